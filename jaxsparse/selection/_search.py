"""The search: the k-th largest of each of several rankings, by counting.

Entries are ranked by *levels*, int32 numbers compared one after the other, as letters of a word:
first the score, then what breaks ties. The search finds, level by level, the number `lo` of the
k-th entry: a bracket [lo, last] is divided by eight thresholds, one pass over the data counts the
entries at or above each, and the part that holds the k-th remains. Nothing but counters leaves a
pass, so arrays may be sharded in any way, and every device finds the same thresholds.

A *ranking* is a list of arrays whose entries compete, or one array whose slices are ranked apart.
All rankings are searched in the same passes: accelerators are kept waiting by many short loops,
sharded arrays by a sum over devices for each pass of each loop, and one loop compiles sooner than a
hundred. What belongs to the slices of all rankings (k, brackets, counters) is one row of numbers.

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
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse import _counts
from jaxsparse._counts import Count
from jaxsparse.selection._keys import INT_MAX, INT_MIN, Bounds, as_int

THRESHOLDS = 8
FARTHEST = np.uint32(2**32 - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """One array of entries to rank.

    Attributes:
      shape: its shape.
      axes: the axes that are ranked; the others count slices that are ranked apart.
      operands: the arrays that levels are computed from, a tuple.
      levels: `levels(seed, *operands)` gives the levels, int32 arrays of `shape` (or broadcastable
        to it), most significant first, and a bool array of the eligible entries or None.
      seed: of what breaks ties, uint32 scalar; those of all arrays of a ranking are the same.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    operands: tuple[Any, ...]
    levels: Callable[..., tuple[list[Array], Array | None]]
    seed: Array

    @property
    def ranked(self) -> int:
        """How many entries are ranked against each other."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape with 1 for the ranked axes: one number per slice."""
        return tuple(1 if a in self.axes else n for a, n in enumerate(self.shape))


Ranking = Sequence[Entries]


def slices(ranking: Ranking) -> int:
    """How many answers a ranking has."""
    return math.prod(ranking[0].slice_shape) if len(ranking) == 1 else 1


def size(ranking: Ranking) -> int:
    """How many entries compete in each slice of a ranking."""
    return sum(e.ranked for e in ranking)


def part(rankings: Sequence[Ranking], i: int, row: Array) -> Array:
    """Of a row of numbers, [..., slices of all rankings], those of the i-th, as they stand against
    its entries."""
    start = sum(map(slices, rankings[:i]))
    own = lax.slice_in_dim(row, start, start + slices(rankings[i]), axis=row.ndim - 1)
    shape = rankings[i][0].slice_shape if len(rankings[i]) == 1 else ()
    return own.reshape(*row.shape[:-1], *shape)


class Found(NamedTuple):
    """The search's answer: the k largest are lexicographically at or above `lo`.

    Attributes:
      lo: for each ranking one array per level, as they stand against its entries.
      some: for each ranking whether k is positive.
      seed: for each ranking its seed.
      exact: a row, whether exactly k entries are there (else there are fewer than k in all, or the last
        level has equal numbers).
    """

    lo: list[list[Array]]
    some: list[Array]
    seed: list[Array]
    exact: Array


class _Own(NamedTuple):
    """What the entries of one ranking are compared with, see `_State`."""

    seed: Array
    some: Array
    level: Array
    lo: Array
    last: Array
    thresholds: list[Array]
    found: list[Array]


class _State(NamedTuple):
    """Where the search stands, of every slice of every ranking.

    What a ranking reads of the rows is cut out of them before a pass, not in it: so arrays of one shape
    have one and the same kernel, which XLA for CPU and GPU compiles once.
    """

    level: Array  # the one that is searched; their number: no more of them
    found: Array  # [levels, slices], the answers so far; INT_MIN accepts everything
    above: Count  # entries above the answers at the levels before
    lo: Array
    last: Array
    c_lo: Count  # entries at or above lo (at first: no fewer than these)
    c_hi: Count  # entries above last
    thresholds: Array  # [8, slices], in (lo, last]
    own: list[Array]  # of each ranking, the numbers that `_own` unpacks


def search(rankings: Sequence[Ranking], k: Count, bounds: Sequence[Bounds]) -> Found:
    """The levels of the k-th largest entry of each slice, for k from 0 to all.

    Args:
      rankings: all of them have 2^31 entries or more in a slice, or none has.
      k: a row of counts, at most the number of entries. More than there are eligible ones means all
        of those.
      bounds: the range of each level.
    """
    sizes = np.concatenate([np.full(slices(r), size(r)) for r in rankings])
    operands = [[e.operands for e in r] for r in rankings]
    plain = _nothing((operands, k)) == 0

    def row(x):
        x = jnp.broadcast_to(x, sizes.shape) if x.ndim < 2 else x
        return jnp.where(plain, x, x)

    k = tuple(map(row, k))
    every = np.divmod(sizes, 1 << _counts.BASE_BITS) if len(k) == 2 else (sizes,)
    zero = row(jnp.int32(0))
    lows = [row(jnp.asarray(bound.lo, jnp.int32)) for bound in bounds]
    seeds = [jnp.broadcast_to(as_int(r[0].seed), (slices(r),)) for r in rankings]
    step = _Step(rankings, operands, bounds, lows, row(jnp.concatenate(seeds)), k)
    start = _State(
        level=zero - 1,
        found=jnp.stack([lows[0], *[zero + INT_MIN for _ in bounds[1:]]]),
        above=tuple(zero for _ in k),
        lo=zero,
        last=zero,
        c_lo=tuple(row(jnp.asarray(c, jnp.int32)) for c in every),
        c_hi=tuple(zero for _ in k),
        thresholds=jnp.stack([zero] * THRESHOLDS),
        own=[],
    )
    end = lax.while_loop(step.goes_on, step, step.advance(start))
    own = [_own(numbers) for numbers in end.own]
    exact = _counts.equal(end.c_lo, k)
    return Found([x.found for x in own], [x.some > 0 for x in own], [x.seed for x in own], exact)


def _own(numbers: Array) -> _Own:
    seed, some, level, lo, last, *more = numbers
    seed = lax.bitcast_convert_type(seed, jnp.uint32)
    return _Own(seed, some, level, lo, last, more[:THRESHOLDS], more[THRESHOLDS:])


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One pass over the data: the counts at eight thresholds, and the narrower bracket.

    Every slice is at a level of its own: one loop has a kernel for each array, where a loop for each
    level would have as many again.
    """

    rankings: Sequence[Ranking]
    operands: Any
    bounds: Sequence[Bounds]
    lows: Sequence[Array]  # those of `bounds`, as rows
    seeds: Array  # int32, a row
    k: Count

    def busy(self, s: _State) -> Array:
        return _counts.positive(self.k) & (s.lo < s.last) & ~_counts.equal(s.c_lo, self.k)

    def goes_on(self, s: _State) -> Array:
        return jnp.any(s.level < len(self.bounds))

    def __call__(self, s: _State) -> _State:
        s, operands = lax.optimization_barrier((s, self.operands))
        parts = []
        for ranking, given, numbers in zip(self.rankings, operands, s.own):
            own = _own(numbers)
            counts, low, high = self.read(ranking[0], given[0], own)
            for e, arrays in zip(ranking[1:], given[1:]):
                more, a, b = self.read(e, arrays, own)
                counts = _counts.add(counts, more)
                low, high = jnp.minimum(low, a), jnp.minimum(high, b)
            parts.append((counts, low, high))
        # Each [8, slices] or [slices].
        counts, low, high = jax.tree.map(lambda *x: jnp.concatenate(x, -1), *parts)
        above = tuple(jnp.broadcast_to(c[None], s.thresholds.shape) for c in s.above)
        return self.advance(self.narrow(s, _counts.add(above, counts), low, high))

    def read(self, e: Entries, arrays: Any, own: _Own) -> tuple[Count, Array, Array]:
        """Of the slices of an array: the entries at or above each of the thresholds, and how far the
        least and the greatest number in the bracket are from its ends."""
        levels, inside = e.levels(own.seed, *arrays)
        x = levels[0] if inside is None else jnp.where(inside, levels[0], jnp.int32(INT_MIN))
        same: Any = True
        for j in range(1, len(levels)):
            # What a level before has told from the k-th lies below all thresholds.
            same &= levels[j - 1] == own.found[j - 1]
            kept = same if inside is None else same & inside
            x = jnp.where(own.level < j, x, jnp.where(kept, levels[j], jnp.int32(INT_MIN)))
        x = jnp.broadcast_to(x, e.shape)
        # Distances from the ends of the bracket wrap around for numbers outside.
        distances = [span(own.lo, x), span(x, own.last)]
        flags = [x >= threshold for threshold in own.thresholds]
        more, ends = totals(flags, distances, e.axes, wide=len(self.k) == 2)
        low, high = (_unsharded(d).reshape(-1) for d in ends)
        digits = zip(*[[_unsharded(d).reshape(-1) for d in c] for c in more])
        return tuple(jnp.stack(d) for d in digits), low, high

    def narrow(self, s: _State, counts: Count, low: Array, high: Array) -> _State:
        """The part of the bracket that holds the k-th."""
        # The higher a threshold, the fewer entries: the counts that belong to the highest threshold
        # that has enough, and to the lowest that has not, are the least and the greatest.
        busy = self.busy(s)
        enough = _counts.at_least(counts, tuple(c[None] for c in self.k))
        up = busy[None] & enough & (s.thresholds > s.lo[None])
        down = busy[None] & ~enough & (s.thresholds <= s.last[None])
        lo = jnp.maximum(s.lo, jnp.max(jnp.where(up, s.thresholds, INT_MIN), 0))
        last = jnp.minimum(s.last, jnp.min(jnp.where(down, s.thresholds - 1, INT_MAX), 0))
        c_lo = _counts.choose(jnp.any(up, 0), _counts.least(counts, up), s.c_lo)
        c_hi = _counts.choose(jnp.any(down, 0), _counts.greatest(counts, down), s.c_hi)
        # A bracket that holds one number only, or two, however many entries, ends the search.
        width = span(s.lo, s.last)
        least_one = s.lo + as_int(jnp.minimum(low, width))
        greatest_one = s.last - as_int(jnp.minimum(high, width))
        lo = jnp.where(busy, jnp.maximum(lo, jnp.minimum(least_one, last)), lo)
        last = jnp.where(busy, jnp.minimum(last, jnp.maximum(greatest_one, lo)), last)
        return s._replace(lo=lo, last=last, c_lo=c_lo, c_hi=c_hi)

    def advance(self, s: _State) -> _State:
        """The thresholds of the next pass. A slice whose bracket is one number goes to its next level;
        to none, if so many entries are above or at it."""
        number = len(self.bounds)
        over = (s.level < number) & ~self.busy(s)
        found = [jnp.where(over & (s.level == j), s.lo, x) for j, x in enumerate(s.found)]
        ended = ~_counts.positive(self.k) | _counts.equal(s.c_lo, self.k)
        level = jnp.where(over, jnp.where(ended, number, s.level + 1), s.level)
        above = _counts.choose(over, s.c_hi, s.above)
        lo, last, given = s.lo, s.last, []
        for j, (bound, low) in enumerate(zip(self.bounds, self.lows)):
            first = over & (level == j)
            lo, last = jnp.where(first, low, lo), jnp.where(first, bound.last, last)
            if not bound.smooth:
                given.append((first, _first_thresholds(bound)))
        thresholds = _next_thresholds(lo, last, s.c_lo, s.c_hi, self.k)
        for first, probes in given:
            thresholds = jnp.where(first[None], probes[:, None], thresholds)
        some = _counts.positive(self.k).astype(jnp.int32)
        rows = jnp.stack([self.seeds, some, level, lo, last, *thresholds, *found])
        own = [part(self.rankings, i, rows) for i in range(len(self.rankings))]
        return _State(level, jnp.stack(found), above, lo, last, s.c_lo, s.c_hi, thresholds, own)


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
    return counts, [jnp.min(x, axis=axes, keepdims=True, initial=FARTHEST) for x in minima]


def _totals_in_one(flags, minima, *, axes, wide):
    """All in one reduction, which alone is vectorised on CPU."""
    ones = [f.astype(jnp.int32) for f in flags]
    numbers = [(jnp.zeros_like(x), x) if wide else (x,) for x in ones]
    n = len(jax.tree.leaves(numbers))
    structure = jax.tree.structure(numbers)

    def combine(a, b):
        pairs = zip(structure.unflatten(a[:n]), structure.unflatten(b[:n]))
        sums = [_counts.add(x, y) for x, y in pairs]
        return *jax.tree.leaves(sums), *(jnp.minimum(x, y) for x, y in zip(a[n:], b[n:]))

    operands = [*jax.tree.leaves(numbers), *minima]
    shape = [1 if a in axes else size for a, size in enumerate(ones[0].shape)]
    if axes:
        empty = [np.int32(0)] * n + [FARTHEST] * len(minima)
        operands = lax.reduce(tuple(operands), tuple(empty), combine, tuple(axes))
        operands = [x.reshape(shape) for x in operands]
    return structure.unflatten(operands[:n]), list(operands[n:])


def _first_thresholds(bound: Bounds) -> Array:
    """The thresholds of the first pass over a level of which nothing is known."""
    if bound.probes:
        return jnp.asarray(bound.probes, jnp.int32)
    steps = range(1, THRESHOLDS + 1)
    width = bound.last - bound.lo
    return jnp.asarray([bound.lo + -(-width * i // (THRESHOLDS + 1)) for i in steps], jnp.int32)


def _next_thresholds(lo, last, c_lo: Count, c_hi: Count, k: Count) -> Array:
    """Eight numbers in (lo, last]: two around the guess of linear interpolation between the counts,
    which is good where entries are spread evenly; three on the way from it to the guess of their
    logarithms, which is good in a tail; and three uniform ones for where both are not."""
    width = span(lo, last)
    i = np.arange(1, 4, dtype=np.uint32)[:, None]
    uniform = (width // 4)[None] * i + ((width % 4)[None] * i) // 4
    held = jnp.maximum(_counts.minus(c_lo, c_hi), 1.0)
    linear = jnp.clip(_counts.minus(c_lo, k) / held, 0.0, 1.0)
    deviation = jnp.sqrt((linear * (1 - linear) + 1 / held) / held)
    zero = tuple(jnp.zeros_like(c) for c in k)
    most, wanted, least = (
        jnp.log(jnp.maximum(_counts.minus(c, zero), 0.5)) for c in (c_lo, k, c_hi)
    )
    tail = jnp.clip((most - wanted) / jnp.maximum(most - least, 1e-6), 0.0, 1.0)
    way = [linear + (tail - linear) * (step / 3) for step in (1, 2, 3)]
    guess = jnp.stack([linear - deviation, linear + deviation, *way])
    guess = jnp.clip(guess * width[None].astype(jnp.float32), 0.0, 4294967040.0)
    step = jnp.concatenate([uniform, guess.astype(jnp.uint32)])
    return lo[None] + as_int(jnp.minimum(jnp.maximum(step, 1), width[None]))


def span(lo: Array, last: Array) -> Array:
    """last - lo as uint32; differences of int32 may exceed int32."""
    return lax.bitcast_convert_type(last, jnp.uint32) - lax.bitcast_convert_type(lo, jnp.uint32)


def _unsharded(x: Array) -> Array:
    """Counters on every device, where types say how arrays are sharded; they are few."""
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def _nothing(arrays) -> Array:
    """0, made of no entries of the arrays: inside `shard_map` it has the type of numbers that
    differ between devices as the data do, and gives it to what loops start from."""
    zero = jnp.int32(0)
    for x in jax.tree.leaves(arrays):
        x = jnp.reshape(x, 1) if jnp.ndim(x) == 0 else x
        zero += jnp.sum(lax.slice(x, (0,) * x.ndim, (0,) * x.ndim), dtype=jnp.int32)
    return zero
