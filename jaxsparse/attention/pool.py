r"""Pooling over blocks of positions: what block predictors score in place of queries and keys.

Arrays are `[..., length, dim]`; the last block may be short. With `lengths` `[batch]`, the first axis of the
array, positions behind a sequence's end take no part: sums are divided by true counts, and a block without a
position has mean 0, maximum $-\infty$ and minimum $\infty$.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def cut(x: Array, block: int, lengths: Array | None = None) -> tuple[Array, Array]:
    """Blocks of positions, and which positions are there.

    Args:
      x: `[..., length, dim]`.
      block: positions of a block.
      lengths: int `[batch]`: how much of each entry of the first axis is filled; None: all.

    Returns:
      float32 `[..., blocks, block, dim]` with 0 where nothing is, and bool of the same shape but for the last
      axis, 1.

    >>> x, there = cut(jnp.ones((3, 2)), 2)
    >>> x.shape, there[..., 0].tolist()
    ((2, 2, 2), [[True, True], [True, False]])
    """
    length = x.shape[-2]
    n = -(-length // block)
    x = x.astype(jnp.float32)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n * block - length), (0, 0)])
    x = x.reshape(*x.shape[:-2], n, block, x.shape[-1])
    position = jnp.arange(n * block).reshape(n, block, 1)
    there = position < length
    if lengths is not None:
        there = there & (position < lengths.reshape(-1, *(1,) * (x.ndim - 1)))
    there = jnp.broadcast_to(there, (*x.shape[:-1], 1))
    return jnp.where(there, x, 0.0), there


def mean(x: Array, block: int, lengths: Array | None = None) -> Array:
    """Means of blocks, `[..., blocks, dim]`.

    >>> mean(jnp.array([[1.0], [3.0], [5.0]]), 2)[:, 0].tolist()
    [2.0, 5.0]
    """
    x, there = cut(x, block, lengths)
    return x.sum(-2) / jnp.maximum(there.sum(-2), 1)


def maximum(x: Array, block: int, lengths: Array | None = None) -> Array:
    """Largest entries of blocks, channel by channel, `[..., blocks, dim]`."""
    x, there = cut(x, block, lengths)
    return jnp.where(there, x, -jnp.inf).max(-2)


def minimum(x: Array, block: int, lengths: Array | None = None) -> Array:
    """Smallest entries of blocks, channel by channel, `[..., blocks, dim]`."""
    x, there = cut(x, block, lengths)
    return jnp.where(there, x, jnp.inf).min(-2)


def self_similarity(x: Array, block: int, lengths: Array | None = None) -> Array:
    r"""The mean cosine of all ordered pairs of a block's rows, `[..., blocks]`.

    Pairs of a row with itself included, it is $\| \tfrac1b \sum_i x_i / \|x_i\| \|^2$: no matrix of pairs is made.
    A row of zeros is similar to nothing, not even itself.

    >>> self_similarity(jnp.array([[2.0, 0.0], [0.0, 1.0]]), 2).tolist()
    [0.5]
    """
    x, there = cut(x, block, lengths)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / jnp.where(norm == 0, 1.0, norm)
    centre = unit.sum(-2) / jnp.maximum(there.sum(-2), 1)
    return jnp.sum(centre**2, -1)
