"""Weights that go back to where they were, and the inner optimizer with them: SAP, lottery tickets, IMP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.engines._checks import (
    check_arguments,
    check_inner,
    compiled_once,
    first_state,
    with_whole_masks,
)
from jaxsparse.engines._slots import renewed
from jaxsparse.engines.setup import Setup
from jaxsparse.leaves import SparseLeaves
from jaxsparse.schedules import At, Both, Updates


def rewind(
    tx: optax.GradientTransformationExtraArgs,
    inner: optax.GradientTransformation,
    setup: Setup,
    at: Updates | At | Both,
    *,
    dense_leaves: bool = False,
    to: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adds to a method that holds masks that weights return, at some steps, to the values that they had.

    At a step of `at` no gradient step is taken. The weights that the new masks keep are then exactly
    those from before step `to`, and the inner optimizer's states that hold slots are as at `init`, with
    their counts. States without slots (the step of a schedule of the learning rate) go on.

    Args:
      tx: the method, of `hold_masks`; it must keep no `aux` of its own, which holds the values here.
      inner: the inner optimizer that `tx` was made with.
      setup: the setup that `tx` was made with.
      at: the steps that rewind, those of the cuts.
      dense_leaves: whether dense leaves (biases, norms) of floating point rewind as well.
      to: the step whose weights return; 0: those given to `init` ("late rewinding" takes an early one).

    Returns:
      The method, with the values as the `aux` of its state: one copy of every leaf that rewinds.

    >>> from jaxsparse import schedules, scores
    >>> from jaxsparse.engines import all_kept, hold_masks, keep_best
    >>> from jaxsparse.engines.setup import setup
    >>> sparse, cut, sgd = setup(0.5), schedules.At((2,)), optax.sgd(0.1)
    >>> tx = hold_masks(sgd, sparse, init=all_kept, rule=keep_best(scores.magnitude, sparse), at=cut)
    >>> tx = rewind(tx, sgd, sparse, cut)
    >>> start = params = {"kernel": jnp.arange(8.0).reshape(4, 2)}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"kernel": jnp.ones((4, 2))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["kernel"].ravel().tolist()
    [0.0, 0.0, 0.0, 0.0, 4.0, 5.0, 6.0, 7.0]

    Raises:
      ValueError: a negative `to`.
    """
    inner = check_inner(inner)
    if to < 0:
        raise ValueError(f"to={to}: the step whose weights return must not be negative")

    def returning(plan: SparseLeaves, params) -> dict[int, Array]:
        """The weights that rewind, by the number of their leaf."""
        chosen = {leaf.index for leaf in plan.leaves}
        floats = lambda x: jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating)
        flat = enumerate(jax.tree.leaves(params))
        return {i: w for i, w in flat if i in chosen or (dense_leaves and floats(w))}

    def init(params):
        kept = returning(setup.leaves_for(params), params)
        copies = [jnp.array(w, copy=True) for w in kept.values()]
        state: Any = tx.init(params)
        return first_state(state._replace(aux=copies), params)

    def update(grads, state, params=None, **extra):
        new: Any
        state = with_whole_masks(state, init, params)
        plan = check_arguments(params, state, setup, keeps_raw=False)
        ws, treedef = jax.tree.flatten(params)
        now = returning(plan, params)
        goals = state.aux
        if to > 0:
            goals = [jnp.where(state.count == to, w, w0) for w, w0 in zip(now.values(), goals)]
        due, was_due = at.fires(state.count), at.fires(state.count - 1)

        def returned(when, masks):
            """The weights, those that rewind at their goal, or 0 where they are pruned."""
            held = dict(zip([leaf.index for leaf in plan.leaves], plan.masks(masks)))
            new = list(ws)
            for i, w0 in zip(now, goals):
                back = jnp.where(held[i], w0, jnp.zeros((), w0.dtype)) if i in held else w0
                new[i] = jnp.where(when, back, ws[i])
            return new

        # p + (w0 - p) is rounded at the scale of p: the step after a rewind starts from w0 itself.
        base = returned(was_due, state.masks)
        moves, new = tx.update(grads, state._replace(aux=None), treedef.unflatten(base), **extra)
        goal = returned(due, new.masks)
        rows = zip(treedef.flatten_up_to(moves), base, goal, ws)
        flat = [
            u if b is w and g is w else jnp.where(due, g - w, u + (b - w)).astype(u.dtype)
            for u, b, g, w in rows
        ]
        slots = renewed(due, inner, new.inner, treedef.unflatten(goal))
        return treedef.unflatten(flat), new._replace(inner=slots, aux=goals)

    return optax.GradientTransformationExtraArgs(init, compiled_once(update))
