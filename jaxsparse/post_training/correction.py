"""Weights that make up for the pruned layers before them.

A layer sees the inputs x that pruned layers make, and should give what it gave for the inputs y of the
dense model. The least-squares answer to that, before it is pruned,

    w + a (Σ x xᵀ + damping)⁻¹ (Σ x (y - x)ᵀ) w,

takes its place; a = 1 follows the dense outputs as far as x tells of them, a = 0 is the usual method,
and half of the way is the choice of the quantizers that do so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.post_training._layer import damped, matmul, prepare


def corrected(
    w: Array, gram: Array, drift: Array, amount: float = 0.5, damping: float = 0.01
) -> Array:
    """The weights `[in, out]` that answer changed inputs.

    Args:
      w: `[in, out]`.
      gram: `[in, in]`, the sum of x xᵀ.
      drift: `[in, in]`, the sum of x (y - x)ᵀ.
      amount: a, in [0, 1].
      damping: added to the diagonal, as a fraction of its mean.

    >>> corrected(jnp.array([[1.0]]), jnp.array([[4.0]]), jnp.array([[4.0]]), 1.0, 0.0).tolist()
    [[2.0]]
    """
    w = w.astype(jnp.float32)
    _, system = prepare(w, gram)
    right = matmul(drift, w)
    moved = jax.scipy.linalg.solve(damped(system, damping), right, assume_a="pos")
    return w + amount * jnp.where(jnp.isfinite(moved), moved, 0.0)
