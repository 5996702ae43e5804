"""Indices of how sparse a vector is without being exactly so: the PQ index and the Gini index."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def pq_index(
    w: Array,
    *,
    p: float = 0.5,
    q: float = 1.0,
    where: Array | None = None,
    axis: int | Sequence[int] | None = None,
) -> Array:
    r"""The PQ index of sparsity, $I = 1 - d^{1/q - 1/p}\, \|w\|_p / \|w\|_q$, in [0, 1).

    0 for a vector of equal magnitudes, $1 - k/d$ (p = 1/2, q = 1) for k equal ones among d; it does
    not change when w is scaled or repeated. (Diao et al., Pruning deep neural networks from a
    sparsity perspective, 2023.)

    Args:
      w: any array.
      p, q: 0 < p < q.
      where: the d entries that count (bool), such as those still kept; all by default. 0 if none.
      axis: the axes over which it is taken.

    >>> round(float(pq_index(jnp.array([1.0, 2.0, 3.0, 4.0]))), 6)
    0.055586

    Raises:
      ValueError: p or q out of order.
    """
    check_pq(p, q)
    where = jnp.ones(w.shape, bool) if where is None else where
    size = jnp.abs(w).astype(jnp.float32)
    top = jnp.max(jnp.where(where, size, 0.0), axis=axis, keepdims=True)
    x = jnp.where(where, size / jnp.where(top > 0, top, 1.0), 0.0)  # means do not overflow
    d = jnp.maximum(jnp.sum(where, axis=axis, dtype=jnp.int32), 1).astype(jnp.float32)
    a = (jnp.sum(x**p, axis=axis) / d) ** (1 / p)
    b = (jnp.sum(x**q, axis=axis) / d) ** (1 / q)
    return index_of_means(a, b)


def index_of_means(a: Array, b: Array) -> Array:
    """1 - a / b for the means a of power p and b of power q."""
    return jnp.where(b > 0, jnp.clip(1.0 - a / jnp.where(b > 0, b, 1.0), 0.0, 1.0), 0.0)


def gini_index(w: jax.typing.ArrayLike) -> float:
    r"""The Gini index of the magnitudes, an index of sparsity in [0, 1):

    $$\frac{\sum_i (2i - n - 1)\, |w|_{(i)}}{n \sum_i |w|_i}, \qquad |w|_{(1)} \le |w|_{(2)} \le \dots$$

    0 for equal magnitudes, $1 - k/n$ for k equal ones among n, like `pq_index` (p = 1/2, q = 1). It
    needs all weights in order, so it is computed on the host, in float64. (Hurley & Rickard, Comparing
    measures of sparsity, 2009.)

    >>> gini_index(jnp.array([1.0, 2.0, 3.0, 4.0])), gini_index(jnp.array([0.0, 5.0, 0.0, 0.0]))
    (0.25, 0.75)
    """
    size = np.sort(np.abs(np.asarray(w, np.float64)).ravel())
    n, total = size.size, size.sum()
    ranks = 2.0 * np.arange(1, n + 1) - n - 1
    return float(ranks @ size / (n * total)) if total > 0 else 0.0


def check_pq(p: float, q: float) -> None:
    """Raises `ValueError` for powers out of order."""
    if not 0 < p < q:
        raise ValueError(f"p={p}, q={q}: need 0 < p < q")
