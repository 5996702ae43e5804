"""The arguments of the functions of selection, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse._counts import Wide
from jaxsparse.selection._hash import as_seed

Axis = int | tuple[int, ...] | None
Score = Callable[..., Array]


def check_ties(ties: str, seed: Any) -> Array | None:
    """The seed as uint32; None where ties go by position."""
    if ties not in ("position", "hash"):
        raise ValueError(f'ties={ties!r}: give "position" or "hash"')
    if ties == "position":
        return None
    if seed is None:
        raise ValueError('ties="hash" needs a seed: give seed=, an int or an integer scalar')
    return as_seed(seed)


def check_k(k: Any, name: str = "k") -> Any:
    """A count: a Python integer, an integer array or a `Wide`."""
    if isinstance(k, Wide):
        return k
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        array = jnp.asarray(k)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}: give a count, an integer")
        return array
    if k < 0:
        raise ValueError(f"{name}={k}: give a count, 0 or more")
    return int(k)


def check_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The ranked axes in order, none of them negative; all for None."""
    if axis is None:
        return tuple(range(ndim))
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in given) or len({a % ndim for a in given}) < len(given):
        raise ValueError(f"axis={axis}: give distinct axes from {-ndim} to {ndim - 1}")
    return tuple(sorted(a % ndim for a in given))


def check_where(where: Any, shape: tuple[int, ...]) -> Array | None:
    """The eligible entries, of the rank of the scores."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise ValueError(f"where has dtype {where.dtype}: give booleans, True where eligible")
    try:
        fits = np.broadcast_shapes(where.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"where has shape {where.shape}: it must broadcast to scores, {shape}")
    return where.reshape((1,) * (len(shape) - where.ndim) + where.shape)


def operands(scores: Any, score: Score | None) -> tuple[Array, ...]:
    """The arrays that scores are made of, as constants for gradients."""
    arrays = tuple(scores) if isinstance(scores, tuple | list) else (scores,)
    if score is None and len(arrays) != 1:
        raise ValueError("several operands need score=, the function that makes scores of them")
    return tuple(lax.stop_gradient(jnp.asarray(x)) for x in arrays)


def identity(x: Array) -> Array:
    """The score of scores."""
    return x


def equal_scores(x: Array) -> Array:
    """`score=equal_scores` ranks entries by what breaks ties alone: with `ties="hash"` it draws k of them at
    random, and no score is searched for.

    >>> import jaxsparse.selection as selection
    >>> free = jnp.array([True, False, True, True])
    >>> selection.topk_mask(free, 2, where=free, score=selection.equal_scores).tolist()
    [True, False, True, False]
    """
    return jnp.zeros(x.shape, jnp.int32)


def shape_and_dtype(arrays: Sequence[Array], score: Score) -> tuple[tuple[int, ...], Any]:
    """Those of the scores of some operands."""
    made = jax.eval_shape(score, *arrays)
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    if made.shape != shape:
        raise ValueError(f"score= made {made.shape} of {shape}: it must be elementwise")
    return shape, made.dtype


def per_leaf(values: Any, n: int, name: str, *, spread: bool = True) -> list:
    """A list with one entry per leaf; anything that is no list is for all leaves (if `spread`)."""
    if values is None or (spread and not isinstance(values, list)):
        return [values] * n
    if not isinstance(values, list | tuple) or len(values) != n:
        raise ValueError(f"{name} must be a list with one entry per leaf, {n} in all")
    return list(values)
