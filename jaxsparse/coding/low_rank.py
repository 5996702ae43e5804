r"""Low rank: the proximal operator of the nuclear norm, separation from sparse errors, and singular value
decompositions that grow with their matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.operators import check_positive


def singular_soft(v: Array, t: Array | float) -> Array:
    r"""$\arg\min_X \frac12\|X - V\|_F^2 + t\|X\|_*$: the singular values become $\max(\sigma - t, 0)$.

    >>> [round(float(x), 6) for x in jnp.diagonal(singular_soft(jnp.diag(jnp.array([3.0, 1.0])), 2.0))]
    [1.0, 0.0]
    """
    u, s, vt = jnp.linalg.svd(v, full_matrices=False)
    return jnp.matmul(u * jnp.maximum(s - t, 0)[..., None, :], vt, precision="highest")


class Separated(NamedTuple):
    """A part of low rank and a sparse part, of the shape of their sum."""

    low_rank: Array
    sparse: Array


def separate(matrix: Array, strength: float | None = None, *, steps: int = 200) -> Separated:
    r"""$\min_{L, S} \|L\|_* + \lambda \|S\|_1$ with $L + S$ the matrix, by the alternating direction method: still
    scenes and what moves, clean data and gross errors.

    Args:
      matrix: `[m, n]`.
      strength: $\lambda$; $1/\sqrt{max(m, n)}$ by default, which recovers both parts where the low rank is
        spread out and the errors are few.
      steps: how many.

    Raises:
      ValueError: not a matrix, a strength that is not positive.

    >>> still = jnp.outer(jnp.arange(1.0, 7), jnp.ones(6))
    >>> found = separate(still.at[2, 3].add(5.0))
    >>> bool(jnp.abs(found.low_rank - still).max() < 1e-2)
    True

    Source: Candès, Li, Ma, Wright, "Robust principal component analysis?", 2011.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix has shape {matrix.shape}: give [m, n]")
    bound = max(matrix.shape) ** -0.5 if strength is None else strength
    check_positive("strength", bound)
    weight = matrix.size / (4 * jnp.maximum(jnp.abs(matrix).sum(), jnp.finfo(matrix.dtype).tiny))

    def step(_, carry):
        _, sparse, dual = carry
        low = singular_soft(matrix - sparse + dual / weight, 1 / weight)
        v = matrix - low + dual / weight
        sparse = v - jnp.clip(v, -bound / weight, bound / weight)
        return low, sparse, dual + weight * (matrix - low - sparse)

    zeros = jnp.zeros_like(matrix)
    low, sparse, _ = jax.lax.fori_loop(0, steps, step, (zeros, zeros, zeros))
    return Separated(low, sparse)


class GrowingSVD(NamedTuple):
    r"""A truncated singular value decomposition $U diag(\sigma) V^T$ of a matrix that grows, with
    $U = U_0 K_u$ and $V = V_0 K_v$: an update touches small matrices and few rows of $U_0$ and $V_0$.

    Attributes:
      left: $U_0$ `[m, k]`; left_turn: $K_u$ `[k, k]`.
      values: $\sigma$ `[k]`, falling.
      right: $V_0$ `[n, k]`; right_turn: $K_v$ `[k, k]`.
    """

    left: Array
    left_turn: Array
    values: Array
    right: Array
    right_turn: Array

    @property
    def u(self) -> Array:
        """`[m, k]`, orthonormal columns."""
        return _dot(self.left, self.left_turn)

    @property
    def v(self) -> Array:
        """`[n, k]`, orthonormal columns."""
        return _dot(self.right, self.right_turn)

    @property
    def condition(self) -> Array:
        """The larger condition number of the turns. They get worse with many updates; where one passes the
        inverse root of the precision an update makes them identities, as `refresh` does."""
        return jnp.maximum(*(jnp.linalg.cond(k) for k in (self.left_turn, self.right_turn)))

    def refresh(self) -> GrowingSVD:
        """The same decomposition with turns that are identities."""
        eye = jnp.eye(len(self.values), dtype=self.values.dtype)
        return GrowingSVD(self.u, eye, self.values, self.v, eye)

    def add_rows(self, columns: Array, values: Array) -> GrowingSVD:
        r"""The best decomposition of rank k of $[U \Sigma V^T; E]$ for new rows E that are zero but in some columns.

        What of E's rows lies outside of V is a basis of pairs (b, c), the vector $b - V c$ with b at these
        columns, of inner product $b^T b' - c^T c'$; the rest is a singular value decomposition of
        $k + s$ rows. Costs about $|columns| (k + s) s + (k + s)^3$.

        Args:
          columns: the columns where E has entries, different ones, int `[c]`.
          values: of E there, `[s, c]`.

        Raises:
          ValueError: values of another shape.
        """
        check_entries("columns", columns, values)
        new, turn_left, tail_left, turn_right, rows = self._grown(
            columns, values, self.right, self.right_turn
        )
        eye = jnp.eye(len(new), dtype=new.dtype)

        def grown(left, left_turn, right, right_turn):
            left = jnp.concatenate([left, _divide(tail_left, left_turn)])
            return GrowingSVD(
                left, left_turn, new, right.at[columns].add(_divide(rows, right_turn)), right_turn
            )

        # A direction that goes leaves a turn that cannot be divided by: then the turns are multiplied out.
        left_turn, right_turn = _dot(self.left_turn, turn_left), _dot(self.right_turn, turn_right)
        worst = jnp.maximum(jnp.linalg.cond(left_turn), jnp.linalg.cond(right_turn))
        return jax.lax.cond(
            worst < jnp.finfo(new.dtype).eps ** -0.5,
            lambda: grown(self.left, left_turn, self.right, right_turn),
            lambda: grown(_dot(self.left, left_turn), eye, _dot(self.right, right_turn), eye),
        )

    def add_columns(self, rows: Array, values: Array) -> GrowingSVD:
        """The same for new columns that are zero but in some rows; `values` is `[s, r]`, a column in each row."""
        grown = self.swapped().add_rows(rows, values)
        return grown.swapped()

    def swapped(self) -> GrowingSVD:
        """Of the transposed matrix."""
        return GrowingSVD(self.right, self.right_turn, self.values, self.left, self.left_turn)

    def _grown(self, columns: Array, values: Array, right: Array, right_turn: Array):
        k, s = len(self.values), values.shape[0]
        inside = _dot(_dot(right_turn.T, right[columns].T), values.T)  # [k, s]
        b, c, r = _orthonormal(values.T, inside)
        zeros = jnp.zeros((k, s), values.dtype)
        middle = jnp.block([[jnp.diag(self.values), zeros], [inside.T, r.T]])
        f, new, gt = jnp.linalg.svd(middle, full_matrices=False)
        g = gt.T
        turn_right = g[:k, :k] - _dot(c, g[k:, :k])
        return new[:k], f[:k, :k], f[k:, :k], turn_right, _dot(b, g[k:, :k])


def truncated_svd(matrix: Array, rank: int) -> GrowingSVD:
    """The decomposition that updates start from.

    Args:
      matrix: `[m, n]`.
      rank: k, from 1 to min(m, n).

    Raises:
      ValueError: a rank out of range.

    >>> found = truncated_svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 2)
    >>> grown = found.add_rows(jnp.array([1]), jnp.array([[2.0]]))
    >>> [round(float(s), 4) for s in grown.values]
    [3.0, 2.8284]

    Source: Deng, Yang, Feng, Liu, Yang, "Fast updating truncated SVD for representation learning with sparse
    matrices", 2024, the exact variant; edits by a product of two factors are not here.
    """
    check_count("rank", rank, most=min(matrix.shape), arrays=True)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    eye = jnp.eye(rank, dtype=matrix.dtype)
    return GrowingSVD(u[:, :rank], eye, s[:rank], vt[:rank].T, eye)


def check_entries(name: str, places: Array, values: Array) -> None:
    """Raises unless values are `[s, c]` for c places."""
    if places.ndim != 1 or values.ndim != 2 or values.shape[1] != places.shape[0]:
        raise ValueError(f"values have shape {values.shape} for {places.shape} {name}: give [s, c]")


def _orthonormal(b: Array, c: Array) -> tuple[Array, Array, Array]:
    """Modified Gram-Schmidt of vectors given as pairs `[., s]`: an orthonormal basis in pairs, and R `[s, s]`.
    A vector that depends on those before it, up to rounding, becomes 0."""
    s = b.shape[1]
    tolerance = 10 * jnp.finfo(b.dtype).eps

    def inner(b, c, i):
        return b[:, i] @ b - c[:, i] @ c

    size = jnp.maximum(jnp.sum(b * b, 0), jnp.finfo(b.dtype).tiny)

    def step(i, carry):
        b, c, r = carry
        square = inner(b, c, i)[i]
        free = square > tolerance * size[i]
        length = jnp.sqrt(jnp.where(free, square, 1))
        unit = lambda a: a.at[:, i].set(jnp.where(free, a[:, i] / length, 0))
        b, c = unit(b), unit(c)
        along = jnp.where(jnp.arange(s) > i, inner(b, c, i), 0)
        r = r.at[i].set(along.at[i].set(jnp.where(free, length, 0)))
        return b - jnp.outer(b[:, i], along), c - jnp.outer(c[:, i], along), r

    return jax.lax.fori_loop(0, s, step, (b, c, jnp.zeros((s, s), b.dtype)))


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _divide(a: Array, turn: Array) -> Array:
    return jnp.linalg.solve(turn.T, a.T).T
