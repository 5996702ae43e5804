"""Integer counts: how many weights a sparsity leaves.

The convention of the library, for a tensor of `n` weights at sparsity `S`:

    zeros = floor(S n),    kept = n - zeros

Counts that are known when a function is traced are computed on the host, from integers and exact
fractions, so they are right at any size. Counts that depend on traced values (a schedule's
position, a swept sparsity) are computed in 32-bit integer arithmetic: float32 cannot count beyond
2^24, and a count that is one off is a contract broken.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxsparse import _search

# A float32 fraction carries a relative error of 2^-24; 0.9 becomes 0.89999998 and floor(0.9 * 10)
# would be 8. A tolerance of 2^-23 repairs this and moves no count for tensors below 2^22 weights.
_FRACTION_BITS = 30
_TOLERANCE = 1 << (_FRACTION_BITS - 23)
MAX_TRACED = 2**31 - 1
INT_WIDE = 2**55 - 1


def is_concrete(*values) -> bool:
    """True if none of the values is a tracer, so that Python may branch on them."""
    return not any(isinstance(v, Tracer) for v in values)


def scale_count(n, fraction):
    """floor(n * fraction) for an integer `n` and a fraction in [0, 1], exact.

    Python numbers give a Python `int` (the fraction is read as the decimal that it stands for: 0.9
    is nine tenths). If either argument is an array the result is `int32`, computed without 64-bit
    types: `n` must then be below 2^31.

    >>> scale_count(10, 0.9), scale_count(3, 1 / 3), scale_count(10**10, 0.3)
    (9, 1, 3000000000)
    >>> int(scale_count(10, jnp.float32(0.9)))
    9
    """
    if isinstance(n, int | np.integer) and isinstance(fraction, float | int | Fraction | np.number):
        exact = Fraction(str(fraction) if isinstance(fraction, np.number) else fraction)
        return math.floor(exact.limit_denominator(10**12) * int(n))
    if isinstance(n, int | np.integer) and n > MAX_TRACED:
        raise ValueError(
            f"a count of {n} weights with a traced fraction is beyond 32-bit integers; give the "
            "sparsity as a Python number, or split the leaf"
        )
    q = _fixed_point(fraction)
    n = jnp.asarray(n).astype(jnp.uint32)
    # (n * q) >> 30 by 16-bit halves; every partial product stays below 2^32.
    nh, nl, qh, ql = n >> 16, n & 0xFFFF, q >> 16, q & 0xFFFF
    high, mid, low = nh * qh, nh * ql + nl * qh, nl * ql
    carry = ((mid & 0x3FFF) + (low >> 16)) >> 14
    return (4 * high + (mid >> 14) + carry).astype(jnp.int32)


def _fixed_point(fraction) -> Array:
    """A fraction in [0, 1] as a multiple of 2^-30, uint32."""
    f = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0)
    q = jnp.round(f * (1 << _FRACTION_BITS)).astype(jnp.uint32)
    return jnp.where(q > 0, jnp.minimum(q + _TOLERANCE, jnp.uint32(1 << _FRACTION_BITS)), q)


def kept_count(n, sparsity):
    """n - floor(sparsity * n): the number of weights that stay, as `scale_count`."""
    return n - scale_count(n, sparsity)


def kept_units(n: int, sparsity, size: int):
    """`kept_count(n, sparsity) // size`; if it is traced and n is 2^31 or more, as the two digits
    (high, low) of a count to the base 2^24, which `selection.global_topk_masks` takes.

    >>> [int(digit) for digit in kept_units(2**40, jnp.float32(1.0), 4)]
    [0, 0]
    """
    if n <= MAX_TRACED or isinstance(sparsity, float | int | Fraction | np.number):
        return kept_count(n, sparsity) // size
    if n >= 1 << 55 or size >= 1 << 24:
        raise ValueError(f"{n} weights in units of {size} are more than can be counted")
    # By long multiplication, subtraction and division, in digits that leave room for the carries.
    mask = 0xFFFF
    q = _fixed_point(sparsity)
    ns, qs = [(n >> 16 * i) & mask for i in range(4)], [q & mask, q >> 16]
    product: list = [0] * 7
    for i, a in enumerate(ns):
        carry = 0
        for j, b in enumerate(qs):
            t = product[i + j] + a * b + carry
            product[i + j], carry = t & mask, t >> 16
        product[i + 2] = carry
    zeros = [(product[i + 1] >> 14) | ((product[i + 2] << 2) & mask) for i in range(4)]
    kept, borrow = [], 0
    for a, b in zip(ns, zeros):
        t = a + (1 << 16) - b - borrow
        kept.append(t & mask)
        borrow = 1 - (t >> 16)
    quotient, rest = [], 0
    for byte in [x for a in reversed(kept) for x in (a >> 8, a & 0xFF)]:
        t = (rest << 8) | byte
        quotient.append((t // size).astype(jnp.int32))
        rest = t % size
    digit = lambda bytes_: functools.reduce(lambda x, y: (x << 8) | y, bytes_)
    return digit(quotient[1:5]), digit(quotient[5:])


def later(done, final, now):
    """The count of a schedule: `final` where `done`, else `now`, or `final` if that is more."""
    if not isinstance(now, tuple):
        return jnp.where(done, final, jnp.maximum(now, final))
    last = _search.count_of(final, INT_WIDE, wide=True)
    return _search.choose(done | _search.at_least(last, now), last, now)


def when(predicate, function, carry, *operands):
    """`function(carry, *operands)` if `predicate`, else `carry`; skipped under `vmap` too.

    `lax.cond` turns into a select under `vmap`: both branches then run at every step. Here a batch
    of predicates asks once whether any of them holds, and only then runs the batched function.
    """
    leaves, tree = jax.tree.flatten((carry, operands))
    n = len(jax.tree.leaves(carry))

    def flat(*xs):
        c, o = jax.tree.unflatten(tree, xs)
        return jax.tree.leaves(function(c, *o))

    # What the function closes over (a traced seed, a swept sparsity) becomes an argument.
    closed = jax.make_jaxpr(flat)(*leaves)
    jaxpr = closed.jaxpr
    opened = jaxpr.replace(constvars=[], invars=[*jaxpr.invars, *jaxpr.constvars])
    run = jaxpr_as_fun(ClosedJaxpr(opened, []))
    out = _when(run, n)(jnp.asarray(predicate), *leaves, *closed.consts)
    return jax.tree.unflatten(jax.tree.structure(carry), out)


def _when(run, n: int):
    """The flat form: the first `n` of `xs` are the carry."""

    @jax.custom_batching.custom_vmap
    def call(predicate, *xs):
        return jax.lax.cond(predicate, lambda *xs: list(run(*xs)), lambda *xs: list(xs[:n]), *xs)

    @call.def_vmap
    def batched(axis_size, in_batched, predicate, *xs):
        flags = in_batched[1:]
        carry = [_spread(x, b, axis_size) for x, b in zip(xs[:n], flags)]
        axes = [0] * n + [0 if b else None for b in flags[n:]]
        if not in_batched[0]:
            many = jax.vmap(run, in_axes=axes, axis_size=axis_size)
            return _when(many, n)(predicate, *carry, *xs[n:]), [True] * n

        def one(go, *xs):
            return [jnp.where(go, new, old) for new, old in zip(run(*xs), xs[:n])]

        def some(*args):
            *xs, go = args
            return jax.vmap(one, in_axes=[0, *axes], axis_size=axis_size)(go, *xs)

        return _when(some, n)(jnp.any(predicate), *carry, *xs[n:], predicate), [True] * n

    return call


def _spread(x, is_batched: bool, axis_size: int):
    return x if is_batched else jnp.broadcast_to(x, (axis_size, *jnp.shape(x)))
