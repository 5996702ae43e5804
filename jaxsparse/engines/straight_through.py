r"""The engine of methods that keep dense raw weights z and hand out $p = S(z)$.

At every step

    d  = inner(pull_back(g), params=z)        g is the gradient at p
    z' = z + d
    p' = where(m', scale sign(z') (|z'| - shift), 0)    with (m', shift, scale) = rule(z')

and the update returned is p' - p. With the identity as `pull_back` this is the straight-through
estimator, exactly, without a custom gradient. Weight decay of the inner optimizer acts on z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse._control import when
from jaxsparse.engines._checks import (
    check_arguments,
    check_inner,
    check_raw_dtype,
    compiled_once,
    first_state,
    sharded_as,
    store_masks,
    with_whole_masks,
)
from jaxsparse.engines.hold_masks import Rule, hidden
from jaxsparse.engines.setup import Setup
from jaxsparse.engines.step import Step, any_nan, kept_inside, views
from jaxsparse.leaves import SparseLeaves
from jaxsparse.scores import View
from jaxsparse.state import SparseState, project


class Projection(NamedTuple):
    """S for all sparse leaves: masks, and per leaf what is subtracted from |z| and what the result
    is multiplied with (lists, or None for 0 and 1); `aux` is what the method keeps besides."""

    masks: list[Array]
    shift: list | None = None
    scale: list | None = None
    aux: Any = None


class Learner(NamedTuple):
    """Parameters that a method trains besides the weights (thresholds): `init(plan, zs) -> aux`,
    `update(step, grads, plan, extra) -> aux`; the step's views hold z and g, its `aux` theirs."""

    init: Callable[[SparseLeaves, list[Array]], Any]
    update: Callable[[Step, SparseLeaves, dict], Any]


def straight_through(
    inner: optax.GradientTransformation,
    setup: Setup,
    rule: Callable[[Step], Projection],
    *,
    pull_back: Callable[[View, Array], Array] | None = None,
    gradient: Callable[[Step], list[Array]] | None = None,
    moves: Callable[[Step], list[Array]] | None = None,
    learner: Learner | None = None,
    init_aux: Callable[[list], Any] | None = None,
    raw_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of a method that keeps raw weights.

    Args:
      inner: the optimizer of z.
      setup: which leaves are sparse, and how masks are stored; see `jaxsparse.methods.setup`.
      rule: S, from a `Step` whose views hold the new z, the gradient, and the masks so far.
      pull_back: the gradient that the inner optimizer sees, from a view (z, g, mask so far) and the
        step; None: g itself.
      gradient: the same for all leaves at once, from the `Step` before this one is taken; not together
        with `pull_back`.
      moves: masks of the raw weights that may move, from the `Step` before this one is taken; the
        others have no gradient and stay where they are, whatever the inner optimizer does.
      learner: what is trained besides the weights.
      init_aux: what the method keeps besides, from the raw weights (not together with `learner`).
      raw_dtype: the dtype of z; None: that of the parameters. bfloat16 weights stall where steps
        are small: give float32 then.
    """
    inner = check_inner(inner)
    check_raw_dtype(raw_dtype)

    def initial_aux(plan, zs):
        if learner is not None:
            return learner.init(plan, zs)
        return None if init_aux is None else init_aux(zs)

    def store(plan: SparseLeaves, state_count, zs, projection: Projection, inner_state):
        def tree(values):
            return None if values is None else plan.scatter(values)

        return SparseState(
            count=state_count,
            masks=plan.scatter(store_masks(projection.masks, setup.pack_masks)),
            raw=plan.scatter(zs),
            shift=tree(projection.shift),
            scale=tree(projection.scale),
            inner=inner_state,
            aux=projection.aux,
        )

    def cast(x: Array) -> Array:
        return x if raw_dtype is None else x.astype(raw_dtype)

    def init_fn(params):
        plan = setup.leaves_for(params)
        ws = plan.take(params)
        inside = kept_inside(plan, inner.init(params), params)
        start = ws if inside is None else hidden(ws, inside)
        # A buffer of its own: z must survive the donation of the parameters.
        zs = [sharded_as(jnp.array(cast(z), copy=True), w) for z, w in zip(start, ws)]
        aux = initial_aux(plan, zs)
        found = rule(Step(jnp.int32(0), views(plan, zs), aux=aux))
        found = found._replace(masks=[sharded_as(m, w) for m, w in zip(found.masks, ws)])
        inner_state = inner.init(plan.put(params, zs))
        state = store(plan, jnp.zeros((), jnp.int32), zs, found, inner_state)
        return first_state(state, params)

    def update_fn(updates, state, params=None, **extra):
        state = with_whole_masks(state, init_fn, params)
        plan = check_arguments(params, state, setup, keeps_raw=True)
        ws, zs = plan.take(params), plan.take(state.raw)
        gs = plan.gradients(updates, params)
        masks = plan.masks(state.masks)
        before = Step(
            state.count, views(plan, zs, [cast(g) for g in gs], masks), state.inner, state.aux
        )
        if gradient is not None:
            seen = gradient(before)
        else:
            seen = [v.g if pull_back is None else pull_back(v, state.count) for v in before.views]
        free = None if moves is None else moves(before)
        seen = seen if free is None else hidden(seen, free)
        deltas, new_inner = inner.update(
            plan.put(updates, seen), state.inner, plan.put(params, zs), **extra
        )
        deltas = deltas if free is None else plan.put(deltas, hidden(plan.take(deltas), free))
        zs = [z + d.astype(z.dtype) for z, d in zip(zs, plan.take(deltas))]
        aux = state.aux if learner is None else learner.update(before, plan, extra)
        found = rule(Step(state.count, views(plan, zs, gs, masks), new_inner, aux))
        # NaN ranks nowhere: were the masks to follow it, it would vanish from p. They stay, and it
        # shows. One pass over z looks for it; thresholds have no ranking that could tell.
        bad = any_nan([], zs)
        found = found._replace(masks=[jnp.where(bad, *pair) for pair in zip(masks, found.masks)])
        none = [None] * len(zs)
        ps = [
            project(z, m, shift, scale, w.dtype)
            for z, w, m, shift, scale in zip(
                zs, ws, found.masks, found.shift or none, found.scale or none
            )
        ]
        # p' - p: -p exactly where a weight is pruned; elsewhere p + u is p' up to one rounding,
        # which does not accumulate, since the next step starts from z again.
        out = [p - w for p, w in zip(ps, ws)]
        count = optax.safe_increment(state.count)
        return plan.put(deltas, out), store(plan, count, zs, found, new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, compiled_once(update_fn))


def refresh(fires, rule: Rule, step: Step) -> list[Array]:
    """The masks of `rule` where `fires`, those so far otherwise (at `init`: those of `rule`)."""
    if any(v.m is None for v in step.views):
        return rule(step)

    def run(old, count, ws):
        seen = [v.replace(w=w, g=None, m=m) for v, w, m in zip(step.views, ws, old)]
        return rule(Step(count, seen))

    return when(fires, run, step.masks, step.count, [v.w for v in step.views])


def soft_threshold_learner(
    inner: optax.GradientTransformation,
    init_value: float,
    backward: Callable[[View, Array], Array],
    shared: bool = False,
) -> Learner:
    r"""One trained s per layer, with the threshold $\sigma(s)$ of
    $p = sign(z)\,relu(|z| - \sigma(s))$:

    $\partial L/\partial s = -\sigma'(s) \sum sign(z)\, g\, c$,

    where c = `backward(view, step)` is the derivative that the method takes for the relu. s is
    trained by a second copy of the inner optimizer, weight decay included.

    The thresholds are the `aux` of the state: `(tree of s, state of their optimizer)`.
    """
    inner = check_inner(inner)

    def init(plan: SparseLeaves, zs):
        s = plan.scatter(
            [jnp.full(leaf.stack_shape, init_value, jnp.float32) for leaf in plan.leaves]
        )
        return s, inner.init(s)

    def update(step: Step, plan: SparseLeaves, extra):
        tree, opt = step.aux
        grads = []
        for v, s in zip(step.views, plan.take(tree)):
            axes = v.leaf.layer_axes
            g = v.g.astype(jnp.float32) * jnp.sign(v.w).astype(jnp.float32)
            total = jnp.sum(g * backward(v, step.count), axis=axes)
            sigma = jax.nn.sigmoid(s)
            grads.append(-sigma * (1.0 - sigma) * total)
        if shared and grads:
            total = sum(jnp.sum(g) for g in grads)
            grads = [jnp.full_like(g, total) for g in grads]
        deltas, opt = inner.update(plan.scatter(grads), opt, tree, **extra)
        return optax.apply_updates(tree, deltas), opt

    return Learner(init, update)


def threshold_of(view: View, s: Array) -> Array:
    """sigma(s) of a leaf, broadcastable against it."""
    sigma = jax.nn.sigmoid(s).astype(view.w.dtype)
    return sigma.reshape(*sigma.shape, *[1] * (view.w.ndim - sigma.ndim))
