"""The engine of methods that hold masks: fixed, pruned gradually, or rewired.

At every step

    m'  = rule(step)  if the step is one of the updates,  m  otherwise
    d   = inner(g seen through the mask)
    p'  = where(m', p + d, 0)

and the update returned is p' - p: exactly -p where a weight is pruned, exactly d where it stays
(unless a method settles p' in a way of its own, see `settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse._counts import when
from jaxsparse.engines._common import (
    PlanFor,
    Step,
    broken,
    check_arguments,
    check_inner,
    check_storage,
    like,
    on_all_devices,
    store_masks,
    views,
    whole,
)
from jaxsparse.engines._skip import update_unless
from jaxsparse.engines._slots import restart
from jaxsparse.masking import SparseState, mark, pack, unpack, without_grown
from jaxsparse.schedules import At, Both, Updates

Rule = Callable[[Step], list[Array]]


def hold_masks(
    inner: optax.GradientTransformation,
    plan_for: PlanFor,
    init: Rule,
    *,
    rule: Callable[[Step], Any] | None = None,
    updates: Updates | At | Both | None = None,
    rule_sees: Literal["masked", "dense"] = "dense",
    inner_sees: Literal["masked", "dense"] | Callable[[Step], list[Array]] = "masked",
    settle: Callable[[Step], tuple[list[Array], list[Array]]] | None = None,
    replaces_step: bool = False,
    restarts: bool = False,
    resets: Callable[[Array], Any] | None = None,
    init_aux: Callable[[Step], Any] | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of a method that holds masks.

    Args:
      inner: the optimizer of the weights.
      plan_for: makes the plan from the parameters.
      init: the masks at `init`, from a `Step` that holds the weights and the inner state.
      rule: the masks at an update, from a `Step` whose views hold the weights before this step,
        their gradients and the masks so far. With `init_aux`, returns `(masks, aux)`.
      updates: the steps at which `rule` runs.
      rule_sees: "dense": all gradients; "masked": those of pruned weights are 0 for the rule, which
        then needs no dense gradient, whatever it reads.
      inner_sees: "masked": gradients of pruned weights are 0 for the inner optimizer; "dense": it
        sees all of them, and only what is applied is masked; a function: the gradients that it
        returns, from a `Step` with the weights before this step and the masks after.
      settle: what becomes of the weights after the step: returns masks and weights, from a `Step`
        whose views hold the weights after the step.
      replaces_step: an update of the masks takes the place of the gradient step, as in RigL: the
        weights then change at mask flips only, and the slots of the inner optimizer stay as they
        are, but for those that `restarts` (see `update_unless`).
      restarts: the inner state of a weight that is grown starts as at `init` (the slots of pruned
        weights are held there).
      resets: the steps (a function of the count) at which the inner state of every weight, of dense
        leaves too, starts as at `init`, before the step is taken; its counts go on.
      init_aux: what the method keeps besides, from a `Step` that holds the weights and their masks.
      pack_masks: store masks as bits.
    """
    inner, events = check_inner(inner), updates
    check_storage(pack_masks)
    # What an update grows is told apart from what stays: by marks, or by the bits that it flips.
    regrows = restarts and rule is not None
    marked, flips = regrows and not pack_masks, regrows and pack_masks

    def store(masks, before=None):
        if marked:
            return [mark(*row) for row in zip(masks, before or masks)]
        return store_masks(masks, pack_masks)

    def init_fn(params):
        plan = plan_for(params)
        ws, inner_state = plan.take(params), inner.init(params)
        found = init(Step(jnp.int32(0), views(plan, ws), inner_state))
        masks = [like(m, w) for m, w in zip(found, ws)]
        start = Step(jnp.int32(0), views(plan, ws, ms=masks), inner_state)
        state = SparseState(
            count=jnp.zeros((), jnp.int32),
            masks=plan.scatter(store(masks)),
            raw=None,
            shift=None,
            scale=None,
            inner=inner_state,
            aux=None if init_aux is None else init_aux(start),
        )
        return on_all_devices(state, params)

    def update_fn(updates, state, params=None, **extra):
        state = whole(state, init_fn, params)
        plan = check_arguments(params, state, plan_for, keeps_raw=False)
        ws, gs, stored = plan.take(params), plan.take(updates), plan.take(state.masks)
        masks, aux, fire = plan.masks(state.masks), state.aux, jnp.zeros((), bool)
        is_plain = lambda m: getattr(m, "dtype", None) == jnp.bool_
        if (pack_masks or marked) and any(map(is_plain, stored)):  # a user has put them there
            stored = store(masks)
        live, before = masks, state.inner

        if rule is not None and events is not None:
            # Scores that are NaN choose nothing: the masks stay, and the NaN shows in the weights.
            fire = events.fires(state.count)
            if restarts:  # nothing has been trained at step 0, and the weights may still be dense
                fire &= state.count > 0

            def readable(gs, stored):
                return hidden(gs, map(unpack, stored)) if rule_sees == "masked" else gs

            fire = when(
                fire, lambda _, gs, ws, ms: ~broken(readable(gs, ms), ws), fire, gs, ws, stored
            )

            def run(carry, count, ws, gs, held):
                carried, old_aux = carry
                gs = readable(gs, held or carried)
                old = [unpack(m) for m in held or carried]
                step = Step(count, views(plan, ws, gs, old), before, old_aux)
                new, new_aux = rule(step) if init_aux else (rule(step), old_aux)  # type: ignore[misc]
                if flips:
                    return [pack(n ^ o) for n, o in zip(new, old)], new_aux
                return store(new, old), new_aux

            # The masks alone pass the conditional: slots would be copied there at every step, and so
            # would a mask of before beside the new one. What has grown is marked in the new mask, or,
            # where masks are bits, the bits that flip pass in its place.
            carry, held = (jax.tree.map(jnp.zeros_like, stored), stored) if flips else (stored, [])
            carry, aux = when(fire, run, (carry, aux), state.count, ws, gs, held)
            stored = jax.tree.map(jnp.bitwise_xor, stored, carry) if flips else carry
            masks = live = [unpack(m) for m in stored]
            if restarts:
                # Live is what is kept, but for what this update has grown. The slots of all that is not
                # are held at their start, at every step, and so are those of what is grown later.
                if flips:
                    kept = jax.tree.map(lambda m, c: m & ~c, stored, carry)
                    live = [unpack(m) for m in kept]
                else:
                    live = [without_grown(m, fire) for m in stored]
                before = restart(inner, before, live, plan, params)

        if resets is not None:
            anew = lambda old, params: restart(inner, old, None, plan, params)
            before = when(resets(state.count), anew, before, params)
        if callable(inner_sees):
            seen = inner_sees(Step(state.count, views(plan, ws, gs, masks), before, aux))
        else:
            seen = gs if inner_sees == "dense" else hidden(gs, live)
        seen = plan.put(updates, seen)
        if replaces_step:
            deltas, new_inner = update_unless(fire, inner, seen, before, params, **extra)
        else:
            deltas, new_inner = inner.update(seen, before, params, **extra)

        def applied(d, w, m, alive):
            return jnp.where(m, jnp.where(alive, d.astype(w.dtype), jnp.zeros((), w.dtype)), -w)

        moving = masks if replaces_step else live  # a replaced step moves nothing
        out = [applied(*row) for row in zip(plan.take(deltas), ws, masks, moving)]
        if settle is not None:
            after = [w + d for w, d in zip(ws, out)]
            was = masks
            masks, after = settle(Step(state.count, views(plan, after, gs, was), new_inner, aux))
            if restarts:
                both = [m & w for m, w in zip(masks, was)]
                new_inner = restart(inner, new_inner, both, plan, params)
            out = [jnp.where(m, p - w, -w) for m, p, w in zip(masks, after, ws)]
            stored = store(masks)
        new_state = state._replace(
            count=optax.safe_increment(state.count),
            masks=plan.scatter(stored),
            inner=new_inner,
            aux=aux,
        )
        return plan.put(deltas, out), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def hidden(gs: Sequence[Array], masks: Iterable[Array]) -> list[Array]:
    """The gradients with zeros at pruned weights."""
    return [jnp.where(m, g, jnp.zeros((), g.dtype)) for m, g in zip(masks, gs)]
