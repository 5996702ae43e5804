r"""Matrices as products of sparse factors, $A \approx \lambda S_1 S_2 \cdots S_J$ (FAuST).

Each factor lies in a set of sparse matrices of Frobenius norm 1; the scale is $\lambda$'s. A set is given by its
projection, a function of a matrix; `keep` and its kin make them.

Source: Le Magoarou, Gribonval, "Learning computationally efficient dictionaries and their implementation as fast
transforms", 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.operators import check_matrix
from jaxsparse.selection import topk_mask

Projection = Callable[[Array], Array]


class Factors(NamedTuple):
    """A scale and the factors from left to right; `dense` multiplies them."""

    scale: Array
    factors: tuple[Array, ...]

    @property
    def dense(self) -> Array:
        return _times(self.scale * self.factors[0], _product(self.factors[1:]))


def keep(k: int) -> Projection:
    """Projects on matrices of k nonzeros and norm 1: the largest magnitudes stay.

    >>> keep(1)(jnp.array([[3.0, -4.0]])).tolist()
    [[0.0, -1.0]]
    """
    check_count("k", k)
    return lambda s: _unit(jnp.where(topk_mask(jnp.abs(s), k), s, 0))


def keep_in_rows(k: int) -> Projection:
    """The same with k nonzeros in each row.

    >>> (keep_in_rows(1)(jnp.array([[3.0, 1.0], [2.0, 4.0]])) != 0).tolist()
    [[True, False], [False, True]]
    """
    check_count("k", k)
    return lambda s: _unit(jnp.where(_largest_in_rows(s, k), s, 0))


def keep_in_columns(k: int) -> Projection:
    """The same with k nonzeros in each column.

    >>> (keep_in_columns(1)(jnp.array([[3.0, 1.0], [2.0, 4.0]])) != 0).tolist()
    [[True, False], [False, True]]
    """
    check_count("k", k)
    return lambda s: _unit(jnp.where(_largest_in_rows(s.T, k).T, s, 0))


def keep_in_rows_or_columns(k: int) -> Projection:
    """The same with what is among the k largest of its row, or of its column.

    >>> keep_in_rows_or_columns(1)(jnp.array([[3.0, 2.0], [4.0, 1.0]])).tolist()[1][1]
    0.0
    """
    check_count("k", k)
    either = lambda s: _largest_in_rows(s, k) | _largest_in_rows(s.T, k).T
    return lambda s: _unit(jnp.where(either(s), s, 0))


def keep_support(mask: Array) -> Projection:
    """The same with nonzeros where `mask` is True.

    >>> keep_support(jnp.array([[True, False]]))(jnp.array([[2.0, 5.0]])).tolist()
    [[1.0, 0.0]]
    """
    return lambda s: _unit(jnp.where(mask, s, 0))


def palm(
    matrix: Array, start: Factors, projections: Sequence[Projection], *, steps: int = 30
) -> Factors:
    r"""Projected gradient on one factor after the other, from right to left:

    $$S_j \leftarrow P_j\Big(S_j - \frac{\lambda}{c} L^T(\lambda L S_j R - A) R^T\Big), \qquad
      c = 1.001\, \lambda^2 \|L\|_2^2 \|R\|_2^2,$$

    with L and R the products on both sides, and after each sweep $\lambda = \langle A, P\rangle / \|P\|_F^2$. For a
    fixed $\lambda$ the error never grows.

    Args:
      matrix: A `[m, n]`.
      start: the factors that it starts from.
      projections: one for each factor; `lambda s: s` leaves it free, `lambda _: z` fixes it at z.
      steps: sweeps.

    Raises:
      ValueError: another number of projections than of factors, or factors whose product has another shape.

    >>> start = Factors(jnp.ones(()), (jnp.eye(2), jnp.zeros((2, 2))))
    >>> found = palm(jnp.array([[0.0, 2.0], [3.0, 0.0]]), start, [keep(2), keep(2)])
    >>> [[round(float(x), 3) for x in row] for row in found.dense]
    [[0.0, 2.0], [3.0, 0.0]]
    """
    check_matrix(matrix)
    if len(projections) != len(start.factors):
        raise ValueError(
            f"projections: {len(projections)} of them for {len(start.factors)} factors; give one each"
        )
    shape = start.factors[0].shape[0], start.factors[-1].shape[1]
    if shape != matrix.shape:
        raise ValueError(f"start: a product of shape {shape} for a matrix {matrix.shape}")

    def sweep(_, found: Factors) -> Factors:
        scale, factors = found.scale, list(found.factors)
        for j in reversed(range(len(factors))):
            left, right = _product(factors[:j]), _product(factors[j + 1 :])
            norm = scale * _spectral(left) * _spectral(right)
            rate = jnp.where(norm > 0, scale / (1.001 * norm * norm), 0)
            rest = scale * _times(_times(left, factors[j]), right) - matrix
            inner = _times(None if left is None else left.T, rest)
            gradient = _times(inner, None if right is None else right.T)
            factors[j] = projections[j](factors[j] - rate * gradient)
        product = _times(factors[0], _product(factors[1:]))
        energy = (product * product).sum()
        scale = jnp.where(energy > 0, (matrix * product).sum() / energy, scale)
        return Factors(scale, tuple(factors))

    return jax.lax.fori_loop(0, steps, sweep, start)


def factorize(
    matrix: Array,
    factors: Sequence[Projection],
    residuals: Sequence[Projection],
    *,
    sizes: Sequence[int] | None = None,
    steps: int = 30,
) -> Factors:
    r"""The hierarchy: what is left is split into a factor and a residual, then all factors are refined.

    With $T_0 = A$: a `palm` of two factors on $T_{l-1} \approx \lambda' S_l T_l$, then one of
    $S_1, \dots, S_l, T_l$ on A. The last residual is the last factor. Wrong budgets of residuals fail
    silently: look at the error.

    Args:
      matrix: A `[m, n]`.
      factors: projections of $S_1, S_2, \dots$
      residuals: projections of $T_1, T_2, \dots$, as many.
      sizes: the inner sizes, columns of $S_1, S_2, \dots$; min(m, n) by default.
      steps: sweeps of each `palm`.

    Raises:
      ValueError: different numbers of projections, or of sizes.

    A Hadamard matrix of n = 2^J comes out exactly, as J factors of 2 n nonzeros:

    >>> h = jnp.array([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    >>> found = factorize(h, [keep_in_rows_or_columns(2)], [keep_in_rows_or_columns(2)])
    >>> (float(jnp.abs(found.dense - h).max()) < 1e-5, [int((s != 0).sum()) for s in found.factors])
    (True, [8, 8])
    """
    check_matrix(matrix)
    sizes = [min(matrix.shape)] * len(factors) if sizes is None else sizes
    if not len(factors) == len(residuals) == len(sizes) >= 1:
        raise ValueError(
            f"factors, residuals and sizes: {len(factors)}, {len(residuals)} and {len(sizes)} of them; "
            "give as many of each, at least one"
        )
    found = Factors(jnp.ones((), matrix.dtype), (matrix,))
    for level, (own, rest, size) in enumerate(zip(factors, residuals, sizes)):
        last = found.factors[-1]
        first = jnp.eye(last.shape[0], size, dtype=matrix.dtype)
        zeros = jnp.zeros((size, last.shape[1]), matrix.dtype)
        start = Factors(jnp.ones((), matrix.dtype), (first, zeros))
        split = palm(last, start, [own, rest], steps=steps)
        found = Factors(found.scale * split.scale, (*found.factors[:-1], *split.factors))
        found = palm(matrix, found, [*factors[: level + 1], rest], steps=steps)
    return found


def _largest_in_rows(s: Array, k: int) -> Array:
    return jax.vmap(lambda row: topk_mask(jnp.abs(row), min(k, s.shape[1])))(s)


def _unit(s: Array) -> Array:
    norm = jnp.linalg.norm(s)
    return jnp.where(norm > 0, s / jnp.where(norm > 0, norm, 1), s)


def _times(a: Array | None, b: Array | None) -> Array:
    """The product; None is the identity."""
    if a is None or b is None:
        found = b if a is None else a
        assert found is not None
        return found
    return jnp.matmul(a, b, precision="highest")


def _product(factors: Sequence[Array]) -> Array | None:
    found = None
    for s in factors:
        found = _times(found, s)
    return found


def _spectral(s: Array | None) -> Array | float:
    return 1.0 if s is None else jnp.linalg.norm(s, 2)
