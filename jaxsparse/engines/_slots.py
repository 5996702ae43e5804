"""The slots of an inner optimizer, for any inner optimizer, and how they start anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array


class Leaves(Protocol):
    """The sparse leaves of a tree, such as `SparseLeaves`."""

    def scatter(self, values: Sequence[Any], fill: Any = None) -> Any:
        """A tree with `values` at the sparse leaves and `fill` elsewhere."""
        ...


def restart(
    inner: optax.GradientTransformation,
    state,
    live: Sequence[Array] | None,
    plan: Leaves,
    params,
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


def renewed(due: Array, inner: optax.GradientTransformation, state, params):
    """The inner optimizer's state where `due` (bool scalar): every state that holds slots as at
    `init`, its counts too, so that bias corrections fit the new moments. States that hold none (the
    step of a schedule of the learning rate) go on."""
    return _where_slots(due, inner, inner.init(params), state, params)


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
            # The masks of a method inside are one part with many leaves: none of them is a slot.
            transform_non_params=lambda part: jax.tree.map(lambda _: None, part),
            is_leaf=_is_masked,
        )
    except (TypeError, ValueError, AttributeError):
        return _by_structure(state, values)


def stand_still(fires: Array, inner: optax.GradientTransformation, before, params, deltas, after):
    """The result (`deltas`, `after`) of a step of the inner optimizer or, where `fires` (bool
    scalar), of none: updates of 0 and the slots of `before`.

    States that hold per-weight slots stand still as a whole, so that moments do not decay and the
    counts of their bias correction do not run ahead of them. States that hold none (the step of a
    schedule of the learning rate, injected hyperparameters) go on: they count the steps of the run.
    """

    deltas = jax.tree.map(lambda d: jnp.where(fires, jnp.zeros((), d.dtype), d), deltas)
    return deltas, _where_slots(fires, inner, before, after, params)


def _where_slots(flag: Array, inner: optax.GradientTransformation, yes, no, params):
    """Of two inner states, `yes` where `flag` (bool scalar) at every state that holds slots, and `no`
    at the others."""
    flat, treedef = jax.tree.flatten(no)
    rows = zip(_slot_states(inner, no, params), jax.tree.leaves(yes), flat, strict=True)
    return treedef.unflatten(
        [jnp.where(flag, jnp.asarray(y).astype(n.dtype), n) if held else n for held, y, n in rows]
    )


def _slot_states(inner, state, params) -> list[bool]:
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
