"""Inner optimizer state of weights that start anew, for any inner optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.plan import Plan


def restart(
    inner: optax.GradientTransformation, state, live: Sequence[Array] | None, plan: Plan, params
):
    """The inner optimizer's state with the slots of weights that are not `live` as at `init`; with
    `live=None` those of all weights, of dense leaves too. Counts go on.

    Which leaves are per-weight slots is asked of optax (`tree_map_params`), not of a list of known
    optimizers. Slots of another shape than the weight (factored moments, row and column
    statistics) belong to no single weight and stay.
    """
    flags = jax.tree.map(lambda _: False, params) if live is None else plan.scatter(live, fill=True)
    fresh = inner.init(params)

    def choose_slot(slot, start, flag):
        if flag is True or isinstance(slot, optax.MaskedNode):
            return slot
        if flag is False:
            return jnp.asarray(start, slot.dtype)
        if jnp.shape(slot) != jnp.shape(flag):
            return slot
        return jnp.where(flag, slot, start.astype(slot.dtype))

    try:
        placed = optax.tree.map_params(
            inner,
            lambda slot, flag: flag,
            state,
            flags,
            transform_non_params=lambda _: True,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
    except (TypeError, ValueError, AttributeError):
        placed = _by_structure(state, flags)
    return jax.tree.map(
        choose_slot, state, fresh, placed, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def _by_structure(state, flags):
    """Per-weight slots found as the subtrees that look like the parameters; for optimizers whose
    `init` cannot be run on optax's placeholder."""
    treedef = jax.tree.structure(flags)

    def alike(node):
        return jax.tree.structure(node) == treedef

    return jax.tree.map(
        lambda node: flags if alike(node) else jax.tree.map(lambda _: True, node),
        state,
        is_leaf=alike,
    )
