"""Arrays as entries of a ranking: their levels, the bounds of these, and the mask at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import _counts
from jaxsparse._counts import Count
from jaxsparse.selection import _search
from jaxsparse.selection._arguments import Score, equal_scores, shape_and_dtype
from jaxsparse.selection._hash import hashed, outer_inner, position
from jaxsparse.selection._keys import (
    INT_MIN,
    Bounds,
    as_int,
    at_or_above,
    native,
    value_bounds,
    value_levels,
)
from jaxsparse.selection._search import Entries, Ranking


def entries(
    arrays: Sequence[Array],
    score: Score,
    where: Array | None,
    seed: Array | None,
    *,
    axes: tuple[int, ...] | None = None,
    dtype: Any = None,
    offset: int = 0,
    wide: bool = False,
    leaf: int | None = None,
    own: Array | None = None,
) -> Entries:
    """One array as entries: levels for `own`, the score, the hash, the leaf, the position.

    Args:
      arrays, score: what scores are made of.
      where: the eligible entries.
      seed: that of the hash; None: ties go by position.
      axes: the ranked axes; all by default.
      dtype: in which scores are compared; their own by default.
      offset: the position of the first entry among those of all arrays that compete.
      wide: whether positions take more than 32 bits.
      leaf: the number of the array, where positions start anew in each.
      own: entries that come before all others.
    """
    shape, _ = shape_and_dtype(arrays, score)
    ranked = tuple(range(len(shape))) if axes is None else axes

    by_hash = seed is not None

    def levels(seed, arrays, where, zero, own):
        out, inside = [], None
        if score is not equal_scores:
            x = score(*arrays)
            out, inside = value_levels(x if dtype is None else x.astype(dtype))
        if own is not None:
            out = [own.astype(jnp.int32), *out]
        if where is not None:
            inside = where if inside is None else inside & where
        if by_hash:
            out.append(as_int(hashed(shape, seed, zero, offset % (1 << 32))) ^ INT_MIN)
        if leaf is not None:
            out.append(jnp.broadcast_to(as_int(zero) - leaf, (1,) * len(shape)))
        if wide:
            parts = outer_inner(shape, ranked, _counts.WIDE)
            out += [~as_int(position(shape, axes, zero)) for axes in parts]
        elif not by_hash:
            out.append(~as_int(position(shape, ranked, zero) + jnp.uint32(offset)))
        return out, inside

    operands = tuple(arrays), where, jnp.uint32(0), own
    return Entries(shape, ranked, operands, levels, jnp.uint32(0) if seed is None else seed)


def bounds_of(
    rankings: Sequence[Ranking], score: Score, dtype: Any, by_hash: bool, wide: bool
) -> list[Bounds]:
    """The bounds of the levels of entries made with the same options, but for those of `own`."""
    bounds = [] if score is equal_scores else value_bounds(dtype)
    if by_hash:
        bounds.append(Bounds(INT_MIN, INT_MIN + 2**32 - 1, smooth=True))
    if wide:
        if len(rankings[0]) > 1:
            bounds.append(Bounds(1 - len(rankings[0]), 0))
        bounds += [Bounds(INT_MIN, -1), Bounds(INT_MIN, -1, smooth=True)]
    elif not by_hash:
        sizes = [np.full(_search.slices(r), _search.size(r)) for r in rankings]
        bounds.append(Bounds(-np.concatenate(sizes), -1, smooth=True))
    return bounds


def masks(rankings: Sequence[Ranking], k: Count, bounds: Sequence[Bounds]) -> list[list[Array]]:
    """The masks of the k largest entries in each slice of each ranking; k is a row of counts."""
    found = _search.search(rankings, k, bounds)

    def mask(e: Entries, i: int) -> Array:
        levels, inside = e.levels(found.seed[i], *e.operands)
        chosen = at_or_above(levels, found.lo[i]) & found.some[i]
        return jnp.broadcast_to(chosen if inside is None else chosen & inside, e.shape)

    return [[mask(e, i) for e in ranking] for i, ranking in enumerate(rankings)]


def together(
    operands: Sequence[tuple[Array, ...]],
    where: Sequence[Array | None],
    seed: Array | None,
    own: Sequence[Array | None],
    score: Score,
    dtype: Any = None,
) -> tuple[Ranking, list[Bounds]]:
    """Arrays as one ranking, and the bounds of its levels; scores are compared in `dtype`, by default
    in the dtype that all can be brought to."""
    made = [shape_and_dtype(arrays, score) for arrays in operands]
    natives = {native(d) for _, d in made}
    with jax.numpy_dtype_promotion("standard"):  # comparing is no promotion of the user's numbers
        dtype = dtype or jnp.result_type(*natives)
    sizes = [math.prod(shape) for shape, _ in made]
    wide = sum(sizes) >= _counts.WIDE
    ranking, offset = [], 0
    for i, (arrays, w, o, n) in enumerate(zip(operands, where, own, sizes)):
        leaf = i if wide and len(operands) > 1 else None
        options = dict(dtype=dtype, offset=offset, wide=wide, leaf=leaf, own=o)
        ranking.append(entries(arrays, score, w, seed, **options))
        offset += n
    return ranking, bounds_of([ranking], score, dtype, seed is not None, wide)
