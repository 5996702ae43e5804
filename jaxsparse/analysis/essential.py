"""How much of a trained network can be zeroed at once, without training, before it breaks.

Jaiswal et al., The emergence of essential sparsity in large pre-trained models: the weights that
matter (2023): one-shot magnitude pruning is nearly free up to a knee, and costs sharply beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse.leaves import find
from jaxsparse.post_training.one_shot import prune


class Sweep(NamedTuple):
    """Sparsities, the metric at each, and the knee between them."""

    sparsities: np.ndarray
    metric: np.ndarray
    knee: float


def sweep(
    evaluate: Callable[[Any], Any],
    params: Any,
    sparsities: Sequence[float] = tuple(i / 20 for i in range(20)),
    *,
    allocation: Any = "global",
    structure: Any = None,
    targets: Any = None,
    tolerance: float | None = None,
) -> Sweep:
    """Prunes `params` to each sparsity by magnitude, at once and from the dense weights, and
    evaluates.

    Args:
      evaluate: from parameters to a number; higher is better (an accuracy, minus a loss).
      params: trained parameters.
      sparsities: increasing; 0 is the dense network itself, and comes first.
      allocation, structure, targets: as for every method; globally by default.
      tolerance: for `knee`.

    >>> import jax.numpy as jnp
    >>> weights = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)}
    >>> result = sweep(lambda p: -jnp.sum(p["kernel"] == 0), weights, (0.0, 0.25, 0.5))
    >>> result.metric.tolist()
    [0.0, -25.0, -50.0]

    Raises:
      ValueError: sparsities that do not increase from 0.
    """
    grid = [float(s) for s in sparsities]
    if len(grid) < 3 or grid[0] != 0.0 or any(b <= a for a, b in zip(grid, grid[1:])):
        raise ValueError(f"sparsities={grid}: give at least three, increasing, the first 0")
    metric = [float(evaluate(params))]
    for s in grid[1:]:
        pruned, _ = prune(params, s, allocation=allocation, structure=structure, targets=targets)
        metric.append(float(evaluate(pruned)))
    return Sweep(np.array(grid), np.array(metric), knee(grid, metric, tolerance=tolerance))


def knee(
    sparsities: Sequence[float], metric: Sequence[float], *, tolerance: float | None = None
) -> float:
    """The sparsity up to which the metric (higher is better) holds.

    With `tolerance`, the largest sparsity before the first one whose metric lies more than that
    below the metric at the first: the usual reading, to be reported with its tolerance. Without,
    the point where the curve bends down most: the change of slope from the segment before a point
    to the one after it is the most negative.

    >>> knee([0.0, 0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 0.99, 0.5, 0.0])
    0.4
    >>> knee([0.0, 0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 0.99, 0.5, 0.0], tolerance=0.005)
    0.2

    Raises:
      ValueError: fewer than three points, lengths that differ, a negative tolerance.
    """
    s, y = np.asarray(sparsities, np.float64), np.asarray(metric, np.float64)
    if len(s) != len(y) or len(s) < 3:
        raise ValueError(f"knee: {len(s)} sparsities, {len(y)} values; give at least three of each")
    if tolerance is not None:
        if tolerance < 0:
            raise ValueError(f"tolerance={tolerance}: must not be negative")
        below = np.flatnonzero(y[0] - y > tolerance)
        return float(s[below[0] - 1] if len(below) else s[-1])
    bend = np.diff(np.diff(y) / np.diff(s))
    return float(s[1 + int(np.argmin(bend))])


def near_zero(params: Any, epsilon: float = 1e-3, *, targets: Any = None) -> float:
    """The fraction of the sparsifiable weights with |w| < epsilon, exact zeros included: tracked over
    a pretraining, its sudden rise is "abrupt sparsification".

    >>> import jax.numpy as jnp
    >>> near_zero({"kernel": jnp.array([[0.0, 1e-4], [0.1, -1.0]])})
    0.5

    Raises:
      ValueError: an epsilon that is not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon}: must be positive")
    found = find(params, targets)
    small = sum(
        int(np.count_nonzero(np.abs(jax.device_get(w)) < epsilon)) for w in found.take(params)
    )
    return small / max(1, sum(leaf.size for leaf in found.leaves))
