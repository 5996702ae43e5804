"""Block-sparse attention as its definition: the whole score matrix, masked."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_sparse_attention.inputs import Inputs


def forward(inputs: Inputs) -> tuple[Array, Array]:
    """Output and log-sum-exp; differentiable by JAX, which makes it the reference for gradients."""
    q, k, v, mask, softcap = inputs.q, inputs.k, inputs.v, inputs.mask, inputs.softcap
    heads, kv_heads = q.shape[1], k.shape[1]
    k, v = (jnp.repeat(x, heads // kv_heads, 1).astype(jnp.float32) for x in (k, v))
    seen = mask.to_dense()
    seen = jnp.repeat(seen, heads // seen.shape[1], 1) if seen.shape[1] > 1 else seen
    if inputs.segments is not None:
        of_q, of_k = inputs.segments
        seen = seen & (of_q[:, None, :, None] == of_k[:, None, None, :])
    # What is not finite reaches the queries that see it, and no others: 0 * NaN is NaN, so that
    # products are taken of finite numbers.
    broken = ~(_finite(q)[..., :, None] & (_finite(k) & _finite(v))[..., None, :])
    q32, k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (q.astype(jnp.float32), k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q32, k, precision="highest")
    scores = scores * inputs.scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    some = jnp.any(seen, -1, keepdims=True)
    # Two `where`s: a row without a visible key takes part in no arithmetic, nor does its gradient.
    highest = jnp.max(jnp.where(seen, scores, -jnp.inf), -1, keepdims=True)
    highest = jnp.where(some, highest, 0.0)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - highest, 0.0)), 0.0)
    total = jnp.where(some, jnp.sum(weights, -1, keepdims=True), 1.0)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights / total, v, precision="highest")
    lse = jnp.where(some, highest + jnp.log(total), -jnp.inf)[..., 0]
    broken = jnp.any(seen & broken, -1)
    out, lse = jnp.where(broken[..., None], jnp.nan, out), jnp.where(broken, jnp.nan, lse)
    return out.astype(q.dtype), lse


def _finite(x: Array) -> Array:
    """bool `[batch, heads, length]`: positions of which every number is finite."""
    return jnp.isfinite(x).all(-1)
