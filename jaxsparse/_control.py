"""Control flow: which values Python may branch on, and work that is skipped under `vmap` too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def is_concrete(*values) -> bool:
    """True if none of the values is a tracer, so that Python may branch on them."""
    return not any(isinstance(v, Tracer) for v in values)


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
