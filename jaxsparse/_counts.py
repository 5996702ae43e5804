"""Integer counts: how many weights a sparsity leaves, and counts that 32 bits do not hold.

The convention of the library, for a tensor of `n` weights at sparsity `S`:

    zeros = floor(S n),    kept = n - zeros

Counts that are known when a function is traced are Python integers, computed from integers and
exact fractions. Counts that depend on traced values (a schedule's position, a swept sparsity) are
int32 arrays below 2^31 and `Wide` from there on. No count is ever a float: float32 cannot count
beyond 2^24, and a count that is one off is a contract broken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

# A float32 fraction carries a relative error of 2^-24; 0.9 becomes 0.89999998 and floor(0.9 * 10)
# would be 8. A tolerance of 2^-23 repairs this and moves no count for tensors below 2^22 weights.
_FRACTION_BITS = 30
_TOLERANCE = 1 << (_FRACTION_BITS - 23)
MAX_TRACED = 2**31 - 1
WIDE = 2**31  # from here on counts are Wide
BASE_BITS = 24
_LIMIT = 55  # bits of the largest Wide

Count = tuple[Array, ...]  # one int32 array, or the two digits of a Wide


class Wide(NamedTuple):
    """The integer high 2^24 + low, below 2^55, in two int32 arrays, 0 <= low < 2^24.

    `n - wide` and `wide // size` are again Wide, for Python integers n and size.
    """

    high: Array
    low: Array

    def __rsub__(self, n: int) -> Wide:
        high, low = digits(n)
        return Wide(*carry(high - self.high, low - self.low))

    def __floordiv__(self, size: int) -> Wide:
        if not 0 < size < 1 << 24:
            raise ValueError(
                f"units of {size} weights: a count beyond 2^31 is divided by less than 2^24"
            )
        quotient, rest = [], jnp.uint32(0)
        for i in reversed(range(7)):  # long division, byte by byte
            word, shift = (self.high, 8 * i - 24) if i > 2 else (self.low, 8 * i)
            rest = (rest << 8) | ((word.astype(jnp.uint32) >> shift) & 0xFF)
            quotient.append((rest // size).astype(jnp.int32))
            rest = rest % size
        joined = lambda bytes_: functools.reduce(lambda high, low: (high << 8) | low, bytes_)
        return Wide(joined(quotient[:4]), joined(quotient[4:]))


def scale_count(n: Any, fraction: Any) -> Any:
    """floor(n * fraction) for an integer `n` and a fraction in [0, 1], exact.

    Python numbers give a Python `int` (the fraction is read as the decimal that it stands for: 0.9
    is nine tenths). If either argument is an array the result is an int32 array, without 64-bit
    types; it is `Wide` if `n` is, or is a Python integer of 2^31 or more.

    >>> scale_count(10, 0.9), scale_count(3, 1 / 3), scale_count(10**10, 0.3)
    (9, 1, 3000000000)
    >>> int(scale_count(10, jnp.float32(0.9)))
    9
    """
    if isinstance(n, int | np.integer) and isinstance(fraction, float | int | Fraction | np.number):
        exact = Fraction(str(fraction) if isinstance(fraction, np.number) else fraction)
        return math.floor(exact.limit_denominator(10**12) * int(n))
    wide = isinstance(n, Wide) or (isinstance(n, int | np.integer) and n >= WIDE)
    if isinstance(n, int | np.integer) and n >= 1 << _LIMIT:
        raise ValueError(f"{n} weights are more than can be counted: split the leaf")
    p = product(_limbs(n, 4 if wide else 2), _limbs(_fixed_point(fraction), 2))
    # The product without its lowest 30 bits.
    parts = [(p[i] >> 14) | ((p[i + 1] << 2) & 0xFFFF) for i in range(1, len(p) - 1)]
    if not wide:
        return ((parts[1] << 16) | parts[0]).astype(jnp.int32)
    a, b, c, d = parts
    high, low = (b >> 8) | (c << 8) | (d << 24), a | ((b & 0xFF) << 16)
    return Wide(high.astype(jnp.int32), low.astype(jnp.int32))


def kept_count(n: Any, sparsity: Any) -> Any:
    """n - floor(sparsity * n): the number of weights that stay, as `scale_count`."""
    return n - scale_count(n, sparsity)


def later(done: Array, final: Any, now: Any) -> Any:
    """The count of a schedule: `final` where `done`, else `now`, or `final` if that is more."""
    if not isinstance(now, Wide):
        return jnp.where(done, final, jnp.maximum(now, final))
    last = Wide(*count_of(final, 2**_LIMIT - 1, wide=True))
    return Wide(*choose(done | at_least(last, now), last, now))


def no_less(count: Any, least: int) -> Any:
    """The count, or `least` if that is more."""
    return later(jnp.bool_(False), least, count)


def _fixed_point(fraction: Any) -> Array:
    """A fraction in [0, 1] as a multiple of 2^-30, uint32."""
    f = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0)
    q = jnp.round(f * (1 << _FRACTION_BITS)).astype(jnp.uint32)
    return jnp.where(q > 0, jnp.minimum(q + _TOLERANCE, jnp.uint32(1 << _FRACTION_BITS)), q)


# -- Long multiplication ---------------------------------------------------------------------------


def _limbs(n: Any, number: int) -> list:
    """16-bit parts of a number that is not negative, the lowest first: Python integers of one, uint32
    arrays of an array or a Wide."""
    if isinstance(n, Wide):
        high, low = (x.astype(jnp.uint32) for x in n)
        words = [low | (high << 24), high >> 8]
    elif isinstance(n, int | np.integer):
        return [(int(n) >> 16 * i) & 0xFFFF for i in range(number)]
    else:
        words = [jnp.asarray(n).astype(jnp.uint32)]
    return [part for word in words for part in (word & 0xFFFF, word >> 16)]


def product(a: Sequence, b: Sequence) -> list:
    """The product of two numbers in 16-bit parts, the lowest first: len(a) + len(b) parts. No number
    on the way exceeds 2^32 - 1."""
    out: list = [0] * (len(a) + len(b))
    for i, x in enumerate(a):
        rest: Any = 0
        for j, y in enumerate(b):
            t = out[i + j] + x * y + rest
            out[i + j], rest = t & 0xFFFF, t >> 16
        out[i + len(b)] = rest
    return out


def words_of_product(a: Any, b: Any) -> tuple[Array, Array]:
    """The product of two numbers below 2^32, as its (high, low) 32 bits; one of them an array."""
    p = product(_limbs(a, 2), _limbs(b, 2))
    return (p[3] << 16) | p[2], (p[1] << 16) | p[0]


# -- Counts of one or two digits -------------------------------------------------------------------


def digits(n: int) -> tuple[int, int]:
    """The two digits of a Python integer."""
    return n >> BASE_BITS, n & ((1 << BASE_BITS) - 1)


def count_of(value: Any, cap: int, wide: bool) -> Count:
    """A count, of two digits if `wide`, from a Python integer, an integer array or a Wide; not above
    `cap` and not negative."""
    if isinstance(value, Wide):
        top = count_of(cap, cap, wide=True)
        value = choose(at_least(value, top), top, value)
        return value if wide else ((value[0] << BASE_BITS) | value[1],)
    if isinstance(value, int | np.integer):
        value = max(min(int(value), cap), 0)
        if not wide:
            return (jnp.int32(value),)
        high, low = digits(value)
        return jnp.int32(high), jnp.int32(low)
    value = jnp.asarray(value)
    if cap < jnp.iinfo(value.dtype).max:
        value = jnp.minimum(value, jnp.asarray(cap, value.dtype))
    value = jnp.maximum(value, jnp.zeros((), value.dtype))
    if not wide:
        return (value.astype(jnp.int32),)
    low = value & jnp.asarray((1 << BASE_BITS) - 1, value.dtype)
    return (value >> BASE_BITS).astype(jnp.int32), low.astype(jnp.int32)


def carry(high: Any, low: Any) -> tuple[Array, Array]:
    """The two digits of high * base + low."""
    return high + (low >> BASE_BITS), low & ((1 << BASE_BITS) - 1)


def add(a: Count, b: Count) -> Count:
    """a + b."""
    return (a[0] + b[0],) if len(a) == 1 else carry(a[0] + b[0], a[1] + b[1])


def at_least(a: Count, b: Count) -> Array:
    """a >= b."""
    if len(a) == 1:
        return a[0] >= b[0]
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def equal(a: Count, b: Count) -> Array:
    """a == b."""
    same = a[0] == b[0]
    return same if len(a) == 1 else same & (a[1] == b[1])


def positive(a: Count) -> Array:
    """a > 0."""
    return a[0] > 0 if len(a) == 1 else (a[0] > 0) | (a[1] > 0)


def minus(a: Count, b: Count) -> Array:
    """a - b, rounded to float32."""
    high, *low = ((x - y).astype(jnp.float32) for x, y in zip(a, b))
    return high * (1 << BASE_BITS) + low[0] if low else high


def choose(flag: Array, a: Count, b: Count) -> Count:
    """a where `flag`, else b."""
    return tuple(jnp.where(flag, x, y) for x, y in zip(a, b))


def least(a: Count, where: Array) -> Count:
    """The least of the counts along the first axis, of those `where`."""
    high = jnp.min(jnp.where(where, a[0], MAX_TRACED), 0)
    if len(a) == 1:
        return (high,)
    return high, jnp.min(jnp.where(where & (a[0] == high), a[1], MAX_TRACED), 0)


def greatest(a: Count, where: Array) -> Count:
    """The greatest of the counts along the first axis, of those `where`."""
    high = jnp.max(jnp.where(where, a[0], -1), 0)
    if len(a) == 1:
        return (high,)
    return high, jnp.max(jnp.where(where & (a[0] == high), a[1], -1), 0)
