"""Masks of short slices, such as groups of four: every entry counts the ones before it.

A search would read the data several times; here each of the m entries of a slice is compared with
the others once, m^2 / 2 vector operations in all and no loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from jaxsparse.selection._hash import hashed
from jaxsparse.selection._keys import INT_MIN, as_int, at_or_above, value_levels

_UP_TO = 32


def is_short(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether slices are so short that their entries are compared in pairs."""
    return len(axes) == 1 and shape[axes[0]] <= _UP_TO


def pairwise(x: Array, k: Array, where: Array | None, seed: Array | None, axis: int) -> Array:
    """The mask of the k largest along `axis`."""
    levels, inside = value_levels(x)
    if inside is None and jnp.issubdtype(x.dtype, jnp.floating):
        inside = ~jnp.isnan(x)
    if where is not None:
        inside = where if inside is None else inside & where
    if seed is not None:
        levels.append(as_int(hashed(x.shape, seed, jnp.uint32(0))) ^ INT_MIN)
    eligible = None
    if inside is not None:
        inside = jnp.broadcast_to(inside, x.shape)
        levels = [jnp.where(inside, level, jnp.int32(INT_MIN)) for level in levels]
        eligible = [lax.index_in_dim(inside, i, axis) for i in range(x.shape[axis])]
    rows = [[lax.index_in_dim(level, i, axis) for level in levels] for i in range(x.shape[axis])]
    ranks = [jnp.zeros(rows[0][0].shape, jnp.int8) for _ in rows]
    for j in range(len(rows)):
        for i in range(j):
            # i is ahead of j where it is not below it, for i stands before j
            first = at_or_above(rows[i], rows[j])
            second = ~first
            if eligible is not None:
                first = (first | ~eligible[j]) & eligible[i]
                second = ~first & eligible[j]
            ranks[j] = ranks[j] + first.astype(jnp.int8)
            ranks[i] = ranks[i] + second.astype(jnp.int8)
    kept = [r < k.astype(jnp.int8) for r in ranks]
    if eligible is not None:
        kept = [m & e for m, e in zip(kept, eligible)]
    return lax.concatenate(kept, axis)
