"""One new token against chosen blocks of a cache, as a Pallas Triton kernel.

A program takes the queries of the heads that share keys (one tile, filled up) and a part of their list;
it reads the chosen blocks where they lie, once, without a gathered copy. Lists are split so that a few
sequences fill the device (flash decoding), and the parts merge by their LSE.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import _gpu
from pallas_kernels._gpu import Config, dot, in_32_bits, largest_tile, load, power_of_2, result
from pallas_kernels.block_sparse_attention.gpu import LOG2E, SMALLEST
from pallas_kernels.block_sparse_attention.inputs import FLOOR, MASKED
from pallas_kernels.block_sparse_attention.lists import CODE_BITS
from pallas_kernels.block_sparse_attention.mask import BlockMask
from pallas_kernels.block_sparse_attention.merge import merge_attention

MAX_GROUP = 64  # heads that share keys
_WAVES = 2  # programs for each multiprocessor

# By the kind of numbers and the larger head size; `depth` is keys at a time.
DECODE: dict[str, dict[str, Config]] = {
    chip: {
        f"{kind}, {width}": Config(16, depth if width < 256 else depth // 2, 4, 3)
        for kind, depth in (("16 bits", 64), ("exact", 32))
        for width in (16, 32, 64, 128, 256)
    }
    for chip in ("h100", "a100", "small")
}


def why_not(q: Array, k: Array, v: Array, mask: BlockMask, interpret: bool) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if (reason := _gpu.why_not(interpret)) is not None:
        return reason
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _gpu.DTYPES:
        return f"q, k and v must be of one floating-point type, not {q.dtype}, {k.dtype}, {v.dtype}"
    if mask.grid.block_kv % SMALLEST:
        return f"block_kv={mask.grid.block_kv} must be a multiple of {SMALLEST}"
    if max(q.shape[-1], v.shape[-1]) > (128 if q.dtype == jnp.float32 else 256):
        return f"head_dim={q.shape[-1]} and v_dim={v.shape[-1]} must be at most 256 (float32: 128)"
    if q.shape[1] // k.shape[1] > MAX_GROUP:
        return f"at most {MAX_GROUP} heads may share keys, not {q.shape[1] // k.shape[1]}"
    if max(k.size, v.size) >= 1 << 31:
        return f"it takes caches of up to 2^31 numbers, not {k.shape} and {v.shape}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one call."""

    group: int
    kv_heads: int
    of_mask: tuple[int, int]
    dims: tuple[int, int]
    widths: tuple[int, int]
    rows: int  # of the tile of queries
    block: int
    depth: int
    most: int  # blocks of a part of the list
    scale: float
    multiply: Any


def _inside(rows: int, columns: int, below: tuple[Any, int]) -> Array:
    at = [lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1)]
    return (at[0] < below[0]) & (at[1] < below[1])


def _kernel(p: _Plan, q, k, v, counts, entries, lengths, out, lse) -> None:
    part, kv = pl.program_id(0), pl.program_id(1)
    b, h = lax.div(kv, jnp.int32(p.kv_heads)), lax.rem(kv, jnp.int32(p.kv_heads))
    of = (b if p.of_mask[0] > 1 else 0) * p.of_mask[1] + (h if p.of_mask[1] > 1 else 0)
    length, (width, v_width), steps = lengths[b], p.widths, p.block // p.depth
    queries = load(
        q.at[kv, pl.ds(0, p.rows), pl.ds(0, width)],
        _inside(p.rows, width, (p.group, p.dims[0])),
    )

    def step(at, carry):
        highest, total, acc = carry
        entry = entries[of, lax.div(at, jnp.int32(steps))]
        start = lax.shift_right_logical(entry, jnp.int32(CODE_BITS)) * p.block
        start += lax.rem(at, jnp.int32(steps)) * p.depth
        here = pl.ds(start, p.depth)
        # Room that is not filled may hold anything.
        left = length - start
        keys = load(k.at[kv, here, pl.ds(0, width)], _inside(p.depth, width, (left, p.dims[0])))
        s = p.multiply(queries, keys.T) * (p.scale * LOG2E)
        s = jnp.where(_inside(p.rows, p.depth, (p.rows, left)), s, MASKED)
        new = jnp.maximum(highest, jnp.max(s, 1))
        weights, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(highest - new)
        values = load(
            v.at[kv, here, pl.ds(0, v_width)], _inside(p.depth, v_width, (left, p.dims[1]))
        )
        acc = acc * shrink[:, None] + p.multiply(weights.astype(values.dtype), values)
        return new, total * shrink + jnp.sum(weights, 1), acc

    zero = jnp.zeros((p.rows,), jnp.float32)
    begin = part * p.most
    end = jnp.minimum(begin + p.most, counts[of])
    init = zero + FLOOR, zero, jnp.zeros((p.rows, v_width), jnp.float32)
    highest, total, acc = lax.fori_loop(begin * steps, end * steps, step, init)
    some = total != 0  # NaN is not nothing
    total = jnp.where(some, total, 1.0)
    logs = jnp.where(some, (highest + jnp.log2(total)) / LOG2E, -jnp.inf)
    _gpu.store(
        out.at[part, kv, pl.ds(0, p.rows), pl.ds(0, v_width)],
        acc / total[:, None],
        _inside(p.rows, v_width, (p.group, p.dims[1])),
    )
    heads = lax.broadcasted_iota(jnp.int32, (p.rows,), 0) < p.group
    _gpu.store(lse.at[part, kv, pl.ds(0, p.rows)], logs, heads)


@in_32_bits
def decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    mask: BlockMask,
    lengths: Array,
    *,
    scale: float,
    interpret: bool = False,
) -> Array:
    """As `decode.block_sparse_decode`, with arguments that are checked."""
    (batch, heads, dim), (_, kv_heads, _, v_dim) = q.shape, v_cache.shape
    group, precision = heads // kv_heads, "highest" if q.dtype == jnp.float32 else None
    widths = max(16, power_of_2(dim)), max(16, power_of_2(v_dim))
    kind = f"{_gpu.kind(q.dtype, precision)}, {max(widths)}"
    how = _gpu.config("attention_decode", kind, DECODE)
    programs = batch * kv_heads
    splits = min(mask.capacity, max(1, -(-_WAVES * _gpu.chip().processors // programs)))
    most = -(-mask.capacity // splits)
    splits = -(-mask.capacity // most)
    p = _Plan(
        group=group,
        kv_heads=kv_heads,
        of_mask=(mask.codes.shape[0], mask.codes.shape[1]),
        dims=(dim, v_dim),
        widths=widths,
        rows=max(16, power_of_2(group)),
        block=mask.grid.block_kv,
        depth=largest_tile(mask.grid.block_kv, how.depth),
        most=most,
        scale=scale,
        multiply=dot(precision, interpret),
    )
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    out, lse = _gpu.call(
        functools.partial(_kernel, p),
        "block_sparse_decode",
        (splits, programs),
        (
            result((splits, programs, group, v_dim), jnp.float32, q),
            result((splits, programs, group), jnp.float32, q),
        ),
        how,
        interpret,
        q.reshape(programs, group, dim),
        flat(k_cache),
        flat(v_cache),
        mask.counts.reshape(-1),
        flat(mask.row_entries),
        lengths.astype(jnp.int32),
    )
    merged, _ = merge_attention(list(zip(out, lse)))
    return merged.reshape(batch, heads, v_dim).astype(q.dtype)
