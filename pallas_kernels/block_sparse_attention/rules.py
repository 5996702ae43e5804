"""Which pairs of query and key positions may meet: small formulas, never a stored mask.

A rule is evaluated on positions inside the blocks that need it, and classifies whole blocks
beforehand. Rules are hashable, so they are static under `jit`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Array = Any  # numpy or jax: only operators are used here


@dataclasses.dataclass(frozen=True)
class Everything:
    """Every pair. Marks a full block that is cut by the end of the keys."""

    def __call__(self, q: Array, k: Array) -> Array:
        return (q == q) & (k == k)

    def classify(self, q0: Array, q1: Array, k0: Array, k1: Array) -> tuple[Array, Array]:
        every = self(q0, k0)
        return every, every


@dataclasses.dataclass(frozen=True)
class Window:
    """low <= q - k <= high; None is unbounded. Causal: `Window(0, None)`."""

    low: int | None
    high: int | None

    def __call__(self, q: Array, k: Array) -> Array:
        if self.low is None and self.high is None:
            return Everything()(q, k)
        if self.high is None:
            return q >= k + self.low
        if self.low is None:
            return q <= k + self.high
        # Unsigned: one comparison for both ends.
        return (q - (k + self.low)).astype("uint32") < max(0, self.high - self.low + 1)

    def classify(self, q0: Array, q1: Array, k0: Array, k1: Array) -> tuple[Array, Array]:
        smallest, largest = q0 - k1, q1 - k0
        some = all_ = Everything()(q0, k0)
        if self.low is not None:
            some, all_ = some & (largest >= self.low), all_ & (smallest >= self.low)
        if self.high is not None:
            some, all_ = some & (smallest <= self.high), all_ & (largest <= self.high)
        return some, all_


@dataclasses.dataclass(frozen=True)
class Keys:
    """k < stop: attention sinks, and the prefix of a prefix language model."""

    stop: int

    def __call__(self, q: Array, k: Array) -> Array:
        return (k < self.stop) & (q == q)

    def classify(self, q0: Array, q1: Array, k0: Array, k1: Array) -> tuple[Array, Array]:
        return self(q0, k0), self(q0, k1)


@dataclasses.dataclass(frozen=True)
class Stride:
    """(q - k) mod stride = 0."""

    stride: int

    def __call__(self, q: Array, k: Array) -> Array:
        difference = q - k
        if self.stride & (self.stride - 1) == 0:  # a mask of bits is cheaper than a division
            return (difference & (self.stride - 1)) == 0
        return difference % self.stride == 0

    def classify(self, q0: Array, q1: Array, k0: Array, k1: Array) -> tuple[Array, Array]:
        smallest, largest = q0 - k1, q1 - k0
        multiples = largest // self.stride - (smallest - 1) // self.stride
        return multiples > 0, multiples == largest - smallest + 1


@dataclasses.dataclass(frozen=True)
class And:
    """Both. A block may be called partial although it is empty; never the other way round."""

    a: Rule
    b: Rule

    def __call__(self, q: Array, k: Array) -> Array:
        return self.a(q, k) & self.b(q, k)

    def classify(self, q0: Array, q1: Array, k0: Array, k1: Array) -> tuple[Array, Array]:
        (some_a, all_a), (some_b, all_b) = (r.classify(q0, q1, k0, k1) for r in (self.a, self.b))
        return some_a & some_b, all_a & all_b


@dataclasses.dataclass(frozen=True)
class Or:
    """Either. A block may be called partial although it is full; never the other way round."""

    a: Rule
    b: Rule

    def __call__(self, q: Array, k: Array) -> Array:
        return self.a(q, k) | self.b(q, k)

    def classify(self, q0: Array, q1: Array, k0: Array, k1: Array) -> tuple[Array, Array]:
        (some_a, all_a), (some_b, all_b) = (r.classify(q0, q1, k0, k1) for r in (self.a, self.b))
        return some_a | some_b, all_a | all_b


Rule = Everything | Window | Keys | Stride | And | Or


def both(a: Rule, b: Rule) -> Rule:
    """a and b, without writing the same rule twice; two windows are one."""
    if a == b or isinstance(b, Everything):
        return a
    if isinstance(a, Window) and isinstance(b, Window):
        lows = [x for x in (a.low, b.low) if x is not None]
        highs = [x for x in (a.high, b.high) if x is not None]
        return Window(max(lows, default=None), min(highs, default=None))
    return b if isinstance(a, Everything) else And(a, b)


def either(a: Rule, b: Rule) -> Rule:
    """a or b, without writing the same rule twice."""
    if a == b or isinstance(a, Everything):
        return a
    return b if isinstance(b, Everything) else Or(a, b)
