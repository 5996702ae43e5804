"""Block scores, written to be obviously right: build the gradient matrix and sum its blocks."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels._formats import Array


def why_not(x: Array, dy: Array, block_shape: tuple[int, int], interpret: bool) -> str | None:
    """The reason why this cannot score these arguments, or None."""
    del x, dy, block_shape
    return "interpret=True is about the Pallas kernel" if interpret else None


def scores(
    x: Array, dy: Array, block_shape: tuple[int, int], *, precision: lax.PrecisionLike = None
) -> Array:
    """`[block rows, block columns]`, float32."""
    (bh, bw), (rows, cols) = block_shape, (x.shape[1], dy.shape[1])
    gradient = jnp.matmul(x.T, dy, precision=precision, preferred_element_type=jnp.float32)
    gradient = jnp.pad(jnp.abs(gradient), ((0, -rows % bh), (0, -cols % bw)))
    return gradient.reshape(-(-rows // bh), bh, -(-cols // bw), bw).sum((1, 3))
