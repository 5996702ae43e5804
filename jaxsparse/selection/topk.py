"""Masks of the k largest scores: of arrays ranked apart, each slice for itself, or all together."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse import _counts
from jaxsparse._counts import Count, Wide
from jaxsparse.selection import _arguments as arguments
from jaxsparse.selection import _entries, _search
from jaxsparse.selection._arguments import Axis, Score
from jaxsparse.selection._keys import Bounds, native
from jaxsparse.selection._pairwise import is_short, pairwise


def topk_masks(
    leaves: Sequence[Any],
    k: Any,
    *,
    where: Sequence[Any] | None = None,
    ties: str = "position",
    seed: Any = None,
    axis: Axis | Sequence[Axis] = None,
    together: bool = False,
    minimum: Sequence[Any] | None = None,
    score: Score | None = None,
) -> list[Array]:
    r"""The k largest scores of each of several arrays, or of all of them: one boolean mask per array.

    Exactly $\min(k, \text{number of eligible entries})$ are True in each ranking. A list given for
    `k`, `seed` or `axis` has one entry per array; anything else is for all. All arrays are searched
    in the same passes; they may differ in shape and dtype, and are not concatenated.

    Args:
      leaves: a list of score arrays, real numbers of any dtype. NaN is not eligible. With `score`:
        of its operands, arrays or tuples of arrays.
      k: how many, an int or an integer array (traced or not). With `axis`, an array of the shape of
        the remaining axes (or one that broadcasts to it) gives every slice its own.
      where: for each array the eligible entries, bool, or None.
      ties: which of equal scores come first: those at lower row-major positions ("position"), or
        in the order of a hash of the position seeded with `seed` ("hash").
      seed: int, integer scalar (traced or not) or PRNG key, for `ties="hash"`.
      axis: None ranks whole arrays. An axis, or a tuple of them: the entries along them are ranked,
        for every index of the other axes apart; axis=0 of `[in, out]` keeps k per output.
      together: one ranking of all entries of all arrays, with one k and one seed. Scores are
        compared in their common dtype; equal ones go to the earlier array, then as `ties` says.
      minimum: with `together`, for each array how many of its own largest come before all others.
        If k is less than the sum of the minima, the largest of those come first.
      score: elementwise function that makes scores of the operands; it is evaluated in each pass,
        and its result never stored. `selection.equal_scores`: none, ties decide.

    >>> a, b = jnp.array([3.0, 1.0, 3.0]), jnp.array([[5.0, 4.0], [7.0, 6.0]])
    >>> [m.tolist() for m in topk_masks([a, b], [2, 1], axis=[None, 1])]
    [[True, False, True], [[True, False], [True, False]]]
    >>> [m.tolist() for m in topk_masks([a, b], 3, together=True)]
    [[False, False, False], [[True, False], [True, True]]]

    Raises:
      ValueError: a negative or fractional k, complex scores, an axis out of range, unknown `ties`,
        no seed for `ties="hash"`, `where` that is not boolean or does not broadcast, lists of
        another length, minima that exceed k where both are known.
    """
    leaves = list(leaves)
    operands = [arguments.operands(x, score) for x in leaves]
    score = score or arguments.identity
    made = [arguments.shape_and_dtype(arrays, score) for arrays in operands]
    shapes, dtypes = [shape for shape, _ in made], [native(dtype) for _, dtype in made]
    listed = arguments.per_leaf(where, len(leaves), "where", spread=False)
    eligible = [arguments.check_where(w, shape) for w, shape in zip(listed, shapes)]
    if together:
        if axis is not None:
            raise ValueError(f"axis={axis}: a ranking of all arrays together has no axes")
        seed = arguments.check_ties(ties, seed)
        return _together(operands, shapes, k, eligible, seed, minimum, score=score)
    if minimum is not None:
        raise ValueError("minimum= is for together=True: of an array ranked by itself k are kept")

    seeds = [arguments.check_ties(ties, s) for s in arguments.per_leaf(seed, len(leaves), "seed")]
    axes = arguments.per_leaf(axis, len(leaves), "axis")
    axes = [arguments.check_axes(a, len(shape)) for a, shape in zip(axes, shapes)]
    ks = arguments.per_leaf(k, len(leaves), "k")
    ks = [_per_slice(arguments.check_k(n), s, a) for n, s, a in zip(ks, shapes, axes)]
    masks = [jnp.zeros(shape, bool) for shape in shapes]
    groups: dict[Any, list[int]] = {}  # arrays whose levels are alike are searched together
    for i, (shape, ranked) in enumerate(zip(shapes, axes)):
        if math.prod(shape):
            alike = i if is_short(shape, ranked) else (dtypes[i], len(ks[i]))
            groups.setdefault(alike, []).append(i)
    for group in groups.values():
        columns = ([values[i] for i in group] for values in (operands, ks, eligible, seeds))
        ranked = tuple(axes[i] for i in group)
        for i, mask in zip(group, _masks_apart(*columns, score=score, axes=ranked)):
            masks[i] = mask
    return masks


def topk_mask(
    scores: Any,
    k: Any,
    *,
    where: Any = None,
    ties: str = "position",
    seed: Any = None,
    axis: Axis = None,
    score: Score | None = None,
) -> Array:
    """`topk_masks` of one array, which most callers have.

    >>> topk_mask(jnp.array([3.0, 1.0, 3.0, 3.0]), 2).tolist()
    [True, False, True, False]
    >>> topk_mask(jnp.array([[3.0, 1.0], [-5.0, 2.0]]), 1, axis=0, score=jnp.abs).tolist()
    [[False, False], [True, True]]
    """
    found = topk_masks(
        [scores], [k], where=[where], ties=ties, seed=[seed], axis=[axis], score=score
    )
    return found[0]


def count(mask: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """How many entries are True, int32.

    >>> int(count(jnp.array([True, False, True])))
    2
    """
    axes = arguments.check_axes(axis, mask.ndim)
    # Two sums, both of which are read: of one alone XLA for CPU first stores an int32 array of the size of
    # the mask, and adds that up.
    (some, rest), _ = _search.totals([mask, ~mask], [], axes)
    size = np.uint32(math.prod(mask.shape[a] for a in axes) % 2**32).astype(np.int32)
    found = jnp.minimum(some[0], size - rest[0])
    return found if keepdims else lax.squeeze(found, axes)


def _per_slice(k: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Count:
    """The count k, one for all slices or a row of one for each."""
    ranked = math.prod(shape[a] for a in axes)
    if not isinstance(k, int | Wide) and k.ndim:
        kept = tuple(n for a, n in enumerate(shape) if a not in axes)
        try:
            k = jnp.broadcast_to(k.reshape((1,) * (len(kept) - k.ndim) + k.shape), kept)
        except (TypeError, ValueError):
            raise ValueError(
                f"k has shape {k.shape}: it must broadcast to the axes that are not ranked, {kept}"
            ) from None
    return _counts.count_of(k, ranked, ranked >= _counts.WIDE)


@functools.partial(jax.jit, static_argnames=("score", "axes"))
def _masks_apart(operands, ks, where, seeds, *, score, axes) -> list[Array]:
    (shape, dtype), ranked = arguments.shape_and_dtype(operands[0], score), axes[0]
    if is_short(shape, ranked):
        k = ks[0][0]
        k = jnp.expand_dims(k, ranked) if k.ndim else k
        return [pairwise(score(*operands[0]), k, where[0], seeds[0], ranked[0])]
    wide, by_hash = len(ks[0]) == 2, seeds[0] is not None
    rows = zip(operands, where, seeds, axes)
    rankings = [[_entries.entries(x, score, w, s, axes=a, wide=wide)] for x, w, s, a in rows]
    rows = [
        tuple(jnp.broadcast_to(d.reshape(-1), _search.slices(r)) for d in k)
        for r, k in zip(rankings, ks)
    ]
    k = tuple(map(jnp.concatenate, zip(*rows)))
    bounds = _entries.bounds_of(rankings, score, dtype, by_hash, wide)
    return [mask for (mask,) in _entries.masks(rankings, k, bounds)]


def _together(operands, shapes, k, where, seed, minimum, *, score) -> list[Array]:
    n, k = len(operands), arguments.check_k(k)
    least = arguments.per_leaf(minimum, n, "minimum", spread=False)
    least = [0 if m is None else arguments.check_k(m, "minimum") for m in least]
    if isinstance(k, int) and all(isinstance(m, int) for m in least) and sum(least) > k:
        raise ValueError(f"minimum={least} adds up to {sum(least)}, more than k={k}")
    size = sum(map(math.prod, shapes))
    if size == 0:
        return [jnp.zeros(shape, bool) for shape in shapes]
    own: list[Array | None] = [None] * n
    if any(not isinstance(m, int) or m > 0 for m in least):
        ties = "position" if seed is None else "hash"
        own[:] = topk_masks(operands, least, where=where, ties=ties, seed=seed, score=score)
    k = _counts.count_of(k, size, size >= _counts.WIDE)
    return _masks_together(operands, k, where, seed, own, score=score)


@functools.partial(jax.jit, static_argnames="score")
def _masks_together(operands, k: Count, where, seed, own, *, score) -> list[Array]:
    ranking, bounds = _entries.together(operands, where, seed, own, score)
    if own[0] is not None:
        bounds = [Bounds(0, 1, smooth=True), *bounds]
    return _entries.masks([ranking], tuple(d[None] for d in k), bounds)[0]
