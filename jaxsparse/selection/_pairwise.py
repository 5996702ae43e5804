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
# So few are compared row by row: where a group lies on several devices, they exchange rows, and no array of
# the leaf's size. For 32 that would be 496 pairs, half a minute of compilation.
_BY_ROWS = 4


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
    place = _place_by_rows if x.shape[axis] <= _BY_ROWS else _place
    kept = place(levels, inside, axis % x.ndim) <= k
    return kept if inside is None else kept & inside


def _place(levels: list[Array], inside: Array | None, axis: int) -> Array:
    """The place of each entry, from 1: how many are ahead of it, itself included; of equals, those that
    stand before it are. Written out over the m others, so that XLA makes one pass of all and no array
    is m times as large."""
    places = lax.broadcasted_iota(jnp.int32, levels[0].shape, axis)
    levels = [*levels, -places]
    counts = jnp.zeros(places.shape, jnp.int32)
    for i in range(places.shape[axis]):
        other = [lax.slice_in_dim(level, i, i + 1, axis=axis) for level in levels]
        ahead = at_or_above(other, levels)
        if inside is not None:
            ahead = ahead & lax.slice_in_dim(inside, i, i + 1, axis=axis)
        counts = counts + ahead.astype(jnp.int32)
    return counts


def _place_by_rows(levels: list[Array], inside: Array | None, axis: int) -> Array:
    """The same, with one comparison for both entries of a pair."""
    row = lambda x, i: lax.slice_in_dim(x, i, i + 1, axis=axis)
    rows = [[row(level, i) for level in levels] for i in range(levels[0].shape[axis])]
    counts = [jnp.ones(rows[0][0].shape, jnp.int32) for _ in rows]
    for j in range(len(rows)):
        for i in range(j):
            first = at_or_above(rows[i], rows[j])  # i stands before j
            second = ~first
            if inside is not None:
                first, second = first & row(inside, i), second & row(inside, j)
            counts[j] = counts[j] + first.astype(jnp.int32)
            counts[i] = counts[i] + second.astype(jnp.int32)
    return lax.concatenate(counts, axis)
