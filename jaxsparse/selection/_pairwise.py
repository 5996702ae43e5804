"""Masks of short slices, such as groups of four: every entry counts the ones ahead of it.

A search would read the data several times; here each of the m entries of a slice is compared with
the others once, and no loop is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from jaxsparse.selection._hash import hashed
from jaxsparse.selection._keys import INT_MIN, as_int, at_or_above, value_levels

_UP_TO = 32
# So few are compared pair by pair, which CPUs do several times as fast; written out for 32, the
# 496 pairs would take XLA half a minute to compile.
_WRITTEN_OUT = 4


def is_short(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether slices are so short that their entries are compared in pairs."""
    return len(axes) == 1 and shape[axes[0]] <= _UP_TO


def pairwise(x: Array, k: Array, where: Array | None, seed: Array | None, axis: int) -> Array:
    """The mask of the k largest along `axis`."""
    levels, inside = value_levels(x)
    if inside is None and jnp.issubdtype(x.dtype, jnp.floating):
        inside = ~jnp.isnan(x)
    if where is not None:
        inside = where if inside is None else inside & where
    if seed is not None:
        levels.append(as_int(hashed(x.shape, seed, jnp.uint32(0))) ^ INT_MIN)
    if inside is not None:
        inside = jnp.broadcast_to(inside, x.shape)
        levels = [jnp.where(inside, level, jnp.int32(INT_MIN)) for level in levels]
    count = _ahead_written_out if x.shape[axis] <= _WRITTEN_OUT else _ahead
    kept = count(levels, inside, axis % x.ndim) < k
    return kept if inside is None else kept & inside


def _ahead(levels: list[Array], inside: Array | None, axis: int) -> Array:
    """How many entries are ahead of each one; of equals, those that stand before it."""
    places = lax.broadcasted_iota(jnp.int32, levels[0].shape, axis)
    levels = [*levels, -places]
    others = [jnp.expand_dims(level, axis + 1) for level in levels]
    ahead = at_or_above(others, [jnp.expand_dims(level, axis) for level in levels])
    if inside is not None:
        ahead = ahead & jnp.expand_dims(inside, axis + 1)
    return jnp.sum(ahead, axis=axis, dtype=jnp.int32) - 1  # each one is at or above itself


def _ahead_written_out(levels: list[Array], inside: Array | None, axis: int) -> Array:
    """The same, with one comparison for both entries of a pair."""
    places = range(levels[0].shape[axis])
    rows = [[lax.index_in_dim(level, i, axis) for level in levels] for i in places]
    counts = [jnp.zeros(rows[0][0].shape, jnp.int32) for _ in places]
    for j in places:
        for i in range(j):
            # i is ahead of j where it is not below it, for i stands before j
            first = at_or_above(rows[i], rows[j])
            second = ~first
            if inside is not None:
                first, second = (
                    x & lax.index_in_dim(inside, at, axis) for x, at in ((first, i), (second, j))
                )
            counts[j] = counts[j] + first
            counts[i] = counts[i] + second
    return lax.concatenate(counts, axis)
