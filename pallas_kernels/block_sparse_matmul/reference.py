"""Block-sparse products, written to be obviously right: build the dense matrix and multiply."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels._formats import Array
from pallas_kernels.block_sparse_matmul.format import BlockSparse


def why_not(x: Array, w: BlockSparse, interpret: bool) -> str | None:
    """The reason why this cannot multiply x by w, or None."""
    del x, w
    return "interpret=True is about the Pallas kernels" if interpret else None


def matmul(
    x: Array,
    w: BlockSparse,
    *,
    transposed: bool = False,
    precision: lax.PrecisionLike = None,
    out_dtype: jnp.dtype | None = None,
) -> Array:
    """`x @ w`, or `x @ w.T` if `transposed`."""
    dense = w.to_dense()
    dense = dense.T if transposed else dense
    y = jnp.matmul(x, dense, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(out_dtype or x.dtype)


def weight_gradient(
    x: Array, dy: Array, w: BlockSparse, *, precision: lax.PrecisionLike = None
) -> Array:
    """The stored blocks of `x^T dy`, `[num_blocks, bh, bw]` in the dtype of w; unused ones are 0."""
    full = jnp.matmul(x.T, dy, precision=precision, preferred_element_type=jnp.float32)
    (gr, gc), (bh, bw) = w.grid, w.block_shape
    full = jnp.pad(full, ((0, gr * bh - full.shape[0]), (0, gc * bw - full.shape[1])))
    blocks = full.reshape(gr, bh, gc, bw).transpose(0, 2, 1, 3)
    rows = jnp.where(w.used, w.block_rows, gr)
    return blocks.at[rows, w.block_cols].get(mode="fill", fill_value=0).astype(w.dtype)
