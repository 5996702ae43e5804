r"""The scaling law of sparsely-connected models: loss from sparsity, size and data.

$$L(S, N, D) = (a (1 - S)^b + c)\, N^{-d} + e\, D^{-f} + g$$

with S the sparsity, N the *nonzero* parameters, D the data, in units that make the numbers moderate
(millions of parameters; 10^5 steps). Frantar et al., Scaling laws for sparsely-connected foundation
models, 2024. `fit` needs scipy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class ScalingLaw(NamedTuple):
    """The seven coefficients; a call evaluates the law.

    >>> round(float(T5(0.75, 48 * 12 * 1024**2 / 1e6, 5.0)), 5)
    1.4683
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float
    g: float

    def __call__(self, sparsity: ArrayLike, nonzeros: ArrayLike, data: ArrayLike) -> NDArray:
        """L(S, N, D), elementwise."""
        return _law(np.array(self, np.float64), *_checked(sparsity, nonzeros, data))


# The authors' fits: N in millions of nonzeros, D in 10^5 steps and in 10^9 examples.
T5 = ScalingLaw(0.567785, 0.721613, 1.522650, 0.245132, 0.633615, 0.202708, 0.650742)
VIT = ScalingLaw(1.304854, 0.821013, 2.075063, 0.392227, 0.278182, 0.889791, 4.516693)


class Fit(NamedTuple):
    """A fitted law, its mean Huber loss, and the losses of all starts, sorted."""

    law: ScalingLaw
    loss: float
    starts: NDArray


def _checked(sparsity, nonzeros, data) -> tuple[NDArray, NDArray, NDArray]:
    s, n, d = (np.asarray(x, np.float64) for x in (sparsity, nonzeros, data))
    if not ((s >= 0) & (s < 1)).all():
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
    if not ((n > 0).all() and (d > 0).all()):
        raise ValueError(
            "nonzeros and data must be positive; they are counted in units of 10^6, 10^5"
        )
    return s, n, d


def _law(x: NDArray, s: NDArray, n: NDArray, data: NDArray) -> NDArray:
    a, b, c, d, e, f, g = x
    return (a * (1 - s) ** b + c) * n**-d + e * data**-f + g


def _gradient(x: NDArray, s: NDArray, n: NDArray, data: NDArray) -> NDArray:
    """The derivatives of the law with respect to its coefficients, `[7, ...]`."""
    a, b, c, d, e, f, _ = x
    q, size, time = (1 - s) ** b, n**-d, data**-f
    return np.stack(
        [
            q * size,
            a * q * np.log1p(-s) * size,
            size,
            -(a * q + c) * size * np.log(n),
            time,
            -e * time * np.log(data),
            np.ones_like(s * n * data),
        ]
    )


def objective(
    x: ArrayLike,
    sparsity: ArrayLike,
    nonzeros: ArrayLike,
    data: ArrayLike,
    loss: ArrayLike,
    *,
    delta: float = 1e-3,
    log: bool = True,
) -> tuple[float, NDArray]:
    """The mean Huber loss of the law with coefficients x, and its gradient; of log L by default.

    >>> value, gradient = objective(T5, [0.5], [1.3271], [2.5], [2.8417])
    >>> gradient.shape
    (7,)
    """
    x, target = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    s, n, d = _checked(sparsity, nonzeros, data)
    predicted, slope = _law(x, s, n, d), _gradient(x, s, n, d)
    if log:
        if not (predicted > 0).all():
            return np.inf, np.zeros(7)
        slope = slope / predicted
        predicted, target = np.log(predicted), np.log(target)
    r = predicted - target
    small = np.abs(r) <= delta
    value = np.where(small, 0.5 * r * r, delta * (np.abs(r) - 0.5 * delta))
    return float(value.mean()), (slope * np.clip(r, -delta, delta)).reshape(7, -1).mean(axis=1)


def fit(
    sparsity: ArrayLike,
    nonzeros: ArrayLike,
    data: ArrayLike,
    loss: ArrayLike,
    *,
    delta: float = 1e-3,
    log: bool = True,
    starts: int = 25,
    seed: int = 0,
) -> Fit:
    """Fits the seven coefficients by BFGS from random starts in [0, 1]^7; the best start counts.

    There are many local minima, and the valley is flat: coefficients of fits that are equally good
    differ, so compare losses and predictions, not coefficients.

    Args:
      sparsity, nonzeros, data, loss: measurements, 1-d and of one length; N and D in units that
        make them moderate.
      delta: where the Huber loss turns linear (the authors: 0.001 with log=True for T5, 0.01 with
        log=False for ViT).
      log: fit log L rather than L.
      starts, seed: random starts.

    Raises:
      ValueError: lengths that differ, fewer than seven measurements, values out of range, no start
        that converged.
    """
    from scipy.optimize import minimize

    s, n, d = _checked(sparsity, nonzeros, data)
    y = np.asarray(loss, np.float64)
    if not s.shape == n.shape == d.shape == y.shape or s.ndim != 1:
        shapes = [x.shape for x in (s, n, d, y)]
        raise ValueError(
            f"sparsity, nonzeros, data, loss: give 1-d arrays of one length, got {shapes}"
        )
    if len(y) < 7:
        raise ValueError(f"loss: {len(y)} measurements cannot determine seven coefficients")
    if not (y > 0).all():
        raise ValueError("loss: must be positive")
    if starts < 1:
        raise ValueError(f"starts={starts}: must be at least 1")
    # Scaled so that the tolerance of the optimizer on gradients is far below what matters here.
    scale = 1.0 / delta**2

    def scaled(x):
        with np.errstate(all="ignore"):
            value, gradient = objective(x, s, n, d, y, delta=delta, log=log)
        return value * scale, gradient * scale

    rng = np.random.default_rng(seed)
    results = [
        minimize(scaled, rng.uniform(size=7), jac=True, method="BFGS", options={"maxiter": 5000})
        for _ in range(starts)
    ]
    results = [r for r in results if np.isfinite(r.fun) and np.isfinite(r.x).all()]
    if not results:
        raise ValueError("fit: no start converged; rescale nonzeros and data, or give more starts")
    best = min(results, key=lambda r: r.fun)
    found = np.array(sorted(r.fun for r in results)) / scale
    return Fit(ScalingLaw(*map(float, best.x)), float(best.fun) / scale, found)


def pruning_cost(
    sparsity: float, *, begin: float = 0.25, end: float = 0.75, power: int = 3
) -> float:
    r"""The cost of a training step relative to the dense parent, averaged over a run in which the
    density falls from 1 to 1 - S between the fractions `begin` and `end` of the steps along the
    polynomial curve: $begin + (end - begin)(1 - S + S/(power + 1)) + (1 - end)(1 - S)$.

    >>> pruning_cost(0.0), pruning_cost(0.75)
    (1.0, 0.53125)

    Raises:
      ValueError: a sparsity not in [0, 1), fractions that are not 0 <= begin <= end <= 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
    if not 0 <= begin <= end <= 1:
        raise ValueError(f"begin={begin}, end={end}: need 0 <= begin <= end <= 1")
    density = 1 - sparsity
    return begin + (end - begin) * (density + sparsity / (power + 1)) + (1 - end) * density


def optimal_sparsity(
    law: ScalingLaw,
    nonzeros: float,
    compute: float,
    *,
    begin: float = 0.25,
    end: float = 0.75,
    highest: float = 0.999,
) -> float:
    r"""The S of lowest loss at a number of nonzeros and a training compute.

    Compute is in units of N D of a dense run. A sparser network of N nonzeros has a larger dense
    parent, $N/(1 - S)$, and therefore sees less data: $D = C (1 - S) / (N\,cost(S))$ with
    `pruning_cost`.

    >>> few, many = (optimal_sparsity(T5, 84.9, c) for c in (100.0, 10_000.0))
    >>> few < many
    True

    Raises:
      ValueError: nonzeros or compute that is not positive.
    """
    if not (nonzeros > 0 and compute > 0):
        raise ValueError(f"nonzeros={nonzeros}, compute={compute}: both must be positive")
    # Fine in log density, where the law bends.
    grid = 1 - np.geomspace(1 - highest, 1, 4001)
    cost = np.array([pruning_cost(s, begin=begin, end=end) for s in grid])
    losses = law(grid, nonzeros, compute * (1 - grid) / (nonzeros * cost))
    return float(grid[int(np.argmin(losses))])
