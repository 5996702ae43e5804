"""Scores as levels: int32 numbers in the order of the scores, compared one after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class Bounds(NamedTuple):
    """All numbers of a level lie in [lo, last]. `smooth`: they are spread evenly, so that the first
    pass may interpolate; else it takes the thresholds `probes`, or uniform ones."""

    lo: Any  # an integer; or an array of them, one per slice
    last: int
    smooth: bool = False
    probes: tuple[int, ...] = ()


def native(dtype: Any) -> Any:
    """The dtype in which scores of `dtype` are compared.

    Raises:
      ValueError: complex numbers and what else has no order.
    """
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.dtype(jnp.int32)
    if jnp.issubdtype(dtype, jnp.floating):
        return dtype if dtype.itemsize > 1 else jnp.dtype(jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer):
        return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.int32)
    raise ValueError(f"scores have dtype {dtype}: give real numbers, floating-point or integer")


def as_int(x: Array) -> Array:
    """The same 32 bits as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def _info(dtype: Any) -> Any:
    return jnp.iinfo(f"int{8 * jnp.dtype(dtype).itemsize}")


def _shift(dtype: Any) -> int:
    """What is added to the key of a float, so that infinity has the greatest integer."""
    info = _info(dtype)
    return info.max - int(np.asarray(jnp.inf, dtype).view(info.dtype))


def _float_keys(x: Array) -> Array:
    """Integers of the same width, in the order of the floats; NaN below everything.

    Negative floats order by their negated magnitude bits, so that -0.0 and 0.0 are both 0. The sum
    wraps NaN, whose magnitudes exceed that of infinity, around to the lowest integers.
    """
    info = _info(x.dtype)
    b = lax.bitcast_convert_type(x, info.dtype)
    lowest = jnp.asarray(info.min, info.dtype)
    return jnp.where(b < 0, lowest - b, b) + jnp.asarray(_shift(x.dtype), info.dtype)


def float32_of(key: Array) -> Array:
    """The float32 whose level is `key`."""
    b = key - jnp.int32(_shift(jnp.float32))
    b = jnp.where(b < 0, jnp.int32(INT_MIN) - b, b)
    return lax.bitcast_convert_type(b, jnp.float32)


def key_of(value: float, dtype: Any) -> int:
    """The level of a float of at most 32 bits."""
    bits = int(np.asarray(abs(value), dtype).view(_info(dtype).dtype))
    return (-bits if value < 0 else bits) + _shift(dtype)


def value_levels(x: Array) -> tuple[list[Array], Array | None]:
    """Scores as levels, and which of them may be chosen (None: all within the bounds)."""
    x = x.astype(native(x.dtype))
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    keys = _float_keys(x) if floating else x
    unsigned = INT_MIN if jnp.issubdtype(keys.dtype, jnp.unsignedinteger) else 0
    if keys.dtype.itemsize == 8:
        words = lax.bitcast_convert_type(keys, jnp.uint32)  # [..., 2], the low one first
        low, high = as_int(words[..., 0]) ^ INT_MIN, as_int(words[..., 1]) ^ unsigned
        return [high, low], ~jnp.isnan(x) if floating else None
    if unsigned:
        return [as_int(keys) ^ INT_MIN], None
    return [keys.astype(jnp.int32)], None


def value_bounds(dtype: Any) -> list[Bounds]:
    """The bounds of the levels of scores that are compared in `dtype`."""
    dtype = native(dtype)
    if dtype.itemsize == 8:
        return [Bounds(INT_MIN, INT_MAX), Bounds(INT_MIN, INT_MAX)]
    if not jnp.issubdtype(dtype, jnp.floating):
        return [Bounds(INT_MIN, INT_MAX)]
    # Most scores are magnitudes near 1, with a heap of them at 0.
    tiny = key_of(0.0, dtype)
    probes = [tiny, tiny + 1]
    probes += [key_of(v, dtype) for v in (6e-5, 1e-3, 1e-2, 0.1, 1.0, 30.0)]
    return [Bounds(key_of(-np.inf, dtype), key_of(np.inf, dtype), probes=tuple(probes))]


def at_or_above(levels, lo) -> Array:
    """Whether the levels are lexicographically at or above `lo`."""
    mask = levels[-1] >= lo[-1]
    for level, value in reversed(list(zip(levels[:-1], lo[:-1]))):
        mask = (level > value) | ((level == value) & mask)
    return mask
