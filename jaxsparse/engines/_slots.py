"""The slots of an inner optimizer, for any inner optimizer, and how they start anew."""

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

    Slots of another shape than the weight (factored moments, row and column statistics) belong to
    no single weight and stay.
    """
    flags = jax.tree.map(lambda _: False, params) if live is None else plan.scatter(live, fill=True)
    fresh = inner.init(params)

    def choose_slot(slot, start, flag):
        if flag is None or flag is True or isinstance(slot, optax.MaskedNode):
            return slot
        if flag is False:
            return jnp.asarray(start, slot.dtype)
        if jnp.shape(slot) != jnp.shape(flag):
            return slot
        return jnp.where(flag, slot, start.astype(slot.dtype))

    return jax.tree.map(choose_slot, state, fresh, placed(inner, state, flags), is_leaf=_is_masked)


def placed(inner: optax.GradientTransformation, state, values):
    """The values of a tree like the parameters at the per-weight slots of an inner state, None at
    what else it holds.

    Which leaves are slots is asked of optax (`tree_map_params`), not of a list of known optimizers.
    """
    try:
        return optax.tree.map_params(
            inner,
            lambda slot, value: value,
            state,
            values,
            transform_non_params=lambda _: None,
            is_leaf=_is_masked,
        )
    except (TypeError, ValueError, AttributeError):
        return _by_structure(state, values)


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _by_structure(state, values):
    """Slots found as the subtrees that look like the parameters; for optimizers whose `init` cannot
    be run on optax's placeholder."""
    treedef = jax.tree.structure(values)

    def alike(node):
        return jax.tree.structure(node) == treedef

    return jax.tree.map(
        lambda node: values if alike(node) else jax.tree.map(lambda _: None, node),
        state,
        is_leaf=alike,
    )
