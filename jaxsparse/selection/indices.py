"""Positions of the k largest entries of each row: for codes that are stored as lists of k.

A mask says which entries are kept and needs no sort; a list of places, which `topk_mask` does not give,
is what decoding k rows of a matrix needs. `lax.top_k` finds it in one pass over a row, with ties at the
lower position, once NaN and -0.0 are ordered as everywhere in `jaxsparse.selection`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxsparse._checks import check_count


def topk_indices(scores: Array, k: int, *, where: Array | None = None) -> tuple[Array, Array]:
    """Where the k largest scores of each row stand, from the largest on.

    Args:
      scores: `[..., n]`, floating point. NaN and -inf are never chosen; -0.0 equals 0.0; ties go to the
        lower position.
      k: how many, a Python integer from 1 to n.
      where: the eligible entries, boolean, of the shape of `scores`; None: all.

    Returns:
      `indices`, int32 `[..., k]`, which differ within a row, and `chosen`, bool `[..., k]`: False where
      a row has fewer than k eligible entries. Neither has a gradient.

    Raises:
      ValueError: k is not an integer from 1 to n, or `where` has another shape.

    >>> indices, chosen = topk_indices(jnp.array([[1.0, 3.0, 3.0], [jnp.nan, 0.0, jnp.nan]]), 2)
    >>> indices[0].tolist(), chosen.tolist()
    ([1, 2], [[True, True], [True, False]])
    """
    n = scores.shape[-1] if scores.ndim else 0
    check_count("k", k, most=n)
    if where is not None and (where.shape != scores.shape or where.dtype != jnp.bool_):
        raise ValueError(
            f"where: {where.dtype}{list(where.shape)}; give booleans of shape {list(scores.shape)}"
        )
    scores = lax.stop_gradient(scores)
    eligible = ~jnp.isnan(scores) if where is None else where & ~jnp.isnan(scores)
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), scores)
    values, indices = lax.top_k(jnp.where(eligible, scores, jnp.full_like(scores, -jnp.inf)), k)
    return indices, values > -jnp.inf
