r"""DRESS: sparse networks within each other, trained together, of which a device takes the one that it can afford.

Mask k keeps the $d_k$ part of largest magnitude of the inputs of every output, so that masks are nested. The raw
weights z are trained by the weighted sum of the subnets' gradients, straight through the masks:

    tx = jaxsparse.magnitude_ste(inner, 1 - densities[-1], structure="fan_in")
    raw = jaxsparse.get_raw_params(opt_state)
    loss, grads = subnet_gradient(loss_of, raw, densities, params=params)
    updates, opt_state = tx.update(grads, opt_state, params)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import leaves, masking, selection
from jaxsparse.typing import Targets


def _checked(densities: Sequence[float]) -> list[float]:
    found = [float(d) for d in densities]
    if not found or not all(0 < d <= 1 for d in found) or sorted(set(found)) != found:
        raise ValueError(f"densities={found}: give increasing numbers in (0, 1]")
    return found


def nested_masks(params: Any, densities: Sequence[float], *, targets: Targets = None) -> list[Any]:
    r"""A tree of masks for each density: the $\lfloor d_k n_{in} \rfloor$ largest |w| of every output.

    Args:
      params: raw weights; not masked ones, whose ties at 0 are of another order.
      densities: increasing, in (0, 1].
      targets: as for every method.

    Returns:
      Masks, the sparsest first, each within the next.

    >>> [m["kernel"].T.tolist() for m in nested_masks({"kernel": jnp.array([[3.0], [1.0], [2.0]])}, (0.34, 0.67))]
    [[[True, False, False]], [[True, False, True]]]

    Raises:
      ValueError: densities that do not increase, or that keep nothing of an output.
    """
    sparse = leaves.find(params, targets, "fan_in")
    rows = list(zip(sparse.leaves, sparse.take(params)))
    found = []
    for d in _checked(densities):
        masks = []
        for leaf, w in rows:
            number = _inputs(leaf.layer_shape, d, leaf.path)
            masks.append(leaf.best(jnp.abs(w), number))
        found.append(sparse.scatter(masks))
    return found


def _inputs(shape: tuple[int, ...], density: float, path: str) -> int:
    n = int(np.prod(shape[:-1]))
    kept = int(density * n + 1e-9)
    if kept < 1:
        raise ValueError(f"densities: {density} of the {n} inputs of {path!r} is less than one")
    return kept


def subnet_gradient(
    loss: Callable[[Any], Array],
    raw: Any,
    densities: Sequence[float],
    *,
    params: Any = None,
    weights: Sequence[float] | None = None,
    targets: Targets = None,
) -> tuple[Array, Any]:
    r"""$\sum_k \pi_k L(m_k \odot z)$, and $\sum_k \pi_k \nabla L(m_k \odot z)$: the gradient that `magnitude_ste`
    around any optimizer applies to all raw weights.

    Args:
      loss: from parameters to a number, on one batch.
      raw: z, the dense raw weights; None at dense leaves, as `get_raw_params` has them, if there are `params`.
      densities: increasing, in (0, 1].
      params: the parameters, whose dense leaves (biases, norms) all subnets share.
      weights: $\pi$; None: all the same, with the sum 1.
      targets: as for every method.

    Returns:
      The loss and the gradient.

    (Qu et al., DRESS: dynamic real-time sparse subnets, 2022; we know the abstract, the rest is its plain form.)

    >>> z = {"kernel": jnp.array([[3.0], [1.0]])}
    >>> value, g = subnet_gradient(lambda p: jnp.sum(p["kernel"] ** 2), z, (0.5, 1.0))
    >>> float(value), g["kernel"].T.tolist()  # 2 * 3 from both, 2 * 1 from one of two
    (9.5, [[6.0, 1.0]])

    Raises:
      ValueError: as `nested_masks`; another number of weights.
    """
    pi = [1 / len(densities)] * len(densities) if weights is None else list(weights)
    if len(pi) != len(densities):
        raise ValueError(f"weights: {len(pi)} of them for {len(densities)} densities")
    if params is not None:
        flat, treedef = jax.tree.flatten(params)
        rows = zip(flat, masking.at_leaves(raw, params))
        raw = treedef.unflatten([p if z is None else z for p, z in rows])
    total, gradient = jnp.zeros(()), None
    for p, masks in zip(pi, nested_masks(raw, densities, targets=targets)):
        value, g = jax.value_and_grad(loss)(masking.apply(raw, masks))
        total = total + p * value
        scaled = jax.tree.map(lambda x, p=p: p * x, g)
        gradient = scaled if gradient is None else jax.tree.map(jnp.add, gradient, scaled)
    return total, gradient


class Prefixes(NamedTuple):
    """A kernel `[..., in, out]` for many densities: of each output the places of its inputs (flat) by falling
    magnitude, and the values there, `[out, kept]`; a subnet is a prefix."""

    places: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]


def to_prefixes(kernel: Array, density: float) -> Prefixes:
    """Stores a kernel so that the subnets of all densities up to this one are prefixes.

    >>> to_prefixes(jnp.array([[3.0], [1.0], [-2.0]]), 1.0).places.tolist()
    [[0, 2, 1]]

    Raises:
      ValueError: a density that keeps nothing.
    """
    w = np.asarray(kernel)
    flat = w.reshape(-1, w.shape[-1])
    kept = _inputs(w.shape, density, "kernel")
    places = np.asarray(selection.topk_indices(jnp.abs(flat.T), kept)[0])
    return Prefixes(places, np.take_along_axis(flat.T, places, axis=1), w.shape)


def from_prefixes(stored: Prefixes, density: float) -> np.ndarray:
    """The kernel of a subnet.

    >>> from_prefixes(to_prefixes(jnp.array([[3.0], [1.0], [-2.0]]), 1.0), 0.7).T.tolist()
    [[3.0, 0.0, -2.0]]

    Raises:
      ValueError: a density above the one that is stored.
    """
    kept = _inputs(stored.shape, density, "kernel")
    if kept > stored.places.shape[1]:
        raise ValueError(
            f"density={density}: {kept} inputs of each output; {stored.places.shape[1]} are stored"
        )
    flat = np.zeros((int(np.prod(stored.shape[:-1])), stored.shape[-1]), stored.values.dtype)
    np.put_along_axis(flat, stored.places[:, :kept].T, stored.values[:, :kept].T, axis=0)
    return flat.reshape(stored.shape)
