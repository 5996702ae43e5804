"""One new token against chosen blocks of a cache, as a Pallas TPU kernel.

The cache stays in HBM. A program takes the queries of the heads that share keys and walks their list: the chosen
blocks are copied to VMEM from where they lie, a chunk of a few at a time, each once and no others, and so many chunks
ahead of their use that the copies of one head follow those of the one before without a gap.

Lists are in the order of the cache, so the positions that are seen come first in what is copied: one number per
head says how many they are. Blocks behind it are not read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import target_platform
from pallas_kernels._tpu import LANES, chip, compiler_params, in_32_bits, result, round_up
from pallas_kernels.block_sparse_attention.inputs import FLOOR, LOG2E, MASKED
from pallas_kernels.block_sparse_attention.lists import CODE_BITS
from pallas_kernels.block_sparse_attention.mask import BlockMask
from pallas_kernels.block_sparse_attention.tpu_walk import NT, PREFETCHED_WORDS

CHUNK = 1024  # positions that are copied and multiplied at a time
AHEAD = 3  # chunks on their way: a copy takes about as long to begin as one of 512 to arrive
_LARGEST = 2048  # positions of a block


def why_not(q: Array, k: Array, v: Array, mask: BlockMask, interpret: bool) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if target_platform() != "tpu" and not interpret:
        return f"it runs on TPU, not on {target_platform()} (interpret=True emulates it)"
    for name, x in (("q", q), ("k_cache", k), ("v_cache", v)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"it takes bfloat16 and float32, not {name} of {x.dtype}"
    rows = 32 // min(k.dtype.itemsize, v.dtype.itemsize)  # of a tile of memory
    block = mask.grid.block_kv
    if block % rows or block > _LARGEST:
        return f"block_kv={block} must be a multiple of {rows}, at most {_LARGEST}"
    if k.shape[-1] % LANES or v.shape[-1] % LANES or max(k.shape[-1], v.shape[-1]) > 256:
        return f"head_dim={k.shape[-1]} and v_dim={v.shape[-1]} must be {LANES} or {2 * LANES}"
    words = k.shape[0] * k.shape[1] * (mask.capacity + 1)
    if words > PREFETCHED_WORDS:
        return f"all lists must fit SMEM, {words} words of at most {PREFETCHED_WORDS}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one call."""

    programs: int
    block: int
    blocks: int  # of a chunk
    capacity: int
    exponent: float  # scores times this are exponents of 2
    precision: lax.Precision | None


def _kernel(p: _Plan, entries, seen, q, k, v, out, k_ring, v_ring, arrived, front) -> None:
    """`front`: head and chunk to be copied next, and how many chunks have been used."""
    head, chunk = pl.program_id(0), p.blocks * p.block
    slots = AHEAD + 1

    def chunks(i: Array) -> Array:
        return jnp.maximum(1, lax.div(seen[i] + (chunk - 1), jnp.int32(chunk)))

    def each(i: Array, c: Array, slot: Array, do: Callable[[Any], None]) -> None:
        """do(copy) for the copies of a chunk of a head."""
        first = c * p.blocks
        number = lax.div(seen[i] + (p.block - 1), jnp.int32(p.block)) - first

        def one(g: Any, carry: None = None) -> None:
            at = lax.shift_right_logical(entries[i * p.capacity + first + g], jnp.int32(CODE_BITS))
            there, here = (
                pl.ds(pl.multiple_of(x * p.block, p.block), p.block) for x in (at, jnp.int32(g))
            )
            for ref, ring in ((k, k_ring), (v, v_ring)):
                source, target = ref.at[i, there, :], ring.at[slot, here, :]
                do(pltpu.make_async_copy(source, target, arrived.at[slot]))

        @pl.when(number >= p.blocks)
        def _whole():
            for g in range(p.blocks):
                one(g)

        @pl.when(number < p.blocks)
        def _part():
            lax.fori_loop(0, jnp.maximum(number, 0), one, None)

    def fetch(step: Array) -> None:
        i, c = front[0], front[1]

        @pl.when(i < p.programs)
        def _fetch():
            each(i, c, lax.rem(step, jnp.int32(slots)), lambda copy: copy.start())
            last = c + 1 >= chunks(i)
            front[0] = jnp.where(last, i + 1, i)
            front[1] = jnp.where(last, 0, c + 1)

    @pl.when(head == 0)
    def _begin():
        front[0], front[1], front[2] = 0, 0, 0
        for step in range(AHEAD):
            fetch(jnp.int32(step))

    queries = q[0]

    def walk(c: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, acc = carry
        step = front[2]
        fetch(step + AHEAD)
        slot = lax.rem(step, jnp.int32(slots))
        each(head, c, slot, lambda copy: copy.wait())
        front[2] = step + 1
        left = seen[head] - c * chunk
        dot = functools.partial(
            lax.dot_general, precision=p.precision, preferred_element_type=jnp.float32
        )
        s = dot(queries, k_ring[slot].astype(queries.dtype), NT) * p.exponent
        s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 1) < left, s, MASKED)
        new = jnp.maximum(highest, jnp.max(s, 1, keepdims=True))
        weights, shrink = jnp.exp2(s - new), jnp.exp2(highest - new)
        values = v_ring[slot].astype(queries.dtype)
        # Memory that nobody wrote and room of the cache may hold anything, and 0 * NaN is NaN.
        inside = lax.broadcasted_iota(jnp.int32, values.shape, 0) < left
        values = jnp.where(inside, values, jnp.zeros_like(values))
        product = dot(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
        total = total * shrink + jnp.sum(weights, 1, keepdims=True)
        return new, total, acc * shrink + product

    column = jnp.zeros((queries.shape[0], 1), jnp.float32)
    zero = jnp.zeros((queries.shape[0], v.shape[-1]), jnp.float32)
    highest, total, acc = lax.fori_loop(0, chunks(head), walk, (column + FLOOR, column, zero))
    out[0] = (acc / jnp.where(total == 0, 1.0, total)).astype(out.dtype)  # NaN is not nothing


@in_32_bits
def decode(
    q: Array, k_cache: Array, v_cache: Array, mask: BlockMask, lengths: Array, *,
    scale: float, interpret: bool = False,
) -> Array:  # fmt: skip
    """As `decode.block_sparse_decode`, with arguments that are checked."""
    (batch, heads, dim), (_, kv_heads, _, v_dim) = q.shape, v_cache.shape
    programs, group, block = batch * kv_heads, heads // kv_heads, mask.grid.block_kv
    rows, blocks = round_up(group, 32 // q.dtype.itemsize), max(1, CHUNK // block)
    blocks = min(blocks, mask.capacity)
    shape = (batch, kv_heads, mask.capacity)
    entries = jnp.broadcast_to(mask.row_entries, shape)
    start = (entries >> CODE_BITS) * block
    listed = jnp.arange(mask.capacity).reshape(1, 1, -1) < mask.counts[..., None]
    filled = jnp.clip(lengths.astype(jnp.int32)[:, None, None] - start, 0, block)
    seen = jnp.sum(jnp.where(listed, filled, 0), -1).reshape(programs)
    p = _Plan(
        programs=programs,
        block=block,
        blocks=blocks,
        capacity=mask.capacity,
        exponent=scale * LOG2E,
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )
    padded = jnp.pad(q.reshape(programs, group, dim), ((0, 0), (0, rows - group), (0, 0)))
    flat = lambda x: x.reshape(programs, *x.shape[2:])
    ring = lambda x, d: pltpu.VMEM((AHEAD + 1, blocks * block, d), x.dtype)
    # In HBM by name: where it is left to XLA, it copies whole caches to VMEM first.
    in_place = pl.BlockSpec(memory_space=pltpu.HBM)
    of_head = lambda d: pl.BlockSpec((1, rows, d), lambda i, *_: (i, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(programs,),
            in_specs=[of_head(dim), in_place, in_place],
            out_specs=of_head(v_dim),
            scratch_shapes=[
                ring(k_cache, dim),
                ring(v_cache, v_dim),
                pltpu.SemaphoreType.DMA((AHEAD + 1,)),
                pltpu.SMEM((3,), jnp.int32),
            ],
        ),
        out_shape=result((programs, rows, v_dim), q.dtype, q),
        compiler_params=compiler_params(("arbitrary",), chip().vmem * 7 // 8),
        name="block_sparse_decode",
        interpret=interpret,
    )(entries.reshape(-1), seen, padded, flat(k_cache), flat(v_cache))
    return out[:, :group].reshape(batch, heads, v_dim)
