r"""Activations whose outputs are sparse by design: shifted and clipped ReLU and soft threshold."""

from __future__ import annotations

import dataclasses
import statistics

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class ClippedReLU:
    r"""$\min(\max(x - \tau, 0), m)$; made by `clipped_relu`."""

    tau: float
    m: float

    def __call__(self, x: Array) -> Array:
        return jnp.clip(x - self.tau, 0, self.m)


@dataclasses.dataclass(frozen=True)
class ClippedSoftThreshold:
    r"""$sign(x) \min(\max(|x| - \tau, 0), m)$; made by `clipped_soft_threshold`."""

    tau: float
    m: float

    def __call__(self, x: Array) -> Array:
        return jnp.sign(x) * jnp.clip(jnp.abs(x) - self.tau, 0, self.m)


def clipped_relu(sparsity: float, m: float = float("inf")) -> ClippedReLU:
    r"""The activation $\min(\max(x - \tau, 0), m)$ that is 0 with the given chance where pre-activations are
    standard normal: $\tau = \Phi^{-1}(s)$.

    Without a clip the critical initialisation is stable from below only, and any excess of variance grows
    from layer to layer; with one it is stable. Initialise with `tickets.critical_variances`.

    Args:
      sparsity: s, in (0, 1).
      m: the largest output; the authors' analysis wants m of about 1 to 1.5 at s = 0.85.

    (Price, Daultry Ball, Lam, Jones & Tanner, Deep neural network initialization with sparsity inducing
    activations, 2024.)

    >>> activation = clipped_relu(0.85, 1.0)
    >>> round(activation.tau, 4), activation(jnp.array([0.5, 9.0])).tolist()
    (1.0364, [0.0, 1.0])

    Raises:
      ValueError: a sparsity not in (0, 1), an m that is not positive.
    """
    return ClippedReLU(_quantile(sparsity, m, sparsity), m)


def clipped_soft_threshold(sparsity: float, m: float = float("inf")) -> ClippedSoftThreshold:
    r"""The odd activation $sign(x) \min(\max(|x| - \tau, 0), m)$ with $\tau = \Phi^{-1}((1 + s)/2)$, otherwise as
    `clipped_relu`.

    >>> round(clipped_soft_threshold(0.85).tau, 4)
    1.4395

    Raises:
      ValueError: a sparsity not in (0, 1), an m that is not positive.
    """
    return ClippedSoftThreshold(_quantile(sparsity, m, (1 + sparsity) / 2), m)


def _quantile(sparsity: float, m: float, level: float) -> float:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: must be in (0, 1)")
    if not m > 0:
        raise ValueError(f"m={m}: must be positive")
    return statistics.NormalDist().inv_cdf(level)
