r"""Pooling over blocks of positions: what block predictors score in place of queries and keys.

Arrays are `[..., length, dim]`; the last block may be short. With `lengths` `[batch]`, the first axis of the
array, positions behind a sequence's end take no part: sums are divided by true counts, and a block without a
position has mean 0, maximum $-\infty$ and minimum $\infty$.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def cut(x: Array, block: int, lengths: Array | None = None) -> tuple[Array, Array | np.ndarray]:
    """Blocks of positions, and which positions are there.

    Args:
      x: `[..., length, dim]`.
      block: positions of a block.
      lengths: int `[batch]`: how much of each entry of the first axis is filled; None: all.

    Returns:
      `[..., blocks, block, dim]` in x's dtype with 0 where nothing is, and bool that broadcasts to it.

    >>> x, there = cut(jnp.ones((3, 2)), 2)
    >>> x.shape, there[..., 0].tolist()
    ((2, 2, 2), [[True, True], [True, False]])
    """
    length = x.shape[-2]
    n = -(-length // block)
    if n * block > length:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n * block - length), (0, 0)])
    x = x.reshape(*x.shape[:-2], n, block, x.shape[-1])
    position = np.arange(n * block).reshape(n, block, 1)
    if lengths is None:
        return x, position < length
    filled = jnp.minimum(lengths, length).reshape(-1, *(1,) * (x.ndim - 1))
    there = position < filled
    return jnp.where(there, x, 0), there


def mean(x: Array, block: int, lengths: Array | None = None) -> Array:
    """Means of blocks, float32 `[..., blocks, dim]`.

    >>> mean(jnp.array([[1.0], [3.0], [5.0]]), 2)[:, 0].tolist()
    [2.0, 5.0]
    """
    x, there = cut(x, block, lengths)
    return _sum_rows(x) / _number(there)


def _sum_rows(x: Array) -> Array:
    """Sums over the second last axis in float32.

    Of 16-bit numbers as a product with ones: a sum would first write a float32 copy of queries and keys, which on a TPU
    takes more time than all else of a choice (`experiments.benchmarks.attention_choice`). Eight rows of ones, of which
    one is used, since a product with a vector is turned into that sum again.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return jnp.sum(x, -2, dtype=jnp.float32)
    ones = jnp.ones((8, x.shape[-2]), x.dtype)
    return jnp.einsum("ab,...bd->...ad", ones, x, preferred_element_type=jnp.float32)[..., 0, :]


def _number(there: Array | np.ndarray) -> Array:
    """How many positions a block has, at least 1."""
    return jnp.maximum(jnp.sum(there, -2, dtype=jnp.float32), 1.0)


def maximum(x: Array, block: int, lengths: Array | None = None) -> Array:
    """Largest entries of blocks, channel by channel, `[..., blocks, dim]`."""
    x, there = cut(x, block, lengths)
    return jnp.where(there, x, -jnp.inf).max(-2).astype(jnp.float32)


def minimum(x: Array, block: int, lengths: Array | None = None) -> Array:
    """Smallest entries of blocks, channel by channel, `[..., blocks, dim]`."""
    x, there = cut(x, block, lengths)
    return jnp.where(there, x, jnp.inf).min(-2).astype(jnp.float32)


def self_similarity(
    x: Array, block: int, lengths: Array | None = None, centre: Array | None = None
) -> Array:
    r"""The mean cosine of all ordered pairs of a block's rows, `[..., blocks]`.

    Pairs of a row with itself included, it is $\| \tfrac1b \sum_i x_i / \|x_i\| \|^2$: no matrix of pairs is made.
    A row of zeros is similar to nothing, not even itself. `centre` `[..., 1, dim]` is taken off the rows first.

    >>> self_similarity(jnp.array([[2.0, 0.0], [0.0, 1.0]]), 2).tolist()
    [0.5]
    """
    x, there = cut(x, block, lengths)
    if centre is not None:
        x = jnp.where(there, x - centre[..., None, :], 0.0)
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    unit = x * jnp.where(square == 0, 0.0, lax.rsqrt(jnp.where(square == 0, 1.0, square)))
    return jnp.sum((unit.sum(-2) / _number(there)) ** 2, -1)
