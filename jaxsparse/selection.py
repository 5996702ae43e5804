"""Exact selection: the k largest of one array, of each slice of it, or of many arrays together.

The only top-k of the project. Everywhere

- exactly k entries are chosen (all eligible ones if there are fewer), whatever the ties;
- `k` may be traced, and so may seeds: a new k needs no new compilation;
- scores are ranked by value: -0.0 equals 0.0, infinities are legal, and NaN ranks below everything
  and is never chosen, so that fewer than k are chosen when NaN leave fewer than k;
- ties go to the lower row-major position, or are broken by a seeded hash of the position
  (`ties="hash"`), which favours no row. Both are the same for any sharding on any number of devices;
- nothing is sorted or gathered but a sample of a few thousand scores: entries are counted against
  thresholds, pass after pass (see `jaxsparse/_search.py`), and a pass over sharded arrays
  communicates counters. Inside `shard_map` a function ranks what its device holds;
- gradients are not defined: scores are taken as constants.

Scores may be any real dtype. They may also be given as operands of an elementwise function,
`topk_mask((w, g), k, score=lambda w, g: abs(w * g))`, which is then evaluated in each pass and never
stored: on CPU, storing an array of the size of the data costs more than the search.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse import _search
from jaxsparse._search import INT_MAX, INT_MIN, Bounds, Count, Entries, Rows, positive

Axis = int | Sequence[int] | None
_SAMPLE = 4096
_SAMPLED_FROM = 1 << 17
_PAIRWISE_UP_TO = 32


# -- Scores as numbers -----------------------------------------------------------------------------


def _native(dtype) -> Any:
    """The dtype in which scores of `dtype` are compared."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.dtype(jnp.int32)
    if jnp.issubdtype(dtype, jnp.floating):
        return dtype if dtype.itemsize > 1 else jnp.dtype(jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer):
        return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.int32)
    raise ValueError(f"scores have dtype {dtype}: give real numbers, floating-point or integer")


def _float_keys(x: Array) -> Array:
    """Integers of the same width, in the order of the floats; NaN below everything.

    Negative floats order by their negated magnitude bits, so that -0.0 and 0.0 are both 0. The sum
    wraps NaN, whose magnitudes exceed that of infinity, around to the lowest integers.
    """
    info = jnp.iinfo(f"int{8 * x.dtype.itemsize}")
    b = lax.bitcast_convert_type(x, info.dtype)
    lowest, shift = jnp.asarray(info.min, info.dtype), _shift(x.dtype)
    return jnp.where(b < 0, lowest - b, b) + jnp.asarray(shift, info.dtype)


def _shift(dtype) -> int:
    info = jnp.iinfo(f"int{8 * jnp.dtype(dtype).itemsize}")
    return info.max - int(np.asarray(jnp.inf, dtype).view(info.dtype))


def _key_of(value: float, dtype) -> int:
    info = jnp.iinfo(f"int{8 * jnp.dtype(dtype).itemsize}")
    return int(np.asarray(abs(value), dtype).view(info.dtype)) * (-1 if value < 0 else 1) + _shift(
        dtype
    )


def _value_levels(x: Array) -> tuple[list[Array], Array | None]:
    """Scores as levels, and which of them may be chosen (None: all within the bounds)."""
    x = x.astype(_native(x.dtype))
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    keys = _float_keys(x) if floating else x
    unsigned = INT_MIN if jnp.issubdtype(keys.dtype, jnp.unsignedinteger) else 0
    if keys.dtype.itemsize == 8:
        words = lax.bitcast_convert_type(keys, jnp.uint32)  # [..., 2], the low one first
        low, high = _as_int(words[..., 0]) ^ INT_MIN, _as_int(words[..., 1]) ^ unsigned
        return [high, low], ~jnp.isnan(x) if floating else None
    if unsigned:
        return [_as_int(keys) ^ INT_MIN], None
    return [keys.astype(jnp.int32)], None


def _value_of(key: Array, dtype) -> Array:
    """The score of a level, for dtypes of one level."""
    if jnp.issubdtype(dtype, jnp.floating):
        info = jnp.iinfo(f"int{8 * jnp.dtype(dtype).itemsize}")
        b = key.astype(info.dtype) - jnp.asarray(_shift(dtype), info.dtype)
        b = jnp.where(b < 0, jnp.asarray(info.min, info.dtype) - b, b)
        return lax.bitcast_convert_type(b, dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return lax.bitcast_convert_type(key ^ INT_MIN, jnp.uint32).astype(dtype)
    return key.astype(dtype)


def _value_bounds(dtype) -> list[Bounds]:
    dtype = _native(dtype)
    if dtype.itemsize == 8:
        return [Bounds(INT_MIN, INT_MAX), Bounds(INT_MIN, INT_MAX)]
    if not jnp.issubdtype(dtype, jnp.floating):
        return [Bounds(INT_MIN, INT_MAX)]
    # Most scores are magnitudes near 1, with a heap of them at 0.
    tiny = _key_of(0.0, dtype)
    probes = [tiny, tiny + 1]
    probes += [_key_of(v, dtype) for v in (6e-5, 1e-3, 1e-2, 0.1, 1.0, 30.0)]
    return [Bounds(_key_of(-np.inf, dtype), _key_of(np.inf, dtype), probes=tuple(probes))]


# -- Positions and hashes --------------------------------------------------------------------------


def _position(shape: Sequence[int], axes: Sequence[int], zero: Array) -> Array:
    """The row-major position within `axes`, uint32 of `shape`. It starts from `zero`, an operand of
    the loop: constants would be computed before the loop, and stored."""
    position = jnp.broadcast_to(zero, shape)
    for a in axes:
        position = position * jnp.uint32(shape[a]) + lax.broadcasted_iota(jnp.uint32, shape, a)
    return position


def _outer_inner(shape: Sequence[int], axes: Sequence[int], limit: int) -> tuple[list, list]:
    """`axes` as leading and trailing ones, the latter with fewer than `limit` positions."""
    split = len(axes)
    while split and math.prod(shape[a] for a in axes[split - 1 :]) < limit:
        split -= 1
    return list(axes[:split]), list(axes[split:])


def mix(x: Array) -> Array:
    """A bijection of uint32 that scatters its argument (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def as_seed(seed: Any) -> Array:
    """A uint32 from an integer or a PRNG key.

    Raises:
      ValueError: anything else.
    """
    if isinstance(seed, int | np.integer):
        return jnp.uint32(int(seed) & 0xFFFFFFFF)
    if not hasattr(seed, "dtype"):
        raise ValueError(f"seed={seed!r}: give an integer or a PRNG key")
    seed = jnp.asarray(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return jax.random.bits(seed, (), jnp.uint32)
    if seed.shape == (2,) and seed.dtype == jnp.uint32:
        return jax.random.bits(jax.random.wrap_key_data(seed), (), jnp.uint32)
    if seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer):
        return seed.astype(jnp.uint32)
    raise ValueError(
        f"seed of dtype {seed.dtype} and shape {seed.shape}: give an integer scalar or a PRNG key"
    )


def _hash(shape: Sequence[int], seed: Array, zero: Array, offset: int = 0) -> Array:
    """See `position_hash`; positions start at `offset`."""
    outer, inner = _outer_inner(shape, range(len(shape)), 2 * _search.WIDE)
    factor, shift = _hash_keys(seed)
    if outer:
        shift = mix(_position(shape, outer, zero) + shift)
    return _hash_of(_position(shape, inner, zero) + jnp.uint32(offset), factor, shift)


def _hash_keys(seed: Array) -> tuple[Array, Array]:
    """Two numbers, the first odd, that make the hash of a position from it."""
    return mix(seed + jnp.uint32(0x9E3779B9)) | 1, mix(seed ^ jnp.uint32(0x7F4A7C15))


def _hash_of(position: Array, factor: Array, shift: Array) -> Array:
    """The hash of a position, by the numbers of a seed."""
    return mix(position * factor + shift)


def position_hash(shape: Sequence[int], seed: Any) -> Array:
    """Pseudo-random uint32 numbers that depend on the seed and the row-major position alone.

    They are distinct for distinct positions below 2^32 (each seed is a bijection of the positions),
    and the same for any sharding and number of devices.

    Args:
      shape: the shape of the result.
      seed: an int, an integer scalar (traced or not), or a PRNG key.

    >>> h = position_hash((2, 3), seed=7)
    >>> h.shape, h.dtype.name, len(set(h.ravel().tolist()))
    ((2, 3), 'uint32', 6)

    Raises:
      ValueError: a seed that is none of these.
    """
    return jnp.broadcast_to(_hash(tuple(shape), as_seed(seed), jnp.uint32(0)), tuple(shape))


# -- Arguments -------------------------------------------------------------------------------------


def _check_ties(ties: str, seed: Any) -> Array | None:
    if ties not in ("position", "hash"):
        raise ValueError(f'ties={ties!r}: give "position" or "hash"')
    if ties == "position":
        return None
    if seed is None:
        raise ValueError('ties="hash" needs a seed: give seed=, an int or an integer scalar')
    return as_seed(seed)


def _check_k(k: Any, name: str = "k") -> Any:
    if isinstance(k, tuple) and len(k) == 2:  # digits, which the library itself makes
        return k
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        array = jnp.asarray(k)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}: give a count, an integer")
        return array
    if k < 0:
        raise ValueError(f"{name}={k}: give a count, 0 or more")
    return int(k)


def _check_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in given) or len({a % ndim for a in given}) < len(given):
        raise ValueError(f"axis={axis}: give distinct axes from {-ndim} to {ndim - 1}")
    return tuple(sorted(a % ndim for a in given))


def _operands(scores: Any, score: Callable[..., Array] | None) -> tuple[Array, ...]:
    arrays = tuple(scores) if isinstance(scores, tuple | list) else (scores,)
    if score is None and len(arrays) != 1:
        raise ValueError("several operands need score=, the function that makes scores of them")
    return tuple(lax.stop_gradient(jnp.asarray(x)) for x in arrays)


def _identity(x: Array) -> Array:
    return x


def _shape_and_dtype(arrays: Sequence[Array], score: Callable[..., Array]):
    made = jax.eval_shape(score, *arrays)
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    if made.shape != shape:
        raise ValueError(f"score= made {made.shape} of {shape}: it must be elementwise")
    return shape, made.dtype


def _check_where(where: Any, shape: tuple[int, ...]) -> Array | None:
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise ValueError(f"where has dtype {where.dtype}: give booleans, True where eligible")
    try:
        fits = jnp.broadcast_shapes(where.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"where has shape {where.shape}: it must broadcast to scores, {shape}")
    return where


# -- Ranking ---------------------------------------------------------------------------------------


def _entries(
    arrays: Sequence[Array],
    score: Callable[..., Array],
    where: Array | None,
    seed: Array | None,
    *,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    as_dtype: Any = None,
    offset: int = 0,
    wide: bool = False,
    leaf: int | None = None,
    own: Array | None = None,
) -> Entries:
    """One array as entries: levels for `own`, the score, the hash, the leaf, the position."""

    def levels(arrays, where, seed, zero, own):
        x = score(*arrays)
        out, inside = _value_levels(x if as_dtype is None else x.astype(as_dtype))
        if own is not None:
            out = [own.astype(jnp.int32), *out]
        if where is not None:
            inside = where if inside is None else inside & where
        if seed is not None:
            out.append(_as_int(_hash(shape, seed, zero, offset)) ^ INT_MIN)
        if leaf is not None:
            out.append(jnp.broadcast_to(-leaf + _as_int(zero), (1,) * len(shape)))
        if wide:
            outer, inner = _outer_inner(shape, axes, _search.WIDE)
            out += [~_as_int(_position(shape, part, zero)) for part in (outer, inner)]
        elif seed is None:
            out.append(~_as_int(_position(shape, axes, zero) + jnp.uint32(offset)))
        return out, inside

    return Entries(shape, axes, (tuple(arrays), where, seed, jnp.uint32(0), own), levels)


def _as_int(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _tie_bounds(size: int, hashed: bool, wide: bool, leaves: int | None) -> list[Bounds]:
    bounds = []
    if hashed:
        bounds.append(Bounds(INT_MIN, INT_MAX, smooth=True))
    if leaves is not None:
        bounds.append(Bounds(1 - leaves, 0))
    if wide:
        bounds += [Bounds(INT_MIN, -1), Bounds(INT_MIN, -1, smooth=True)]
    elif not hashed:
        bounds.append(Bounds(-size, -1, smooth=True))
    return bounds


def _first_thresholds(entries: Sequence[Entries], k: Count, bound: Bounds) -> Array | None:
    """Eight thresholds of the first level to begin with; None for those of the bounds.

    On CPU, where a pass over the data is dear, they lie around the k-th of a strided sample. A TPU
    would read all of the data for it, and has no need of it.
    """
    size = sum(e.ranked for e in entries)
    if size < _SAMPLED_FROM or bound.smooth or math.prod(entries[0].kept_shape) > 1:
        return None
    if any(_explicitly_sharded(x) for e in entries for x in jax.tree.leaves(e.operands)):
        return None
    blind = _search.first_thresholds(bound)
    operands = tuple(e.operands for e in entries)
    near = functools.partial(_near_thresholds, entries, size, bound)
    return lax.platform_dependent(operands, k, cpu=near, default=lambda *_: blind)


def _explicitly_sharded(x: Array) -> bool:
    """Whether the type of x says that it is sharded; such axes do not take slices."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    return any(axis is not None for axis in spec)


def _near_thresholds(entries: Sequence[Entries], size: int, bound: Bounds, operands, k) -> Array:
    parts = []
    for e, (arrays, where, *rest) in zip(entries, operands):
        strides = _strides(e.shape, max(1, size // _SAMPLE))

        def cut(x, e=e, strides=strides):
            if x is None or x.ndim == 0:
                return x
            x = jnp.broadcast_to(x, (1,) * (len(e.shape) - x.ndim) + x.shape)
            steps = [s if n > 1 else 1 for s, n in zip(strides, x.shape)]
            return lax.slice(x, (0,) * x.ndim, x.shape, steps)

        levels, inside = e.levels(tuple(map(cut, arrays)), cut(where), *rest)
        part = levels[0] if inside is None else jnp.where(inside, levels[0], INT_MIN)
        parts.append(part.ravel())
    share = _search.to_float(k).reshape(()) / float(size)
    return _around_rank(jnp.concatenate(parts), share, bound)


def _around_rank(sample: Array, share: Array, bound: Bounds) -> Array:
    """Eight thresholds around the number that a `share` of the sample, [..., n], reaches; their axis
    is the first."""
    ordered, count = jnp.sort(sample, axis=-1), sample.shape[-1]
    p = jnp.clip(share, 0.0, 1.0)[..., None]
    spread = jnp.sqrt(count * p * (1 - p)) + 1.0
    around = jnp.array([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
    ranks = jnp.clip(count - 1 - p * count + around * spread, 0, count - 1)
    picked = jnp.take_along_axis(ordered, ranks.astype(jnp.int32), axis=-1)
    # The number after the guess tells at once whether the k-th is in a heap of equal scores.
    after = jnp.minimum(picked[..., 3:4], INT_MAX - 1) + 1
    return jnp.maximum(jnp.moveaxis(jnp.concatenate([picked, after], -1), -1, 0), bound.lo + 1)


def _strides(shape: tuple[int, ...], target: int) -> list[int]:
    """Odd strides whose product is about `target`, the longest axes thinned first. Odd, so that
    the sample does not always hit the same place of groups of 2, 4, 64, ..."""
    strides = [1] * len(shape)
    while shape and math.prod(strides) < target:
        a = max(range(len(shape)), key=lambda a: shape[a] / strides[a])
        if shape[a] <= strides[a]:
            break
        strides[a] = 2 * strides[a] + 1
    return strides


def _mask(entries: Entries, found: _search.Found, some: Array) -> Array:
    levels, inside = entries.levels(*entries.operands)
    mask = _search.at_or_above(levels, found.lo) & some
    mask = mask if inside is None else mask & inside
    return jnp.broadcast_to(mask, entries.shape)


# -- Masks -----------------------------------------------------------------------------------------


def count(mask: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """How many entries are True, int32.

    >>> int(count(jnp.array([True, False, True])))
    2
    """
    axes = _check_axes(axis, mask.ndim)
    # Two different sums at once: one alone is not vectorised on CPU.
    (found, _), _ = _search.totals([mask, ~mask], [], axes)
    return found[0] if keepdims else lax.squeeze(found[0], axes)


def topk_mask(
    scores: Any,
    k: Any,
    *,
    where: Any = None,
    ties: str = "position",
    seed: Any = None,
    axis: Axis = None,
    score: Callable[..., Array] | None = None,
) -> Array:
    r"""The k largest scores: a boolean array of their shape with exactly
    $\min(k, \text{number of eligible entries})$ True.

    Args:
      scores: real numbers of any dtype. NaN is not eligible.
      k: how many, an int or an integer array (traced or not). With `axis`, an array of the shape
        of the remaining axes (or one that broadcasts to it) gives every slice its own.
      where: bool, broadcasts to `scores`: the eligible entries.
      ties: which of equal scores come first: those at lower row-major positions ("position"), or
        in the order of a hash of the position seeded with `seed` ("hash").
      seed: int, integer scalar (traced or not) or PRNG key, for `ties="hash"`.
      axis: None ranks the whole array. An axis or several: the entries along them are ranked, for
        every index of the other axes apart; axis=0 of `[in, out]` keeps k per output.
      score: elementwise function that makes the scores of `scores`, an array or a tuple of arrays;
        it is evaluated in each pass, and its result never stored.

    >>> topk_mask(jnp.array([3.0, 1.0, 3.0, 3.0]), 2).tolist()
    [True, False, True, False]
    >>> topk_mask(jnp.array([[3.0, 1.0], [-5.0, 2.0]]), 1, axis=0, score=jnp.abs).tolist()
    [[False, False], [True, True]]

    Raises:
      ValueError: a negative or fractional k, complex scores, an axis out of range, unknown `ties`,
        no seed for `ties="hash"`, `where` that is not boolean or does not broadcast.
    """
    seed = _check_ties(ties, seed)
    k = _check_k(k)
    arrays = _operands(scores, score)
    score = score or _identity
    shape, dtype = _shape_and_dtype(arrays, score)
    axes = _check_axes(axis, len(shape))
    where = _check_where(where, shape)
    _native(dtype)
    if math.prod(shape) == 0:
        return jnp.zeros(shape, bool)
    k = _count_per_slice(k, shape, axes)
    return _topk(arrays, k, where, seed, score=score, axes=axes)


def _count_per_slice(k: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Count:
    """The count k, for all slices or for each, with 1 for the ranked axes."""
    ranked = math.prod(shape[a] for a in axes)
    if not isinstance(k, int) and k.ndim:
        kept = tuple(n for a, n in enumerate(shape) if a not in axes)
        try:
            k = jnp.expand_dims(jnp.broadcast_to(k, kept), axes)
        except ValueError:
            raise ValueError(
                f"k has shape {k.shape}: it must broadcast to the axes that are not ranked, {kept}"
            ) from None
    return _search.count_of(k, ranked, ranked >= _search.WIDE)


@functools.partial(jax.jit, static_argnames=("score", "axes"))
def _topk(arrays, k: Count, where, seed, *, score, axes) -> Array:
    shape, _ = _shape_and_dtype(arrays, score)
    if _is_short(shape, axes):
        return _pairwise(score(*arrays), k[0], where, seed, axes[0])
    return _mask(*_find(arrays, k, where, seed, score=score, axes=axes), positive(k))


def _find(arrays, k: Count, where, seed, *, score, axes) -> tuple[Entries, _search.Found]:
    shape, dtype = _shape_and_dtype(arrays, score)
    ranked = math.prod(shape[a] for a in axes)
    wide = ranked >= _search.WIDE
    entries = _entries(arrays, score, where, seed, shape=shape, axes=axes, wide=wide)
    bounds = _value_bounds(dtype) + _tie_bounds(ranked, seed is not None, wide, None)
    first = _first_thresholds([entries], k, bounds[0])
    return entries, _search.search([entries], k, bounds, first)


def topk_masks(
    leaves: Sequence[Any],
    ks: Sequence[Any],
    *,
    where: Sequence[Any] | None = None,
    ties: str = "position",
    seeds: Sequence[Any] | None = None,
    axes: Sequence[Axis] | None = None,
) -> list[Array]:
    """`topk_mask` of several arrays, each ranked by itself: the same masks.

    All are searched in the same passes: accelerators are kept waiting by many short loops, and
    sharded arrays by a sum over devices for each pass of each loop; and one loop compiles sooner than
    a hundred. On a single CPU device all are copied to rows of one length for it, so that the size of
    the program does not depend on how many there are; on several, where a copy could move what is
    sharded, one array is searched after the other.

    Args:
      leaves: a list of score arrays.
      ks: for each array how many, see `topk_mask`.
      where: for each array the eligible entries, or None.
      ties: as for `topk_mask`.
      seeds: for each array the seed, for `ties="hash"`.
      axes: for each array the ranked axes.

    >>> a, b = jnp.array([3.0, 1.0, 2.0]), jnp.array([[5.0, 4.0], [7.0, 6.0]])
    >>> [m.tolist() for m in topk_masks([a, b], [2, 1], axes=[None, 1])]
    [[True, False, True], [[True, False], [True, False]]]

    Raises:
      ValueError: lists of another length, and what `topk_mask` raises.
    """
    leaves = list(leaves)
    lists = {"ks": ks, "where": where, "seeds": seeds, "axes": axes}
    columns = [_check_list(values, leaves, name) for name, values in lists.items()]
    masks: list[Any] = [None] * len(leaves)
    together: dict[Any, list[int]] = {}
    rows = []
    for i, (x, k, w, seed, axis) in enumerate(zip(leaves, *columns)):
        (x,) = _operands(x, None)
        picked = _check_axes(axis, x.ndim)
        ranked = math.prod(x.shape[a] for a in picked)
        count_ = _count_per_slice(_check_k(k), x.shape, picked)
        rows.append((x, count_, _check_where(w, x.shape), _check_ties(ties, seed), picked))
        dtype = _native(x.dtype)
        if x.size and ranked < _search.WIDE and not _is_short(x.shape, picked):
            together.setdefault(dtype, []).append(i)
        else:
            masks[i] = topk_mask(x, k, where=w, ties=ties, seed=seed, axis=axis)
    for group in together.values():
        *operands, picked = zip(*(rows[i] for i in group))
        for i, mask in zip(group, _topk_apart(*map(list, operands), axes=picked)):
            masks[i] = mask
    return masks


def _is_short(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether slices are so short that their entries are compared in pairs."""
    return len(axes) == 1 and shape[axes[0]] <= _PAIRWISE_UP_TO


@functools.partial(jax.jit, static_argnames="axes")
def _topk_apart(arrays, ks, where, seeds, *, axes) -> list[Array]:
    def in_turn(*columns):
        rows = zip(*columns, axes)
        return [_topk((x,), k, w, seed, score=_identity, axes=a) for x, k, w, seed, a in rows]

    if len(arrays) == 1:
        return in_turn(arrays, ks, where, seeds)
    length = _row_length(sum(x.size for x in arrays))
    fit = [i for i, (x, a) in enumerate(zip(arrays, axes)) if _fits_rows(x, a, length)]
    in_one = len(fit) > 1 and sum(arrays[i].size for i in fit) < _search.WIDE // 4

    def in_rows(*columns):
        masks: list[Any] = [None] * len(axes)
        rows, rest = list(zip(*columns, axes)), [i for i in range(len(axes)) if i not in fit]
        for i, mask in zip(fit, _topk_in_rows(*zip(*[rows[i] for i in fit]), length=length)):
            masks[i] = mask
        for i, mask in zip(rest, in_turn(*([column[i] for i in rest] for column in columns))):
            masks[i] = mask
        return masks

    on_cpu = in_rows if in_one and jax.device_count() == 1 else in_turn
    at_once = functools.partial(_topk_at_once, axes=axes)
    return lax.platform_dependent(arrays, ks, where, seeds, cpu=on_cpu, default=at_once)


# Rows are as long as a loop over one needs to run well, and longer where there would be too many.
_ROW, _ROWS = 1024, 2048


def _row_length(size: int) -> int:
    """The length of rows for arrays of `size` entries in all."""
    return max(_ROW, 2 ** math.ceil(math.log2(max(1, size / _ROWS))))


def _fits_rows(x: Array, axes: tuple[int, ...], length: int) -> bool:
    """Whether the ranked axes are the last ones, and filling up rows wastes little."""
    trailing = axes == tuple(range(x.ndim - len(axes), x.ndim))
    slices = math.prod(x.shape[: x.ndim - len(axes)])
    one_level = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4
    return trailing and one_level and slices * length <= 4 * max(x.size, length)


def _topk_in_rows(arrays, ks, where, seeds, axes, *, length: int) -> list[Array]:
    """All arrays in one: each slice is cut into rows of one length, which know their place in it. Two
    loops and a few kernels then serve any number of arrays, where XLA for CPU compiles those of each
    and prepares them at every call, of a branch that is not taken too."""
    slices = [math.prod(x.shape[: x.ndim - len(a)]) for x, a in zip(arrays, axes)]
    dtype = _native(arrays[0].dtype)

    def in_rows(x, w, n):
        # NaN is never chosen, wherever it stands.
        x = x.astype(dtype) if w is None else jnp.where(w, x.astype(dtype), jnp.nan)
        x = x.reshape(n, -1)
        filled = jnp.pad(x, ((0, 0), (0, -x.shape[1] % length)), constant_values=jnp.nan)
        return filled.reshape(-1, length)

    scores = jnp.concatenate([in_rows(*row) for row in zip(arrays, where, slices)])
    parts = tuple(x.size // n for x, n in zip(arrays, slices) for _ in range(n))

    def levels(scores, numbers):
        place, *keys = (x[:, None] for x in numbers)
        place = place + lax.broadcasted_iota(jnp.uint32, scores.shape, 1)
        tie = _as_int(_hash_of(place, *keys)) ^ INT_MIN if keys else ~_as_int(place)
        found, inside = _value_levels(scores)
        return [*found, tie], inside

    rows = Rows(scores.shape, (1,), (scores,), levels, parts)
    place = (np.arange(len(rows.owner)) - rows.starts[rows.owner]) * length
    keys: tuple[Array, ...] = ()
    if seeds[0] is not None:
        before = np.concatenate([np.arange(n) * (x.size // n) for x, n in zip(arrays, slices)])
        place = place + before[rows.owner]
        of_slice = [jnp.broadcast_to(seed, n) for seed, n in zip(seeds, slices)]
        keys = _hash_keys(jnp.concatenate(of_slice)[rows.owner])

    numbers = (jnp.asarray(place, jnp.uint32), *keys)
    rows = dataclasses.replace(rows, operands=(scores, numbers))
    k = jnp.concatenate([jnp.broadcast_to(k.ravel(), n) for (k,), n in zip(ks, slices)])
    bounds, first = _bounds_apart([rows], dtype, bool(keys)), None
    if scores.size >= _SAMPLED_FROM:
        first = _around_rank(_sample(rows), k / rows.sizes, bounds[0])
    (mask,) = _masks_apart([rows], (k,), bounds, first)

    masks, ends = [], (rows.starts + rows.rows)[np.cumsum(slices) - 1]
    for x, n, start, end in zip(arrays, slices, [0, *ends], ends):
        own = mask[start:end].reshape(n, -1)[:, : x.size // n]
        masks.append(own.reshape(x.shape))
    return masks


def _sample(rows: Rows) -> Array:
    """The first level of some entries of each slice, [slices, n], spread evenly, at no distance that
    groups of 2, 4, 64 and so on could have."""
    n = min(max(2**16 // len(rows.parts), 64), 1024)
    spread = np.arange(n) * ((math.sqrt(5) - 1) / 2) % 1
    at = rows.starts[:, None] * rows.shape[1] + (spread * rows.sizes[:, None]).astype(np.int64)
    scores = rows.operands[0].ravel()[at.astype(np.int32)]
    return _value_levels(scores)[0][0]


def _topk_at_once(arrays, ks, where, seeds, *, axes) -> list[Array]:
    rows = zip(arrays, where, seeds, axes)
    entries = [_entries((x,), _identity, w, seed, shape=x.shape, axes=a) for x, w, seed, a in rows]
    bounds = _bounds_apart(entries, arrays[0].dtype, seeds[0] is not None)
    in_a_row = [jnp.broadcast_to(k, e.kept_shape).ravel() for (k,), e in zip(ks, entries)]
    return _masks_apart(entries, (jnp.concatenate(in_a_row),), bounds)


def _bounds_apart(entries: Sequence[Entries], dtype: Any, hashed: bool) -> list[Bounds]:
    """The bounds of arrays that are ranked apart, whose positions start at a number for each slice."""
    if hashed:
        return _value_bounds(dtype) + _tie_bounds(0, True, False, None)
    lowest = -np.concatenate([e.sizes for e in entries])
    return [*_value_bounds(dtype), Bounds(lowest, -1, smooth=True)]


def _masks_apart(
    entries: Sequence[Entries], k: Count, bounds: Sequence[Bounds], first: Array | None = None
) -> list[Array]:
    """The masks of arrays that are ranked apart, in the same passes."""
    found, some, masks = _search.search(entries, k, bounds, first, apart=True), positive(k), []
    for i, e in enumerate(entries):
        own = functools.partial(_search.cut, entries, i)
        masks.append(_mask(e, found._replace(lo=[own(lo) for lo in found.lo]), own(some)))
    return masks


def passes(scores: Array, k: Any) -> Array:
    """How many times `topk_mask(scores, k)` reads the scores, besides the pass that makes the mask:
    an int32 scalar for benchmarks.

    >>> int(passes(jnp.arange(100.0), 10)) < 5
    True
    """
    (array,), k = _operands(scores, None), _check_k(k)
    k = _search.count_of(k, array.size, array.size >= _search.WIDE)
    axes = tuple(range(array.ndim))
    return jax.jit(lambda x, k: _find((x,), k, None, None, score=_identity, axes=axes)[1].passes)(
        array, k
    )


def _pairwise(x: Array, k: Array, where: Array | None, seed: Array | None, axis: int) -> Array:
    """The mask of short slices: every entry counts the ones before it in its slice."""
    levels, inside = _value_levels(x)
    if inside is None and jnp.issubdtype(x.dtype, jnp.floating):
        inside = ~jnp.isnan(x)
    if where is not None:
        inside = where if inside is None else inside & where
    if seed is not None:
        levels.append(_as_int(_hash(x.shape, seed, jnp.uint32(0))) ^ INT_MIN)
    if inside is not None:
        inside = jnp.broadcast_to(inside, x.shape)
        levels = [jnp.where(inside, level, INT_MIN) for level in levels]
    rows = [[lax.index_in_dim(level, i, axis) for level in levels] for i in range(x.shape[axis])]
    eligible = None
    if inside is not None:
        eligible = [lax.index_in_dim(inside, i, axis) for i in range(x.shape[axis])]
    ranks = [jnp.zeros(rows[0][0].shape, jnp.int8) for _ in rows]
    for j in range(len(rows)):
        for i in range(j):
            # i is ahead of j where it is not below it, for i stands before j
            first = _search.at_or_above(rows[i], rows[j])
            if eligible is not None:
                first = (first | ~eligible[j]) & eligible[i]
                second = ~first & eligible[j]
            else:
                second = ~first
            ranks[j] = ranks[j] + first.astype(jnp.int8)
            ranks[i] = ranks[i] + second.astype(jnp.int8)
    limit = k.astype(jnp.int8)
    kept = [r < limit for r in ranks]
    if eligible is not None:
        kept = [m & e for m, e in zip(kept, eligible)]
    return lax.concatenate(kept, axis)


def nm_mask(scores: Any, n: int, m: int, *, axis: int = -1, stride_groups: bool = False) -> Array:
    """The n largest of every group of m entries along `axis`, ties to the lower index.

    Groups are m consecutive entries, or with `stride_groups=True` the entries i, i + L/m,
    i + 2 L/m, ... of an axis of length L.

    >>> nm_mask(jnp.array([4.0, -1.0, 2.0, 2.0]), 2, 4).tolist()
    [True, False, True, False]

    Raises:
      ValueError: m does not divide the axis, n is not in [0, m], an axis out of range.
    """
    scores = _operands(scores, None)[0]
    (axis,) = _check_axes(axis, scores.ndim)
    length = scores.shape[axis]
    if not (isinstance(n, int | np.integer) and isinstance(m, int | np.integer) and 0 <= n <= m):
        raise ValueError(f"n={n}, m={m}: give integers with 0 <= n <= m")
    if m < 1 or length % m:
        raise ValueError(f"m={m} does not divide axis {axis} of scores with shape {scores.shape}")
    groups = (m, length // m) if stride_groups else (length // m, m)
    split = scores.reshape(*scores.shape[:axis], *groups, *scores.shape[axis + 1 :])
    kept = topk_mask(split, int(n), axis=axis if stride_groups else axis + 1)
    return kept.reshape(scores.shape)


def random_mask(key_or_seed: Any, shape: Sequence[int], k: Any) -> Array:
    """Exactly `min(k, size)` True at uniformly random positions.

    The positions follow from the seed, the shape and k alone, not from devices and shardings.

    Args:
      key_or_seed: int, integer scalar (traced or not), or PRNG key.
      shape: the shape of the mask.
      k: int or integer scalar (traced or not).

    >>> int(random_mask(0, (100, 100), 1000).sum())
    1000

    Raises:
      ValueError: a negative or fractional k, a seed of another kind.
    """
    k, seed, shape = _check_k(k), as_seed(key_or_seed), tuple(shape)
    size = math.prod(shape)
    if size == 0:
        return jnp.zeros(shape, bool)
    return _random(_search.count_of(k, size, size >= _search.WIDE), seed, shape=shape)


@functools.partial(jax.jit, static_argnames=("shape",))
def _random(k: Count, seed: Array, *, shape: tuple[int, ...]) -> Array:
    size, axes = math.prod(shape), tuple(range(len(shape)))
    wide = size >= _search.WIDE

    def levels(seed, zero):
        out = [_as_int(_hash(shape, seed, zero)) ^ INT_MIN]
        if wide:
            outer, inner = _outer_inner(shape, axes, _search.WIDE)
            out += [~_as_int(_position(shape, part, zero)) for part in (outer, inner)]
        return out, None

    entries = Entries(shape, axes, (seed, jnp.uint32(0)), levels)
    found = _search.search([entries], k, _tie_bounds(size, True, wide, None))
    return _mask(entries, found, positive(k))


# -- Many arrays -----------------------------------------------------------------------------------


def _check_list(values: Any, leaves: Sequence, name: str) -> list:
    if values is None:
        return [None] * len(leaves)
    if not isinstance(values, list | tuple) or len(values) != len(leaves):
        raise ValueError(f"{name} must be a list with one entry per leaf, {len(leaves)} in all")
    return list(values)


class _Many(NamedTuple):
    """Several arrays that are ranked together: their scores are `score(*operands)`."""

    operands: list[tuple[Array, ...]]
    where: list[Array | None]
    score: Callable[..., Array]
    size: int

    def count(self, k: Any) -> Count:
        return _search.count_of(k, self.size, self.size >= _search.WIDE)


def _many(leaves: Sequence[Any], where: Any, score: Callable[..., Array] | None) -> _Many:
    operands = [_operands(x, score) for x in leaves]
    score = score or _identity
    shapes = [_shape_and_dtype(arrays, score)[0] for arrays in operands]
    masks = [_check_where(w, s) for w, s in zip(_check_list(where, leaves, "where"), shapes)]
    return _Many(operands, masks, score, sum(map(math.prod, shapes)))


def _dtype_of(operands: Sequence[tuple[Array, ...]], score: Callable[..., Array]) -> Any:
    """The dtype in which scores of several arrays are compared."""
    natives = {_native(_shape_and_dtype(arrays, score)[1]) for arrays in operands}
    return natives.pop() if len(natives) == 1 else jnp.result_type(*natives)


def _together(operands, where, seed, own, score) -> tuple[list[Entries], list[Bounds]]:
    """The entries of arrays that are ranked together, and the bounds of their levels."""
    dtype = _dtype_of(operands, score)
    shapes = [_shape_and_dtype(arrays, score)[0] for arrays in operands]
    size = sum(map(math.prod, shapes))
    wide = size >= _search.WIDE
    entries, offset = [], 0
    for i, (arrays, shape, w, o) in enumerate(zip(operands, shapes, where, own)):
        entries.append(
            _entries(
                arrays,
                score,
                w,
                seed,
                shape=shape,
                axes=tuple(range(len(shape))),
                as_dtype=dtype,
                offset=offset % (1 << 32),
                wide=wide,
                leaf=i if wide else None,
                own=o,
            )  # fmt: skip
        )
        offset += math.prod(shape)
    ties = _tie_bounds(size, seed is not None, wide, len(shapes) if wide else None)
    return entries, _value_bounds(dtype) + ties


def global_topk_masks(
    leaves: Sequence[Any],
    k: Any,
    *,
    where: Sequence[Any] | None = None,
    ties: str = "position",
    seed: Any = None,
    minimum: Sequence[Any] | None = None,
    score: Callable[..., Array] | None = None,
) -> list[Array]:
    """The k largest scores of several arrays together, as one mask per array.

    The arrays may differ in shape and dtype (they are compared in the common one) and are not
    concatenated. Equal scores go to the earlier array, then to the lower position.

    Args:
      leaves: a list of score arrays (with `score`, of its operands: arrays or tuples of arrays).
      k: how many in all, an int or an integer scalar (traced or not); a traced k that 32 bits do
        not hold is given as its digits (high, low) to the base 2^24, both int32.
      where: for each array the eligible entries, or None.
      ties, seed, score: as for `topk_mask`.
      minimum: for each array how many of its own largest come before all others. If k is less than
        the sum of the minima, the largest of those come first.

    >>> a, b = jnp.array([5.0, 1.0]), jnp.array([[4.0], [3.0]])
    >>> [m.ravel().tolist() for m in global_topk_masks([a, b], 2)]
    [[True, False], [True, False]]
    >>> [m.ravel().tolist() for m in global_topk_masks([a, b], 2, minimum=[2, 0])]
    [[True, True], [False, False]]

    Raises:
      ValueError: a negative or fractional k, lists of another length, minima that exceed k where
        both are known, and what `topk_mask` raises.
    """
    salt = _check_ties(ties, seed)
    k = _check_k(k)
    leaves = list(leaves)
    where = _check_list(where, leaves, "where")
    least = [
        0 if m is None else _check_k(m, "minimum") for m in _check_list(minimum, leaves, "minimum")
    ]
    if isinstance(k, int) and all(isinstance(m, int) for m in least) and sum(least) > k:
        raise ValueError(f"minimum={least} adds up to {sum(least)}, more than k={k}")
    many = _many(leaves, where, score)
    if many.size == 0:
        return [jnp.zeros(_shape_and_dtype(a, many.score)[0], bool) for a in many.operands]
    own: list[Array | None] = [None] * len(leaves)
    if any(not isinstance(m, int) or m > 0 for m in least):
        own = [
            topk_mask(x, m, where=w, ties=ties, seed=seed, score=score)
            for x, m, w in zip(leaves, least, many.where)
        ]
    return _topk_together(many.operands, many.count(k), many.where, salt, own, score=many.score)


@functools.partial(jax.jit, static_argnames="score")
def _topk_together(operands, k: Count, where, seed, own, *, score) -> list[Array]:
    entries, bounds = _together(operands, where, seed, own, score)
    first = None
    if own[0] is not None:
        bounds = [Bounds(0, 1, smooth=True), *bounds]
    else:
        first = _first_thresholds(entries, k, bounds[0])
    found = _search.search(entries, k, bounds, first)
    return [_mask(e, found, positive(k)) for e in entries]


@functools.partial(jax.jit, static_argnames="score")
def _neighbours(operands, k: Count, where, *, score) -> tuple[Array, Array]:
    """The k-th and the (k+1)-th largest score of several arrays."""
    none = [None] * len(operands)
    entries, bounds = _together(operands, where, None, none, score)
    dtype = _dtype_of(operands, score)
    bounds = _value_bounds(dtype)
    found = _search.search(entries, k, bounds, _first_thresholds(entries, k, bounds[0]))
    some = positive(k)
    if len(bounds) == 1:
        kth, next_one = _around(entries, found.lo[0], some, bounds[0], dtype)
    else:
        kth, next_one = _around_by_value(entries, operands, found.lo, some, score, dtype)
    # Of several equal scores only some may be among the k largest; then the next one is equal.
    return kth, jnp.where(found.exact | ~some, next_one, kth)


def _around(entries, lo: Array, some: Array, bound: Bounds, dtype) -> tuple[Array, Array]:
    """The least score at or above `lo` and the greatest below it (of all, where not `some`).

    In integers: on CPU the reduction is vectorised, and seven times as fast as that of the scores.
    """
    lo = lo.reshape(())
    last = jnp.where(some, lo - 1, bound.last)
    none = jnp.uint32(2**32 - 1)
    ups, downs = [none], [none]
    for e in entries:
        levels, inside = e.levels(*e.operands)
        x = jnp.broadcast_to(levels[0], e.shape)
        # Distances from lo and from last wrap around on the other side.
        distances = _search.span(lo, x), _search.span(x, last)
        if inside is not None:
            distances = [jnp.where(inside, d, none) for d in distances]
        up, down = lax.reduce(
            tuple(distances),
            (none, none),
            lambda p, q: (jnp.minimum(p[0], q[0]), jnp.minimum(p[1], q[1])),
            tuple(range(len(e.shape))),
        )
        ups.append(up)
        downs.append(down)
    up, down = jnp.min(jnp.stack(ups)), jnp.min(jnp.stack(downs))
    low, high = _limits(dtype)
    is_above = some & (up <= _search.span(lo, jnp.int32(INT_MAX)))
    is_below = (~some | (lo > bound.lo)) & (down <= _search.span(jnp.int32(bound.lo), last))
    kth = jnp.where(is_above, _value_of(lo + _as_int(up), dtype), high)
    return kth, jnp.where(is_below, _value_of(last - _as_int(down), dtype), low)


def _around_by_value(entries, operands, lo, some, score, dtype) -> tuple[Array, Array]:
    """The same for scores of several levels."""
    low, high = _limits(dtype)
    above, below = [], []
    for e, arrays in zip(entries, operands):
        levels, inside = e.levels(*e.operands)
        x = jnp.broadcast_to(score(*arrays).astype(dtype), e.shape)
        chosen = _search.at_or_above(levels[: len(lo)], lo) & some
        chosen, rest = jnp.broadcast_to(chosen, e.shape), jnp.broadcast_to(~chosen, e.shape)
        if jnp.issubdtype(dtype, jnp.floating):
            rest &= ~jnp.isnan(x)
        if inside is not None:
            chosen, rest = chosen & inside, rest & inside
        a, b = lax.reduce(
            (jnp.where(chosen, x, high), jnp.where(rest, x, low)),
            (high, low),
            lambda p, q: (jnp.minimum(p[0], q[0]), jnp.maximum(p[1], q[1])),
            tuple(range(len(e.shape))),
        )
        above.append(a)
        below.append(b)
    return jnp.min(jnp.stack(above)), jnp.max(jnp.stack(below))


def _limits(dtype) -> tuple[Array, Array]:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(-jnp.inf, dtype), jnp.asarray(jnp.inf, dtype)
    info = jnp.iinfo(dtype)
    return jnp.asarray(info.min, dtype), jnp.asarray(info.max, dtype)


def kth_largest(
    scores: Any, k: Any, *, where: Any = None, score: Callable[..., Array] | None = None
) -> Array:
    """The value of the k-th largest eligible score, exact; see `global_kth_largest`.

    >>> float(kth_largest(jnp.array([3.0, 1.0, 2.0]), 2))
    2.0
    """
    return global_kth_largest([scores], k, where=[where], score=score)


def global_kth_largest(
    leaves: Sequence[Any],
    k: Any,
    *,
    where: Sequence[Any] | None = None,
    score: Callable[..., Array] | None = None,
) -> Array:
    """The value of the k-th largest eligible score of several arrays, exact.

    A scalar of the common dtype of the scores. k = 0 gives the greatest value of the dtype
    (infinity), k beyond the number of eligible scores the least eligible one.

    Args:
      leaves, where, score: as for `global_topk_masks`.
      k: an int or an integer scalar (traced or not).

    >>> float(global_kth_largest([jnp.array([5.0, 1.0]), jnp.array([4.0])], 2))
    4.0

    Raises:
      ValueError: no scores at all, and what `global_topk_masks` raises.
    """
    k = _check_k(k)
    many = _many(list(leaves), where, score)
    if many.size == 0:
        raise ValueError("leaves hold no scores at all: there is no k-th largest")
    return _neighbours(many.operands, many.count(k), many.where, score=many.score)[0]


def quantile(leaves: Sequence[Any], q: Any, *, score: Callable[..., Array] | None = None) -> Array:
    r"""The q-quantile of all entries of several arrays, interpolated linearly between neighbours.

    With N entries in ascending order $x_0 \le x_1 \le \dots$ and $h = q (N - 1)$, the result is
    $x_{\lfloor h \rfloor} + (h - \lfloor h \rfloor)(x_{\lfloor h \rfloor + 1} - x_{\lfloor h \rfloor})$,
    as `numpy.quantile(..., method="linear")`, in float32. The two neighbours are exact order
    statistics, and $\lfloor h \rfloor$ is exact: a Python number q is read as the decimal it stands
    for, a float32 q is the product of an integer below 2^24 and a power of two, and the product
    with N - 1 is taken in integers. (In float32, h would be off by hundreds at a billion entries.)

    Args:
      leaves: a list of arrays (with `score`, of its operands). NaN ranks below everything and is
        counted in N.
      q: a number in [0, 1], or a float scalar (traced or not).
      score: elementwise function, as for `topk_mask`.

    >>> float(quantile([jnp.array([1.0, 2.0]), jnp.array([4.0])], 0.75))
    3.0

    Raises:
      ValueError: q outside [0, 1] where it is known, no entries at all.
    """
    many = _many(list(leaves), None, score)
    if many.size == 0:
        raise ValueError("leaves hold no entries at all: there is no quantile")
    k, fraction = _rank_from_above(q, many.size)
    pair = _neighbours(many.operands, many.count(k), many.where, score=many.score)
    above, below = (x.astype(jnp.float32) for x in pair)
    return jnp.where(fraction > 0, below + fraction * (above - below), below).reshape(())


def _rank_from_above(q: Any, size: int) -> tuple[Any, Any]:
    """How many entries are above the lower neighbour of the q-quantile of `size` entries, and the
    fraction of the way from it to the upper one."""
    if isinstance(q, float | int):
        if not 0 <= q <= 1:
            raise ValueError(f"q={q}: must be in [0, 1]")
        h = Fraction(q).limit_denominator(10**12) * (size - 1)
        return size - 1 - math.floor(h), float(h - math.floor(h))
    if size > 1 << 32:
        raise ValueError(
            f"a traced q needs at most 2^32 entries, not {size}: give q as a Python number"
        )
    floor, fraction = _times(jnp.clip(jnp.asarray(q, jnp.float32), 0.0, 1.0), size - 1)
    return jnp.uint32(size - 1) - floor, fraction


def _times(q: Array, n: int) -> tuple[Array, Array]:
    """floor(q n) (uint32) and q n - floor(q n), for float32 q in [0, 1] and integer n < 2^32."""
    bits = lax.bitcast_convert_type(q, jnp.uint32)
    exponent = bits >> 23
    m = jnp.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, bits & 0x7FFFFF)
    e = 150 - jnp.maximum(exponent, 1)  # q = m 2^-e, 23 <= e < 150
    # The product m n < 2^56 in two words, by 16-bit halves.
    mh, ml, nh, nl = m >> 16, m & 0xFFFF, jnp.uint32(n >> 16), jnp.uint32(n & 0xFFFF)
    middle = ((ml * nl) >> 16) + ((ml * nh) & 0xFFFF) + ((mh * nl) & 0xFFFF)
    low = (middle << 16) | ((ml * nl) & 0xFFFF)
    high = mh * nh + ((ml * nh) >> 16) + ((mh * nl) >> 16) + (middle >> 16)
    small = jnp.minimum(e, 31)  # of low, where e < 32; else all of it and `beyond` bits of high
    beyond = jnp.minimum(jnp.maximum(e, 32) - 32, 31)
    floor = jnp.where(e < 32, (high << (32 - small)) | (low >> small), high >> beyond)
    one = jnp.uint32(1)
    rest_high = jnp.where(e < 32, 0, high & ((one << beyond) - 1))
    rest_low = jnp.where(e < 32, low & ((one << small) - 1), low)
    rest = rest_high.astype(jnp.float32) * 2.0**32 + rest_low.astype(jnp.float32)
    return floor, rest * jnp.exp2(-e.astype(jnp.float32))


def lamp_scores(scores: Array, *, lead: int = 0) -> Array:
    r"""Layer-adaptive magnitudes: $s_i^2 / \sum_{j: s_j \ge s_i} s_j^2$, equal scores in the order of
    their positions, float32.

    A global ranking by them prunes each layer by magnitude, and balances layers by the distortion
    that pruning does to each (Lee et al., Layer-adaptive sparsity for the magnitude-based pruning,
    2021). This is a sort, once for each layer: sharded layers are gathered for it.

    Args:
      scores: magnitudes, not negative.
      lead: so many leading axes stack independent layers.

    >>> lamp_scores(jnp.array([1.0, 2.0, 2.0])).tolist()
    [0.1111111119389534, 0.5, 1.0]
    """
    shape = scores.shape

    def one(s):
        order = jnp.argsort(s, stable=True)
        squares = jnp.square(s[order])
        at_least = jnp.cumsum(squares[::-1])[::-1]
        share = squares / jnp.maximum(at_least, jnp.finfo(jnp.float32).tiny)
        return jnp.zeros_like(s).at[order].set(share)

    flat = lax.stop_gradient(scores).astype(jnp.float32)
    flat = flat.reshape(math.prod(shape[:lead]), math.prod(shape[lead:]))
    return jax.vmap(one)(flat).reshape(shape)
