"""Whole layers that go: a shallower model and the optimizer's state without their slots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxsparse.masking import PackedMask, pack
from jaxsparse.targets import path_name

Take = Callable[[Sequence[int]], object]


class Shallower(NamedTuple):
    """What is left.

    Attributes:
      model: the model, or the tree of parameters, with fewer layers; what was given is unchanged.
      opt_state: the optimizer's state without the slots of what is gone, if one was given.
      kept: the layers that stayed, in the old numbering.
      parameters: how many numbers the model held before and after.
    """

    model: object
    opt_state: object
    kept: tuple[int, ...]
    parameters: tuple[int, int]


def drop_layers(
    model: object, where: str, drop: Iterable[int], opt_state: object = None
) -> Shallower:
    """Removes whole layers of a repeated part: those after one that is gone read what it read.

    Layers are found as the items of a list (`nnx.List`, list, tuple), as entries of a mapping that are numbered
    (0, 1, ...; `where_0`, `where_1`, ... as Linen names them), or as the first axis of all arrays (layers
    that `scan` or `vmap` has stacked). What is left is numbered anew. It must fit: layers that change the width
    cannot go.

    Args:
      model: an NNX module, or a tree of parameters (then a Linen module is to be built with fewer layers).
      where: the path of the layers, `"layers"` or `"decoder/blocks"`.
      drop: the numbers of the layers that go; negative ones count from the end.
      opt_state: an optimizer's state or an `nnx.Optimizer`. Slots and masks go with their layers; counts stay.

    Returns:
      The model, its optimizer's state, the numbers of the layers that stay, and the parameters before and after.

    Raises:
      ValueError: no layers at `where`, or at several places; numbers out of range or given twice, none or all of
        the layers; an optimizer state without slots of these layers.

    >>> model = nnx.Sequential(*[nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(4)])
    >>> small = drop_layers(model, "layers", [1, -1])
    >>> len(small.model.layers), small.kept, small.parameters
    (2, (0, 2), (48, 24))
    """
    drop = [int(i) for i in drop]
    params = nnx.state(model) if isinstance(model, nnx.Module) else model
    numbers = _walk(params, where, None)[1]
    if len(numbers) != 1:
        what = (
            f"layers are at {len(numbers)} places; give a longer path"
            if numbers
            else (
                "no layers there (a list, entries numbered from 0, or arrays of one first axis); there are "
                + (", ".join(map(repr, _places(params))) or "none in this model")
            )
        )
        raise ValueError(f"where={where!r}: {what}")
    n = numbers[0]
    gone = {i % n for i in drop if -n <= i < n}
    if len(gone) < len(drop) or not 0 < len(gone) < n:
        raise ValueError(
            f"drop={drop}: must be different numbers of the {n} layers at {where!r}, one at least and not all"
        )
    kept = tuple(i for i in range(n) if i not in gone)
    after = _walk(params, where, kept)[0]
    small = _without(model, where, kept, after) if isinstance(model, nnx.Module) else after
    size = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))
    return Shallower(
        small, _cut_state(opt_state, where, n, kept), kept, (size(params), size(after))
    )


def _without(model: nnx.Module, where: str, kept: Sequence[int], state: object) -> nnx.Module:
    """A copy of the module with these layers, whose `state` it has then."""
    small = nnx.clone(model)
    *owners, name = where.split("/")
    owner: object = small
    for key in owners:
        owner = owner[int(key)] if isinstance(owner, Sequence) else getattr(owner, key)
    layers = getattr(owner, name)
    if isinstance(layers, nnx.List | list | tuple):
        setattr(owner, name, type(layers)([layers[i] for i in kept]))
    else:
        nnx.update(small, state)
    return small


def _cut_state(opt_state: object, where: str, n: int, kept: Sequence[int]) -> object:
    if opt_state is None:
        return None
    wrapped = isinstance(opt_state, nnx.Optimizer)
    state = opt_state.opt_state if wrapped else opt_state
    cut, numbers = _walk(state, where, kept)
    if set(numbers) != {n} and any(np.ndim(x) for x in jax.tree.leaves(state)):
        raise ValueError(
            f"opt_state: it holds no slots of {n} layers at {where!r}; pass the state of the optimizer that "
            "trained this model"
        )
    if not wrapped:
        return cut
    optimizer = nnx.clone(opt_state)
    optimizer.opt_state = nnx.data(cut)
    return optimizer


# -- Layers in a tree ------------------------------------------------------------------------------


def _walk(
    tree: object, where: str, kept: Sequence[int] | None, path: str = ""
) -> tuple[object, list[int]]:
    """The tree with the layers at `where` that are `kept` (with None it stays as it is), and how many are at
    each place where there are some."""
    if _is_leaf(tree):
        return tree, []
    owner, _, name = where.rpartition("/")
    ends = lambda end: f"/{path}".endswith(f"/{end}") or not end
    found = None
    if path and ends(where):
        found = _numbered(tree, "") or _stacked(tree)
    elif ends(owner):
        found = _numbered(tree, name)
    if found is not None:
        n, take = found
        return tree if kept is None else take(kept), [n]
    rows, join = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    below = [
        _walk(child, where, kept, f"{path}/{path_name(key)}".strip("/")) for key, child in rows
    ]
    return join.unflatten([part for part, _ in below]), [n for _, numbers in below for n in numbers]


def _numbered(node: object, name: str) -> tuple[int, Take] | None:
    """How many layers are numbered in this node, and what makes a node of some of them."""
    if isinstance(node, list | tuple) and not (name or hasattr(node, "_fields")):
        return len(node), lambda kept: type(node)([node[i] for i in kept])
    if not isinstance(node, Mapping):
        return None
    pattern = re.compile(rf"{re.escape(name)}_(\d+)" if name else r"(\d+)")
    keys = {int(m[1]): key for key in node if (m := pattern.fullmatch(str(key)))}
    if not keys or set(keys) != set(range(len(keys))):
        return None
    rest = {key: value for key, value in node.items() if key not in keys.values()}

    def take(kept):
        return type(node)({**rest, **{keys[i]: node[keys[k]] for i, k in enumerate(kept)}})  # pyright: ignore[reportCallIssue]

    return len(keys), take


def _stacked(node: object) -> tuple[int, Take] | None:
    """The same for layers along the first axis of all arrays of the node."""
    leaves = jax.tree.leaves(node, is_leaf=_is_packed)
    firsts = {x.shape[0] if x.shape else 0 for x in leaves}
    if len(firsts) != 1 or not (n := firsts.pop()):
        return None

    def take(kept):
        one = lambda x: pack(x.unpack()[index]) if _is_packed(x) else x[index]
        index = np.asarray(kept)
        return jax.tree.map(one, node, is_leaf=_is_packed)

    return n, take


def _places(tree: object, path: str = "") -> list[str]:
    """The paths of numbered layers in a tree, for an error."""
    if _is_leaf(tree):
        return []
    found = _numbered(tree, "") if path else None
    rows, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    below = [p for key, x in rows for p in _places(x, f"{path}/{path_name(key)}".strip("/"))]
    return [*([path] if found and found[0] > 1 else []), *below]


def _is_leaf(node: object) -> bool:
    return _is_packed(node) or jax.tree_util.all_leaves([node])


def _is_packed(node: object) -> bool:
    return isinstance(node, PackedMask)
