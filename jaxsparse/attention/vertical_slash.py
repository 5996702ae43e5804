r"""MInference's vertical-slash attention to the key: blocks of the chosen distances, and single columns beside them.

Blocks that a chosen distance touches go through the kernel. The chosen columns are gathered once per head into
contiguous keys and values, which every block of queries attends to densely, without the pairs that its blocks have
already. Both are attention over disjoint keys with a log-sum-exp, and merge exactly.

Next to `minference`, whose masks read whole blocks for columns, it does less for columns that lie scattered.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxsparse.attention.layout import DEFAULT, Layout, check_heads
from jaxsparse.attention.minference import (
    VerticalSlash,
    line_scores,
    slash_blocks,
    unit_means,
    whole_units,
)
from jaxsparse.selection import topk_indices
from pallas_kernels import block_sparse_attention, merge_attention


def vertical_slash_attention(
    q: Array, k: Array, v: Array, pattern: VerticalSlash, *, layout: Layout = DEFAULT
) -> Array:
    """Attention over the distances and columns of the most attention in the last queries; see the module.

    Args:
      q: `[batch, heads, q_len, dim]`.
      k, v: `[batch, kv_heads, kv_len, ...]`.
      pattern: how many columns and distances, from how many queries; columns are single keys whatever its `unit`.
      layout: blocks of the slashes, with its forced blocks. Causal; each query head chooses for itself.

    Returns:
      `[batch, heads, q_len, v_dim]` in q's dtype.

    Raises:
      ValueError: shapes that do not fit, a layout that is not causal.

    >>> q = k = v = jnp.ones((1, 2, 64, 8))
    >>> out = vertical_slash_attention(q, k, v, VerticalSlash(8, 4, first=1, near=1), layout=Layout(8, 8))
    >>> bool(jnp.allclose(out, 1.0))
    True
    """
    sizes = check_heads(q, k, v)
    if not layout.causal:
        raise ValueError(
            "causal=False: patterns are read from the last queries of a causal model; give a causal Layout"
        )
    grid = layout.grid(sizes.q_len, sizes.kv_len)
    vertical, slash = line_scores(q, k, pattern.sample)
    number = whole_units(pattern.slash, grid.kv_len, pattern.unit)
    slash = unit_means(slash, pattern.unit)
    blocks = slash_blocks(slash, number, pattern.near, pattern.unit, layout, grid)
    blocks = jnp.broadcast_to(blocks | layout.forced(grid), (*q.shape[:2], *blocks.shape[2:]))
    by_blocks = block_sparse_attention(q, k, v, layout.mask(blocks, grid), return_lse=True)

    first = jnp.arange(grid.kv_len) < pattern.first
    count = min(pattern.vertical, grid.kv_len)
    columns, _ = topk_indices(jnp.where(first, jnp.inf, vertical), count)  # [batch, heads, count]
    repeat = lambda x: jnp.repeat(x, sizes.heads // sizes.kv_heads, axis=1)
    gather = lambda x: jnp.take_along_axis(repeat(x), columns[..., None], axis=2)
    k_columns, v_columns = gather(k), gather(v)
    nq, bq = grid.q_blocks, grid.block_q
    rows = jnp.pad(q, ((0, 0), (0, 0), (0, nq * bq - grid.q_len), (0, 0)))
    rows = jnp.moveaxis(rows.reshape(*q.shape[:2], nq, bq, -1), 2, 0)
    # Is a column in a block that the row of blocks has read?
    read = jnp.take_along_axis(blocks, columns[:, :, None] // grid.block_kv, axis=3)
    shift = grid.kv_len - grid.q_len

    def row(at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        i, block, done = at
        position = shift + i * bq + jnp.arange(bq)[:, None]
        seen = (columns[:, :, None] <= position) & ~done[:, :, None]
        s = jnp.einsum("bhqd,bhkd->bhqk", block, k_columns, preferred_element_type=jnp.float32)
        s = s * sizes.dim**-0.5
        some = seen.any(-1, keepdims=True)
        top = lax.stop_gradient(jnp.max(jnp.where(seen, s, -jnp.inf), -1, keepdims=True))
        top = jnp.where(some, top, 0.0)
        w = jnp.where(seen, jnp.exp(jnp.where(seen, s - top, 0.0)), 0.0)
        total = jnp.where(some, w.sum(-1, keepdims=True), 1.0)
        out = jnp.einsum("bhqk,bhke->bhqe", (w / total).astype(v.dtype), v_columns)
        return out, jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]

    out, lse = lax.map(row, (jnp.arange(nq), rows, jnp.moveaxis(read, 2, 0)))
    flat = lambda x: jnp.moveaxis(x, 0, 2).reshape(*q.shape[:2], nq * bq, *x.shape[4:])[
        :, :, : grid.q_len
    ]
    return merge_attention([by_blocks, (flat(out), flat(lse))])[0]
