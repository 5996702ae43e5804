"""Quantiles of all entries of several arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse import _counts
from jaxsparse._counts import Count
from jaxsparse.selection import _arguments as arguments
from jaxsparse.selection import _entries, _search
from jaxsparse.selection._arguments import Score
from jaxsparse.selection._keys import INT_MAX, as_int, float32_of, value_bounds


def quantile(leaves: Sequence[Any], q: Any, *, score: Score | None = None) -> Array:
    r"""The q-quantile of all entries of several arrays, interpolated linearly between neighbours.

    With N entries in ascending order $x_0 \le x_1 \le \dots$ and $h = q (N - 1)$, the result is
    $x_{\lfloor h \rfloor} + (h - \lfloor h \rfloor)(x_{\lfloor h \rfloor + 1} - x_{\lfloor h \rfloor})$,
    as `numpy.quantile(..., method="linear")`, in float32. The two neighbours are exact order
    statistics (of the float32 values), and $\lfloor h \rfloor$ is exact: a Python number q is read as
    the decimal it stands for, a float32 q is the product of an integer below 2^24 and a power of two,
    and the product with N - 1 is taken in integers. (In float32, h would be off by hundreds at a
    billion entries.)

    Args:
      leaves: a list of arrays (with `score`, of its operands). NaN ranks below everything and is
        counted in N.
      q: a number in [0, 1], or a float scalar (traced or not).
      score: elementwise function, as for `topk_masks`.

    >>> float(quantile([jnp.array([1.0, 2.0]), jnp.array([4.0])], 0.75))
    3.0

    Raises:
      ValueError: q outside [0, 1] where it is known, no entries at all.
    """
    operands = [arguments.operands(x, score) for x in leaves]
    score = score or arguments.identity
    shapes = [arguments.shape_and_dtype(arrays, score)[0] for arrays in operands]
    size = sum(map(math.prod, shapes))
    if size == 0:
        raise ValueError("leaves hold no entries at all: there is no quantile")
    k, fraction = _rank_from_above(q, size)
    above, below = _neighbours(
        operands, _counts.count_of(k, size, size >= _counts.WIDE), score=score
    )
    return jnp.where(fraction > 0, below + fraction * (above - below), below)


@functools.partial(jax.jit, static_argnames="score")
def _neighbours(operands, k: Count, *, score) -> tuple[Array, Array]:
    """The k-th and the (k+1)-th largest score of several arrays."""
    none = [None] * len(operands)
    ranking, _ = _entries.together(operands, none, None, none, score, jnp.float32)
    (bound,) = value_bounds(jnp.float32)
    found = _search.search([ranking], tuple(d[None] for d in k), [bound])
    lo, some, exact = (x.reshape(()) for x in (found.lo[0][0], found.some[0], found.exact))
    # The least score at or above lo and the greatest below it (of all, where k is 0). In integers: on
    # CPU the reduction is vectorised, and seven times as fast as that of the scores.
    last = jnp.where(some, lo - 1, bound.last)
    ups, downs = [], []
    for e in ranking:
        (x, *_), _ = e.levels(e.seed, *e.operands)
        x = jnp.broadcast_to(x, e.shape)
        # Distances from lo and from last wrap around on the other side.
        up, down = lax.reduce(
            (_search.span(lo, x), _search.span(x, last)),
            (_search.FARTHEST, _search.FARTHEST),
            lambda p, q: (jnp.minimum(p[0], q[0]), jnp.minimum(p[1], q[1])),
            tuple(range(len(e.shape))),
        )
        ups.append(up)
        downs.append(down)
    up, down = jnp.min(jnp.stack(ups)), jnp.min(jnp.stack(downs))
    is_above = some & (up <= _search.span(lo, jnp.int32(INT_MAX)))
    is_below = (~some | (lo > bound.lo)) & (down <= _search.span(jnp.int32(bound.lo), last))
    kth = jnp.where(is_above, float32_of(lo + as_int(up)), jnp.float32(np.inf))
    next_one = jnp.where(is_below, float32_of(last - as_int(down)), jnp.float32(-np.inf))
    # Of several equal scores only some may be among the k largest; then the next one is equal.
    return kth, jnp.where(exact | ~some, next_one, kth)


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
    floor, fraction = times(jnp.clip(jnp.asarray(q, jnp.float32), 0.0, 1.0), size - 1)
    return jnp.uint32(size - 1) - floor, fraction


def times(q: Array, n: int) -> tuple[Array, Array]:
    """floor(q n) (uint32) and q n - floor(q n), for float32 q in [0, 1] and integer n < 2^32."""
    bits = lax.bitcast_convert_type(q, jnp.uint32)
    exponent = bits >> 23
    m = jnp.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, bits & 0x7FFFFF)
    e = 150 - jnp.maximum(exponent, 1)  # q = m 2^-e, 23 <= e < 150
    high, low = _counts.words_of_product(m, n)
    small = jnp.minimum(e, 31)  # of low, where e < 32; else all of it and `beyond` bits of high
    beyond = jnp.minimum(jnp.maximum(e, 32) - 32, 31)
    floor = jnp.where(e < 32, (high << (32 - small)) | (low >> small), high >> beyond)
    one = jnp.uint32(1)
    rest_high = jnp.where(e < 32, 0, high & ((one << beyond) - 1))
    rest_low = jnp.where(e < 32, low & ((one << small) - 1), low)
    rest = rest_high.astype(jnp.float32) * 2.0**32 + rest_low.astype(jnp.float32)
    return floor, rest * jnp.exp2(-e.astype(jnp.float32))
