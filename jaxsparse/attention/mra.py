r"""MRA attention: important blocks at full resolution, the others by their averages. Nothing is dropped.

1. $\mu_{IJ} = \bar q_I \cdot \bar k_J / \sqrt d$ of block means.
2. The best blocks of a head, over all of its rows together once each row's largest is subtracted, are computed exactly.
3. Every other block has weight $|J| e^{\mu_{IJ}}$ and value $\bar v_J$, for all queries of I.

Both parts are attention with a log-sum-exp and merge exactly. $e^{\mu}$ is at most the mean of $e^{q \cdot k}$ over the
block (Jensen), so coarse blocks are weighed too low, never too high.

Source: Zeng et al., Multi resolution analysis (MRA) for approximate self-attention, 2022, and its code. The factor $|J|$
counts true tokens. A causal form is not published: here each query has its own coarse logits $q_i \cdot \bar k_J$ of
blocks before its own, so that no output reads a later token (with pooled queries it would).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse.attention import pool
from jaxsparse.attention.layout import DEFAULT, Layout, check_heads, group
from jaxsparse.attention.predictor import Predictor, State, pooled_cost
from jaxsparse.selection import topk_mask
from pallas_kernels import BlockMask, block_sparse_attention, merge_attention


def mra(*, density: float, layout: Layout = DEFAULT) -> Predictor:
    """The fine blocks alone (MRA-2-s): a global choice over the rows of a head, forced blocks inside the budget.

    Args:
      density: share of the visible blocks.
      layout: blocks; the authors' are 32 by 32, which is small for a matrix unit.

    Raises:
      ValueError: a density outside (0, 1], or without room for the forced blocks.

    >>> q = k = jnp.ones((1, 1, 64, 8))
    >>> mra(density=0.8, layout=Layout(16, 16))(q, k).counts
    Array([[8]], dtype=int32)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must lie in (0, 1]")

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        grid = layout.grid(q.shape[2], k.shape[2])
        keep, number = _fine(q, k, density, layout, state.lengths)
        return BlockMask.from_dense(keep, grid, capacity=number) & _within(layout, grid)

    return Predictor("mra", run, layout, lambda sizes: pooled_cost(sizes, layout))


def mra_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    density: float,
    layout: Layout = DEFAULT,
    lengths: Array | None = None,
) -> Array:
    """Attention at two resolutions; see the module.

    Args:
      q: `[batch, heads, q_len, dim]`.
      k, v: `[batch, kv_heads, kv_len, dim]`.
      density: share of the visible blocks that are fine.
      layout: blocks. Without `causal`, coarse weights are those of pooled queries, as published.
      lengths: int `[batch]`: keys behind are not seen.

    Returns:
      `[batch, heads, q_len, v_dim]` in q's dtype.

    >>> q = k = v = jnp.ones((1, 1, 64, 8))
    >>> out = mra_attention(q, k, v, density=0.5, layout=Layout(16, 16, causal=False, sinks=0))
    >>> bool(jnp.allclose(out, 1.0))
    True
    """
    sizes = check_heads(q, k, v)
    grid = layout.grid(sizes.q_len, sizes.kv_len)
    keep, number = _fine(q, k, density, layout, lengths)
    mask = BlockMask.from_dense(keep, grid, capacity=number) & _within(layout, grid)
    segments = None
    if lengths is not None:
        there = (jnp.arange(sizes.kv_len) < lengths[:, None]).astype(jnp.int32)
        segments = (jnp.ones((q.shape[0], sizes.q_len), jnp.int32), there)
    fine = block_sparse_attention(q, k, v, mask, segment_ids=segments, return_lse=True)

    _, there = pool.cut(k, layout.block_kv, lengths)
    number_of = jnp.sum(there, -2)[..., 0]  # [batch or 1, 1, 1, kv_blocks]
    number_of = number_of.reshape(-1, 1, 1, grid.kv_blocks)
    mean_k, mean_v = pool.mean(k, layout.block_kv, lengths), pool.mean(v, layout.block_kv, lengths)
    keep = jnp.repeat(keep, sizes.heads // keep.shape[1], axis=1)
    coarse = ~keep & layout.visible(grid) & (number_of > 0)
    rows = q.astype(jnp.float32)
    if layout.causal:
        coarse = jnp.repeat(coarse, layout.block_q, axis=2)[:, :, : sizes.q_len]
        position = np.arange(sizes.q_len)[:, None] + sizes.kv_len - sizes.q_len
        coarse = coarse & (layout.bounds(grid)[3] <= position)  # whole blocks before the query
    else:
        rows = pool.mean(q, layout.block_q)
    s = jnp.einsum("bgrid,bgjd->bgrij", group(rows, sizes.kv_heads), mean_k) * sizes.dim**-0.5
    s = s + jnp.log(jnp.maximum(number_of, 1))[:, :, None]
    seen = group(coarse, sizes.kv_heads)
    some = seen.any(-1, keepdims=True)
    top = lax.stop_gradient(jnp.max(jnp.where(seen, s, -jnp.inf), -1, keepdims=True))
    top = jnp.where(some, top, 0.0)
    w = jnp.where(seen, jnp.exp(jnp.where(seen, s - top, 0.0)), 0.0)
    total = jnp.where(some, w.sum(-1, keepdims=True), 1.0)
    out = jnp.einsum("bgrij,bgje->bgrie", w / total, mean_v)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    flat = lambda x: x.reshape(x.shape[0], sizes.heads, *x.shape[3:])
    out, lse = flat(out), flat(lse)
    if not layout.causal:
        out, lse = (jnp.repeat(x, layout.block_q, axis=2)[:, :, : sizes.q_len] for x in (out, lse))
    return merge_attention([fine, (out, lse)])[0]


def _within(layout: Layout, grid) -> BlockMask:
    if layout.causal:
        return BlockMask.causal(grid, offset=grid.kv_len - grid.q_len)
    return BlockMask.from_dense(np.ones((grid.q_blocks, grid.kv_blocks), bool), grid)


def _fine(
    q: Array, k: Array, density: float, layout: Layout, lengths: Array | None
) -> tuple[Array, int]:
    """The fine blocks, bool `[batch, heads or kv_heads, q_blocks, kv_blocks]`, and how many per head."""
    grid = layout.grid(q.shape[2], k.shape[2])
    visible, forced = layout.visible(grid), layout.forced(grid)
    if layout.causal:
        # A query sees its own block at full resolution; coarse blocks end before it.
        q0, q1, k0, k1 = layout.bounds(grid)
        forced = forced | (visible & (k1 > q0))
    number = max(1, int(density * visible.sum() + 1e-9))
    if number < forced.sum():
        raise ValueError(
            f"density={density} is {number} blocks of a head, fewer than the {int(forced.sum())} forced ones "
            "(sinks, local, and own blocks under a causal mask)"
        )
    mean_q, mean_k = pool.mean(q, layout.block_q, lengths), pool.mean(k, layout.block_kv, lengths)
    s = jnp.einsum("bgrid,bgjd->bgrij", group(mean_q, k.shape[1]), mean_k) * q.shape[-1] ** -0.5
    s = s.mean(2) if layout.share else s.reshape(*q.shape[:2], *s.shape[3:])
    s = jnp.where(visible & layout.filled(grid, lengths), s, -jnp.inf)
    s = s - s.max(-1, keepdims=True)
    s = jnp.where(forced, jnp.inf, s)
    return topk_mask(lax.stop_gradient(s), number, axis=(-2, -1), where=s > -jnp.inf), number
