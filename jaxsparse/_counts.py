"""Integer counts: how many weights a sparsity leaves.

The convention of the library, for a tensor of `n` weights at sparsity `S`:

    zeros = floor(S n),    kept = n - zeros

Counts that are known when a function is traced are computed on the host, from integers and exact
fractions, so they are right at any size. Counts that depend on traced values (a schedule's
position, a swept sparsity) are computed in 32-bit integer arithmetic: float32 cannot count beyond
2^24, and a count that is one off is a contract broken.
"""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# A float32 fraction carries a relative error of 2^-24; 0.9 becomes 0.89999998 and floor(0.9 * 10)
# would be 8. A tolerance of 2^-23 repairs this and moves no count for tensors below 2^22 weights.
_FRACTION_BITS = 30
_TOLERANCE = 1 << (_FRACTION_BITS - 23)
MAX_TRACED = 2**31 - 1


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
        exact = Fraction(float(fraction) if isinstance(fraction, np.number) else fraction)
        return math.floor(exact.limit_denominator(10**12) * int(n))
    if isinstance(n, int | np.integer) and n > MAX_TRACED:
        raise ValueError(
            f"a count of {n} weights with a traced fraction is beyond 32-bit integers; give the "
            "sparsity as a Python number, or split the leaf"
        )
    one = jnp.uint32(1 << _FRACTION_BITS)
    f = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0)
    q = jnp.round(f * (1 << _FRACTION_BITS)).astype(jnp.uint32)
    q = jnp.where(q > 0, jnp.minimum(q + _TOLERANCE, one), q)
    n = jnp.asarray(n).astype(jnp.uint32)
    # (n * q) >> 30 by 16-bit halves; every partial product stays below 2^32.
    nh, nl, qh, ql = n >> 16, n & 0xFFFF, q >> 16, q & 0xFFFF
    high, mid, low = nh * qh, nh * ql + nl * qh, nl * ql
    carry = ((mid & 0x3FFF) + (low >> 16)) >> 14
    return (4 * high + (mid >> 14) + carry).astype(jnp.int32)


def kept_count(n, sparsity):
    """n - floor(sparsity * n): the number of weights that stay, as `scale_count`."""
    return n - scale_count(n, sparsity)


def when(predicate, function, carry, *operands):
    """`function(carry, *operands)` if `predicate`, else `carry`; skipped under `vmap` too.

    `lax.cond` turns into a select under `vmap`: both branches then run at every step. A while loop
    with a batched predicate runs its body only while any member asks for it, and its carry needs
    no copy where nothing is done. The barrier keeps XLA from hoisting work on the operands, which
    do not change in the loop, out of it: it would run at every step again.
    """

    def body(state):
        go, carry = state
        (_, carry, inputs) = jax.lax.optimization_barrier((go, carry, operands))
        return jnp.zeros_like(go), function(carry, *inputs)

    predicate = jnp.asarray(predicate)
    return jax.lax.while_loop(lambda state: state[0], body, (predicate, carry))[1]
