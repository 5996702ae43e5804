"""Exact selection: the only top-k of the project. (First version.)"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax


def _ordered(x: Array) -> Array:
    """uint32 keys in the order of the values; NaN is 0, below everything."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        f = x.astype(jnp.float32) + 0.0
        b = lax.bitcast_convert_type(f, jnp.int32)
        u = lax.bitcast_convert_type(b ^ ((b >> 31) & jnp.int32(0x7FFFFFFF)), jnp.uint32)
        return jnp.where(jnp.isnan(f), jnp.uint32(0), u ^ jnp.uint32(0x80000000))
    return lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32) ^ jnp.uint32(0x80000000)


def _axes(ndim, axis):
    if axis is None:
        return tuple(range(ndim))
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(a % ndim for a in axis)


def count(mask: Array, *, axis=None, keepdims=False) -> Array:
    """How many entries are True, int32, over `axis`."""
    return jnp.sum(mask, axis=axis, dtype=jnp.int32, keepdims=keepdims)


def _search(keys, k, where, axes):
    """Largest t with count(keys >= t & where) >= k, keepdims."""
    shape = [1 if a in axes else n for a, n in enumerate(keys.shape)]

    def body(i, t):
        cand = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(count((keys >= cand) & where, axis=axes, keepdims=True) >= k, cand, t)

    return lax.fori_loop(0, 32, body, jnp.zeros(shape, jnp.uint32))


def _position(shape, axes):
    pos = jnp.zeros(shape, jnp.uint32)
    for a in axes:
        pos = pos * jnp.uint32(shape[a]) + lax.broadcasted_iota(jnp.uint32, shape, a)
    return pos


def _mix(x):
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def topk_mask(scores, k, *, where=None, ties="position", seed=None, axis=None) -> Array:
    """Exactly min(k, eligible) True: the k largest."""
    scores = lax.stop_gradient(jnp.asarray(scores))
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    axes = _axes(scores.ndim, axis)
    keys = _ordered(scores)
    ok = keys > 0
    ok = ok if where is None else ok & where
    k = jnp.asarray(k, jnp.int32)
    if k.ndim:
        k = jnp.expand_dims(k, axes) if k.ndim != scores.ndim else k
    t = _search(keys, k, ok, axes)
    above = (keys > t) & ok
    need = k - count(above, axis=axes, keepdims=True)
    tied = (keys == t) & ok
    pos = _position(scores.shape, axes)
    order = ~pos if ties == "position" else _mix(pos ^ jnp.asarray(seed).astype(jnp.uint32))
    cut = _search(order, need, tied, axes)
    return above | (tied & (order >= cut) & (need > 0))


def global_topk_masks(leaves, k, *, where=None, ties="position", seed=None, minimum=None):
    """Exactly k True in total."""
    flat = jnp.concatenate([jnp.asarray(x, jnp.float32).ravel() for x in leaves])
    w = None
    if where is not None:
        w = jnp.concatenate(
            [jnp.ones(x.size, bool) if m is None else m.ravel() for x, m in zip(leaves, where)]
        )
    if minimum is not None:
        own = jnp.concatenate([topk_mask(x, m).ravel() for x, m in zip(leaves, minimum)])
        flat = jnp.where(own, jnp.inf, flat)
    m = topk_mask(flat, k, where=w, ties=ties, seed=seed)
    out, i = [], 0
    for x in leaves:
        out.append(m[i : i + x.size].reshape(x.shape))
        i += x.size
    return out


def quantile(leaves, q):
    """Linear-interpolated quantile."""
    return jnp.quantile(jnp.concatenate([x.ravel().astype(jnp.float32) for x in leaves]), q)


def lamp_scores(scores: Array, *, lead: int = 0) -> Array:
    """s^2 / sum of the squares that rank no lower."""
    shape = scores.shape
    flat = scores.reshape(math.prod(shape[:lead]), -1)

    def one(s):
        order = jnp.argsort(s, stable=True)
        u = jnp.square(s[order])
        tail = jnp.cumsum(u[::-1])[::-1]
        return jnp.zeros_like(s).at[order].set(u / jnp.maximum(tail, 1e-38))

    return jax.vmap(one)(flat).reshape(shape)
