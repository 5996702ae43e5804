r"""Budgets over heads and layers: who keeps how many.

Uniform budgets need no function. `with_floor` is one ranking over all heads in which each head is sure of a few
(Ada-SnapKV); `by_counts` gives layers what a global ranking would have given them (DynamicKV); `by_recall` moves
blocks from heads that lose little to heads that lose much (AdaSpa); `balance` spreads heads of different cost over
devices (DSV).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.selection import topk_mask


def with_floor(
    scores: Array, total: int | Array, floor: int, *, where: Array | None = None
) -> Array:
    """The best entries of all heads together, of which each head has `floor` at least.

    Args:
      scores: `[..., heads, n]`; inf is kept first.
      total: entries of all heads, at least heads * floor; may be traced.
      floor: entries that a head keeps in any case.
      where: eligible entries.

    Returns:
      bool `[..., heads, n]`, `total` entries in each of the leading indices, or all eligible ones.

    >>> with_floor(jnp.array([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0]]), 3, 1).astype(int).tolist()
    [[1, 1, 0], [0, 1, 0]]
    """
    heads = scores.shape[-2]
    if isinstance(total, int) and total < heads * floor:
        raise ValueError(f"total={total} is below floor={floor} for each of {heads} heads")
    eligible = jnp.ones(scores.shape, bool) if where is None else where
    eligible = eligible & (scores > -jnp.inf)
    sure = topk_mask(scores, floor, axis=-1, where=eligible)
    rest = jnp.asarray(total) - sure.sum((-1, -2))
    more = topk_mask(scores, rest, axis=(-2, -1), where=eligible & ~sure)
    return sure | more


def by_counts(scores: Array, base: int, most: int) -> Array:
    r"""Entries per layer, by how a global ranking over layers and heads distributes.

    With m layers and H heads: $c_l$ counts the entries of layer l among the best `base * H * m`; lengths are
    $\lfloor \text{most}\, c_l / (r \sum c) \rfloor$ with r such that they sum to `base * m`. That is, proportional to
    $c_l$, at most `most`; what is cut off at `most` and what rounding leaves goes to the layers with room, in the order
    of $c_l$ (the authors give the remainder to the last layer, which may take it beyond its bound).

    Args:
      scores: `[layers, heads, n]`.
      base: mean entries per layer and head.
      most: the largest length, at least `base`.

    Returns:
      int32 `[layers]`, with sum `base * layers`, each in [0, most].

    >>> by_counts(jnp.array([[[3.0, 3, 3, 3]], [[1.0, 1, 1, 1]]]), 2, 3).tolist()
    [3, 1]
    """
    layers, heads, n = scores.shape
    if not 1 <= base <= most:
        raise ValueError(f"base={base} must lie in [1, most], most={most}")
    kept = topk_mask(scores, min(base * heads * layers, scores.size))
    counts = kept.sum((1, 2)).astype(jnp.float32)
    total = base * layers
    first = jnp.minimum(jnp.floor(total * counts / counts.sum()), most).astype(jnp.int32)
    # What rounding leaves goes round once, what the bound cuts off to the first layers with room.
    rank = ((counts[:, None] < counts) | ((counts[:, None] == counts) & _earlier(layers))).sum(1)
    room, left = most - first, total - first.sum()
    one = ((rank < left) & (room > 0)).astype(jnp.int32)
    first, room, left = first + one, room - one, left - one.sum()
    before = jnp.sum(jnp.where(rank < rank[:, None], room, 0), 1)
    return first + jnp.clip(left - before, 0, room)


def _earlier(n: int) -> np.ndarray:
    return np.arange(n)[:, None] > np.arange(n)


def by_recall(recall: Array, base: int, step: int) -> Array:
    """Blocks per row for each head: the half with more recall gives `step` to the half with less, the middle one of an
    odd number keeps its own. The mean stays `base`.

    The rule's details are recalled, not verified, in the paper's account.

    Args:
      recall: `[..., heads]` at the budget `base`.
      base: blocks per row.
      step: blocks that change hands, below base.

    Returns:
      int32 `[..., heads]`.

    >>> by_recall(jnp.array([0.9, 0.5, 0.7]), 8, 2).tolist()
    [6, 10, 8]
    """
    if not 0 <= step < base:
        raise ValueError(f"step={step} must lie in [0, base), base={base}")
    heads = recall.shape[-1]
    half = heads // 2
    best = topk_mask(recall, half, axis=-1)
    worst = topk_mask(-recall, half, axis=-1, where=~best)
    return base - step * best.astype(jnp.int32) + step * worst.astype(jnp.int32)


def balance(costs: Sequence[float], devices: int) -> list[list[int]]:
    """Heads to devices, the most expensive first, each to the device with the least so far.

    On the host. The largest load is at most that of heads dealt in turn, or the function returns that deal.

    >>> balance([4.0, 1.0, 1.0, 2.0], 2)
    [[0], [3, 1, 2]]
    """
    if devices < 1:
        raise ValueError(f"devices={devices} must be at least 1")
    loads, found = [0.0] * devices, [[] for _ in range(devices)]
    for head in sorted(range(len(costs)), key=lambda h: -costs[h]):
        d = loads.index(min(loads))
        loads[d] += costs[head]
        found[d].append(head)
    dealt = [list(range(d, len(costs), devices)) for d in range(devices)]
    most = lambda groups: max(sum(costs[h] for h in g) for g in groups)
    return found if most(found) <= most(dealt) else dealt
