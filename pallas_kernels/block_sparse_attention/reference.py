"""Block-sparse attention as its definition: the whole score matrix, masked."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_sparse_attention.grid import Grid
from pallas_kernels.block_sparse_attention.inputs import LOG2E, Inputs


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
    if inputs.skip_below is not None:
        seen = seen & ~skipped(jnp.where(seen, scores, -jnp.inf), mask.grid, inputs.skip_below)
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


def skipped(scores: Array, grid: Grid, below: float) -> Array:
    r"""Pairs in blocks that the running maximum of their rows makes negligible.

    Blocks of a row I come in the order of their keys. With $b_{iJ}$ the largest score of query i in block J and
    $m_{iJ}$ the largest in blocks before, J is skipped if $\max_{i \in I} (b_{iJ} - m_{iJ}) \le -\lambda \ln 2$.
    Since it raises no maximum, m does not depend on what was skipped.

    Args:
      scores: float32 `[batch, heads, q_len, kv_len]`, $-\infty$ for what is not seen.
      grid: blocks.
      below: $\lambda$.

    Returns:
      bool of the scores' shape.
    """
    q_len, kv_len, bq, bk = grid.q_len, grid.kv_len, grid.block_q, grid.block_kv
    rows, columns = grid.q_blocks * bq - q_len, grid.kv_blocks * bk - kv_len
    s = jnp.pad(scores, ((0, 0), (0, 0), (0, rows), (0, columns)), constant_values=-jnp.inf)
    largest = s.reshape(*s.shape[:3], grid.kv_blocks, bk).max(-1)
    before = lax.cummax(largest, axis=3)
    before = jnp.pad(before, ((0, 0), (0, 0), (0, 0), (1, 0)), constant_values=-jnp.inf)[..., :-1]
    # A query that sees nothing of a block does not ask for it.
    gain = jnp.where(jnp.isneginf(largest), -jnp.inf, largest - before)
    gain = gain.reshape(*s.shape[:2], grid.q_blocks, bq, grid.kv_blocks).max(3)
    negligible = gain <= -below / LOG2E
    pairs = jnp.repeat(jnp.repeat(negligible, bq, 2), bk, 3)
    return pairs[:, :, :q_len, :kv_len]


def _finite(x: Array) -> Array:
    """bool `[batch, heads, length]`: positions of which every number is finite."""
    return jnp.isfinite(x).all(-1)
