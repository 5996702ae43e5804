r"""Projections whose weights change a little at a time.

For $B = A W^{1/2}$ with W diagonal and positive, $P = B^T (B B^T)^{-1} B$ projects on the rows of B. The inverse
$(A W A^T)^{-1}$ is kept; where a weight has changed by more than a factor it is brought up to date by Woodbury's
identity, so that P belongs to weights that are within that factor of the true ones.

Source: Song, Yang, Yang, Zhang, "Sketching meets differential privacy: fast algorithm for dynamic Kronecker
projection maintenance", 2022: the lazy maintenance only, for a diagonal W; the sketches, and the privacy that guards
them against adaptive queries, are not here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.operators import check_positive
from jaxsparse.selection import topk_mask


class Maintained(NamedTuple):
    """A `[m, n]`, the weights `[n]` that the inverse `[m, m]` of A W A^T belongs to."""

    matrix: Array
    weights: Array
    inverse: Array

    def project(self, h: Array) -> Array:
        """P h, `[n]`, or of many vectors `[..., n]`."""
        root = jnp.sqrt(self.weights)
        inside = jnp.matmul(root * h, self.matrix.T, precision="highest")
        back = jnp.matmul(inside, self.inverse, precision="highest")
        return root * jnp.matmul(back, self.matrix, precision="highest")


def maintain(matrix: Array, weights: Array) -> Maintained:
    """The start, and what brings rounding errors back to zero every now and then.

    Args:
      matrix: A `[m, n]` of rank m.
      weights: the diagonal of W `[n]`, positive.

    Raises:
      ValueError: shapes that do not fit, weights that are not positive.

    >>> state = maintain(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.ones(2))
    >>> state.project(jnp.array([3.0, 4.0])).tolist()
    [3.0, 4.0]
    """
    if matrix.ndim != 2 or weights.shape != matrix.shape[1:]:
        raise ValueError(
            f"weights have shape {weights.shape} for a matrix {matrix.shape}: give one for each column"
        )
    check_positive("weights", weights)
    gram = jnp.matmul(matrix * weights, matrix.T, precision="highest")
    return Maintained(matrix, weights, jnp.linalg.inv(gram))


def reweigh(
    state: Maintained, weights: Array, *, factor: float = 0.1, most: int | None = None
) -> Maintained:
    r"""Brings the weights up to date that have changed by more than `factor` of what they were:
    $M \leftarrow M - M A_I (diag(1/\delta) + A_I^T M A_I)^{-1} A_I^T M$.

    Args:
      state: of `maintain`.
      weights: the new ones `[n]`, positive.
      factor: 0 brings all up to date.
      most: how many at most in one call, those of the largest relative change; n by default. The cost is
        that of this many.

    Raises:
      ValueError: weights that are not positive or of another shape, a negative factor, most out of range.

    >>> state = maintain(jnp.array([[1.0, 1.0]]), jnp.ones(2))
    >>> later = reweigh(state, jnp.array([3.0, 1.05]))
    >>> later.weights.tolist(), round(float(later.inverse[0, 0]), 6)
    ([3.0, 1.0], 0.25)
    """
    n = state.weights.shape[0]
    if weights.shape != (n,):
        raise ValueError(f"weights have shape {weights.shape}: must be {(n,)}, as at the start")
    check_positive("weights", weights)
    check_positive("factor", factor, zero=True)
    most = n if most is None else most
    check_count("most", most, most=n, arrays=True)
    change = jnp.abs(weights / state.weights - 1)
    due = topk_mask(change, most) & (change > factor)
    (at,) = jnp.nonzero(due, size=most, fill_value=n)
    use = at < n
    columns = jnp.where(use, state.matrix.at[:, at].get(mode="fill", fill_value=0), 0)
    delta = (weights - state.weights).at[at].get(mode="fill", fill_value=0)
    # 1 + delta * (.) in place of 1 / delta + (.): an entry that does not change is no division by zero.
    turned = jnp.matmul(state.inverse, columns, precision="highest")
    small = jnp.eye(most, dtype=delta.dtype) + delta[:, None] * (columns.T @ turned)
    inverse = state.inverse - turned @ jnp.linalg.solve(small, delta[:, None] * turned.T)
    return Maintained(state.matrix, jnp.where(due, weights, state.weights), inverse)
