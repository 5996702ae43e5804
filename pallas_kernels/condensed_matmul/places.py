"""The rows of a condensed matrix as a mask, and how they change.

Values that stay keep their number in a column, and new ones take the numbers of those that go; what is
not used has the row beyond the last.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._formats import Array


def mask_of(rows: Array, inputs: int) -> Array:
    """bool `[inputs, columns]`: where `rows [columns, fan_in]` store a value."""
    column = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((inputs, rows.shape[0]), bool).at[rows, column].set(True, mode="drop")


def rewire(rows: Array, mask: Array) -> tuple[Array, Array]:
    """The rows `[columns, fan_in]` of another pattern, and which values stay: bool, like the rows.

    Args:
      rows: `[columns, fan_in]`.
      mask: bool `[inputs, columns]`, the new pattern, at most `fan_in` to a column.

    >>> new, kept = rewire(jnp.array([[1, 3]]), jnp.array([[True], [False], [False], [True]]))
    >>> new.tolist(), kept.tolist()
    ([[0, 3]], [[False, True]])
    """
    return _rewire(rows, mask)


@jax.jit
def _rewire(rows: Array, mask: Array) -> tuple[Array, Array]:
    inputs, (columns, fan_in) = mask.shape[0], rows.shape
    column = jnp.arange(columns, dtype=jnp.int32)
    kept = mask.at[rows, column[:, None]].get(mode="fill", fill_value=False)
    grown = mask & ~mask_of(rows, inputs)
    # The r-th new row of a column goes where its r-th free place is.
    number = jnp.where(grown, jnp.cumsum(grown, 0) - 1, fan_in)
    row = jnp.arange(inputs, dtype=jnp.int32)[:, None]
    found = jnp.full((columns, fan_in), inputs, jnp.int32)
    found = found.at[column, number].set(row, mode="drop")
    free = jnp.maximum(jnp.cumsum(~kept, 1) - 1, 0)
    return jnp.where(kept, rows, jnp.take_along_axis(found, free, 1)), kept
