"""Cuts removed channels out of trees of arrays: parameters, statistics, the slots of optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.channels.adapt import is_array
from jaxsparse.channels.groups import Groups
from jaxsparse.channels.keep import aliases
from jaxsparse.masking import PackedMask, pack
from jaxsparse.targets import named_leaves

Axes = Sequence[np.ndarray]


def kept_positions(groups: Groups, kept: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Which positions of every axis of every leaf stay, boolean, by path."""
    masks = {groups[name].atom: mask for name, mask in kept.items()}
    return {path: [axis.keep(masks) for axis in axes] for path, axes in groups.axes.items()}


def cut_params(
    groups: Groups, params: chex.ArrayTree, kept: Mapping[str, np.ndarray]
) -> chex.ArrayTree:
    """The arrays of a model without the channels that go."""
    places = kept_positions(groups, kept)
    leaves = [
        _cut(leaf, places[path]) if is_array(leaf) else leaf for path, leaf in named_leaves(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def zero_params(
    groups: Groups, params: chex.ArrayTree, kept: Mapping[str, np.ndarray]
) -> chex.ArrayTree:
    """The parameters with zeros wherever a channel that goes has one; statistics stay."""
    places = kept_positions(groups, kept)

    def zero(path: str, leaf):
        if path not in groups.trained:
            return leaf
        mask = np.ones((), bool)
        for d, axis in enumerate(places[path]):
            mask = mask & np.expand_dims(axis, tuple(i for i in range(leaf.ndim) if i != d))
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    leaves = [zero(path, leaf) for path, leaf in named_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def cut_opt_state(
    groups: Groups, opt_state: chex.ArrayTree, kept: Mapping[str, np.ndarray]
) -> chex.ArrayTree:
    """The state of an optimizer without the slots of the channels that go.

    A slot is known by its path, which ends in that of its parameter, and by its shape: that of the parameter, or
    without one of its axes (factored moments). Scalars and counts stay.

    Raises:
      ValueError: no state, a slot of another shape, a state without any slot of these parameters.
    """
    wrong = next((x for x in jax.tree.leaves(opt_state) if callable(x) or isinstance(x, str)), None)
    if wrong is not None:
        raise ValueError(
            f"opt_state: it holds {wrong!r}, as an optimizer does and not its state; give what tx.init(params) "
            "and tx.update return"
        )
    places, paths = kept_positions(groups, kept), aliases(groups)
    packed = lambda x: isinstance(x, PackedMask)
    named = named_leaves(opt_state, is_leaf=packed)
    found, matched = [], 0
    for path, leaf in named:
        owner = _owner(path, paths)
        if owner is None or not (packed(leaf) or (is_array(leaf) and leaf.ndim)):
            found.append(leaf)
            continue
        if packed(leaf):
            found.append(pack(_slot(path, leaf.unpack(), places[owner])))
        else:
            found.append(_slot(path, leaf, places[owner]))
        matched += 1
    if not matched and any(is_array(leaf) and leaf.ndim for _, leaf in named):
        raise ValueError(
            f"opt_state: it holds no slot of the model's parameters, such as {next(iter(groups.shapes))!r}; pass "
            "the state of the optimizer that trained this model"
        )
    return jax.tree.unflatten(jax.tree.structure(opt_state, is_leaf=packed), found)


def _owner(path: str, paths: Mapping[str, str]) -> str | None:
    """The leaf whose path ends this one; the longest, where several do."""
    keys = path.split("/")
    for start in range(len(keys)):
        name = "/".join(keys[start:])
        if name in paths:
            return paths[name]
    return None


def _slot(path: str, leaf: jax.Array, axes: Axes) -> jax.Array:
    axes = tuple(axes)
    shape = tuple(len(axis) for axis in axes)
    if leaf.shape == shape:
        return _cut(leaf, axes)
    if leaf.size == 1:
        return leaf  # what optimizers hold in place of a slot that they do not use
    without = [
        axes[:d] + axes[d + 1 :]
        for d in range(len(axes))
        if leaf.shape == shape[:d] + shape[d + 1 :]
    ]
    alike = {tuple(tuple(axis) for axis in rest) for rest in without}
    if len(alike) == 1:
        return _cut(leaf, without[0])
    why = "could be either axis of it" if alike else "is of another model"
    raise ValueError(
        f"opt_state: the slot {path!r} of shape {leaf.shape} belongs to a parameter of shape {shape}, and {why}; "
        "begin with a new state, tx.init(small.params)"
    )


def _cut(leaf: jax.Array, axes: Axes) -> jax.Array:
    for d, kept in enumerate(axes):
        if not kept.all():
            leaf = jnp.take(leaf, np.flatnonzero(kept), axis=d)
    return leaf
