"""One new token against a cache of keys and values, of which only the chosen blocks are read."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._dispatch import choose, vary_alike
from pallas_kernels.block_sparse_attention import gpu_decode, tpu_decode
from pallas_kernels.block_sparse_attention.inputs import MASKED
from pallas_kernels.block_sparse_attention.lists import CODE_BITS
from pallas_kernels.block_sparse_attention.mask import BlockMask

KERNELS: dict[str, Any] = {"tpu": tpu_decode, "gpu": gpu_decode}
"""By name, the best first."""


def block_sparse_decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    mask: BlockMask,
    lengths: Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Array:
    """Attention of one query per sequence over the chosen blocks of its cache.

    Memory traffic is that of the chosen blocks (up to `mask.capacity` per head of the cache), whatever
    the cache's length: kernels on TPU and GPU read the blocks where they lie, elsewhere a gather of the
    list's blocks and two small products in plain JAX.

    Args:
      q: `[batch, heads, head_dim]`.
      k_cache, v_cache: `[batch, kv_heads, capacity, dim]`, whole blocks. Of another dtype than q's, what is
        read of them is cast to it.
      mask: chosen blocks for one query (`q_len=1, block_q=1`), per head of the cache, without
        patterns (`from_dense`, `from_scores` or `from_indices`).
      lengths: int `[batch]`, how much of each cache is filled; later positions are not seen, and may
        hold anything, NaN too. (So may blocks that are not chosen.)
      scale: by default `head_dim ** -0.5`.
      implementation: `'tpu'` (Pallas TPU: heads of 128 or 256, blocks of whole tiles, 16 positions in
        bfloat16), `'gpu'` (Pallas Triton, compute capability 8.0), `'xla'` (any device), or None for the
        best one that takes these arguments.
      interpret: run a kernel in the interpreter, for tests on a machine without the device; needs
        `implementation`.

    Returns:
      `[batch, heads, v_dim]` in q's dtype; 0 where nothing is visible.

    Raises:
      ValueError: if shapes, lengths and the mask do not fit together.

    >>> q, cache = jnp.ones((1, 2, 4)), jnp.arange(8.0).reshape(1, 1, 8, 1) * jnp.ones(4)
    >>> keep = jnp.array([[True, False, True, False]])
    >>> mask = BlockMask.from_dense(keep, (1, 2), capacity=2)
    >>> block_sparse_decode(q, 0 * cache, cache, mask, jnp.array([5]))[0, 0, 0] * 3  # 0 + 1 + 4
    Array(5., dtype=float32)
    """
    if q.ndim != 3 or k_cache.ndim != 4 or v_cache.ndim != 4:
        raise ValueError(
            f"q has shape {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}; give one query for each sequence, "
            "[batch, heads, head_dim], and [batch, kv_heads, capacity, dim] twice"
        )
    lengths = jnp.asarray(lengths)
    batch, heads, dim = q.shape
    kv_heads, length = k_cache.shape[1:3]
    if k_cache.shape[0] != batch or heads % kv_heads or v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"k_cache {k_cache.shape} and v_cache {v_cache.shape} do not fit q {q.shape}; they "
            "must be [batch, a divisor of heads, capacity, dim]"
        )
    if (mask.grid.q_len, mask.grid.block_q, mask.grid.kv_len) != (
        1,
        1,
        length,
    ) or length % mask.grid.block_kv:
        raise ValueError(
            f"mask is for q_len={mask.grid.q_len}, block_q={mask.grid.block_q}, kv_len={mask.grid.kv_len} with "
            f"block_kv={mask.grid.block_kv}; decoding needs 1, 1 and the cache's {length}, whole blocks"
        )
    if mask.rules:
        raise ValueError("mask has patterns; decoding takes chosen blocks and lengths only")
    if mask.codes.shape[0] not in (1, batch) or mask.codes.shape[1] not in (1, kv_heads):
        raise ValueError(
            f"mask is for batch {mask.codes.shape[0]} and {mask.codes.shape[1]} heads; it must be "
            f"1 or {batch}, and 1 or {kv_heads} (heads of the cache)"
        )
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths has shape {lengths.shape} and dtype {lengths.dtype}; it must be integer "
            f"[{batch}], one number for each sequence"
        )
    factor = dim**-0.5 if scale is None else float(scale)
    reasons = {
        name: kernel.why_not(q, k_cache, v_cache, mask, interpret)
        for name, kernel in KERNELS.items()
    }
    reasons["xla"] = "interpret=True is about the Pallas kernels" if interpret else None
    name = choose(implementation, reasons)
    if name == "xla":
        return _decode(factor, q, k_cache, v_cache, mask, lengths)
    q, k_cache, v_cache, mask, lengths = vary_alike(q, k_cache, v_cache, mask, lengths)
    return _kernel(name, factor, interpret, q, k_cache, v_cache, mask, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel(name: str, scale: float, interpret: bool, *args) -> Array:
    run = functools.partial(KERNELS[name].decode, scale=scale, interpret=interpret)
    return jax.custom_batching.sequential_vmap(run)(*args)


def _kernel_fwd(name, scale, interpret, *args):
    return _kernel(name, scale, interpret, *args), args


def _kernel_bwd(name, scale, interpret, args, dout):
    q, k, v, mask, lengths = args
    _, pull = jax.vjp(lambda q, k, v: _decode(scale, q, k, v, mask, lengths), q, k, v)
    return (*pull(dout), None, None)


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _decode(
    scale: float, q: Array, k_cache: Array, v_cache: Array, mask: BlockMask, lengths: Array
) -> Array:
    (batch, heads, dim), (kv_heads, length) = q.shape, k_cache.shape[1:3]
    n, block = mask.capacity, mask.grid.block_kv
    shape = (batch, kv_heads, n)
    indices = jnp.broadcast_to(mask.row_entries >> CODE_BITS, shape)
    listed = jnp.broadcast_to(jnp.arange(n).reshape(1, 1, n) < mask.counts[..., None], shape)

    def gather(cache: Array) -> Array:
        blocks = cache.reshape(batch, kv_heads, length // block, block, -1)
        chosen = jnp.take_along_axis(blocks, indices[..., None, None], 2)
        # Room that is not filled may hold anything, and 0 * NaN is NaN.
        chosen = jnp.where(seen[..., None], chosen, 0)
        return chosen.reshape(batch, kv_heads, n * block, -1).astype(q.dtype)

    positions = indices[..., None] * block + jnp.arange(block).reshape(1, 1, 1, -1)
    seen = listed[..., None] & (positions < lengths[:, None, None, None])
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum(
        "bhgd,bhkd->bhgk", grouped, gather(k_cache), preferred_element_type=jnp.float32
    )
    visible = seen.reshape(batch, kv_heads, 1, n * block)
    scores = jnp.where(visible, scores * scale, MASKED)
    top = lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    values = gather(v_cache)
    out = jnp.einsum(
        "bhgk,bhkd->bhgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return out.reshape(batch, heads, -1).astype(q.dtype)
