"""N:M product for a few rows of x (decoding) as a Pallas Triton kernel.

What N:M saves here is bytes, and it pays where reading the weights is what takes the time. (The sparse
tensor cores of NVIDIA GPUs cannot be reached from JAX: see docs/kernels/gpu.md.) A program computes some
outputs: it reads their values and packed codes, rebuilds the weights of each place r of the groups in
registers (select where the code is r), and multiplies them by the columns r, M + r, 2M + r, ... of x, which
are set apart before the kernel (x is small). Codes stay in registers while the groups that they belong to
pass by. If outputs are too few to fill the device, the groups are split too and the float32 sums are added
up in order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import _gpu
from pallas_kernels._gpu import Config, dot, in_32_bits, load, power_of_2, result
from pallas_kernels.nm_matmul.format import NMSparse, code_bits

MAX_ROWS = 64  # beyond, the product is not bound by reading the weights
_WAVES = 2  # programs for each multiprocessor

# `tile` is outputs, `depth` groups at a time.
DECODE: dict[str, dict[str, Config]] = {
    "h100": {"16 bits, 16": Config(64, 32, 4, 3), "16 bits, 64": Config(64, 32, 4, 3)},
    "a100": {"16 bits, 16": Config(64, 32, 4, 3), "16 bits, 64": Config(64, 32, 4, 3)},
}
DECODE["small"] = DECODE["a100"]


def why_not(x: Array, w: NMSparse, interpret: bool) -> str | None:
    """The reason why this kernel cannot multiply x by w, or None."""
    rows = x.size // x.shape[-1]
    if (reason := _gpu.why_not(interpret)) is not None:
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {x.dtype}"
    if rows > MAX_ROWS:
        return f"it is made for up to {MAX_ROWS} rows of x, not {rows} (dense is faster there)"
    if w.share != 1:
        return f"it takes the element-wise form, not share={w.share}"
    if w.m > 16:
        return f"it takes groups of up to 16, not m={w.m}"
    if w.values.size >= 1 << 31:
        return f"it takes up to 2^31 stored values, not {w.values.size}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one product."""

    rows: int
    groups: int
    packed: int  # rows of codes
    outputs: int
    n: int
    m: int
    tile: tuple[int, int]  # rows of x and outputs
    depth: int
    parts: int  # runs of groups (see `format`) that a program sees to
    multiply: Any


def _below(start: Array, size: int, limit: int | Array, axis: int) -> Array:
    shape = (1, size) if axis else (size, 1)
    return start + lax.broadcasted_iota(jnp.int32, shape, axis) < limit


def _kernel(p: _Plan, x, values, codes, y) -> None:
    (rows, width), bits = p.tile, code_bits(p.m)
    first, share = pl.program_id(0) * width, pl.program_id(1)
    at, outputs = pl.ds(first, width), _below(first, width, p.outputs, 1)
    inside = _below(jnp.int32(0), rows, p.rows, 0)

    def chunk(q: Array, total: Array) -> Array:
        row = pl.ds(q * p.depth, p.depth)
        there = _below(q * p.depth, p.depth, p.packed, 0) & outputs
        words = [load(codes.at[jnp.int32(i), row, at], there) for i in range(p.n)]

        def part(run: Array, total: Array) -> Array:
            start = run * p.packed + q * p.depth
            group = pl.ds(start, p.depth)
            limit = jnp.minimum((run + 1) * p.packed, p.groups)
            used = _below(start, p.depth, limit, 0) & outputs
            of_run = [(c >> (run * bits)) & ((1 << bits) - 1) for c in words]
            stored = [
                load(values.at[jnp.int32(i), group, at], used).astype(jnp.float32)
                for i in range(p.n)
            ]
            seen = inside & _below(start, p.depth, limit, 1)
            for r in range(p.m):
                weights = jnp.zeros((p.depth, width), jnp.float32)
                for code, value in zip(of_run, stored):
                    weights = jnp.where(code == r, weights + value, weights)
                part_of_x = load(x.at[jnp.int32(r), pl.ds(0, rows), group], seen)
                total += p.multiply(part_of_x, weights.astype(x.dtype))
            return total

        begin = share * p.parts
        return lax.fori_loop(begin, begin + p.parts, part, total)

    zero = jnp.zeros((rows, width), jnp.float32)
    total = lax.fori_loop(0, -(-p.packed // p.depth), chunk, zero)
    index = pl.ds(0, rows), at
    _gpu.store(y.at[share, *index], total.astype(y.dtype), inside & outputs)


@in_32_bits
def matmul(
    x: Array,
    w: NMSparse,
    *,
    precision: lax.PrecisionLike = None,
    out_dtype=None,
    interpret: bool = False,
) -> Array:
    """`x @ w` for `x [rows, in]`."""
    (rows, _), (n, groups, width) = x.shape, w.values.shape
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    tall = max(16, power_of_2(rows))
    how = _gpu.config("nm_matmul", f"16 bits, {16 if tall == 16 else 64}", DECODE)
    runs = 32 // code_bits(w.m)
    tiles = -(-width // how.tile)
    splits = min(runs, power_of_2(-(-_WAVES * _gpu.chip().processors // tiles)))
    packed = w.codes.shape[1]
    p = _Plan(
        rows=rows,
        groups=groups,
        packed=packed,
        outputs=width,
        n=n,
        m=w.m,
        tile=(tall, how.tile),
        depth=max(16, min(how.depth, power_of_2(packed))),
        parts=runs // splits,
        multiply=dot(precision, interpret),
    )
    y = _gpu.call(
        functools.partial(_kernel, p),
        "nm_matmul",
        (tiles, splits),
        result((splits, rows, width), out_dtype if splits == 1 else jnp.float32, x),
        how,
        interpret,
        x.reshape(rows, groups, w.m).transpose(2, 0, 1),  # [m, rows, groups]
        w.values,
        w.codes,
        cost=pl.CostEstimate(
            flops=2 * rows * w.shape[0] * width,
            transcendentals=0,
            bytes_accessed=w.values.size * 2 + w.codes.size * 4,
        ),
    )
    return y[0] if splits == 1 else jnp.sum(y, 0).astype(out_dtype)
