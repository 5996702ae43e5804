"""Partial results of attention merge by their LSE."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def merge_attention(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    r"""Attention over the union of disjoint sets of keys, from the output and LSE of each.

    $$ L = \log \sum_p e^{L_p}, \quad o = \sum_p e^{L_p - L} o_p $$

    Args:
      parts: pairs of an output `[..., length, dim]` and its log-sum-exp `[..., length]`, which
        may be -inf.

    Returns:
      The merged pair; the output in the dtype of the first.

    >>> q, k, v = jnp.ones((1, 1, 4, 8)), jnp.eye(4, 8)[None, None], jnp.eye(4, 8)[None, None]
    >>> from pallas_kernels import BlockMask, block_sparse_attention
    >>> left, right = jnp.array([[True, False]] * 2), jnp.array([[False, True]] * 2)
    >>> masks = [BlockMask.from_dense(x, (2, 2)) for x in (left, right)]
    >>> parts = [block_sparse_attention(q, k, v, m, return_lse=True) for m in masks]
    >>> bool(jnp.allclose(merge_attention(parts)[0], 0.25 * jnp.eye(4, 8).sum(0)))
    True
    """
    if not parts:
        raise ValueError("parts=[] is empty; give at least one (output, lse) pair")
    top = functools.reduce(jnp.maximum, (lse for _, lse in parts))
    top = lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = functools.reduce(jnp.add, weights)
    some = total != 0  # NaN is not nothing
    safe = jnp.where(some, total, 1.0)
    terms = [(w / safe)[..., None] * o.astype(jnp.float32) for w, (o, _) in zip(weights, parts)]
    out = functools.reduce(jnp.add, terms).astype(parts[0][0].dtype)
    return out, jnp.where(some, top + jnp.log(safe), -jnp.inf)
