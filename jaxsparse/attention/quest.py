r"""Quest: pages of the cache by an upper bound of their scores, while decoding. No key is ever evicted.

A page stores the smallest and the largest entry of its keys, channel by channel: $m_c = \min_j k_{jc}$,
$M_c = \max_j k_{jc}$ (after positions). For a query, $u = \sum_c \max(q_c m_c, q_c M_c) \ge \max_j q \cdot k_j$. The pages
with the largest u are read, the one that is being filled in any case.

With $q^+ = \max(q, 0)$ and $q^- = \min(q, 0)$, $u = q^+ \cdot M + q^- \cdot m$: two products.

Source: Tang et al., Quest: query-aware sparsity for efficient long-context LLM inference, 2024, and its code. Heads that
share keys share pages, by the sum of their u. The first two layers and prefill are dense there; here a call with more
than one query is dense.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsparse.attention import pool
from jaxsparse.attention.layout import DEFAULT, Layout, Sizes, checked_lengths, group
from jaxsparse.attention.predictor import Predictor, State
from jaxsparse.attention.static import dense
from jaxsparse.selection import topk_mask
from pallas_kernels import BlockMask


class Pages(NamedTuple):
    """The bounds of a cache's pages; an empty page has low inf and high -inf.

    Attributes:
      low, high: `[batch, kv_heads, pages, head_dim]`, in the keys' dtype, in which they are exact.
    """

    low: Array
    high: Array


def pages(k: Array, page: int, lengths: Array | None = None) -> Pages:
    """The bounds of keys `[batch, kv_heads, capacity, head_dim]`, of which `lengths` `[batch]` are filled.

    >>> p = pages(jnp.array([[1.0], [-2.0], [3.0]])[None, None], 2)
    >>> p.low[0, 0, :, 0].tolist(), p.high[0, 0, :, 0].tolist()
    ([-2.0, 3.0], [1.0, 3.0])
    """
    bounds = pool.minimum(k, page, lengths), pool.maximum(k, page, lengths)
    return Pages(*(x.astype(k.dtype) for x in bounds))


def append_page(old: Pages, k: Array, at: Array, page: int) -> Pages:
    """The bounds after one more key per sequence; the same as `pages` of all keys.

    Args:
      old: bounds.
      k: the new keys `[batch, kv_heads, 1, head_dim]`.
      at: int `[batch]`, where they stand. Beyond the last page nothing changes.
      page: keys of a page.
    """
    entry, index = jnp.arange(k.shape[0]), at // page
    new = k[:, :, 0].astype(old.low.dtype)
    low = old.low.at[entry, :, index].min(new, mode="drop")
    return Pages(low, old.high.at[entry, :, index].max(new, mode="drop"))


def page_scores(q: Array, bounds: Pages) -> Array:
    """u, float32 `[batch, heads, pages]`, of queries `[batch, heads, head_dim]`; 0 for empty pages.

    The bounds are read once, in their own precision.
    """
    grouped = group(q, bounds.low.shape[1])
    exact = jnp.float32 if q.dtype != bounds.low.dtype else q.dtype  # 16-bit products are
    product = functools.partial(
        jnp.einsum, "bgrd,bgpd->bgrp", precision="highest", preferred_element_type=jnp.float32
    )
    # What an empty page has would be NaN next to a query of 0.
    high = jnp.where(bounds.high == -jnp.inf, 0, bounds.high).astype(exact)
    low = jnp.where(bounds.low == jnp.inf, 0, bounds.low).astype(exact)
    grouped = grouped.astype(exact)
    u = product(jnp.maximum(grouped, 0), high) + product(jnp.minimum(grouped, 0), low)
    return u.reshape(*q.shape[:2], -1)


def quest(
    *, budget: int = 1024, page: int = 16, sinks: int = 0, layout: Layout = DEFAULT
) -> Predictor:
    """Pages of a cache for one query per sequence; see the module.

    As a function: q `[batch, heads, 1, head_dim]`, k the cache `[batch, kv_heads, capacity, head_dim]`, and a `State`
    with `lengths` (how much is filled, the query's own key included) and, so that keys are not read to choose among
    them, `params=Pages`. The mask is for `pallas_kernels.block_sparse_decode`.

    Args:
      budget: keys that are read, the page in use included.
      page: keys of a page; the cache's capacity must be a multiple. A step reads two keys per page for the choice, so
        that for long caches 64 read less than the published 16 (`bytes_read`).
      sinks: pages at the beginning that are always read, inside the budget.
      layout: for calls with more than one query, which are dense.

    Raises:
      ValueError: a budget of fewer than 3 pages (the authors' least) or below the forced ones; when used, a capacity
        that is no multiple of the page.

    >>> q, k = jnp.ones((1, 2, 1, 4)), jnp.zeros((1, 1, 12, 4)).at[:, :, 3].set(9.0)
    >>> mask = quest(budget=6, page=2)(q, k, state=State(lengths=jnp.array([11])))
    >>> mask.codes[0, 0, 0].tolist()
    [1, 1, 0, 0, 0, 1]
    """
    number = budget // page if page > 0 else 0
    if page < 1 or number < max(3, 1 + sinks) or sinks < 0:
        raise ValueError(
            f"budget={budget}, page={page}, sinks={sinks}: give a budget of at least {max(3, 1 + sinks)} pages"
        )

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        if q.shape[2] > 1:
            return dense(layout=layout)(q, k, v, state)
        capacity = k.shape[2]
        if capacity % page:
            raise ValueError(f"the cache has room for {capacity} keys, no multiple of page={page}")
        lengths = state.lengths
        if lengths is None:
            lengths = jnp.full(k.shape[0], capacity, jnp.int32)
        lengths = checked_lengths(lengths, k.shape[0], capacity)
        bounds = state.params if isinstance(state.params, Pages) else pages(k, page, lengths)
        if bounds.low.shape[2] != capacity // page:
            raise ValueError(
                f"state has the bounds of {bounds.low.shape[2]} pages; a cache of {capacity} keys has {capacity // page} of "
                f"page={page}"
            )
        u = group(page_scores(q[:, :, 0], bounds), k.shape[1]).sum(2)
        index = jnp.arange(capacity // page)
        newest = ((lengths - 1) // page)[:, None, None]
        forced = (index == newest) | ((index < sinks) & (index <= newest))
        scores = jnp.where(forced, jnp.inf, jnp.where(index <= newest, u, -jnp.inf))
        keep = topk_mask(scores, min(number, scores.shape[-1]), axis=-1, where=scores > -jnp.inf)
        return BlockMask.from_dense(
            keep[:, :, None], (1, page), capacity=min(number, scores.shape[-1])
        )

    def cost(sizes: Sizes) -> float:
        return 4.0 * sizes.heads * sizes.kv_len / page * sizes.dim

    return Predictor("quest", run, layout, cost, page)


def bytes_read(length: int, budget: int, page: int) -> float:
    """Bytes that a step reads over those of dense decoding: bounds and chosen pages, $1 / page + b / L$.

    >>> round(bytes_read(32768, 4096, 16), 4), round(bytes_read(131072, 4096, 16), 4)
    (0.1875, 0.0938)
    """
    return 1 / page + min(budget, length) / length
