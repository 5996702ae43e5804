"""A step that the inner optimizer does not take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxsparse.engines._slots import placed


def update_unless(
    skip: Array,
    inner: optax.GradientTransformationExtraArgs,
    updates,
    state,
    params,
    **extra: Any,
):
    """`inner.update(updates, state, params)`, or, where `skip` (bool scalar), no step: updates of 0
    and the state as it was.

    States that hold per-weight slots stand still as a whole, so that moments do not decay and the
    counts of their bias correction do not run ahead of them. States that hold none (the step of a
    schedule of the learning rate, injected hyperparameters) go on: they count the steps of the run.

    Every new slot is chosen where it is computed, inside the trace of `inner.update`, so that what
    follows from it reads the chosen one; the updates that this spoils are those of a skipped step.
    Chosen after the update, the old slots would have to outlive the new ones: on CPU a copy of all
    of them at every step.
    """
    args, tree = jax.tree.flatten((updates, state, params))

    def update(*args):
        updates, state, params = tree.unflatten(args)
        return inner.update(updates, state, params, **extra)

    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*args)
    held = _held(inner, state, params)
    olds = [None] * len(jax.tree.leaves(shapes[0]))
    olds += [x if hold else None for x, hold in zip(jax.tree.leaves(state), held)]

    def choose(old, new):
        return new if old is None else jnp.where(skip, jnp.asarray(old).astype(new.dtype), new)

    deltas, new = jax.tree.unflatten(jax.tree.structure(shapes), _run(closed, args, olds, choose))
    return jax.tree.map(lambda d: jnp.where(skip, jnp.zeros((), d.dtype), d), deltas), new


def _run(closed: ClosedJaxpr, args, olds, choose) -> list[Array]:
    """The results of a jaxpr, each replaced by `choose(old, result)` as soon as it is known: the
    equations are run in pieces that end where a result to be replaced is made."""
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args)))
    is_var = lambda v: not isinstance(v, Literal)
    # A result that is an argument, a constant or two results at once is replaced at the end.
    times = Counter(filter(is_var, jaxpr.outvars))
    early = {v: old for v, old in zip(jaxpr.outvars, olds)
             if old is not None and is_var(v) and times[v] == 1 and v not in values}  # fmt: skip
    last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if is_var(v)}
    last_use |= dict.fromkeys(times, len(jaxpr.eqns))

    piece = []
    for i, eqn in enumerate(jaxpr.eqns):
        piece.append(eqn)
        if i + 1 < len(jaxpr.eqns) and not any(v in early for v in eqn.outvars):
            continue
        ins = list({v: None for e in piece for v in e.invars if is_var(v) and v in values})
        outs = [v for e in piece for v in e.outvars if last_use.get(v, 0) > i]
        run = jaxpr_as_fun(
            ClosedJaxpr(jaxpr.replace(constvars=[], invars=ins, outvars=outs, eqns=piece), [])
        )
        found = run(*[values[v] for v in ins])
        values |= {v: choose(early.get(v), x) for v, x in zip(outs, found)}
        piece = []

    read = lambda v: jnp.asarray(values[v] if is_var(v) else v.val)
    done = lambda v: is_var(v) and v in early
    return [read(v) if done(v) else choose(old, read(v)) for v, old in zip(jaxpr.outvars, olds)]


def _held(inner, state, params) -> list[bool]:
    """For every leaf of an inner state, whether it belongs to a state that holds slots, or to one
    that such a state wraps."""
    depths = jax.tree_util.tree_map_with_path(lambda path, _: len(path), params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    # A slot lies at (path of the state, its field, path of the parameter).
    owners = {
        path[: max(len(path) - depth - 1, 0)]
        for path, depth in jax.tree_util.tree_leaves_with_path(placed(inner, state, depths))
    }
    return [any(path[:i] in owners for i in range(len(path) + 1)) for path in paths]
