"""Whole layers that go: a shallower model and the optimizer's state without their slots."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxsparse.masking import PackedMask, pack
from jaxsparse.targets import path_name

# The axes that leaves of one layer have at least, by name, when the layers are stacked.
_STACKED_AXES = dict.fromkeys(("bias", "scale", "gamma", "beta", "mean", "var"), 2) | {
    "kernel": 3,
    "embedding": 3,
}


class _Place(NamedTuple):
    """Layers of a model: "items" of a list or of a mapping with numbers, entries "named" `name_0`, `name_1`, ..., or
    the first axis of arrays that are "stacked"; and how many there are."""

    kind: str
    count: int


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
    params = nnx.state(model) if isinstance(model, nnx.Module) else model
    places = _places(params)
    if isinstance(model, nnx.Module):
        places = _with_lists(places, model)
    place, (kind, n) = _chosen(places, where)
    if isinstance(model, nnx.Module) and kind == "named":
        raise ValueError(
            f"where={where!r}: these layers are attributes of a module, which calls them by name; hold them in an "
            "nnx.List"
        )
    kept = _left(drop, n, where)
    after = _cut(params, places, place, kept)[0]
    small = _without(model, place, kind, kept, after) if isinstance(model, nnx.Module) else after
    size = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))
    return Shallower(
        small, _cut_state(opt_state, places, place, kept), kept, (size(params), size(after))
    )


def _chosen(places: Mapping[str, _Place], where: str) -> tuple[str, _Place]:
    """The place that is meant: the path itself, or the only one that ends with it."""
    bare = where.removeprefix("params/")
    found = [p for p in (where, bare) if p in places][:1]
    found = found or [p for p in places if f"/{p}".endswith(f"/{bare}")]
    if len(found) == 1:
        return found[0], places[found[0]]
    if found:
        what = (
            f"layers are at {len(found)} places; give a longer path: {', '.join(map(repr, found))}"
        )
    else:
        known = [p for p, (_, n) in places.items() if n > 1]
        what = (
            "no layers there (a list, entries numbered from 0, or arrays of one first axis); there are "
            + (", ".join(map(repr, known)) or "none in this model")
        )
    raise ValueError(f"where={where!r}: {what}")


def _left(drop: Iterable[int], n: int, where: str) -> tuple[int, ...]:
    try:
        numbers = [operator.index(i) for i in drop]
    except TypeError:
        raise ValueError(f"drop={drop!r}: give the numbers of layers, as in [2, 3]") from None
    gone = {i % n for i in numbers if -n <= i < n}
    if len(gone) < len(numbers) or not 0 < len(gone) < n:
        raise ValueError(
            f"drop={numbers}: must be different numbers of the {n} layers at {where!r}, one at least and not all"
        )
    return tuple(i for i in range(n) if i not in gone)


def _without(
    model: nnx.Module, place: str, kind: str, kept: Sequence[int], state: object
) -> nnx.Module:
    """A copy of the module with these layers, whose `state` it has then."""
    small = nnx.clone(model)
    if kind == "stacked":
        nnx.update(small, state)
        return small
    *owners, name = place.split("/")
    owner: object = small
    for key in owners:
        owner = owner[int(key)] if isinstance(owner, Sequence) else getattr(owner, key)
    layers = owner[int(name)] if isinstance(owner, Sequence) else getattr(owner, name)
    new = type(layers)([layers[i] for i in kept])
    if isinstance(owner, Sequence):
        owner[int(name)] = new  # pyright: ignore[reportIndexIssue]
    else:
        setattr(owner, name, new)
    return small


def _cut_state(
    opt_state: object, places: Mapping[str, _Place], place: str, kept: Sequence[int]
) -> object:
    if opt_state is None:
        return None
    wrapped = isinstance(opt_state, nnx.Optimizer)
    state = opt_state.opt_state if wrapped else opt_state
    cut, number = _cut(state, places, place, kept)
    if not number and any(np.ndim(x) for x in jax.tree.leaves(state)):
        raise ValueError(
            f"opt_state: it holds no slots of {places[place].count} layers at {place!r}; pass the state of the "
            "optimizer that trained this model"
        )
    if not wrapped:
        return cut
    optimizer = nnx.clone(opt_state)
    optimizer.opt_state = nnx.data(cut)
    return optimizer


# -- Layers in a tree ------------------------------------------------------------------------------


def _places(tree: object) -> dict[str, _Place]:
    """Every place that holds layers, by path. Collections of Linen variables are one tree: the statistics of a layer
    go with its parameters."""
    if isinstance(tree, Mapping) and "params" in tree:
        collections = [_places_in(part, "", None) for part in tree.values()]
        return {p: found for places in reversed(collections) for p, found in places.items()}
    return _places_in(tree, "", None)


def _places_in(node: object, path: str, above: int | None) -> dict[str, _Place]:
    """`above`: the length of the stack that the node is a part of."""
    if _is_leaf(node):
        return {}
    found = {}
    if path and (n := _items(node)):
        found[path] = _Place("items", n)
    elif path and above is None and (n := _stack(node)):
        found[path] = _Place("stacked", n)
    if isinstance(node, Mapping):
        for name, n in _names(node).items():
            found[_join(path, name)] = _Place("named", n)
    children = _children(node)
    stack = found[path].count if path in found and found[path].kind == "stacked" else above
    for name, child in children:
        # The only part of a stack is the stack; one part of several is not to be cut alone.
        found |= _places_in(child, _join(path, name), None if len(children) == 1 else stack)
    return found


def _with_lists(places: Mapping[str, _Place], model: nnx.Module) -> dict[str, _Place]:
    """The places with the lists of a module, whose items may hold no arrays: functions, dropout. Not those in which a
    layer is used twice: its arrays are in one place only."""
    found = dict(places)
    for keys, module in nnx.iter_modules(model):
        if keys and isinstance(module, nnx.List) and jax.tree.leaves(nnx.state(module)):
            path = "/".join(map(str, keys))
            layers = [id(x) for x in module if isinstance(x, nnx.Module)]
            found[path] = _Place("items", len(module))
            if len(set(layers)) < len(layers):
                del found[path]
    return found


def _cut(
    node: object,
    places: Mapping[str, _Place],
    place: str,
    kept: Sequence[int],
    path: str = "",
) -> tuple[object, int]:
    """The tree with the layers that are `kept`, and how often they were found in it: an optimizer has several trees of
    slots, each of which ends like the model's."""
    if _is_leaf(node):
        return node, 0
    kind, n = places[place]
    here = path
    if kind == "named":
        here = _join(path, place.rpartition("/")[2])
    if _owner(here, places) == place:
        if kind == "stacked":
            return _sliced(node, place, n, kept), 1
        if (numbers := _numbers(node, place, kind)) is not None:
            return _renumbered(node, numbers, place, n, kept), 1
    rows, join = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    below = [_cut(child, places, place, kept, _join(path, path_name(key))) for key, child in rows]
    return join.unflatten([part for part, _ in below]), sum(number for _, number in below)


def _owner(path: str, places: Mapping[str, _Place]) -> str | None:
    """The place that a path ends with; the longest, where several do."""
    ends = [p for p in places if f"/{path}".endswith(f"/{p}")]
    return max(ends, key=len, default=None)


def _numbers(node: object, place: str, kind: str) -> dict[int, object] | None:
    """The keys of the layers in this node by their number; None where it is no such node."""
    if kind == "items" and isinstance(node, list | tuple) and not hasattr(node, "_fields"):
        return dict(enumerate(range(len(node))))
    if not isinstance(node, Mapping):
        return None
    name = re.escape(place.rpartition("/")[2])
    pattern = re.compile(rf"{name}_(\d+)" if kind == "named" else r"(\d+)")
    return {int(m[1]): key for key in node if (m := pattern.fullmatch(str(key)))} or None


def _renumbered(
    node, numbers: Mapping[int, object], place: str, n: int, kept: Sequence[int]
) -> object:
    whole = isinstance(node, list | tuple)
    if max(numbers, default=-1) >= n or (whole and len(node) != n):
        raise ValueError(
            f"opt_state: it holds {max(numbers, default=-1) + 1} layers at {place!r} and the model {n}; pass the "
            "state of the optimizer that trained this model"
        )
    if whole:
        return type(node)([node[i] for i in kept])
    rest = {key: value for key, value in node.items() if key not in numbers.values()}
    # Keys are as long as the numbers in them: `layers_2` becomes `layers_1`, 2 becomes 1.
    new = {}
    for i, k in enumerate(kept):
        if k in numbers:
            old = numbers[k]
            key = re.sub(r"\d+$", str(i), old) if isinstance(old, str) else type(old)(i)  # pyright: ignore[reportCallIssue]
            new[key] = node[old]
    return type(node)({**rest, **new})


def _sliced(node: object, place: str, n: int, kept: Sequence[int]) -> object:
    index = np.asarray(kept)

    def one(x):
        if np.size(x) == 1 and not _is_packed(x):
            return x  # counts, and what optimizers hold in place of a slot that they do not use
        if x.shape[0] != n:
            raise ValueError(
                f"opt_state: a slot of shape {x.shape} at {place!r} does not have the {n} layers first; begin with a "
                "new state, tx.init(small.model)"
            )
        return pack(x.unpack()[index]) if _is_packed(x) else x[index]

    return jax.tree.map(one, node, is_leaf=_is_packed)


def _items(node: object) -> int:
    """How many layers a list has, or a mapping that is numbered from 0; 0 if it is neither."""
    if isinstance(node, list | tuple) and not hasattr(node, "_fields"):
        return len(node)
    keys = list(node) if isinstance(node, Mapping) else []
    numbers = {int(str(key)) for key in keys if str(key).isdecimal()}
    return len(keys) if keys and numbers == set(range(len(keys))) else 0


def _names(node: Mapping) -> dict[str, int]:
    """The names that are numbered from 0 in a mapping, `name_0`, `name_1`, ..., and how many there are of each."""
    found: dict[str, set[int]] = {}
    for key in node:
        if match := re.fullmatch(r"(.+)_(\d+)", str(key)):
            found.setdefault(match[1], set()).add(int(match[2]))
    return {name: len(at) for name, at in found.items() if at == set(range(len(at)))}


def _stack(node: object) -> int:
    """How many layers are stacked along the first axis of all arrays of the node; 0 if they are not. A kernel with its
    bias is one layer, square or not, and a window of a convolution is none."""
    rows, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=_is_packed)
    arrays = [
        (path_name(path).rpartition("/")[2], x.shape) for path, x in rows if getattr(x, "shape", ())
    ]
    firsts = {shape[0] for _, shape in arrays}
    if len(firsts) != 1 or any(len(shape) < _STACKED_AXES.get(name, 1) for name, shape in arrays):
        return 0
    window = lambda shape: len(shape) > 3 and shape[0] == shape[1] and shape[0] % 2 == 1
    if all(name == "kernel" and window(shape) for name, shape in arrays):
        return 0
    return firsts.pop()


def _children(node: object) -> list[tuple[str, object]]:
    rows, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(path_name(key), child) for key, child in rows]


def _join(path: str, name: str) -> str:
    return f"{path}/{name}".strip("/")


def _is_leaf(node: object) -> bool:
    return _is_packed(node) or isinstance(node, nnx.Variable) or jax.tree_util.all_leaves([node])


def _is_packed(node: object) -> bool:
    return isinstance(node, PackedMask)
