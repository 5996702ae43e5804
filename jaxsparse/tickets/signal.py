r"""Signals in wide networks at their start: variances that neither grow nor vanish, for any activation.

With weights of variance $\sigma_w^2 / n_{in}$ and biases of variance $\sigma_b^2$ the second moment q of the
pre-activations of one layer becomes that of the next by

$$V(q) = \sigma_w^2\, E[\phi(\sqrt q Z)^2] + \sigma_b^2, \qquad Z \sim N(0, 1),$$

and gradients keep their size where $\chi = \sigma_w^2\, E[\phi'(\sqrt q Z)^2] = 1$, the edge of chaos.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import masking

Activation = Callable[[Array], Array]


class Variances(NamedTuple):
    r"""$\sigma_w^2$ (of weights times their fan-in) and $\sigma_b^2$ (of biases)."""

    weights: float
    biases: float


def _mean(values: np.ndarray, z: np.ndarray) -> float:
    """The expectation over a standard normal Z of values on the grid z."""
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return float(np.sum(values * density) * (z[1] - z[0]))


def _grid() -> np.ndarray:
    """Midpoints of [-12, 12], which meet no kink at a round number."""
    n = 480_000
    return (np.arange(n) + 0.5) * (24 / n) - 12


def _square(activation: Activation, q: float) -> float:
    z = _grid()
    x = jnp.asarray(np.sqrt(q) * z, jnp.float32)
    return _mean(np.asarray(activation(x), np.float64) ** 2, z)


def critical_variances(activation: Activation, q: float = 1.0) -> Variances:
    r"""The variances on the edge of chaos whose fixed point is q: $\sigma_w^2 = 1/E[\phi'(\sqrt q Z)^2]$ and
    $\sigma_b^2 = q - \sigma_w^2 E[\phi(\sqrt q Z)^2]$.

    Pruning by a gradient's score needs them: away from the edge gradients shrink by a factor per layer, and
    the ranking prunes whole layers. In residual networks multiply each of L branches by $1/\sqrt L$ as well.

    Args:
      activation: elementwise.
      q: the second moment of pre-activations.

    Returns:
      The variances.

    (Hayou, Ton, Doucet & Teh, Robust pruning at initialization, 2021; Price, Daultry Ball, Lam, Jones & Tanner,
    Deep neural network initialization with sparsity inducing activations, 2024.)

    >>> [round(v, 3) for v in critical_variances(jax.nn.relu)]
    [2.0, 0.0]

    Raises:
      ValueError: a q that is not positive; an activation for which the biases' variance would be negative.
    """
    if not q > 0:
        raise ValueError(f"q={q}: a second moment must be positive")
    z = _grid()
    x = jnp.asarray(np.sqrt(q) * z, jnp.float32)
    slope = jax.jvp(activation, (x,), (jnp.ones_like(x),))[1]
    weights = 1 / _mean(np.asarray(slope, np.float64) ** 2, z)
    biases = q - weights * _square(activation, q)
    if biases < -1e-3 * q:
        raise ValueError(
            f"activation: at q={q} the edge of chaos would need a bias variance of {biases:.3g}"
        )
    return Variances(weights, max(biases, 0.0))


def variance_map(activation: Activation, variances: Variances, q: float) -> float:
    """V(q), the second moment of pre-activations one layer on.

    >>> round(variance_map(jax.nn.relu, Variances(2.0, 0.0), 3.0), 3)
    3.0
    """
    return variances.weights * _square(activation, q) + variances.biases


def stability(activation: Activation, variances: Variances, q: float = 1.0) -> tuple[float, float]:
    r"""$V'(q)$ and $V''(q)$, by differences. A fixed point with $V' < 1$ is stable; with $V' = 1$ and
    $V'' > 0$ any excess grows from layer to layer.

    >>> [abs(round(v, 2)) for v in stability(jax.nn.relu, Variances(2.0, 0.0))]
    [1.0, 0.0]
    """
    h = 0.05 * q
    low, mid, high = (variance_map(activation, variances, q + s * h) for s in (-1, 0, 1))
    far = [variance_map(activation, variances, q + s * h) for s in (-2, 2)]
    first = (8 * (high - low) - (far[1] - far[0])) / (12 * h)
    second = (16 * (low + high) - sum(far) - 30 * mid) / (12 * h * h)
    return first, second


def initializers(
    variances: Variances,
) -> tuple[jax.nn.initializers.Initializer, jax.nn.initializers.Initializer]:
    """Initialisers of kernels and biases with these variances, as Flax layers take them.

    >>> kernel_init, bias_init = initializers(critical_variances(jax.nn.relu))
    >>> kernel_init(jax.random.key(0), (3, 3, 8, 16)).shape
    (3, 3, 8, 16)
    """
    kernel = jax.nn.initializers.variance_scaling(variances.weights, "fan_in", "normal")
    return kernel, jax.nn.initializers.normal(variances.biases**0.5)


def rescale_energy(params: Any, masks: Any) -> Any:
    r"""Masked kernels with the energy of the dense ones: $W \leftarrow \rho\, m \odot W$ with
    $\rho = \sqrt{mean(W^2) / mean((m \odot W)^2)}$ of each layer, once after pruning at initialisation.

    It counts the sizes of the weights that a score has kept; `jaxsparse.rescale_fan_in` counts the inputs.
    Biases stay.

    Args:
      params: the parameters before pruning.
      masks: a tree of masks, None at dense leaves.

    Returns:
      The pruned parameters, rescaled. A layer that lost everything is 0.

    (Hayou, Ton, Doucet & Teh, Robust pruning at initialization, 2021; the empirical form of their gain.)

    >>> w, m = {"kernel": jnp.array([[3.0, 4.0]])}, {"kernel": jnp.array([[False, True]])}
    >>> rescale_energy(w, m)["kernel"].tolist()
    [[0.0, 5.0]]
    """

    def one(w, m):
        if m is None:
            return w
        wide = w.astype(jnp.float32)
        kept = jnp.where(masking.unpack(m), wide, 0.0)
        left = jnp.mean(kept * kept)
        gain = jnp.sqrt(jnp.mean(wide * wide) / jnp.where(left > 0, left, 1.0))
        return (gain * kept).astype(w.dtype)

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([one(*row) for row in zip(leaves, masking.at_leaves(masks, params))])
