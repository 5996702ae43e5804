"""The engine of methods that hold masks: fixed, pruned gradually, or rewired.

At every step

    m'  = rule(step)  if the step is one of the updates,  m  otherwise
    d   = inner(g seen through the mask)
    p'  = where(m', p + d, 0)

and the update returned is p' - p: exactly -p where a weight is pruned, exactly d where it stays
(unless a method chooses p' in a way of its own, see `after`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse._control import when
from jaxsparse.engines._checks import (
    check_arguments,
    check_inner,
    compiled_once,
    first_state,
    sharded_as,
    store_masks,
    with_whole_masks,
)
from jaxsparse.engines._slots import restart, stand_still
from jaxsparse.engines.setup import Setup
from jaxsparse.engines.step import Step, any_nan, intersect, kept_inside, views
from jaxsparse.masking import unpack
from jaxsparse.schedules import At, Both, Updates
from jaxsparse.state import SparseState

Rule = Callable[[Step], list[Array]]
RuleWithAux = Callable[[Step], tuple[list[Array], Any]]


def hold_masks(
    inner: optax.GradientTransformation,
    setup: Setup,
    *,
    init: Rule,
    rule: Rule | RuleWithAux | None = None,
    at: Updates | At | Both | None = None,
    gradient: Literal["masked", "kept", "dense"] | Callable[[Step], list[Array]] = "masked",
    after: Callable[[Step], tuple[list[Array], list[Array]]] | None = None,
    on_update: Literal["step", "replace"] = "step",
    fresh: Literal["grown"] | Callable[[Array], Array] | None = None,
    grow_init: Callable[[Step], list[Array]] | None = None,
    aux: Callable[[Step], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of a method that holds masks.

    Args:
      inner: the optimizer of the weights.
      setup: which leaves are sparse, and how masks are stored; see `jaxsparse.methods.setup`.
      init: the masks at `init`, from a `Step` that holds the weights and the inner state.
      rule: the masks at an update, from a `Step` whose views hold the weights before this step,
        their gradients and the masks so far; with `aux`, the pair of masks and the new aux.
      at: the steps at which `rule` runs.
      gradient: who sees gradients of pruned weights. "masked": the rule alone; "kept": nobody, so
        that a sparse backward product would do; "dense": the rule and the inner optimizer. A
        function returns what the inner optimizer sees, from a `Step` with the weights before this
        step and the masks after; the rule then sees all.
      after: chooses the masks and the weights once the step is taken, from a `Step` whose views hold
        the weights after it.
      on_update: "step": an update of the masks comes on top of the gradient step; "replace": it
        takes its place, as in RigL (see `stand_still`). Weights then change where masks flip only.
      fresh: whose slots of the inner state start as at `init`. "grown": those of weights that are
        not kept, so that a grown weight starts anew; a function of the count: those of all weights,
        of dense leaves too, at the steps where it is true. Counts of the inner state go on: with Adam
        see `scale_by_age`.
      grow_init: the values at which grown weights start, of the leaves' shapes, from the `Step` that
        the rule sees; None: 0.
      aux: what the method keeps besides, from a `Step` that holds the weights and their masks.
    """
    inner = check_inner(inner)

    def init_fn(params):
        plan = setup.leaves_for(params)
        ws, inner_state = plan.take(params), inner.init(params)
        inside = kept_inside(plan, inner_state, params)
        masks = init(Step(jnp.int32(0), views(plan, ws), inner_state, inside=inside))
        masks = intersect(masks, inside)
        # Buffers of their own: what a user has given must survive the donation of the state.
        masks = [sharded_as(jnp.array(m, copy=True), w) for m, w in zip(masks, ws)]
        step = Step(jnp.int32(0), views(plan, ws, ms=masks), inner_state)
        state = SparseState(
            count=jnp.zeros((), jnp.int32),
            masks=plan.scatter(store_masks(masks, setup.pack_masks)),
            raw=None,
            shift=None,
            scale=None,
            inner=inner_state,
            aux=None if aux is None else aux(step),
        )
        return first_state(state, params)

    def update_fn(updates, state, params=None, **extra):
        state = with_whole_masks(state, init_fn, params)
        plan = check_arguments(params, state, setup, keeps_raw=False)
        ws, gs = plan.take(params), plan.gradients(updates, params)
        old = plan.masks(state.masks)
        # Called where it is read alone: outside of a conditional it would be stored at every step.
        read = lambda gs, old: hidden(gs, old) if gradient == "kept" else gs
        masks, new_aux, fires = old, state.aux, jnp.zeros((), bool)
        inside = kept_inside(plan, state.inner, params)

        if rule is not None and at is not None:
            choose = rule
            due = at.fires(state.count)
            if fresh == "grown":  # nothing has been trained at step 0
                due &= state.count > 0

            def run(carry, count, ws, gs):
                masks = [unpack(m) for m in carry[0]]
                gs = read(gs, masks)
                step = Step(count, views(plan, ws, gs, masks), state.inner, carry[1], inside)
                found: Any = choose(step)
                new, new_aux = found if aux else (found, carry[1])
                chosen = store_masks(intersect(new, inside), setup.pack_masks), new_aux, True
                # Scores that are NaN choose nothing: the masks stay, and the NaN shows in the weights.
                return optax.tree.where(any_nan(gs, ws), carry, chosen)

            # Masks alone pass the conditional: weights and slots would be copied there.
            carry = store_masks(old, setup.pack_masks), state.aux, fires
            stored, new_aux, fires = when(due, run, carry, state.count, ws, gs)
            masks = [unpack(m) for m in stored]

        # Of a weight that was just grown neither the gradient nor the slots count.
        live = intersect(masks, old) if fresh == "grown" else masks
        before = state.inner
        if fresh == "grown" and rule is not None:
            before = restart(inner, before, live, plan, params)
        elif callable(fresh):
            anew = lambda slots, params: restart(inner, slots, None, plan, params)
            before = when(fresh(state.count), anew, before, params)

        if callable(gradient):
            seen = gradient(Step(state.count, views(plan, ws, gs, masks), before, new_aux))
        else:
            seen = gs if gradient == "dense" else hidden(gs, live)
        deltas, slots = inner.update(plan.put(updates, seen), before, params, **extra)
        if on_update == "replace":
            deltas, slots = stand_still(fires, inner, before, params, deltas, slots)

        moves = [
            jnp.where(m, d.astype(w.dtype), jnp.zeros((), w.dtype))
            for m, d, w in zip(live, plan.take(deltas), ws)
        ]
        if grow_init is not None:
            first_values = grow_init

            def started(moves, count, masks, old, ws, gs):
                gs = read(gs, old)
                values = first_values(Step(count, views(plan, ws, gs, old), state.inner, state.aux))
                rows = zip(moves, masks, old, values, ws)
                return [jnp.where(m & ~o, (v - w).astype(d.dtype), d) for d, m, o, v, w in rows]

            moves = when(fires, started, moves, state.count, masks, old, ws, gs)
        out = [jnp.where(m, d, -w) for m, d, w in zip(masks, moves, ws)]
        if after is not None:
            step = Step(
                state.count,
                views(plan, [w + d for w, d in zip(ws, out)], gs, masks),
                slots,
                new_aux,
                inside,
            )
            chosen, weights = after(step)
            chosen = intersect(chosen, inside)
            if fresh == "grown":
                slots = restart(inner, slots, intersect(chosen, masks), plan, params)
            masks = chosen
            out = [jnp.where(m, p - w, -w) for m, p, w in zip(masks, weights, ws)]
        new_state = state._replace(
            count=optax.safe_increment(state.count),
            masks=plan.scatter(store_masks(masks, setup.pack_masks)),
            inner=slots,
            aux=new_aux,
        )
        return plan.put(deltas, out), new_state

    return optax.GradientTransformationExtraArgs(init_fn, compiled_once(update_fn))


def hidden(gs: Sequence[Array], masks: Iterable[Array]) -> list[Array]:
    """The gradients with zeros at pruned weights."""
    return [jnp.where(m, g, jnp.zeros((), g.dtype)) for m, g in zip(masks, gs)]
