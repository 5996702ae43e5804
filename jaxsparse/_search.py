"""The search under `jaxsparse.selection`: the k-th largest of many arrays by counting.

Entries are ranked by *levels*, int32 numbers compared one after the other, as letters of a word:
first the score, then what breaks ties. The search finds, level by level, the number `lo` of the
k-th entry: a bracket [lo, last] is divided by eight thresholds, one pass over the data counts the
entries at or above each, and the part that holds the k-th remains. Nothing but counters leaves a
pass, so arrays may be sharded in any way, and every device finds the same thresholds.

Three things decide over a factor of ten on XLA for CPU, and none hurts elsewhere:
1. Eight counts are taken at once by one variadic `lax.reduce`. It is vectorised; a single integer
   `jnp.sum(x >= t)` is not, and takes ten times as long.
2. Operands pass an optimization barrier inside the loop. Otherwise the numbers derived from them,
   which do not change in the loop, are computed before it and stored.
3. No array of the size of the data is made at all; thresholds go out, the mask is computed last.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

THRESHOLDS = 8
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# Where 32 bits do not hold the counts, they have two digits to this base.
BASE_BITS = 24
WIDE = 2**31

Count = tuple[Array, ...]  # (units,) or (high, low) digits, int32


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """One array of entries to rank.

    Attributes:
      shape: its shape.
      axes: the axes that are ranked; the others count slices that are ranked apart.
      operands: the arrays that levels are computed from, a tuple.
      levels: `levels(*operands)` gives the levels, int32 arrays of `shape` (or broadcastable to
        it), most significant first, and a bool array of the eligible entries or None.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    operands: tuple[Any, ...]
    levels: Callable[..., tuple[list[Array], Array | None]]

    @property
    def ranked(self) -> int:
        """How many entries are ranked against each other."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape with 1 for the ranked axes: one number per slice."""
        return tuple(1 if a in self.axes else n for a, n in enumerate(self.shape))

    @property
    def sizes(self) -> np.ndarray:
        """How many entries each slice has, in a row."""
        return np.full(math.prod(self.kept_shape), self.ranked, np.int32)

    def facing(self, x: Array) -> Array:
        """Numbers in a row, one per slice along the last axis, as they stand against the entries."""
        return x.reshape(*x.shape[:-1], *self.kept_shape)

    def gathered(self, x: Array, combine: Callable[..., Array], nothing: Any) -> Array:
        """What a reduction over `axes` gives, [..., *kept_shape], as one number per slice in a row.
        `combine` (`jnp.sum` or `jnp.min`) and its neutral element join numbers of one slice."""
        del combine, nothing
        return x.reshape(*x.shape[: x.ndim - len(self.shape)], -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Entries):
    """Arrays that are ranked apart, laid out one after the other in rows of one length: `shape` is
    [rows, length], and the last row of each is filled up with entries that are not eligible.

    Attributes:
      parts: how many entries each of them has.
    """

    parts: tuple[int, ...] = ()

    @property
    def sizes(self) -> np.ndarray:
        return np.asarray(self.parts, np.int32)

    @property
    def rows(self) -> np.ndarray:
        """How many rows each of them has."""
        return -(-self.sizes // self.shape[1])

    @property
    def starts(self) -> np.ndarray:
        """The first row of each of them."""
        return np.cumsum(self.rows) - self.rows

    @property
    def owner(self) -> np.ndarray:
        """Which of them each row belongs to."""
        return np.repeat(np.arange(len(self.parts)), self.rows)

    def facing(self, x: Array) -> Array:
        return x[..., self.owner, None]

    def gathered(self, x: Array, combine: Callable[..., Array], nothing: Any) -> Array:
        i = np.arange(max(self.rows))
        is_own = i < self.rows[:, None]
        numbers = x[..., 0][..., np.where(is_own, self.starts[:, None] + i, 0)]
        return combine(jnp.where(is_own, numbers, nothing), axis=-1)


class Bounds(NamedTuple):
    """All numbers of a level lie in [lo, last]. `smooth`: they are spread evenly, so that the first
    pass may interpolate; else it takes the thresholds `probes`, or uniform ones."""

    lo: Any  # an integer; or an array of them, one per slice
    last: int
    smooth: bool = False
    probes: tuple[int, ...] = ()


class Found(NamedTuple):
    """The search's answer: the k largest are lexicographically at or above `lo`.

    Attributes:
      lo: one number per level.
      exact: whether exactly k entries are there (else there are fewer than k in all, or the last
        level has equal numbers).
      passes: how many times the data were read (int32 scalar).
    """

    lo: list[Array]
    exact: Array
    passes: Array


# -- Counts ----------------------------------------------------------------------------------------


def count_of(value: Any, cap: int, wide: bool) -> Count:
    """A count from a Python integer, an integer array or two digits, not above `cap` and not
    negative."""
    if isinstance(value, tuple):
        top = count_of(cap, cap, wide=True)
        value = choose(at_least(value, top), top, value)
        return value if wide else ((value[0] << BASE_BITS) | value[1],)
    if isinstance(value, int | np.integer):
        value = max(min(int(value), cap), 0)
        if not wide:
            return (jnp.int32(value),)
        return jnp.int32(value >> BASE_BITS), jnp.int32(value & ((1 << BASE_BITS) - 1))
    value = jnp.asarray(value)
    if cap < jnp.iinfo(value.dtype).max:
        value = jnp.minimum(value, jnp.asarray(cap, value.dtype))
    value = jnp.maximum(value, jnp.zeros((), value.dtype))
    if not wide:
        return (value.astype(jnp.int32),)
    low = value & jnp.asarray((1 << BASE_BITS) - 1, value.dtype)
    return (value >> BASE_BITS).astype(jnp.int32), low.astype(jnp.int32)


def at_least(a: Count, b: Count) -> Array:
    """a >= b."""
    if len(a) == 1:
        return a[0] >= b[0]
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def equal(a: Count, b: Count) -> Array:
    """a == b."""
    same = a[0] == b[0]
    return same if len(a) == 1 else same & (a[1] == b[1])


def add(a: Count, b: Count) -> Count:
    """a + b."""
    if len(a) == 1:
        return (a[0] + b[0],)
    return carry(a[0] + b[0], a[1] + b[1])


def carry(high: Array, low: Array) -> Count:
    """The two digits of high * base + low."""
    return high + (low >> BASE_BITS), low & ((1 << BASE_BITS) - 1)


def minus(a: Count, b: Count) -> Array:
    """a - b, rounded to float32."""
    if len(a) == 1:
        return (a[0] - b[0]).astype(jnp.float32)
    high, low = (x - y for x, y in zip(a, b))
    return high.astype(jnp.float32) * (1 << BASE_BITS) + low.astype(jnp.float32)


def to_float(a: Count) -> Array:
    """a, rounded to float32."""
    return minus(a, tuple(jnp.zeros((), jnp.int32) for _ in a))


def positive(a: Count) -> Array:
    """a > 0."""
    return a[0] > 0 if len(a) == 1 else (a[0] > 0) | (a[1] > 0)


def choose(flag: Array, a: Count, b: Count) -> Count:
    """a where `flag`, else b."""
    return tuple(jnp.where(flag, x, y) for x, y in zip(a, b))


def totals(
    flags: Sequence[Array], minima: Sequence[Array], axes: Sequence[int], wide: bool = False
) -> tuple[list[Count], list[Array]]:
    """How many of each of the boolean arrays are True, and the minima of uint32 arrays, over
    `axes`, dimensions kept."""
    in_one = functools.partial(_totals_in_one, axes=tuple(axes), wide=wide)
    if wide:
        return in_one(flags, minima)
    apart = functools.partial(_totals_apart, axes=tuple(axes))
    return lax.platform_dependent(list(flags), list(minima), cpu=in_one, default=apart)


def _totals_apart(flags, minima, *, axes):
    """Sums and minima are what sharded arrays are reduced by in one exchange, those of many arrays
    together; of a reduction of several operands each would be gathered."""
    counts = [(jnp.sum(f, axis=axes, dtype=jnp.int32, keepdims=True),) for f in flags]
    most = jnp.uint32(2**32 - 1)  # of nothing
    return counts, [jnp.min(x, axis=axes, keepdims=True, initial=most) for x in minima]


def _totals_in_one(flags, minima, *, axes, wide):
    """All in one reduction, which alone is vectorised on CPU."""
    ones = [f.astype(jnp.int32) for f in flags]
    numbers = [(x, jnp.zeros_like(x)) if wide else (x,) for x in ones]
    n = len(jax.tree.leaves(numbers))
    structure = jax.tree.structure(numbers)

    def combine(a, b):
        pairs = zip(structure.unflatten(a[:n]), structure.unflatten(b[:n]))
        sums = [tuple(reversed(add(x[::-1], y[::-1]))) for x, y in pairs]
        return *jax.tree.leaves(sums), *(jnp.minimum(x, y) for x, y in zip(a[n:], b[n:]))

    operands = [*jax.tree.leaves(numbers), *minima]
    shape = [1 if a in axes else size for a, size in enumerate(ones[0].shape)]
    if axes:
        empty = [jnp.int32(0)] * n + [jnp.uint32(2**32 - 1)] * len(minima)
        operands = lax.reduce(tuple(operands), tuple(empty), combine, tuple(axes))
        operands = [x.reshape(shape) for x in operands]
    counts = structure.unflatten(operands[:n])
    return [c[::-1] for c in counts], list(operands[n:])


def least(a: Count, where: Array) -> Count:
    """The least of the counts along the first axis, of those `where`."""
    high = jnp.min(jnp.where(where, a[0], INT_MAX), 0)
    if len(a) == 1:
        return (high,)
    return high, jnp.min(jnp.where(where & (a[0] == high), a[1], INT_MAX), 0)


def greatest(a: Count, where: Array) -> Count:
    """The greatest of the counts along the first axis, of those `where`."""
    high = jnp.max(jnp.where(where, a[0], -1), 0)
    if len(a) == 1:
        return (high,)
    return high, jnp.max(jnp.where(where & (a[0] == high), a[1], -1), 0)


# -- The search ------------------------------------------------------------------------------------


class _State(NamedTuple):
    lo: Array
    last: Array
    c_lo: Count  # entries at or above lo (at first: no fewer than these)
    c_hi: Count  # entries above last
    thresholds: Array  # [8, *shape of lo], in (lo, last]
    slow: Array  # the pass before has not narrowed the bracket by 8
    passes: Array


def search(
    entries: Sequence[Entries],
    k: Count,
    bounds: Sequence[Bounds],
    first: Array | None = None,
    *,
    apart: bool = False,
) -> Found:
    """The levels of the k-th largest entry, for k from 0 to all; one answer per slice.

    Args:
      entries: arrays that are ranked together (those with slices: one array only).
      apart: each array is ranked by itself instead, all in the same passes. There is one answer for
        each slice of each, in a row (`cut` finds those of an array), and so are k and the lower ends
        of bounds. A pass then waits for one sum of counters over devices, not for one per array.
      k: a count that broadcasts to one per slice, at most the number of entries. More than there
        are eligible ones means all of those.
      bounds: the range of each level.
      first: eight thresholds of the first level to begin with, [8] or one row of them per slice.
    """
    shape: tuple[int, ...]
    size: Any
    if apart:
        size, wide = np.concatenate([e.sizes for e in entries]), False
        shape = size.shape
    else:
        size = sum(e.ranked for e in entries)
        wide = size >= WIDE
        shape = entries[0].kept_shape if len(entries) == 1 else ()
    operands = tuple(e.operands for e in entries)
    plain = _nothing((operands, k)) == 0

    def per_slice(x):
        x = jnp.broadcast_to(x, shape) if x.ndim <= len(shape) else x
        return jnp.where(plain, x, x)

    k = tuple(per_slice(c) for c in k)
    some = positive(k)
    c_lo = tuple(per_slice(c) for c in count_of(size, int(np.max(size)), wide))
    c_hi = tuple(per_slice(c) for c in count_of(0, 0, wide))
    passes = jnp.where(plain, jnp.int32(0), jnp.int32(0))
    found: list[Array] = []

    for j, bound in enumerate(bounds):
        step = _Step(entries, operands, j, tuple(found), k, some, c_hi, wide, shape, apart)
        lo, last = per_slice(jnp.asarray(bound.lo, jnp.int32)), per_slice(jnp.int32(bound.last))
        slow = per_slice(jnp.asarray(not bound.smooth))
        if bound.smooth:
            thresholds = _next_thresholds(lo, last, c_lo, c_hi, k, slow)
        else:
            given = first if j == 0 and first is not None else first_thresholds(bound)
            given = given if given.ndim > 1 else _front(given, lo)
            thresholds = per_slice(jnp.broadcast_to(given, (THRESHOLDS, *shape)))
        start = _State(lo, last, c_lo, c_hi, thresholds, slow, passes)
        done = some & equal(c_lo, k)
        end = lax.while_loop(step.goes_on, step, start)
        # Where the levels before have told the k-th from the next, this one accepts everything.
        found.append(jnp.where(done, INT_MIN, end.lo) if j else end.lo)
        c_lo, c_hi, passes = end.c_lo, end.c_hi, end.passes
    return Found(found, equal(c_lo, k), passes)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One pass over the data: the counts at eight thresholds, and the narrower bracket."""

    entries: Sequence[Entries]
    operands: Any
    j: int  # the level that is searched
    found: tuple[Array, ...]  # the answer at the levels before
    k: Count
    some: Array
    base: Count  # entries above the answer at the levels before
    wide: bool
    shape: tuple[int, ...]
    apart: bool

    def busy(self, s: _State) -> Array:
        return self.some & (s.lo < s.last) & ~equal(s.c_lo, self.k)

    def goes_on(self, s: _State) -> Array:
        return jnp.any(self.busy(s))

    def __call__(self, s: _State) -> _State:
        s, operands = lax.optimization_barrier((s, self.operands))
        return self.narrow(s, *self.read(s, operands))

    def read(self, s: _State, operands) -> tuple[Count, Array, Array]:
        """Entries at or above each of the thresholds, and how far the least and the greatest number
        in the bracket are from its ends."""
        t, none = s.thresholds, jnp.uint32(2**32 - 1)
        parts = []
        for i, (e, arrays) in enumerate(zip(self.entries, operands)):
            own = functools.partial(cut, self.entries, i) if self.apart else lambda x: x
            levels, inside = e.levels(*arrays)
            for level, value in zip(levels, self.found):
                same = level == own(value)
                inside = same if inside is None else inside & same
            x = levels[self.j]
            x = jnp.broadcast_to(x if inside is None else jnp.where(inside, x, INT_MIN), e.shape)
            # Distances from the ends of the bracket wrap around for numbers outside.
            distances = [span(own(s.lo), x), span(x, own(s.last))]
            if inside is not None:
                distances = [jnp.where(inside, d, none) for d in distances]
            more, ends = totals([x >= v for v in own(t)], distances, e.axes, self.wide)
            digits = tuple(jnp.stack(c) for c in zip(*more))
            if self.apart:
                digits = tuple(e.gathered(c, jnp.sum, 0) for c in digits)
                ends = [e.gathered(x, jnp.min, none) for x in ends]
            else:
                digits = tuple(c.reshape(THRESHOLDS, *self.shape) for c in digits)
                ends = [x.reshape(self.shape) for x in ends]
            parts.append((digits, *ends))
        base = tuple(jnp.broadcast_to(c, t.shape) for c in self.base)
        if self.apart:
            counts, low, high = jax.tree.map(lambda *x: jnp.concatenate(x, -1), *parts)
            return add(base, counts), low, high
        counts, low, high = parts[0]
        for more, a, b in parts[1:]:
            counts, low, high = add(counts, more), jnp.minimum(low, a), jnp.minimum(high, b)
        return add(base, counts), low, high

    def narrow(self, s: _State, counts: Count, low: Array, high: Array) -> _State:
        # The higher a threshold, the fewer entries: the counts that belong to the highest threshold
        # that has enough, and to the lowest that has not, are the least and the greatest.
        enough, busy = at_least(counts, self.k), self.busy(s)
        up = busy & enough & (s.thresholds > s.lo)
        down = busy & ~enough & (s.thresholds <= s.last)
        lo = jnp.maximum(s.lo, jnp.max(jnp.where(up, s.thresholds, INT_MIN), 0))
        last = jnp.minimum(s.last, jnp.min(jnp.where(down, s.thresholds - 1, INT_MAX), 0))
        c_lo = choose(jnp.any(up, 0), least(counts, up), s.c_lo)
        c_hi = choose(jnp.any(down, 0), greatest(counts, down), s.c_hi)
        # A bracket that holds one number only, or two, however many entries, ends the search.
        least_one = s.lo + _int(jnp.minimum(low, span(s.lo, s.last)))
        greatest_one = s.last - _int(jnp.minimum(high, span(s.lo, s.last)))
        lo = jnp.where(busy, jnp.maximum(lo, jnp.minimum(least_one, last)), lo)
        last = jnp.where(busy, jnp.minimum(last, jnp.maximum(greatest_one, lo)), last)
        slow = (span(lo, last) > span(s.lo, s.last) >> 3) & (
            8 * minus(c_lo, c_hi) > minus(s.c_lo, s.c_hi)
        )
        thresholds = _next_thresholds(lo, last, c_lo, c_hi, self.k, slow)
        return _State(lo, last, c_lo, c_hi, thresholds, slow, s.passes + 1)


def cut(entries: Sequence[Entries], i: int, x: Array) -> Array:
    """Of numbers in a row, one per slice of arrays that are ranked apart, those of the i-th array."""
    start = sum(e.sizes.size for e in entries[:i])
    own = lax.slice_in_dim(x, start, start + entries[i].sizes.size, axis=-1)
    return entries[i].facing(own)


def first_thresholds(bound: Bounds) -> Array:
    """The thresholds of the first pass over a level of which nothing is known."""
    if bound.probes:
        return jnp.asarray(bound.probes, jnp.int32)
    steps = range(1, THRESHOLDS + 1)
    width = bound.last - bound.lo
    return jnp.asarray([bound.lo + -(-width * i // (THRESHOLDS + 1)) for i in steps], jnp.int32)


def _nothing(arrays) -> Array:
    """0, made of no entries of the arrays: inside `shard_map` it has the type of numbers that
    differ between devices as the data do, and gives it to what loops start from."""
    zero = jnp.int32(0)
    for x in jax.tree.leaves(arrays):
        x = jnp.reshape(x, 1) if jnp.ndim(x) == 0 else x
        zero += jnp.sum(lax.slice(x, (0,) * x.ndim, (0,) * x.ndim), dtype=jnp.int32)
    return zero


def span(lo: Array, last: Array) -> Array:
    """last - lo as uint32; differences of int32 may exceed int32."""
    return lax.bitcast_convert_type(last, jnp.uint32) - lax.bitcast_convert_type(lo, jnp.uint32)


# Thresholds around the guess, in standard deviations of the guess.
_AROUND = (-9.0, -2.6, -1.1, -0.35, 0.35, 1.1, 2.6, 9.0)


def _int(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _front(x, like: Array) -> Array:
    """`x` along a new first axis of `like`."""
    return jnp.asarray(x).reshape(-1, *(1,) * like.ndim)


def _next_thresholds(lo, last, c_lo: Count, c_hi: Count, k: Count, slow) -> Array:
    """Eight numbers in (lo, last]: around the guess of linear interpolation between the counts, or
    uniform where that has just failed."""
    width = span(lo, last)
    quotient, rest = width // (THRESHOLDS + 1), width % (THRESHOLDS + 1)
    i = _front(np.arange(1, THRESHOLDS + 1, dtype=np.uint32), lo)
    uniform = quotient * i + (rest * i + THRESHOLDS) // (THRESHOLDS + 1)
    held = jnp.maximum(minus(c_lo, c_hi), 1.0)
    p = jnp.clip(minus(c_lo, k) / held, 0.0, 1.0)
    spread = jnp.sqrt((p * (1 - p) + 1 / held) / held)
    guess = (p + _front(np.asarray(_AROUND, np.float32), lo) * spread) * width.astype(jnp.float32)
    guess = jnp.clip(guess, 0.0, 4294967040.0).astype(jnp.uint32)
    step = jnp.where(slow | (held <= 16), uniform, guess)
    step = jnp.minimum(jnp.maximum(step, 1), width)
    return lo + lax.bitcast_convert_type(step, jnp.int32)


def at_or_above(levels: Sequence[Array], lo: Sequence[Array]) -> Array:
    """Whether the levels are lexicographically at or above `lo`."""
    mask = levels[-1] >= lo[-1]
    for level, value in reversed(list(zip(levels[:-1], lo[:-1]))):
        mask = (level > value) | ((level == value) & mask)
    return mask
