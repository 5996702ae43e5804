"""Block-sparse products in C++, on all threads: see `pallas_kernels.cpu`."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import cpu
from pallas_kernels._formats import Array
from pallas_kernels.block_sparse_matmul.format import BlockSparse

_LANES = 16  # of a vector in the kernels
_DENSE_FROM = 0.8  # density from which the dense product is faster


def why_not(x: Array, w: BlockSparse, interpret: bool) -> str | None:
    """The reason why this cannot multiply x by w, or None."""
    if interpret:
        return "interpret=True is about the Pallas kernels"
    if w.block_shape[0] % _LANES or w.block_shape[1] % _LANES:
        return f"block_shape={w.block_shape} must be multiples of {_LANES}"
    return cpu.why_not(x.dtype)


def why_not_unasked(w: BlockSparse) -> str | None:
    """The reason why it should not run where nobody named it, or None."""
    stored = w.num_blocks * w.block_shape[0] * w.block_shape[1]
    if stored >= _DENSE_FROM * w.shape[0] * w.shape[1]:
        return "the dense product is faster at this density"
    return cpu.why_not_unasked()


def matmul(
    x: Array,
    w: BlockSparse,
    *,
    transposed: bool = False,
    precision: lax.PrecisionLike = None,
    out_dtype: jnp.dtype | None = None,
) -> Array:
    """`x @ w`, or `x @ w.T` if `transposed`."""
    del precision  # float32 throughout
    shape = x.shape[0], w.shape[0] if transposed else w.shape[1]
    y = cpu.call("BlocksMatmul", shape, x, w.values, w.places, transposed=transposed)
    return y.astype(out_dtype or x.dtype)


def weight_gradient(
    x: Array, dy: Array, w: BlockSparse, *, precision: lax.PrecisionLike = None
) -> Array:
    """The stored blocks of `x^T dy`, `[num_blocks, bh, bw]`; unused ones are 0."""
    del precision
    return cpu.call("BlocksValueGradient", w.values.shape, x, dy, w.places)
