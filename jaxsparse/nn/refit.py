"""`refit`: a stored run goes on with arrays of another capacity."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse.nn._stored_tree import Blocks, Columns, Matrix, StoredTree, find
from jaxsparse.nn.stored import StoredState
from jaxsparse.targets import named_leaves


@dataclasses.dataclass(frozen=True)
class Refit:
    """What became of one stored matrix.

    Attributes:
      path: of its values.
      used: blocks, or weights of the fullest output, that are part of the pattern.
      before, after: for how many there is room.
    """

    path: str
    used: int
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.path}: room for {self.before}, now for {self.after} ({self.used} used)"


def refit(params, opt_state, capacity: float | int | None = None, *, groups: int = 1):
    """Gives the stored matrices of a run room for more or for less, outside of compiled code: after
    rule="magnitude" has dropped blocks, or where a checkpoint has another capacity than is wanted. Values,
    slots and what wraps them move along; the run goes on as it would have.

    Args:
      params: the trained leaves, as `stored` takes them.
      opt_state: the state of its optimizer, however deeply it is wrapped.
      capacity: how many blocks, or weights of each output, there is room for afterwards: a number (int), or
        a multiple of what is used (float); None: as many as are used.
      groups: as in `stored`; every group of columns then has equal room.

    Returns:
      The parameters, the state, and a report with an entry for each matrix. With NNX:
      `nnx.update(model, params)` and `nnx.update(optimizer.opt_state, nnx.state(state))`.

    Raises:
      ValueError: a capacity below what a pattern uses, or one that is no number from 1.

    >>> import jaxsparse, optax
    >>> from jaxsparse.nn import BlockSparseLinear, Trained
    >>> layer = BlockSparseLinear(8, 8, block_shape=(2, 2), density=0.5, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(layer, Trained))
    >>> state = jaxsparse.stored(optax.adam(1e-3), rule="static").init(params)
    >>> params, state, report = refit(params, state, 12)
    >>> print(*report)
    values: room for 8, now for 12 (8 used)
    """
    if capacity is not None and (isinstance(capacity, bool) or not capacity >= 1):
        raise ValueError(
            f"capacity={capacity!r}: give a number from 1, or a multiple (float) of what is used, from 1.0"
        )
    params, opt_state = nnx.as_pure(params), nnx.as_pure(getattr(opt_state, "opt_state", opt_state))
    tree, leaves = find(params, groups), jax.tree.leaves(params)
    moves, places, report = [], [], []
    for m in tree.matrices:
        old = np.asarray(leaves[m.places])
        used = np.asarray(m.used(leaves[m.places])).reshape(*old.shape[:-2], -1, m.capacity)
        parts = groups if isinstance(m, Blocks) else 1
        used = used.reshape(-1, parts, m.capacity // parts)
        most = int(used.sum(-1).max())
        room = _room(capacity, most * parts, parts, m)
        report.append(Refit(m.path, most * parts, m.capacity, room))
        moves.append(_order(used, room // parts))
        places.append(_places(m, old, moves[-1]))
    move = functools.partial(_moved, tree=tree, moves=moves, places=places)
    is_state = lambda x: isinstance(x, StoredState)
    again = lambda x: x._replace(places=tuple(map(jnp.asarray, places))) if is_state(x) else x
    opt_state = jax.tree.map(again, move(opt_state), is_leaf=is_state)
    return move(params), opt_state, report


def _room(capacity: float | int | None, most: int, parts: int, m: Matrix) -> int:
    """The new capacity: a multiple of `parts`."""
    room = most if capacity is None else capacity
    if isinstance(capacity, float):
        room = round(capacity * most)
    room = max(1, -(-int(room) // parts)) * parts
    if room < most:
        raise ValueError(
            f"capacity={capacity}: {m.path!r} uses {most} of the {m.capacity} that it has room for; give "
            f"{most} or more"
        )
    return room


def _order(used: np.ndarray, room: int) -> np.ndarray:
    """For each new place the number of the old one, or one that does not exist: `[rows, parts * room]`."""
    rows, parts, capacity = used.shape
    first = np.argsort(~used, -1, kind="stable")[..., :room]
    number = first + capacity * np.arange(parts)[:, None]
    found = np.full((rows, parts, room), parts * capacity)
    found[..., : first.shape[-1]] = np.where(
        np.take_along_axis(used, first, -1), number, parts * capacity
    )
    return found.reshape(rows, -1)


def _taken(x: np.ndarray, order: np.ndarray, fill: int = 0) -> np.ndarray:
    """`x [rows, capacity, ...]` in a new order; `fill` where nothing was."""
    padded = np.concatenate([x, np.full((len(x), 1, *x.shape[2:]), fill, x.dtype)], 1)
    return np.take_along_axis(padded, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)


def _places(m: Matrix, old: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The places in a new order."""
    (gr, gc), rows = m.grid, old.reshape(-1, *old.shape[-2:])
    if isinstance(m, Columns):
        new = _taken(rows.reshape(-1, m.capacity), order, gr)
        return new.reshape(*old.shape[:-1], order.shape[1])
    at = [_taken(rows[:, i], order, fill) for i, fill in enumerate((gr, gc))]
    lists = [
        np.argsort(a * (n + 1) + b, -1, kind="stable") for a, b, n in ((*at, gc), (*at[::-1], gr))
    ]
    return np.stack([*at, *lists], 1).astype(old.dtype).reshape(*old.shape[:-1], order.shape[1])


def _moved(tree_of_arrays, *, tree: StoredTree, moves, places):
    """A tree with what belongs to stored values in their new order; averages of integers start at 0."""
    values = {m.path: i for i, m in enumerate(tree.matrices)}
    integers = {tree.paths[m.places]: i for i, m in enumerate(tree.matrices)}
    known = sorted({**values, **integers}, key=len, reverse=True)

    def one(path: str, x):
        own = next((p for p in known if path == p or path.endswith(f"/{p}")), None)
        if own is None:
            return x
        i = values[own] if own in values else integers[own]
        m = tree.matrices[i]
        if own in integers:
            new = places[i]
            return jnp.asarray(
                new if jnp.issubdtype(x.dtype, jnp.integer) else np.zeros(new.shape, x.dtype)
            )
        if jnp.shape(x) != m.shape:  # factored moments
            return x
        before, (rows, room) = m.shape, moves[i].shape
        after = before[: m.axis] + (room,) + before[m.axis + 1 :]
        return jnp.asarray(
            _taken(np.asarray(x).reshape(rows, m.capacity, -1), moves[i]).reshape(after)
        )

    flat = [one(path, x) for path, x in named_leaves(tree_of_arrays)]
    return jax.tree.unflatten(jax.tree.structure(tree_of_arrays), flat)
