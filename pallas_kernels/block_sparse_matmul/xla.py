"""Block-sparse products in plain XLA, made for CPU.

x is cut into slabs, one for each block row of w: `[block rows, tokens, bh]`. A loop takes a few
stored blocks at a time, gathers their slabs (whole slabs: a copy at memory speed), multiplies them
in one batched product, and adds the results to the slabs of y in place. The loop body is what keeps
XLA from fusing the cut of x into the gather, which would make it a slow strided one, and the few
blocks at a time what keeps the gathered slabs in the cache. Any pattern costs the same.

Where most blocks are stored, or blocks are tiny, the dense product is faster and is what runs.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels._dispatch import vary_alike
from pallas_kernels._formats import Array
from pallas_kernels.block_sparse_matmul import reference
from pallas_kernels.block_sparse_matmul.format import BlockSparse

_CACHE = 1 << 21  # bytes of gathered slabs at a time
_DENSE_FROM = 0.7  # density from which the dense product is faster
_SMALL = 8  # side of a block below which it is


def _dense_is_faster(w: BlockSparse) -> bool:
    stored = w.num_blocks * w.block_shape[0] * w.block_shape[1]
    return stored >= _DENSE_FROM * w.shape[0] * w.shape[1] or min(w.block_shape) < _SMALL


def _slabs(x: Array, blocks: int, width: int) -> Array:
    """`[tokens, features]` to `[blocks, tokens, width]`."""
    x = jnp.pad(x, ((0, 0), (0, blocks * width - x.shape[1])))
    return x.reshape(x.shape[0], blocks, width).transpose(1, 0, 2)


def _chunks(w: BlockSparse, tokens: int) -> tuple[int, int]:
    """Blocks at a time, and how often."""
    slab = 4 * tokens * (w.block_shape[0] + w.block_shape[1])
    group = max(1, min(w.num_blocks, 32, _CACHE // slab))
    return group, -(-w.num_blocks // group)


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
    out_dtype = out_dtype or x.dtype
    if _dense_is_faster(w):
        return reference.matmul(
            x, w, transposed=transposed, precision=precision, out_dtype=out_dtype
        )
    (gk, gj), (bk, bn), width = w.grid, w.block_shape, w.shape[1]
    k, j = w.block_rows, w.block_cols
    if transposed:
        (gk, gj), (bk, bn), (k, j), width = (gj, gk), (bn, bk), (j, k), w.shape[0]
    used = w.used
    k, j = jnp.where(used, k, 0), jnp.where(used, j, gj)  # slab gj of y is thrown away
    xs = _slabs(x, gk, bk)
    group, chunks = _chunks(w, x.shape[0])
    contract = (((2,), (2 if transposed else 1,)), ((0,), (0,)))

    def body(c, ys):
        start = jnp.minimum(c * group, w.num_blocks - group)
        new = start + jnp.arange(group) >= c * group  # the last chunk repeats some blocks
        take = lambda a: lax.dynamic_slice_in_dim(a, start, group)
        products = lax.dot_general(
            xs.at[take(k)].get(mode="promise_in_bounds"),
            take(w.values),
            contract,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        at = jnp.where(new, take(j), gj)
        return ys.at[at].add(products, mode="promise_in_bounds")

    zeros = vary_alike(jnp.zeros((gj + 1, x.shape[0], bn), jnp.float32), like=x)
    ys = lax.fori_loop(0, chunks, body, zeros)
    y = ys[:gj].astype(out_dtype).transpose(1, 0, 2).reshape(x.shape[0], gj * bn)
    return y[:, :width]


def weight_gradient(
    x: Array, dy: Array, w: BlockSparse, *, precision: lax.PrecisionLike = None
) -> Array:
    """The stored blocks of `x^T dy`, `[num_blocks, bh, bw]` in the dtype of w; unused ones are 0."""
    if _dense_is_faster(w):
        return reference.weight_gradient(x, dy, w, precision=precision)
    (gk, gj), (bk, bn) = w.grid, w.block_shape
    used = w.used
    k, j = jnp.where(used, w.block_rows, 0), jnp.where(used, w.block_cols, 0)
    xs, dys = _slabs(x, gk, bk), _slabs(dy, gj, bn)
    group, chunks = _chunks(w, x.shape[0])

    def body(c, out):
        start = jnp.minimum(c * group, w.num_blocks - group)
        take = lambda a: lax.dynamic_slice_in_dim(a, start, group)
        blocks = lax.dot_general(
            xs.at[take(k)].get(mode="promise_in_bounds"),
            dys.at[take(j)].get(mode="promise_in_bounds"),
            (((1,), (1,)), ((0,), (0,))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        blocks = jnp.where(take(used)[:, None, None], blocks, 0).astype(w.dtype)
        return lax.dynamic_update_slice_in_dim(out, blocks, start, 0)

    zeros = vary_alike(jnp.zeros(w.values.shape, w.dtype), like=x)
    return lax.fori_loop(0, chunks, body, zeros)
