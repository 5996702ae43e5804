"""The backward view of methods that multiply with other weights going back than going forward.

The forward product and the gradient of its input need not use the same weights. Two-view methods
keep the parameters as all others do: they are the network of the *forward* view, exactly sparse. The
mask b of the *backward* view is kept in the optimizer's state, and the weights behind it are

    w_b = where(b, z, 0)    z the raw weights where the method keeps them, else the parameters.

They reach the layers (`jaxsparse.nn.TwoViewLinear`) through `jaxsparse.nn.refresh`. On ordinary
layers, which have one view, the forward view alone is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jax import Array

from jaxsparse import masking
from jaxsparse.engines._checks import (
    compiled_once,
    first_state,
    sharded_as,
    store_masks,
    with_whole_masks,
)
from jaxsparse.engines.setup import Setup
from jaxsparse.leaves import Leaf
from jaxsparse.state import find_states
from jaxsparse.structures import NM


class BackwardView(NamedTuple):
    """The `aux` of a two-view method: `masks` is a tree of masks b, `order` a tree of permutations
    of the outputs (int32 `[*stacked, out]`) by which their groups are formed, or None."""

    masks: Any
    order: Any = None


# (leaf, weights, forward mask, (b, order) so far or None at init, count) -> (b, order)
BackwardRule = Callable[[Leaf, Array, Array, Any, Array], tuple[Array, Any]]


def two_view(
    tx: optax.GradientTransformationExtraArgs,
    setup: Setup,
    structure: NM,
    rule: BackwardRule,
) -> optax.GradientTransformationExtraArgs:
    """Adds the backward view to a method of one of the engines, as the `aux` of its state.

    Args:
      tx: the method of the forward view; it must keep no `aux` of its own.
      setup: the setup of the forward view.
      structure: the N:M structure of b, along the outputs; must fit every sparse leaf.
      rule: the new b and order of a leaf.
    """

    def view(plan, ws, masks, old, count):
        found = [rule(*row, count) for row in zip(plan.leaves, ws, masks, old)]
        bs = [sharded_as(b, w) for (b, _), w in zip(found, ws)]
        orders = [order for _, order in found]
        return BackwardView(
            plan.scatter(store_masks(bs, setup.pack_masks)),
            None if all(o is None for o in orders) else plan.scatter(orders),
        )

    def init_fn(params):
        plan = setup.leaves_for(params)
        for leaf in plan.leaves:
            structure.check(leaf.path, leaf.layer_shape)
        state: Any = tx.init(params)
        none = [None] * len(plan.leaves)
        masks = plan.masks(state.masks) if plan.leaves else []
        aux = view(plan, plan.take(params), masks, none, state.count)
        return first_state(state._replace(aux=aux), params)

    def update_fn(updates, state: Any, params: Any = None, **extra):
        new: Any
        state = with_whole_masks(state, init_fn, params)
        updates, new = tx.update(updates, state._replace(aux=None), params, **extra)
        plan = setup.leaves_for(params)
        if new.raw is None:
            ws = [w + u for w, u in zip(plan.take(params), plan.take(updates))]
        else:
            ws = plan.take(new.raw)
        bs, none = plan.masks(state.aux.masks), [None] * len(plan.leaves)
        orders = none if state.aux.order is None else plan.take(state.aux.order)
        old = list(zip(bs, orders))
        return updates, new._replace(aux=view(plan, ws, plan.masks(new.masks), old, state.count))

    return optax.GradientTransformationExtraArgs(init_fn, compiled_once(update_fn))


def backward_views(opt_state) -> dict[str, tuple[Array, Any]]:
    """`{path: (b, raw weights or None)}` of every two-view leaf inside `opt_state`, however deeply
    it is wrapped.

    Raises:
      ValueError: `opt_state` holds no state of a two-view method.
    """
    found = {}
    for state in find_states(opt_state):
        if not isinstance(state.aux, BackwardView):
            continue
        raw = {} if state.raw is None else masking.by_path(state.raw)
        found |= {
            path: (masking.unpack(b), raw.get(path))
            for path, b in masking.by_path(state.aux.masks).items()
        }
    if not found:
        raise ValueError(
            "opt_state holds no two-view state; pass what bi_mask, bdwp or slope's init returned, "
            "alone or inside optax wrappers"
        )
    return found
