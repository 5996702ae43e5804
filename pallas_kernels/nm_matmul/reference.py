"""Products with an N:M sparse matrix, written to be obviously right."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._formats import Array
from pallas_kernels.nm_matmul.format import NMSparse, from_planes


def matmul(x: Array, w: NMSparse, *, precision: lax.PrecisionLike = None, out_dtype=None) -> Array:
    """`x @ w`."""
    y = jnp.matmul(x, w.to_dense(), precision=precision, preferred_element_type=jnp.float32)
    return y.astype(out_dtype or x.dtype)


def gradients(
    x: Array, dy: Array, w: NMSparse, *, precision: lax.PrecisionLike = None
) -> tuple[Array, Array]:
    """`dy w^T`, and the stored values of `x^T dy`."""
    how: dict[str, Any] = dict(precision=precision, preferred_element_type=jnp.float32)
    dx = jnp.matmul(dy, w.to_dense().T, **how).astype(x.dtype)
    full = jnp.matmul(x.T, dy, **how)
    rows = jnp.repeat(w.rows, w.share, 2)
    dvalues = full[rows, jnp.arange(w.shape[1])]
    return dx, from_planes(dvalues, w.share).astype(w.dtype)
