r"""Signatures of paths, and linear models of what a path does.

Level k of the signature of a path $X_t \in R^d$ is the tensor of its iterated integrals
$\int_{t_1 < \dots < t_k} dX_{t_1} \otimes \dots \otimes dX_{t_k}$. A controlled differential equation is linear in it,
so that the LASSO on truncated signatures learns which parts of the path matter.

Source: Bleistein, Fermanian, Jannot, Guilloux, "Learning the dynamics of sparsely observed interacting systems",
2023.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.coding.operators import Operator, check_positive, has_non_finite
from jaxsparse.coding.proximal import fista
from jaxsparse.coding.thresholds import group_soft


def signature(path: Array, order: int) -> list[Array]:
    r"""Levels 1 to `order` of a piecewise linear path, exactly: on a segment of increment v level k is
    $v^{\otimes k} / k!$, and segments combine by Chen's identity
    $S^k(XY) = \sum_{i=0}^k S^i(X) \otimes S^{k-i}(Y)$.

    Args:
      path: `[points, d]`, at least two of them.
      order: the last level, from 1.

    Returns:
      Level k as `[d, ..., d]` (k axes).

    Raises:
      ValueError: an order below 1, less than two points, integers.

    >>> first, second = signature(jnp.array([[0.0, 0.0], [1.0, 2.0]]), 2)
    >>> first.tolist(), second.tolist()
    ([1.0, 2.0], [[0.5, 1.0], [1.0, 2.0]])
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"order={order}: use an integer from 1")
    if path.ndim != 2 or path.shape[0] < 2:
        raise ValueError(f"path has shape {path.shape}: give [points, d] with at least two points")
    if not jnp.issubdtype(path.dtype, jnp.floating):
        raise ValueError(f"path has dtype {path.dtype}: give floats")
    outer = lambda a, b: jnp.tensordot(a, b, 0)

    def segment(v):
        levels = [v]
        for k in range(2, order + 1):
            levels.append(outer(levels[-1], v) / k)
        return levels

    def extend(levels, v):
        new = segment(v)
        found = []
        for k in range(1, order + 1):
            mixed = [outer(levels[i - 1], new[k - i - 1]) for i in range(1, k)]
            found.append(sum(mixed, levels[k - 1] + new[k - 1]))
        return found, None

    zeros = [jnp.zeros((path.shape[1],) * k, path.dtype) for k in range(1, order + 1)]
    return jax.lax.scan(extend, zeros, jnp.diff(path, axis=0))[0]


def signature_features(path: Array, order: int, *, factorial: bool = False) -> Array:
    r"""What the LASSO is given: time as a coordinate, scaled by the total variation, all levels in one row.

    Args:
      path: `[points, d]` with time among its coordinates. Without it, paths that differ in speed only are
        the same.
      order: the last level.
      factorial: multiply level k by k!, so that levels are of one size; give it in training and prediction alike.

    Returns:
      `[d + d^2 + ... + d^order]`.

    >>> signature_features(jnp.array([[0.0], [2.0], [4.0]]), 2).tolist()
    [1.0, 0.5]
    """
    variation = jnp.linalg.norm(jnp.diff(path, axis=0), axis=1).sum()
    scaled = path / jnp.where(variation > 0, variation, 1)
    weight = lambda k: float(math.factorial(k)) if factorial else 1.0
    levels = signature(scaled, order)
    return jnp.concatenate([weight(k + 1) * level.ravel() for k, level in enumerate(levels)])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "intercept", "alpha", "alphas", "errors"],
    meta_fields=["order", "factorial", "flat"],
)
@dataclasses.dataclass(frozen=True)
class SignatureLasso:
    """A linear function of signatures, as `fit_signatures` finds it.

    Attributes:
      weights: `[features, q]` for q targets; `signature_features` says in which order.
      intercept: `[q]`.
      alpha: the strength that was chosen.
      alphas: those that were tried `[s]`.
      errors: their mean squared errors on rows that were left out `[s]`.
      order, factorial: of the features.
      flat: one target, given as `[paths]`.
    """

    weights: Array
    intercept: Array
    alpha: Array
    alphas: Array
    errors: Array
    order: int
    factorial: bool
    flat: bool

    def __call__(self, path: Array) -> Array:
        """The targets at the end of a path `[points, d]`: `[q]`, or a scalar."""
        features = signature_features(path, self.order, factorial=self.factorial)
        found = jnp.matmul(features, self.weights, precision="highest") + self.intercept
        return found[0] if self.flat else found

    def along(self, path: Array) -> Array:
        """The targets at every point of a path but the first, each from the path until there: `[points - 1, ...]`.
        It computes the signatures of as many paths."""
        # A path that stays where it is has the signature, and the variation, of the one that ended.
        until = lambda t: path[jnp.minimum(jnp.arange(len(path)), t)]
        return jax.vmap(lambda t: self(until(t)))(jnp.arange(1, len(path)))


def fit_signatures(
    paths: Array,
    targets: Array,
    order: int,
    *,
    alphas: Array | None = None,
    folds: int = 5,
    factorial: bool = False,
    steps: int = 2000,
) -> SignatureLasso:
    r"""SigLasso: the LASSO of targets on truncated signatures, its strength by cross-validation,

    $\min_{W, b} \frac{1}{2n}\|Y - X W - b\|_F^2 + \alpha \sum_j \|W_j\|_2$,

    with a row of W for each entry of the signatures: entries are chosen for all targets together. The chosen
    $\alpha$ has the least mean over folds of the squared error on paths that were left out.

    Args:
      paths: `[n, points, d]`, with time among the coordinates. Shorter paths end by repeating their last point.
      targets: `[n]`, or `[n, q]`.
      order: the last level of the signatures.
      alphas: strengths to try, the first of the best is taken; None: 30 from the least that gives all zeros down to a thousandth of it.
      folds: runs of neighbouring paths that are left out in turn, 2 to n; shuffle paths that have an order.
      factorial: as of `signature_features`; it is kept for prediction.
      steps: of FISTA.

    Returns:
      A `SignatureLasso`, a function from a path to targets.

    Raises:
      ValueError: shapes that do not fit, a number of folds out of range, strengths that are not positive.

    >>> time = jnp.linspace(0.0, 1.0, 5)
    >>> slopes = jnp.linspace(-1.0, 1.0, 12)[jnp.array([3, 8, 0, 11, 5, 7, 1, 9, 4, 6, 2, 10])]
    >>> paths = jax.vmap(lambda s: jnp.stack([time, s * time], axis=1))(slopes)
    >>> driven = paths[:, -1, 1] / jnp.sqrt(1 + slopes**2)  # what the scaled path moves by
    >>> fit = jax.jit(lambda x, y: fit_signatures(x, y, 1, folds=3))(paths, driven)
    >>> round(float(fit.weights[1, 0]), 1), bool(jnp.abs(fit(paths[0]) - driven[0]) < 0.05)
    (1.0, True)

    Source: Bleistein, Fermanian, Jannot, Guilloux, 2023. The grid of strengths is that of scikit-learn's `LassoCV`; the
    authors' is fixed.
    """
    if paths.ndim != 3:
        raise ValueError(f"paths have shape {paths.shape}: give [paths, points, d]")
    n = len(paths)
    if targets.ndim not in (1, 2) or len(targets) != n:
        raise ValueError(f"targets have shape {targets.shape}: give [{n}] or [{n}, q]")
    if has_non_finite(targets):
        raise ValueError("targets have NaN or infinite entries: leave these paths out")
    if not isinstance(folds, int) or not 2 <= folds <= n:
        raise ValueError(f"folds={folds}: use 2 to {n}, the number of paths")
    x = jax.vmap(lambda path: signature_features(path, order, factorial=factorial))(paths)
    y = targets.reshape(n, -1).astype(x.dtype)
    if alphas is None:
        largest = jnp.linalg.norm((x - x.mean(0)).T @ (y - y.mean(0)), axis=1).max() / n
        tried = jnp.maximum(largest, jnp.finfo(x.dtype).tiny) * jnp.logspace(0, -3, 30)
    else:
        check_positive("alphas", alphas)
        tried = jnp.asarray(alphas, x.dtype)
    solve = functools.partial(_group_lasso, x, y, steps=steps)

    # The first n % folds of them have one more, as scikit-learn's KFold.
    ends = np.cumsum(np.full(folds, n // folds) + (np.arange(folds) < n % folds))
    fold = np.searchsorted(ends, np.arange(n), side="right")

    def left_out(i):
        out = (fold == i).astype(x.dtype)
        weights, intercept = solve(tried, 1 - out)
        rest = y - jnp.matmul(x, weights, precision="highest") - intercept[:, None]
        return jnp.einsum("snq,n->s", rest**2, out) / (out.sum() * y.shape[1])

    fold = jnp.asarray(fold)
    errors = jnp.mean(jax.lax.map(left_out, jnp.arange(folds)), axis=0)
    alpha = tried[jnp.argmin(errors)]
    weights, intercept = solve(alpha[None], jnp.ones(n, x.dtype))
    return SignatureLasso(
        weights[0], intercept[0], alpha, tried, errors, order, factorial, targets.ndim == 1
    )


def _group_lasso(
    x: Array, y: Array, alphas: Array, used: Array, *, steps: int
) -> tuple[Array, Array]:
    """Weights `[s, features, q]` and intercepts `[s, q]` of each strength, from the rows where `used` is 1."""
    rows = used.sum()
    mean = lambda values: used @ values / rows
    inputs, outputs = used[:, None] * (x - mean(x)), used[:, None] * (y - mean(y))
    shape, q = inputs.shape, y.shape[1]
    times = functools.partial(jnp.einsum, precision="highest")
    op = Operator(
        lambda w: times("nf,...fq->...nq", inputs, w.reshape(*w.shape[:-1], -1, q)).reshape(
            *w.shape[:-1], -1
        ),
        lambda r: times("nf,...nq->...fq", inputs, r.reshape(*r.shape[:-1], -1, q)).reshape(
            *r.shape[:-1], -1
        ),
        1.001 * jnp.linalg.norm(inputs, 2),
        shape[0] * q,
        shape[1] * q,
    )
    signals = jnp.broadcast_to(outputs.ravel(), (len(alphas), outputs.size))
    prox = lambda v, t: group_soft(v, t, q)
    strength = (alphas * rows)[:, None]
    codes = fista(op, signals, strength, steps=steps, prox=prox)
    weights = codes.reshape(len(alphas), shape[1], q)
    return weights, mean(y) - times("f,sfq->sq", mean(x), weights)
