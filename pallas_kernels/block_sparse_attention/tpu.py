"""Block-sparse attention as Pallas TPU kernels.

One loop walks all chunks of a head's list, a chunk being a few kept blocks of one row, and overlaps
two chunks: while the matrix units multiply the queries with the keys of the next chunk, the vector
unit takes the exponentials of the present one. So the cost follows the kept blocks, without a grid
step per block.

The backward pass is one kernel that walks the lists by columns: K and V of a column and their
gradients stay at hand while the float32 dQ of the head is resident. It multiplies five times per
block instead of the seven of separate dQ and dK, dV kernels.

What the lists point at, K and V of the head forward, queries and output gradients backward, is read
in one of two ways. Whole, into VMEM: each block once, however many rows keep it. Or fetched chunk by
chunk, kept blocks only: if the list's capacity says that this is less to read, or if the whole does
not fit VMEM. See `tpu_walk`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._tpu import LANES, chip, in_32_bits
from pallas_kernels.block_sparse_attention.inputs import FLOOR, MASKED, Inputs, pad_to
from pallas_kernels.block_sparse_attention.mask import BlockMask
from pallas_kernels.block_sparse_attention.tpu_walk import (
    LOG2E,
    NT,
    STREAMED_WORDS,
    TN,
    Fetched,
    Lists,
    Plan,
    Resident,
    block_of,
    call,
    fetching,
    make_plan,
    padded,
    ring_bytes,
    rings,
    segment_arrays,
    walk,
)


def why_not(q: Array, k: Array, v: Array, mask: BlockMask) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if q.dtype == jnp.float16:
        return "it takes float32 and bfloat16, not float16"
    if mask.grid.block_q % LANES or mask.grid.block_kv % LANES:
        return f"block_q={mask.grid.block_q} and block_kv={mask.grid.block_kv} must be multiples of {LANES}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"head_dim={q.shape[-1]} and v_dim={v.shape[-1]} must be at most 256"
    if max(mask.codes.shape[-2:]) > STREAMED_WORDS:
        nq, nk = mask.codes.shape[-2:]
        return (
            f"the list of one row or column of {nq} x {nk} blocks must fit SMEM, at most "
            f"{STREAMED_WORDS} blocks; choose larger blocks"
        )
    return None


# -------------------------------------------------------------------- forward


def _forward_kernel(plan: Plan, scalars, inputs, outputs, accumulators, packed, even, odd, *ring):
    (q,), inner = inputs["q"], inputs["inner"]
    out, lse = outputs["out"], outputs["lse"]
    highest, total, acc = accumulators
    lists = Lists(plan, scalars, inputs["segments"])
    source = Fetched(plan, lists, inner, *ring) if plan.fetched else Resident(plan, lists, inner)
    bq = plan.outer_block

    def multiply(chunk, take, scores):
        """Scores of a chunk of row r."""
        r, p = chunk
        s = plan.dot(block_of(q, jnp.minimum(r, plan.outer - 1), bq), take(0), NT)
        scores[...] = lists.hide(plan.cap(s), r, p)

    def accumulate(chunk, take, scores, weights_of):
        """Online softmax: the chunk's weights against the row's maximum so far."""
        r, p = chunk
        row = pl.ds(pl.multiple_of(jnp.minimum(r, plan.outer) * bq, bq), bq)
        # What the scratch holds before the first chunk of a row is anything.
        fresh = p == lists.start(r)
        s, old = scores[...], jnp.where(fresh, FLOOR, highest[row, :])
        new = jnp.maximum(old, jnp.max(s, 1, keepdims=True))
        highest[row, :] = new
        weights = jnp.exp2((s - _lanes(new, s.shape[1])) * plan.exponent)
        shrink = jnp.exp2((old - new) * plan.exponent)
        parts = [weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES)]
        before = jnp.where(fresh, 0.0, total[row, :]) * shrink
        total[row, :] = before + functools.reduce(jnp.add, parts)
        weights_of[...] = weights.astype(weights_of.dtype)
        product = plan.dot(weights_of[...], take(1))
        before = jnp.where(fresh, 0.0, acc[row, :]) * _lanes(shrink, acc.shape[1])
        acc[row, :] = before + product

    walk(plan, lists, source, inputs["segments"], multiply, accumulate, packed, even, odd)

    eye = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == lax.broadcasted_iota(
        jnp.int32, (LANES, LANES), 1
    )

    def finish(i, _):
        at = pl.ds(pl.multiple_of(i * bq, bq), bq)
        seen = lists.start(i + 1) > lists.start(i)
        sums = jnp.where(seen, jnp.sum(total[at, :], 1, keepdims=True), 0.0)
        safe = jnp.where(sums == 0, 1.0, sums)
        out[0, at, :] = jnp.where(seen, acc[at, :] * (1 / safe), 0.0).astype(out.dtype)
        logs = highest[at, :] * (plan.exponent / LOG2E) + jnp.log(safe)
        logs = jnp.where(sums == 0, -jnp.inf, logs)  # NaN is not nothing
        # A column becomes a row: keep the diagonal, sum over sublanes.
        rows = [
            jnp.sum(jnp.where(eye, logs[j : j + LANES], 0.0), 0, keepdims=True)
            for j in range(0, bq, LANES)
        ]
        lse[0, :, at] = jnp.concatenate(rows, 1)
        return 0

    lax.fori_loop(0, plan.outer, finish, 0, unroll=math.gcd(plan.outer, 4))


def _lanes(x: Array, width: int) -> Array:
    """x, the same in all its lanes, as wide as asked."""
    copies = -(-width // LANES)
    return jnp.concatenate([x] * copies, 1)[:, :width] if copies > 1 else x[:, :width]


@in_32_bits
def forward(
    inputs: Inputs, *, fetch: bool | None = None, interpret: Any = False
) -> tuple[Array, Array]:
    """As `xla.forward`; `fetch` says how keys are read (None: whichever is better)."""
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    b, h, q_len, d = q.shape
    dv = v.shape[-1]
    plan = make_plan(inputs, backward=False)
    bq = plan.outer_block
    rows, keys = plan.tiles * plan.tile_positions, plan.inner * plan.inner_block

    of_key = (padded(d) + padded(dv)) * q.dtype.itemsize
    rest = plan.tile_positions * (2 * of_key + 4 * (2 * LANES + padded(dv)) + 64)
    rest += plan.width * plan.group * bq * plan.inner_block * (8 + q.dtype.itemsize)
    if plan.segments:
        rest += 64 * keys + plan.tile_positions * 2 * 4 * LANES
    # Whole keys are read once for the heads that share them.
    less = plan.capacity * (h // k.shape[1]) <= plan.inner
    plan, specs = _inner_specs(plan, of_key * keys, rest, less, fetch, (d, dv), plan.kv_index)

    tile = lambda n: pl.BlockSpec((1, plan.tile_positions, n), lambda i, t, *_: (i, t, 0))
    scores = (bq, plan.group * plan.inner_block)
    result = call(
        _forward_kernel,
        plan,
        (mask.row_starts, mask.row_entries, mask.offsets),
        dict(
            q=[(pad_to(q, 2, rows).reshape(b * h, rows, d), tile(d))],
            inner=[
                (pad_to(x, 2, keys).reshape(-1, keys, x.shape[-1]), spec)
                for x, spec in zip((k, v), specs)
            ],
            segments=segment_arrays(plan, inputs, rows, keys),
        ),
        dict(
            out=((b * h, rows, dv), q.dtype, tile(dv)),
            lse=(
                (b * h, 1, rows),
                "float32",
                pl.BlockSpec((1, 1, plan.tile_positions), lambda i, t, *_: (i, 0, t)),
            ),
        ),
        [
            [pltpu.VMEM((plan.tile_positions + bq, n), jnp.float32) for n in (LANES, LANES, dv)],
            [[pltpu.VMEM(scores, q.dtype)]] * plan.width,
            *[[[pltpu.VMEM(scores, jnp.float32)]] * plan.width] * 2,
            *rings(plan, q.dtype, d, dv),
        ],
        interpret,
    )
    out, lse = result["out"], result["lse"]
    return out.reshape(b, h, rows, dv)[:, :, :q_len], lse.reshape(b, h, rows)[:, :, :q_len]


# -------------------------------------------------------------------- backward


def _backward_kernel(plan: Plan, scalars, inputs, outputs, accumulators, packed, even, odd, *ring):
    (lse, delta), (k, v), inner = inputs["of_rows"], inputs["kv"], inputs["inner"]
    dq_acc, dk_acc, dv_acc = accumulators
    lists = Lists(plan, scalars, inputs["segments"])
    source = Fetched(plan, lists, inner, *ring) if plan.fetched else Resident(plan, lists, inner)
    bk, bq = plan.outer_block, plan.inner_block

    def row_of(ref, indices):
        parts = [ref[0, :, pl.ds(pl.multiple_of(i * bq, bq), bq)] for i in indices]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)

    def multiply(chunk, take, scores, products):
        """Scores, and output gradients times values, of a chunk of column c: keys by rows, queries
        by columns, so that what belongs to a query is a row of numbers."""
        c = jnp.minimum(chunk[0], plan.outer - 1)
        s = plan.dot(block_of(k, c, bk), take(0), NT)
        scores[...] = lists.hide(plan.cap(s), *chunk)
        products[...] = plan.dot(block_of(v, c, bk), take(1), NT)

    def accumulate(chunk, take, scores, products, weights, slopes):
        indices, _ = lists.chunk(*chunk)
        s = scores[...]
        probabilities = jnp.exp2(s * plan.exponent - row_of(lse, indices))
        weights[...] = probabilities.astype(weights.dtype)
        ds = probabilities * (products[...] - row_of(delta, indices))
        if plan.softcap is not None:
            ds = ds * (1 - jnp.minimum(s * s, 1.0))  # hidden scores are far below -1
        slopes[...] = ds.astype(slopes.dtype)
        at = pl.ds(pl.multiple_of(jnp.minimum(chunk[0], plan.outer) * bk, bk), bk)
        keys = block_of(k, jnp.minimum(chunk[0], plan.outer - 1), bk)
        dv_acc[at, :] += plan.dot(weights[...], take(1))
        dk_acc[at, :] += plan.dot(slopes[...], take(0))
        for g, i in enumerate(indices):
            row = pl.ds(pl.multiple_of(i * bq, bq), bq)
            dq_acc[row, :] += plan.dot(slopes[:, g * bq : (g + 1) * bq], keys, TN)

    @pl.when(pl.program_id(1) == 0)
    def _start():
        dq_acc[...] = jnp.zeros_like(dq_acc)

    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    walk(plan, lists, source, inputs["segments"], multiply, accumulate, packed, even, odd)

    keys = plan.tile_positions
    dk, dv, dq = outputs["dk"], outputs["dv"], outputs["dq"]
    dk[0] = (dk_acc[:keys, :] * plan.scale).astype(dk.dtype)
    dv[0] = dv_acc[:keys, :].astype(dv.dtype)

    @pl.when(pl.program_id(1) == plan.tiles - 1)
    def _finish():
        dq[0] = (dq_acc[...] * plan.scale).astype(dq.dtype)


@in_32_bits
def backward(
    inputs: Inputs,
    lse: Array,
    delta: Array,
    dout: Array,
    *,
    fetch: bool | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """As `xla.backward`; `fetch` says how queries are read (None: whichever is better).

    If the dQ of a head does not fit VMEM the queries are cut into parts, and the parts' dK and dV
    are summed.
    """
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    b, h, q_len, d = q.shape
    kv_heads, kv_len, dv = k.shape[1], k.shape[2], v.shape[-1]
    plan = make_plan(inputs, backward=True)
    bk, size = plan.outer_block, q.dtype.itemsize
    rows, keys = plan.inner * plan.inner_block, plan.tiles * plan.tile_positions

    of_query = (padded(d) + padded(dv)) * size
    rest = plan.tile_positions * (padded(d) + padded(dv)) * (4 * 4 + 4)
    rest += plan.width * plan.group * bk * plan.inner_block * (16 + 2 * size)
    if plan.segments:
        rest += plan.tile_positions * 2 * 4 * LANES
    # dQ's accumulator and output, LSE and delta, ids.
    own = padded(d) * (4 + 2 * size) + 128 + 64 * plan.segments
    ring = ring_bytes(fetching(plan, of_query), of_query)
    parts = -(-own * rows // max(1, _room() - rest - ring))
    if (parts := min(parts, plan.inner)) > 1:
        return _backward_by_parts(inputs, parts, lse, delta, dout, fetch=fetch, interpret=interpret)
    less = plan.capacity <= plan.inner
    plan, specs = _inner_specs(
        plan, of_query * rows, rest + own * rows, less, fetch, (d, dv), lambda i: i
    )

    # An empty row has lse = -inf; a huge number instead makes its probabilities 0.
    lse = jnp.where(jnp.isneginf(lse), -MASKED, lse * LOG2E)
    of_rows = [
        pad_to(x, 2, rows, fill).reshape(b * h, 1, rows) for x, fill in ((lse, -MASKED), (delta, 0))
    ]
    whole = lambda n: pl.BlockSpec((1, rows, n), lambda i, t, *_: (i, 0, 0))
    tile = lambda n: pl.BlockSpec((1, plan.tile_positions, n), lambda i, t, *_: (i, t, 0))
    tile_of_kv = lambda n: pl.BlockSpec(
        (1, plan.tile_positions, n), lambda i, t, *_: (plan.kv_index(i), t, 0)
    )
    inner = [
        (pad_to(x.astype(q.dtype), 2, rows).reshape(b * h, rows, -1), spec)
        for x, spec in zip((q, dout), specs)
    ]
    # The heads of a group are summed in float32.
    key_dtype = q.dtype if h == kv_heads else jnp.float32
    scores = (bk, plan.group * plan.inner_block)
    result = call(
        _backward_kernel,
        plan,
        (mask.col_starts, mask.col_entries, mask.offsets),
        dict(
            inner=inner,
            of_rows=[(x, pl.BlockSpec((1, 1, rows), lambda i, t, *_: (i, 0, 0))) for x in of_rows],
            kv=[
                (pad_to(x, 2, keys).reshape(-1, keys, n), tile_of_kv(n))
                for x, n in ((k, d), (v, dv))
            ],
            segments=segment_arrays(plan, inputs, keys, rows),
        ),
        dict(
            dq=((b * h, rows, d), q.dtype, whole(d)),
            dk=((b * h, keys, d), key_dtype, tile(d)),
            dv=((b * h, keys, dv), key_dtype, tile(dv)),
        ),
        [
            [
                pltpu.VMEM((rows, d), jnp.float32),
                *(pltpu.VMEM((plan.tile_positions + bk, n), jnp.float32) for n in (d, dv)),
            ],
            [[pltpu.VMEM(scores, q.dtype)] * 2] * plan.width,
            *[[[pltpu.VMEM(scores, jnp.float32)] * 2] * plan.width] * 2,
            *rings(plan, q.dtype, d, dv),
        ],
        interpret,
    )

    def sum_of_group(x: Array) -> Array:
        x = x.reshape(b, kv_heads, h // kv_heads, keys, -1)
        return (jnp.sum(x, 2) if h > kv_heads else x[:, :, 0])[:, :, :kv_len].astype(k.dtype)

    dq = result["dq"].reshape(b, h, rows, d)[:, :, :q_len]
    return dq, sum_of_group(result["dk"]), sum_of_group(result["dv"])


def _backward_by_parts(
    inputs: Inputs, parts: int, lse: Array, delta: Array, dout: Array, **options: Any
) -> tuple[Array, Array, Array]:
    mask = inputs.mask
    nq, nk = mask.codes.shape[-2:]
    count = -(-nq // parts)
    results = []
    for first in range(0, nq, count):
        n = min(count, nq - first)
        at = slice(first * mask.grid.block_q, (first + n) * mask.grid.block_q)
        ids = inputs.segments and (inputs.segments[0][:, at], inputs.segments[1])
        part = dataclasses.replace(
            inputs, q=inputs.q[:, :, at], mask=mask.window(first, n, 0, nk), segments=ids
        )
        of_rows = (x[:, :, at] for x in (lse, delta, dout))
        results.append(backward(part, *of_rows, **options))
    dq, dk, dv = zip(*results)
    total = lambda xs: functools.reduce(jnp.add, [x.astype(jnp.float32) for x in xs])
    return jnp.concatenate(dq, 2), total(dk).astype(dk[0].dtype), total(dv).astype(dv[0].dtype)


# -------------------------------------------------------------------- memory


def _room() -> int:
    """VMEM that a call may plan with."""
    return chip().vmem * 3 // 4


def _inner_specs(
    plan: Plan,
    resident: int,
    rest: int,
    less: bool,
    fetch: bool | None,
    dims: tuple[int, int],
    head: Any,
) -> tuple[Plan, list[Any]]:
    """The plan with the way in which inner blocks are read, and the specs of their arrays.

    Arrays of `resident` bytes per head are held in VMEM twice (the next head's arrive meanwhile),
    or once if there is no room beside `rest`, unless fetching is asked for, reads less, or is the
    only way.
    """
    length = plan.inner * plan.inner_block
    if fetch is None:
        fetch = less or resident + rest > _room()
    if fetch:
        plan = fetching(plan, resident // length)
        return plan, [pl.BlockSpec(memory_space=pl.ANY)] * 2
    buffers = pl.Buffered(2 if 2 * resident + rest <= _room() else 1)
    index = lambda i, t, *_: (head(i), 0, 0)
    return plan, [pl.BlockSpec((1, length, n), index, pipeline_mode=buffers) for n in dims]
