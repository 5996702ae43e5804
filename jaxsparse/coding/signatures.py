r"""Signatures of paths, and linear models of what a path does.

Level k of the signature of a path $X_t \in R^d$ is the tensor of its iterated integrals
$\int_{t_1 < \dots < t_k} dX_{t_1} \otimes \dots \otimes dX_{t_k}$. A controlled differential equation is linear in it,
so that the LASSO on truncated signatures learns which parts of the path matter.

Source: Bleistein, Fermanian, Jannot, Guilloux, "Learning the dynamics of sparsely observed interacting systems",
2023.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


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
