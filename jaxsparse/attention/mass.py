r"""What attention does, exactly, block by block: probabilities summed over blocks, without the whole matrix.

Queries are taken a block at a time, so memory is that of one block of rows.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsparse.attention import select
from jaxsparse.attention.layout import Layout, check_heads, group


def block_mass(
    q: Array,
    k: Array,
    layout: Layout,
    *,
    reduce: Literal["sum", "max"] = "sum",
    lse: Array | None = None,
    scale: float | None = None,
    lengths: Array | None = None,
) -> Array:
    r"""The probability of each block of keys, for each block of queries.

    With $p_{ij} = e^{c\, q_i \cdot k_j - L_i}$: "sum" is $\frac{1}{|I|} \sum_{i \in I} \sum_{j \in J} p_{ij}$, whose rows
    sum to 1; "max" is $\max_{i \in I, j \in J} p_{ij}$.

    Args:
      q: `[batch, heads, q_len, dim]`.
      k: `[batch, kv_heads, kv_len, dim]`.
      layout: blocks and causality.
      reduce: "sum" or "max".
      lse: L `[batch, heads, q_len]` that is known already, perhaps from an earlier step; None: computed. With one that
        has drifted, $c\, q \cdot k - L$ is clipped at 0, so that no probability is above 1.
      scale: c; by default `dim ** -0.5`.
      lengths: int `[batch]`, positions behind are nobody's keys.

    Returns:
      float32 `[batch, heads, q_blocks, kv_blocks]`.

    >>> q = k = jnp.zeros((1, 1, 4, 2))
    >>> (12 * block_mass(q, k, Layout(2, 2))[0, 0]).round().astype(int).tolist()
    [[12, 0], [7, 5]]
    """
    sizes = check_heads(q, k)
    grid = layout.grid(sizes.q_len, sizes.kv_len)
    c = sizes.dim**-0.5 if scale is None else scale
    shift = grid.kv_len - grid.q_len if layout.causal else 0
    nq, nk, bq, bk = grid.q_blocks, grid.kv_blocks, grid.block_q, grid.block_kv
    batch, heads = q.shape[:2]
    pad = lambda x, n: jnp.pad(x, [(0, 0), (0, 0), (0, n - x.shape[2]), *[(0, 0)] * (x.ndim - 3)])
    q_cut = pad(q, nq * bq).reshape(batch, heads, nq, bq, -1)
    k_all = pad(k, nk * bk)
    key = jnp.arange(nk * bk)
    there = key < grid.kv_len
    if lengths is not None:
        there = there & (key < lengths[:, None])
        there = there[:, None, None, None]
    known = None if lse is None else pad(lse, nq * bq).reshape(batch, heads, nq, bq)

    def row(i: Array) -> Array:
        position = i * bq + jnp.arange(bq)
        seen = there & (position < grid.q_len)[:, None]
        if layout.causal:
            seen = seen & (key <= position[:, None] + shift)
        block = group(lax.dynamic_index_in_dim(q_cut, i, 2, keepdims=False), sizes.kv_heads)
        s = jnp.einsum("bgrqd,bgkd->bgrqk", block, k_all, preferred_element_type=jnp.float32) * c
        if known is None:
            w = select.masses(s, seen)
        else:
            level = group(lax.dynamic_index_in_dim(known, i, 2, keepdims=False), sizes.kv_heads)
            w = jnp.where(seen, jnp.exp(jnp.minimum(s - level[..., None], 0.0)), 0.0)
        w = w.reshape(batch, heads, bq, nk, bk)
        if reduce == "max":
            return w.max((2, 4))
        return w.sum((2, 4)) / jnp.minimum(bq, grid.q_len - i * bq).astype(jnp.float32)

    return jnp.moveaxis(lax.map(row, jnp.arange(nq)), 0, 2)


def row_lse(q: Array, k: Array, rows: Array, *, causal: bool, scale: float | None = None) -> Array:
    r"""$L_i = \log \sum_j e^{c\, q_i \cdot k_j}$ over all visible keys, for some rows, float32
    `[batch, heads, rows]`.

    Args:
      q, k: `[batch, heads, q_len, dim]`, `[batch, kv_heads, kv_len, dim]`.
      rows: int `[rows]`, positions in q.
      causal: queries see no later keys; with fewer queries than keys the ends are aligned.
      scale: c; by default `dim ** -0.5`.
    """
    sizes = check_heads(q, k)
    c = sizes.dim**-0.5 if scale is None else scale
    some = group(jnp.take(q, rows, axis=2), sizes.kv_heads)
    s = jnp.einsum("bgrqd,bgkd->bgrqk", some, k, preferred_element_type=jnp.float32) * c
    if causal:
        position = rows + sizes.kv_len - sizes.q_len
        s = jnp.where(jnp.arange(sizes.kv_len) <= position[:, None], s, -jnp.inf)
    return jax.nn.logsumexp(s, -1).reshape(*q.shape[:2], -1)


def sample_scores(
    q: Array,
    k: Array,
    number: int,
    *,
    causal: bool,
    scale: float | None = None,
    lengths: Array | None = None,
) -> Array:
    """Probabilities of the last `number` queries over all keys, float32 `[batch, heads, number, kv_len]`: the
    sample from which patterns are read.

    With `lengths`, int `[batch]` (as many queries as keys), the last queries of each sequence; where a sequence has fewer,
    the first rows are 0.
    """
    sizes = check_heads(q, k)
    number = min(number, sizes.q_len)
    c = sizes.dim**-0.5 if scale is None else scale
    if lengths is None:
        last = q[:, :, sizes.q_len - number :]
        position = jnp.arange(sizes.kv_len - number, sizes.kv_len)[None]
        there = jnp.ones_like(position, bool)
    else:
        at = lengths[:, None] - number + jnp.arange(number)
        there, position = at >= 0, at
        last = jnp.take_along_axis(q, jnp.maximum(at, 0)[:, None, :, None], axis=2)
    s = jnp.einsum(
        "bgrqd,bgkd->bgrqk", group(last, sizes.kv_heads), k, preferred_element_type=jnp.float32
    )
    key = jnp.arange(sizes.kv_len)
    seen = key <= position[..., None] if causal else jnp.ones((*position.shape, 1), bool)
    if lengths is not None:
        seen = seen & (key < lengths[:, None, None])
    seen = (seen & there[..., None])[:, None, None]
    return select.masses(s * c, seen).reshape(*q.shape[:2], number, sizes.kv_len)
