"""Positions, and pseudo-random numbers that depend on a seed and a position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse import _counts


def position(shape: Sequence[int], axes: Sequence[int], zero: Array) -> Array:
    """The row-major position within `axes`, uint32 of `shape`. It starts from `zero`, an operand of
    the loop: constants would be computed before the loop, and stored."""
    out = jnp.broadcast_to(zero, shape)
    for a in axes:
        out = out * jnp.uint32(shape[a]) + lax.broadcasted_iota(jnp.uint32, shape, a)
    return out


def outer_inner(shape: Sequence[int], axes: Sequence[int], limit: int) -> tuple[list, list]:
    """`axes` as leading and trailing ones, the latter with fewer than `limit` positions."""
    split = len(axes)
    while split and math.prod(shape[a] for a in axes[split - 1 :]) < limit:
        split -= 1
    return list(axes[:split]), list(axes[split:])


def mix(x: Array) -> Array:
    """A bijection of uint32 that scatters its argument (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def as_seed(seed: Any) -> Array:
    """A uint32 from an integer or a PRNG key.

    Raises:
      ValueError: anything else.
    """
    if isinstance(seed, int | np.integer):
        return jnp.uint32(int(seed) & 0xFFFFFFFF)
    if not hasattr(seed, "dtype"):
        raise ValueError(f"seed={seed!r}: give an integer or a PRNG key")
    seed = jnp.asarray(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return jax.random.bits(seed, (), jnp.uint32)
    if seed.shape == (2,) and seed.dtype == jnp.uint32:
        return jax.random.bits(jax.random.wrap_key_data(seed), (), jnp.uint32)
    if seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer):
        return seed.astype(jnp.uint32)
    raise ValueError(
        f"seed of dtype {seed.dtype} and shape {seed.shape}: give an integer scalar or a PRNG key"
    )


def hashed(shape: Sequence[int], seed: Array, zero: Array, offset: int = 0) -> Array:
    """See `position_hash`; positions start at `offset`, and from `zero` as in `position`."""
    outer, inner = outer_inner(shape, range(len(shape)), 2 * _counts.WIDE)
    factor, shift = _line(seed)
    if outer:
        shift = mix(position(shape, outer, zero) + shift)
    return mix((position(shape, inner, zero) + jnp.uint32(offset)) * factor + shift)


def _line(seed: Array) -> tuple[Array, Array]:
    """What positions are multiplied by, and what is added."""
    return mix(seed + jnp.uint32(0x9E3779B9)) | 1, mix(seed ^ jnp.uint32(0x7F4A7C15))


def hash_at(positions: Array, seed: Any) -> Array:
    """`position_hash` at some positions of an array: for one that is seen in parts.

    Args:
      positions: row-major ones, uint32, below 2^32.
      seed: an int, an integer scalar (traced or not), or a PRNG key.

    >>> whole = position_hash((4, 6), seed=7)
    >>> bool((hash_at(jnp.uint32([[8], [14]]), seed=7) == whole[1:3, 2:3]).all())
    True

    Raises:
      ValueError: a seed that is none of these.
    """
    factor, shift = _line(as_seed(seed))
    return mix(positions * factor + shift)


def position_hash(shape: Sequence[int], seed: Any) -> Array:
    """Pseudo-random uint32 numbers that depend on the seed and the row-major position alone.

    They are distinct for distinct positions below 2^32 (each seed is a bijection of the positions),
    and the same for any sharding and number of devices.

    Args:
      shape: the shape of the result.
      seed: an int, an integer scalar (traced or not), or a PRNG key.

    >>> h = position_hash((2, 3), seed=7)
    >>> h.shape, h.dtype.name, len(set(h.ravel().tolist()))
    ((2, 3), 'uint32', 6)

    Raises:
      ValueError: a seed that is none of these.
    """
    return jnp.broadcast_to(hashed(tuple(shape), as_seed(seed), jnp.uint32(0)), tuple(shape))
