r"""Where a sequence changes: divide and conquer dynamic programming.

A segmentation costs the sum of the costs of its segments and $\gamma$ for each. On a coarse grid of Q places dynamic
programming finds the best one in $O(Q^2)$ segments; each of its changes is then moved to where the two segments
beside it cost least. Costs are functions of the host, so any sparse estimator can be one.

Source: Li, Wang, Rinaldo, "Divide and conquer dynamic programming: an almost linear time change point detection
methodology in high dimensions", 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike

Cost = Callable[[int, int], float]
"""Of the segment `[start, stop)`: how badly one model fits it."""


def mean_cost(signals: ArrayLike, strength: float = 0.0) -> Cost:
    r"""$\sum_t \|x_t - m\|^2$ with m the mean of the segment, soft-thresholded by `strength`: sparse shifts.

    Args:
      signals: `[n, p]` or `[n]`.
      strength: of the threshold, at least 0.

    Raises:
      ValueError: a negative strength.

    >>> mean_cost([0.0, 0.0, 3.0, 3.0])(0, 4)
    9.0
    """
    if strength < 0:
        raise ValueError(f"strength={strength}: use at least 0")
    x = np.asarray(signals, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    zero = np.zeros((1, x.shape[1]))
    sums = np.concatenate([zero, np.cumsum(x, 0)])
    squares = np.concatenate([[0.0], np.cumsum((x**2).sum(1))])

    def cost(start: int, stop: int) -> float:
        total, n = sums[stop] - sums[start], stop - start
        mean = total / n
        mean = np.sign(mean) * np.maximum(np.abs(mean) - strength, 0)
        return float(squares[stop] - squares[start] - 2 * mean @ total + n * mean @ mean)

    return cost


def change_points(
    cost: Cost, n: int, penalty: float, *, grid: int, refine: Cost | None = None, buffer: int = 10
) -> list[int]:
    r"""The places where segments begin, without the first.

    Args:
      cost: of a segment.
      n: the length of the sequence.
      penalty: $\gamma$, for each segment; infinite: no change.
      grid: Q, how many places are tried first, from 1 to n - 1 (which is exact); changes closer than n / Q
        can be missed.
      refine: cost by which changes are moved afterwards; the same by default.
      buffer: places that are left out at both ends of where a change may move.

    Raises:
      ValueError: a grid or a penalty out of range.

    >>> change_points(mean_cost([0.0] * 10 + [5.0] * 10), 20, 1.0, grid=3, buffer=1)
    [10]
    """
    if not 1 <= grid <= n - 1:
        raise ValueError(f"grid={grid}: use 1 to {n - 1} places for a sequence of {n}")
    if not penalty >= 0:
        raise ValueError(f"penalty={penalty}: use at least 0")
    if np.isinf(penalty):
        return []
    places = sorted({i * n // (grid + 1) for i in range(grid + 1)} - {0} | {n})
    ends, best, back = [0, *places], [0.0], [0]
    for j in range(1, len(ends)):
        values = [best[i] + penalty + cost(ends[i], ends[j]) for i in range(j)]
        back.append(int(np.argmin(values)))
        best.append(values[back[-1]])
    found, at = [], back[-1]
    while at:
        found.append(ends[at])
        at = back[at]
    found.reverse()
    return _moved(found, n, cost if refine is None else refine, buffer)


def _moved(found: list[int], n: int, cost: Cost, buffer: int) -> list[int]:
    """Each change between thirds of the way to its neighbours, where both sides cost least."""
    bounds, moved = [0, *found, n], []
    for before, here, after in zip(bounds, bounds[1:], bounds[2:]):
        start, stop = round((2 * before + here) / 3), round((here + 2 * after) / 3)
        edge = max(buffer, 1)  # no side is empty
        splits = [here, *range(start + edge, stop - edge + 1)]  # where it is, if no other is better
        values = [cost(start, s) + cost(s, stop) for s in splits]
        moved.append(splits[int(np.argmin(values))])
    return moved


def hausdorff(found: list[int], true: list[int]) -> float:
    """The largest distance from a place of one list to the other list; infinite if one alone is empty.

    >>> hausdorff([199, 400], [200, 400])
    1.0
    """
    if not found or not true:
        return 0.0 if not found and not true else float("inf")
    far = lambda a, b: max(min(abs(x - y) for y in b) for x in a)
    return float(max(far(found, true), far(true, found)))
