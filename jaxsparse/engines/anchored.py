r"""Weights that stay where they were instead of at zero: masks over fixed weights.

$$\theta = m \odot \phi + (1 - m) \odot \theta_{ref}$$

Pruning has $\theta_{ref} = 0$, freezing (FreezeNet, FISH masks, sparse fine-tuning) the values that the
weights had. The network is dense then; what is sparse is the change, and only that need be stored
(`changes`, `restore`). A mask of three values, {trained, frozen, zero}, is one around the other:

    tx = jaxsparse.static(anchored(optax.adam(1e-3), trained), masks=trained_or_frozen)

(The common model of Wimmer, Mehnert & Condurache, Dimensionality reduced training by pruning and freezing
parts of a deep neural network, a survey, 2023.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxsparse import masking
from jaxsparse._control import is_concrete
from jaxsparse.engines._checks import check_inner, compiled_once, is_placeholder
from jaxsparse.targets import named_leaves


class AnchoredState(NamedTuple):
    """The trained weights of every leaf in the order of `jax.tree.leaves`: a mask, or with
    `compact=True` their places (int32); None where a leaf is trained whole. And the inner state."""

    trained: tuple
    inner: Any


def anchored(
    inner: optax.GradientTransformation,
    trained: Any,
    *,
    compact: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains the weights of a mask; all others keep their value, bit by bit.

    The inner optimizer sees a gradient of 0 at frozen weights, so that a clipping by the global norm
    counts trained ones only, and whatever it would do to them (decay, drift of moments) is dropped.
    With `compact=True` it sees the trained weights alone, as one vector for each leaf, and keeps slots
    for these only: at 0.5 % trained, Adam's moments take 1 % of the parameters. For optimizers that
    treat each weight by itself the result is the same; what reads a matrix (Muon, Adafactor) or a norm
    of a leaf reads another one.

    Args:
      inner: the optimizer of the trained weights.
      trained: a tree of boolean masks like the parameters, None at leaves that are trained whole; or a
        function from the parameters to such a tree, called at `init`.
      compact: see above; masks must be concrete at `init`.

    Returns:
      The transformation. Its updates at frozen weights are -0.0, which changes no number.

    >>> tx = anchored(optax.sgd(1.0), {"w": jnp.array([True, False])})
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.0, 2.0]

    Raises:
      ValueError: masks that are not like the parameters; with `compact` masks that are traced; no
        parameters at an update.
    """
    inner = check_inner(inner)

    def init_fn(params):
        if is_placeholder(params):
            opaque: Any = 0  # masks are not like the parameters
            return AnchoredState(opaque, inner.init(params))
        tree = trained(params) if callable(trained) else trained
        masks = _like(tree, params)
        if not compact:
            own = [None if m is None else jnp.array(m, copy=True) for m in masks]
            return AnchoredState(tuple(own), inner.init(params))
        if not is_concrete(*[m for m in masks if m is not None]):
            raise ValueError("compact=True: the number of trained weights must be known at init")
        found = [None if m is None else np.flatnonzero(np.asarray(m)) for m in masks]
        places = tuple(None if i is None else jnp.asarray(i, jnp.int32) for i in found)
        return AnchoredState(places, inner.init(_taken(params, places)))

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "update needs the parameters: call tx.update(grads, opt_state, params)"
            )
        gs, treedef = jax.tree.flatten(updates)
        if compact:
            seen, at = _taken(updates, state.trained), _taken(params, state.trained)
            deltas, slots = inner.update(seen, state.inner, at, **extra)
            rows = zip(gs, jax.tree.leaves(deltas), state.trained)
            out = [d if i is None else _spread(d, i, g.shape) for g, d, i in rows]
        else:
            masked = lambda xs, fill: [
                x if m is None else jnp.where(m, x, jnp.asarray(fill, x.dtype))
                for x, m in zip(xs, state.trained, strict=True)
            ]
            seen = treedef.unflatten(masked(gs, 0.0))
            deltas, slots = inner.update(seen, state.inner, params, **extra)
            out = masked(treedef.flatten_up_to(deltas), -0.0)
        return treedef.unflatten(out), AnchoredState(state.trained, slots)

    return optax.GradientTransformationExtraArgs(init_fn, compiled_once(update_fn))


def _like(tree: Any, params: Any) -> list[Array | None]:
    """The masks at the leaves of `params`, checked."""
    try:
        found = [None if m is None else masking.unpack(m) for m in masking.at_leaves(tree, params)]
    except ValueError as error:
        raise ValueError(f"trained: not a tree like the parameters: {error}") from None
    for m, (path, p) in zip(found, named_leaves(params)):
        if m is not None and (m.shape != p.shape or m.dtype != bool):
            raise ValueError(
                f"trained: the mask of {path!r} is {m.dtype}{list(m.shape)}; it must be "
                f"bool{list(p.shape)}, or None where the leaf is trained whole"
            )
    return found


def _taken(tree: Any, places: tuple) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    rows = zip(leaves, places, strict=True)
    return treedef.unflatten([x if i is None else jnp.ravel(x)[i] for x, i in rows])


def _spread(values: Array, places: Array, shape: tuple[int, ...]) -> Array:
    flat = jnp.full(int(np.prod(shape)), -0.0, values.dtype)
    return flat.at[places].set(values, unique_indices=True, indices_are_sorted=True).reshape(shape)


# -- What is stored ----------------------------------------------------------------------------------


class Changes(NamedTuple):
    """What differs from a reference, by path of the leaf: flat places (int64; None: all of the leaf)
    and values. Leaves without a change are not in it."""

    places: dict[str, np.ndarray | None]
    values: dict[str, np.ndarray]


def changes(params: Any, reference: Any) -> Changes:
    """What of `params` differs from `reference`, bit by bit.

    Args:
      params: the trained parameters.
      reference: a tree like them: the values before training.

    Returns:
      Places and values, in host memory.

    >>> found = changes({"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([1.0, 2.0])})
    >>> found.places["w"].tolist(), found.values["w"].tolist()
    ([1], [5.0])

    Raises:
      ValueError: trees with other leaves, shapes or dtypes.
    """
    old = dict(named_leaves(reference))
    places, values = {}, {}
    for path, leaf in named_leaves(params):
        x, x0 = np.asarray(leaf), np.asarray(old.pop(path, np.nan))
        if x.shape != x0.shape or x.dtype != x0.dtype:
            raise ValueError(
                f"reference: {path!r} is {x0.dtype}{list(x0.shape)}, the parameter "
                f"{x.dtype}{list(x.shape)}; give the parameters before training"
            )
        bits = lambda a: np.ascontiguousarray(a).view(np.uint8).reshape(a.size, a.itemsize)
        moved = np.flatnonzero((bits(x) != bits(x0)).any(axis=1))
        if moved.size:
            places[path] = None if moved.size == x.size else moved
            values[path] = x if moved.size == x.size else x.ravel()[moved]
    if old:
        raise ValueError(f"reference: {sorted(old)[0]!r} is no leaf of the parameters")
    return Changes(places, values)


def restore(reference: Any, stored: Changes) -> Any:
    """The parameters that `changes` was given, from the reference and what differs.

    >>> before, after = {"w": jnp.zeros(3)}, {"w": jnp.array([0.0, 0.0, 7.0])}
    >>> restore(before, changes(after, before))["w"].tolist()
    [0.0, 0.0, 7.0]

    Raises:
      ValueError: changes of leaves that the reference has not.
    """
    named, treedef = named_leaves(reference), jax.tree.structure(reference)
    unknown = sorted(set(stored.values) - {path for path, _ in named})
    if unknown:
        raise ValueError(f"stored: {unknown[0]!r} is no leaf of the reference")
    leaves = []
    for path, x in named:
        if path in stored.values:
            new, at = np.array(x, order="C"), stored.places[path]
            new.reshape(-1)[slice(None) if at is None else at] = stored.values[path].ravel()
            x = jnp.asarray(new)
        leaves.append(x)
    return treedef.unflatten(leaves)


class Seeded(NamedTuple):
    """A checkpoint of a network of which few weights were trained: the key of its initial values, with
    the name of its generator, and `Changes`."""

    key: np.ndarray
    generator: str
    changes: Changes


def save_seeded(init: Callable[[Array], Any], key: Array, params: Any) -> Seeded:
    """The checkpoint of parameters that began as `init(key)`: seed and changed weights, nothing else.

    Args:
      init: from a key to the initial parameters; pure.
      key: a typed key, `jax.random.key(0)`.
      params: the trained parameters.

    >>> init = lambda key: {"w": jax.random.normal(key, (4,))}
    >>> key = jax.random.key(3)
    >>> trained = {"w": init(key)["w"].at[2].set(9.0)}
    >>> stored = save_seeded(init, key, trained)
    >>> stored.changes.places["w"].tolist(), bool((restore_seeded(init, stored)["w"] == trained["w"]).all())
    ([2], True)

    Raises:
      ValueError: a key that is not typed; parameters that are not like `init(key)`.
    """
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ValueError(f"key={key!r}: give a typed key, jax.random.key(seed)")
    data = np.asarray(jax.random.key_data(key))
    return Seeded(data, str(jax.random.key_impl(key)), changes(params, init(key)))


def restore_seeded(init: Callable[[Array], Any], stored: Seeded) -> Any:
    """The parameters of a checkpoint of `save_seeded`, with the same `init`."""
    key = jax.random.wrap_key_data(jnp.asarray(stored.key), impl=stored.generator)
    return restore(init(key), stored.changes)
