"""Block-sparse attention as Pallas TPU kernels.

Keys and values of a head stay in VMEM. One loop walks all chunks of a head's list, a chunk being
a few kept blocks of one row, and overlaps two chunks: while the matrix units multiply the queries
with the keys of the next chunk, the vector unit takes the exponentials of the present one. So the
cost follows the kept blocks, without a grid step per block.

The backward pass is one kernel that walks the lists by columns: K and V of a column and their
gradients stay at hand while the queries, output gradients and float32 dQ of the head are resident.
It multiplies five times per block instead of the seven of separate dQ and dK, dV kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import target_platform
from pallas_kernels.block_sparse_attention.mask import CODE_BITS, CODE_MASK, FULL, BlockMask
from pallas_kernels.block_sparse_attention.merge import merge_attention, vary, varying_axes
from pallas_kernels.block_sparse_attention.rules import Rule
from pallas_kernels.block_sparse_attention.xla import FLOOR, MASKED, pad_to

LANES = 128
LOG2E = math.log2(math.e)
NT = (((1,), (1,)), ((), ()))  # a @ b.T
TN = (((0,), (0,)), ((), ()))  # a.T @ b
# Sizes found with the compiler's static schedule on v5e: keys per chunk and queries per step
# forward, queries per chunk and keys per step backward.
CHUNK, STEP = 512, 256
BACKWARD_CHUNK, BACKWARD_STEP = 256, 256
# Queries (backward: keys) per grid step; their float32 accumulators stay in VMEM.
TILE = 4096
# Words of SMEM. Lists of all heads are prefetched if they fit, else streamed tile by tile.
PREFETCHED_WORDS, STREAMED_WORDS = 180_000, 56_000


def why_not(q: Array, k: Array, v: Array, mask: BlockMask) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if mask.block_q % LANES or mask.block_kv % LANES:
        return f"block_q={mask.block_q} and block_kv={mask.block_kv} must be multiples of {LANES}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"head_dim={q.shape[-1]} and v_dim={v.shape[-1]} must be at most 256"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts that both kernels share. The lists' outer blocks are rows (blocks of queries)
    forward and columns (blocks of keys) backward; their inner blocks the others."""

    heads: int
    kv_heads: int
    mask_batch: int
    mask_heads: int
    outer: int  # outer blocks per grid step
    tiles: int  # grid steps per head
    room: int  # entries of a list, and of the part of one tile if lists are streamed
    group: int  # inner blocks per chunk
    width: int  # chunks per step of the loop
    bq: int
    bk: int
    kv_len: int
    rules: tuple[Rule, ...]
    segments: bool
    streamed: bool
    scale: float
    softcap: float | None
    precision: Any

    @property
    def lists(self) -> int:
        return self.mask_batch * self.mask_heads

    @property
    def ragged(self) -> bool:
        return self.kv_len % self.bk != 0

    @property
    def exponent(self) -> float:
        """Stored scores times this are logits in base 2."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap)

    def kv_index(self, i: Any) -> Any:
        return i // self.heads * self.kv_heads + i % self.heads * self.kv_heads // self.heads

    def mask_index(self, i: Any) -> Any:
        batch = i // self.heads if self.mask_batch > 1 else 0
        return batch * self.mask_heads + i % self.heads * self.mask_heads // self.heads

    def dot(self, a: Array, b: Array, dims: Any = (((1,), (0,)), ((), ()))) -> Array:
        return lax.dot_general(
            a, b, dims, precision=self.precision, preferred_element_type=jnp.float32
        )

    def cap(self, s: Array) -> Array:
        return s if self.softcap is None else jnp.tanh(s * (self.scale / self.softcap))


class _Lists:
    """The list of the present head and tile, in SMEM."""

    def __init__(self, plan: _Plan, starts: Any, entries: Any):
        self.plan, self.starts, self.entries = plan, starts, entries
        self.list = plan.mask_index(pl.program_id(0))
        self.first = pl.program_id(1) * plan.outer
        self.at_starts = self.list * (plan.tiles * plan.outer + 1) + self.first
        self.at_entries = self.list * plan.room

    def start(self, r: Any) -> Any:
        r = jnp.minimum(r, self.plan.outer)
        if self.plan.streamed:
            return self.starts[0, 0, r]
        return self.starts[self.list * (self.plan.tiles * self.plan.outer + 1) + self.first + r]

    def entry(self, p: Any) -> Any:
        if self.plan.streamed:
            return self.entries[0, 0, p]
        return self.entries[self.at_entries + p]

    def chunk(self, r: Any, p: Any) -> tuple[list[Any], list[Any]]:
        """Indices and codes of the chunk at p of row r; code 0 behind the row's end."""
        end = self.start(r + 1)
        raw = [self.entry(p + g) for g in range(self.plan.group)]
        codes = [jnp.where(p + g < end, e & CODE_MASK, 0) for g, e in enumerate(raw)]
        return [e >> CODE_BITS for e in raw], codes

    def is_last(self, r: Any, p: Any) -> Any:
        """Whether the chunk at p is the last of row r."""
        return p + self.plan.group >= self.start(r + 1)

    def next(self, r: Any, p: Any) -> tuple[Any, Any]:
        """The chunk after; an empty row has one chunk, with nothing in it."""
        last = self.is_last(r, p)
        ahead = jnp.where(last, self.start(r + 1), p + self.plan.group)
        return jnp.where(last, r + 1, r), ahead


def _split(refs: Any, segments: bool, *sizes: int) -> list[Any]:
    """Segment references (if any), then groups of the given sizes; the last size repeats."""
    refs = list(refs)
    groups = [refs[: 2 * segments]]
    del refs[: 2 * segments]
    while refs:
        size = sizes[min(len(groups), len(sizes)) - 1]
        groups.append(refs[:size])
        del refs[:size]
    return groups


def _rows(ref: Any, index: Any, block: int) -> Array:
    return ref[0, pl.ds(pl.multiple_of(index * block, block), block), :]


def _lanes(x: Array, width: int) -> Array:
    """x, the same in all its lanes, as wide as asked."""
    copies = -(-width // LANES)
    return jnp.concatenate([x] * copies, 1)[:, :width] if copies > 1 else x[:, :width]


def _gather(ref: Any, indices: list[Any], block: int) -> Array:
    parts = [_rows(ref, i, block) for i in indices]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)


def _bias(plan: _Plan, codes: list[Any], size: int) -> Array:
    """0 for the blocks of a chunk, MASKED for absent ones behind the end of its row."""
    parts = [jnp.full((1, size), jnp.where(c == 0, MASKED, 0.0), jnp.float32) for c in codes]
    return jnp.concatenate(parts, 1)


def _hide_partial(plan: _Plan, chunks: list[_Chunk]) -> None:
    """Overwrite what partial blocks of freshly multiplied chunks must not show."""
    if not plan.rules and not plan.segments:
        return
    partial = [(c.codes[g] > FULL) for c in chunks for g in range(plan.group)]
    anything = functools.reduce(jnp.logical_or, partial)
    if plan.segments:
        anything = True

    @pl.when(anything)
    def _():
        for chunk in chunks:
            for g, code in enumerate(chunk.codes):
                for i, rule in enumerate(plan.rules):

                    @pl.when(code == FULL + 1 + i)
                    def _rule(chunk=chunk, g=g, rule=rule):
                        q, k, k_local = chunk.positions(g)
                        seen = rule(q, k)
                        if plan.ragged:
                            seen = seen & (k_local < plan.kv_len)
                        chunk.keep(g, seen)

                if plan.segments:

                    @pl.when(code != 0)
                    def _segment(chunk=chunk, g=g):
                        chunk.keep(g, chunk.same_segment(g))


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Scores just computed: how to mask block g of them."""

    codes: list[Any]
    positions: Callable[[int], tuple[Array, Array, Array]]
    same_segment: Callable[[int], Array]
    keep: Callable[[int, Array], None]


def _walk(
    plan: _Plan,
    lists: _Lists,
    multiply: Callable[..., _Chunk],
    accumulate: Callable[..., None],
    even: list[Any],
    odd: list[Any],
    packed: list[Any],
) -> None:
    """All chunks of the tile, `width` at a time: while the matrix units multiply the next chunks
    into one set of scratch references, the vector unit works on the other.
    """

    def ahead(chunk, count):
        chunks = [chunk]
        for _ in range(count):
            chunks.append(lists.next(*chunks[-1]))
        return chunks

    def step(first, now, later):
        chunks = ahead(first, 2 * plan.width)
        fresh = [multiply(*c, ref) for c, ref in zip(chunks[plan.width :], later)]
        for c, ref, extra in zip(chunks, now, packed):
            accumulate(*c, ref, extra)
        _hide_partial(plan, fresh)
        return chunks[plan.width]

    start = (0, lists.start(0))
    _hide_partial(plan, [multiply(*c, ref) for c, ref in zip(ahead(start, plan.width), even)])
    lax.while_loop(
        lambda chunk: chunk[0] < plan.outer,
        lambda chunk: step(step(chunk, even, odd), odd, even),
        start,
    )


# -------------------------------------------------------------------- forward


def _forward_kernel(plan: _Plan, offsets, starts, entries, q, k, v, *rest):
    segments, (out, lse, highest, total, acc), weights_of, even, odd = _split(
        rest, plan.segments, 5, plan.width
    )
    lists = _Lists(plan, starts, entries)
    bq, bk = plan.bq, plan.bk
    first_row = lists.first * bq
    q_offset, k_offset = offsets[lists.list * 2], offsets[lists.list * 2 + 1]

    def multiply(r, p, scores):
        """Scores of the chunk at p of row r."""
        indices, codes = lists.chunk(r, p)
        r = jnp.minimum(r, plan.outer - 1)
        s = plan.dot(_rows(q, r, bq), _gather(k, indices, bk), NT)
        scores[...] = plan.cap(s) + _bias(plan, codes, bk)

        def positions(g):
            row = lax.broadcasted_iota(jnp.int32, (bq, bk), 0) + (q_offset + first_row + r * bq)
            col = lax.broadcasted_iota(jnp.int32, (bq, bk), 1) + indices[g] * bk
            return row, col + k_offset, col

        def same_segment(g):
            at_k = segments[1][0, :1, pl.ds(pl.multiple_of(indices[g] * bk, bk), bk)]
            return _rows(segments[0], r, bq)[:, :1] == at_k

        def keep(g, seen):
            at = pl.ds(g * bk, bk)
            scores[:, at] = jnp.where(seen, scores[:, at], MASKED)

        return _Chunk(codes, positions, same_segment, keep)

    def accumulate(r, p, scores, packed):
        """Online softmax: the chunk's weights against the row's maximum so far."""
        indices, _ = lists.chunk(r, p)
        row = pl.ds(pl.multiple_of(jnp.minimum(r, plan.outer) * bq, bq), bq)
        s, old = scores[...], highest[row, :]
        new = jnp.maximum(old, jnp.max(s, 1, keepdims=True))
        highest[row, :] = new
        weights = jnp.exp2((s - _lanes(new, s.shape[1])) * plan.exponent)
        shrink = jnp.exp2((old - new) * plan.exponent)
        parts = [weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES)]
        total[row, :] = total[row, :] * shrink + functools.reduce(jnp.add, parts)
        packed[...] = weights.astype(v.dtype)
        product = plan.dot(packed[...], _gather(v, indices, bk))
        acc[row, :] = acc[row, :] * _lanes(shrink, acc.shape[1]) + product

    highest[...] = jnp.full_like(highest, FLOOR)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)
    _walk(plan, lists, multiply, accumulate, even, odd, weights_of)

    eye = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == lax.broadcasted_iota(
        jnp.int32, (LANES, LANES), 1
    )

    def finish(i, _):
        at = pl.ds(pl.multiple_of(i * bq, bq), bq)
        sums = jnp.sum(total[at, :], 1, keepdims=True)
        safe = jnp.where(sums > 0, sums, 1.0)
        out[0, at, :] = (acc[at, :] * (1 / safe)).astype(out.dtype)
        logs = highest[at, :] * (plan.exponent / LOG2E) + jnp.log(safe)
        logs = jnp.where(sums > 0, logs, -jnp.inf)
        # A column becomes a row: keep the diagonal, sum over sublanes.
        rows = [
            jnp.sum(jnp.where(eye, logs[j : j + LANES], 0.0), 0, keepdims=True)
            for j in range(0, bq, LANES)
        ]
        lse[0, :, at] = jnp.concatenate(rows, 1)
        return 0

    lax.fori_loop(0, plan.outer, finish, 0, unroll=math.gcd(plan.outer, 4))


def forward(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    segment_ids: tuple[Array, Array] | None,
    scale: float,
    softcap: float | None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """As `xla.forward`.

    If the keys and values of a head do not fit VMEM they are cut into parts whose results merge
    by their log-sum-exp.
    """
    bq, bk = mask.block_q, mask.block_kv
    nq, nk = mask.codes.shape[-2:]
    plan = _plan(q, k, mask, segment_ids, scale, softcap, backward=False)
    lanes = _padded(q.shape[-1]) + _padded(v.shape[-1])
    of_key = lanes * q.dtype.itemsize + (64 if plan.segments else 0)
    tile = plan.outer * bq * (2 * of_key + 4 * (2 * LANES + _padded(v.shape[-1])) + 64)
    tile += plan.width * plan.group * bq * bk * (8 + q.dtype.itemsize)
    buffers, parts = _buffers(of_key * nk * bk, tile, nk)
    if parts > 1:
        results = []
        for first, count in _cut(nk, parts):
            at = slice(first * bk, (first + count) * bk)
            part = mask.window(0, nq, first, count)
            ids = segment_ids and (segment_ids[0], segment_ids[1][:, at])
            args = q, k[:, :, at], v[:, :, at], part, ids, scale, softcap, interpret
            results.append(forward(*args))
        return merge_attention(results)

    b, h, q_len, d = q.shape
    dv = v.shape[-1]
    rows, keys, tile_rows = plan.tiles * plan.outer * bq, nk * bk, plan.outer * bq
    arrays = [
        pad_to(q, 2, rows).reshape(b * h, rows, d),
        *(pad_to(x, 2, keys).reshape(-1, keys, x.shape[-1]) for x in (k, v)),
    ]
    resident = dict(pipeline_mode=pl.Buffered(buffers))
    specs = [
        pl.BlockSpec((1, tile_rows, d), lambda i, t, *_: (i, t, 0)),
        pl.BlockSpec((1, keys, d), lambda i, t, *_: (plan.kv_index(i), 0, 0), **resident),
        pl.BlockSpec((1, keys, dv), lambda i, t, *_: (plan.kv_index(i), 0, 0), **resident),
    ]
    if segment_ids is not None:
        arrays += [_columns(segment_ids[0], rows), _rows_of_ids(segment_ids[1], keys)]
        specs += [
            pl.BlockSpec((1, tile_rows, LANES), lambda i, t, *_: (i // h, t, 0)),
            pl.BlockSpec((1, 1, keys), lambda i, t, *_: (i // h, 0, 0)),
        ]
    out, lse = _call(
        _forward_kernel,
        plan,
        (mask.row_starts, mask.row_entries, mask.offsets),
        (b * h, plan.tiles),
        arrays,
        specs,
        [
            (
                (b * h, rows, dv),
                q.dtype,
                pl.BlockSpec((1, tile_rows, dv), lambda i, t, *_: (i, t, 0)),
            ),
            (
                (b * h, 1, rows),
                "float32",
                pl.BlockSpec((1, 1, tile_rows), lambda i, t, *_: (i, 0, t)),
            ),
        ],
        [
            *[pltpu.VMEM((tile_rows + bq, LANES), jnp.float32)] * 2,
            pltpu.VMEM((tile_rows + bq, dv), jnp.float32),
            *[pltpu.VMEM((bq, plan.group * bk), q.dtype)] * plan.width,
            *[pltpu.VMEM((bq, plan.group * bk), jnp.float32)] * (2 * plan.width),
        ],
        interpret,
    )
    return out.reshape(b, h, rows, dv)[:, :, :q_len], lse.reshape(b, h, rows)[:, :, :q_len]


# -------------------------------------------------------------------- backward


def _backward_kernel(plan: _Plan, offsets, starts, entries, q, dout, lse, delta, k, v, *rest):
    segments, (dq, dk, dv, dq_acc, dk_acc, dv_acc), weights_of, even, odd = _split(
        rest, plan.segments, 6, 2 * plan.width
    )
    lists = _Lists(plan, starts, entries)
    bq, bk = plan.bq, plan.bk
    first_col = lists.first * bk
    q_offset, k_offset = offsets[lists.list * 2], offsets[lists.list * 2 + 1]

    def pairs(refs):
        return list(zip(refs[::2], refs[1::2]))

    def column(c):
        return pl.ds(pl.multiple_of(jnp.minimum(c, plan.outer) * bk, bk), bk)

    def row_of(ref, indices):
        parts = [ref[0, :, pl.ds(pl.multiple_of(i * bq, bq), bq)] for i in indices]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)

    def multiply(c, p, refs):
        """Scores, and output gradients times values, of the chunk at p of column c: keys by rows,
        queries by columns, so that what belongs to a query is a row of numbers."""
        scores, products = refs
        indices, codes = lists.chunk(c, p)
        c = jnp.minimum(c, plan.outer - 1)
        s = plan.dot(_rows(k, c, bk), _gather(q, indices, bq), NT)
        scores[...] = plan.cap(s) + _bias(plan, codes, bq)
        products[...] = plan.dot(_rows(v, c, bk), _gather(dout, indices, bq), NT)

        def positions(g):
            col = lax.broadcasted_iota(jnp.int32, (bk, bq), 0) + (first_col + c * bk)
            row = lax.broadcasted_iota(jnp.int32, (bk, bq), 1) + (q_offset + indices[g] * bq)
            return row, col + k_offset, col

        def same_segment(g):
            at_q = segments[0][0, :1, pl.ds(pl.multiple_of(indices[g] * bq, bq), bq)]
            return _rows(segments[1], c, bk)[:, :1] == at_q

        def keep(g, seen):
            at = pl.ds(g * bq, bq)
            scores[:, at] = jnp.where(seen, scores[:, at], MASKED)

        return _Chunk(codes, positions, same_segment, keep)

    def accumulate(c, p, refs, packed):
        scores, products = refs
        weights, slopes = packed
        indices, _ = lists.chunk(c, p)
        s = scores[...]
        probabilities = jnp.exp2(s * plan.exponent - row_of(lse, indices))
        weights[...] = probabilities.astype(weights.dtype)
        ds = probabilities * (products[...] - row_of(delta, indices))
        if plan.softcap is not None:
            ds = ds * (1 - jnp.minimum(s * s, 1.0))  # hidden scores are far below -1
        slopes[...] = ds.astype(slopes.dtype)
        at, keys = column(c), _rows(k, jnp.minimum(c, plan.outer - 1), bk)
        dv_acc[at, :] += plan.dot(weights[...], _gather(dout, indices, bq))
        dk_acc[at, :] += plan.dot(slopes[...], _gather(q, indices, bq))
        for g, i in enumerate(indices):
            row = pl.ds(pl.multiple_of(i * bq, bq), bq)
            dq_acc[row, :] += plan.dot(slopes[:, g * bq : (g + 1) * bq], keys, TN)

    @pl.when(pl.program_id(1) == 0)
    def _start():
        dq_acc[...] = jnp.zeros_like(dq_acc)

    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    _walk(plan, lists, multiply, accumulate, pairs(even), pairs(odd), pairs(weights_of))

    keys = plan.outer * bk
    dk[0] = (dk_acc[:keys, :] * plan.scale).astype(dk.dtype)
    dv[0] = dv_acc[:keys, :].astype(dv.dtype)

    @pl.when(pl.program_id(1) == plan.tiles - 1)
    def _finish():
        dq[0] = (dq_acc[...] * plan.scale).astype(dq.dtype)


def backward(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    segment_ids: tuple[Array, Array] | None,
    scale: float,
    softcap: float | None,
    lse: Array,
    delta: Array,
    dout: Array,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """As `xla.backward`.

    If the queries of a head and their gradients do not fit VMEM they are cut into parts, and the
    parts' dK and dV are summed.
    """
    bq, bk = mask.block_q, mask.block_kv
    nq, nk = mask.codes.shape[-2:]
    plan = _plan(q, k, mask, segment_ids, scale, softcap, backward=True)
    lanes_d, lanes_v = _padded(q.shape[-1]), _padded(v.shape[-1])
    of_query = (lanes_d + lanes_v) * q.dtype.itemsize + 64 + (32 if plan.segments else 0)
    own = lanes_d * (4 + 2 * q.dtype.itemsize)  # dQ: the accumulator and the output
    tile = plan.outer * bk * (lanes_d + lanes_v) * (4 * 4 + 4)
    tile += plan.width * plan.group * bq * bk * (16 + 2 * q.dtype.itemsize)
    buffers, parts = _buffers(of_query * nq * bq, tile, nq, own * nq * bq)
    if parts > 1:
        results = []
        for first, count in _cut(nq, parts):
            at = slice(first * bq, (first + count) * bq)
            part = mask.window(first, count, 0, nk)
            ids = segment_ids and (segment_ids[0][:, at], segment_ids[1])
            of_rows = (lse[:, :, at], delta[:, :, at], dout[:, :, at])
            args = q[:, :, at], k, v, part, ids, scale, softcap, *of_rows, interpret
            results.append(backward(*args))
        dq, dk, dv = zip(*results)
        dk, dv = (
            functools.reduce(jnp.add, [x.astype(jnp.float32) for x in xs]).astype(k.dtype)
            for xs in (dk, dv)
        )
        return jnp.concatenate(dq, 2), dk, dv

    b, h, q_len, d = q.shape
    kv_heads, kv_len, dv = k.shape[1], k.shape[2], v.shape[-1]
    rows, tile_keys = nq * bq, plan.outer * bk
    keys = plan.tiles * tile_keys
    # An empty row has lse = -inf; a huge number instead makes its probabilities 0.
    lse = jnp.where(jnp.isneginf(lse), -MASKED, lse * LOG2E)
    arrays = [
        *(pad_to(x.astype(q.dtype), 2, rows).reshape(b * h, rows, -1) for x in (q, dout)),
        pad_to(lse, 2, rows, -MASKED).reshape(b * h, 1, rows),
        pad_to(delta, 2, rows).reshape(b * h, 1, rows),
        *(pad_to(x, 2, keys).reshape(-1, keys, x.shape[-1]) for x in (k, v)),
    ]
    resident = dict(pipeline_mode=pl.Buffered(buffers))
    specs = [
        *(pl.BlockSpec((1, rows, n), lambda i, t, *_: (i, 0, 0), **resident) for n in (d, dv)),
        *[pl.BlockSpec((1, 1, rows), lambda i, t, *_: (i, 0, 0))] * 2,
        *(
            pl.BlockSpec((1, tile_keys, n), lambda i, t, *_: (plan.kv_index(i), t, 0))
            for n in (d, dv)
        ),
    ]
    if segment_ids is not None:
        arrays += [_rows_of_ids(segment_ids[0], rows), _columns(segment_ids[1], keys)]
        specs += [
            pl.BlockSpec((1, 1, rows), lambda i, t, *_: (i // h, 0, 0)),
            pl.BlockSpec((1, tile_keys, LANES), lambda i, t, *_: (i // h, t, 0)),
        ]
    # The heads of a group are summed in float32.
    key_dtype = q.dtype if h == kv_heads else jnp.float32
    dq, *of_keys = _call(
        _backward_kernel,
        plan,
        (mask.col_starts, mask.col_entries, mask.offsets),
        (b * h, plan.tiles),
        arrays,
        specs,
        [
            ((b * h, rows, d), q.dtype, pl.BlockSpec((1, rows, d), lambda i, t, *_: (i, 0, 0))),
            *(
                (
                    (b * h, keys, n),
                    key_dtype,
                    pl.BlockSpec((1, tile_keys, n), lambda i, t, *_: (i, t, 0)),
                )
                for n in (d, dv)
            ),
        ],
        [
            pltpu.VMEM((rows, d), jnp.float32),
            *(pltpu.VMEM((tile_keys + bk, n), jnp.float32) for n in (d, dv)),
            *[pltpu.VMEM((bk, plan.group * bq), q.dtype)] * (2 * plan.width),
            *[pltpu.VMEM((bk, plan.group * bq), jnp.float32)] * (4 * plan.width),
        ],
        interpret,
    )

    def sum_of_group(x: Array) -> Array:
        x = x.reshape(b, kv_heads, h // kv_heads, keys, -1)
        return (jnp.sum(x, 2) if h > kv_heads else x[:, :, 0])[:, :, :kv_len].astype(k.dtype)

    dq = dq.reshape(b, h, rows, d)[:, :, :q_len]
    return dq, sum_of_group(of_keys[0]), sum_of_group(of_keys[1])


# -------------------------------------------------------------------- around the kernels


def _plan(
    q: Array,
    k: Array,
    mask: BlockMask,
    segment_ids: tuple[Array, Array] | None,
    scale: float,
    softcap: float | None,
    *,
    backward: bool,
) -> _Plan:
    bq, bk = mask.block_q, mask.block_kv
    mask_batch, mask_heads, n, inner = mask.codes.shape
    outer_size, inner_size, chunk, step = bq, bk, CHUNK, STEP
    if backward:
        n, inner, outer_size, inner_size = inner, n, bk, bq
        chunk, step = BACKWARD_CHUNK, BACKWARD_STEP
    group = max(1, min(chunk // inner_size, inner))
    tiles = -(-n // max(1, TILE // outer_size))
    room = mask.capacity + group
    streamed = mask_batch * mask_heads * (n + tiles + room) > PREFETCHED_WORDS
    if streamed:
        tiles = max(tiles, -(-n // max(1, STREAMED_WORDS // inner)))
        room = min(mask.capacity, -(-n // tiles) * inner) + group
    return _Plan(
        heads=q.shape[1],
        kv_heads=k.shape[1],
        mask_batch=mask_batch,
        mask_heads=mask_heads,
        outer=-(-n // tiles),
        tiles=tiles,
        room=room,
        group=group,
        width=max(1, step // outer_size),
        bq=bq,
        bk=bk,
        kv_len=mask.kv_len,
        rules=mask.rules,
        segments=segment_ids is not None,
        streamed=streamed,
        scale=scale,
        softcap=softcap,
        precision="highest" if q.dtype == jnp.float32 else None,
    )


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _vmem_bytes() -> int:
    """VMEM of the device that this is compiled for; that of a v5e where there is none."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if target_platform() == "tpu" else 128 << 20


def _buffers(resident: int, tile: int, blocks: int, own: int = 0) -> tuple[int, int]:
    """How often to buffer what stays in VMEM for a whole head, and into how many parts to cut it.

    Twice if it fits, so that the next head's arrives in time; once if only that fits; else parts.
    """
    room = _vmem_bytes() * 3 // 4 - tile
    if 2 * resident + own <= room:
        return 2, 1
    if resident + own <= room:
        return 1, 1
    return 2, min(blocks, -(-(2 * resident + own) // max(1, room)))


def _cut(blocks: int, parts: int) -> list[tuple[int, int]]:
    """(first, count) of contiguous parts of nearly equal size."""
    size = -(-blocks // parts)
    return [(i, min(size, blocks - i)) for i in range(0, blocks, size)]


def _columns(ids: Array, length: int) -> Array:
    """Segment ids down the sublanes, the same in all lanes."""
    ids = pad_to(ids, 1, length, -1)
    return jnp.broadcast_to(ids[:, :, None], (*ids.shape, LANES))


def _rows_of_ids(ids: Array, length: int) -> Array:
    """Segment ids along the lanes."""
    return pad_to(ids, 1, length, -1)[:, None]


def _call(
    kernel: Callable[..., None],
    plan: _Plan,
    lists: tuple[Array, Array, Array],
    grid: tuple[int, int],
    arrays: list[Array],
    specs: list[Any],
    outputs: list[tuple[tuple[int, ...], Any, Any]],
    scratch: list[Any],
    interpret: Any,
) -> list[Array]:
    starts, entries, offsets = lists
    n = plan.tiles * plan.outer
    starts = jnp.pad(
        starts.reshape(plan.lists, -1), ((0, 0), (0, n + 1 - starts.shape[-1])), mode="edge"
    )
    entries = entries.reshape(plan.lists, -1)
    if plan.streamed:
        # The part of the list that belongs to each tile, with starts relative to it.
        entries = pad_to(entries, 1, entries.shape[1] + plan.room)
        firsts = starts[:, : -1 : plan.outer]
        cut = jax.vmap(jax.vmap(lambda x, i: lax.dynamic_slice_in_dim(x, i, plan.room), (None, 0)))
        entries = cut(entries, firsts).reshape(plan.lists * plan.tiles, 1, plan.room)
        inside = jnp.arange(plan.tiles)[:, None] * plan.outer + jnp.arange(plan.outer + 1)
        starts = (starts[:, inside] - firsts[..., None]).reshape(-1, 1, plan.outer + 1)

        def of_list(i: Any, t: Any, *_: Any) -> tuple[Any, int, int]:
            return plan.mask_index(i) * plan.tiles + t, 0, 0

        specs = [
            *(
                pl.BlockSpec((1, 1, x.shape[-1]), of_list, memory_space=pltpu.SMEM)
                for x in (starts, entries)
            ),
            *specs,
        ]
        prefetched, arrays = [offsets.reshape(-1)], [starts, entries, *arrays]
    else:
        entries = pad_to(entries, 1, plan.room)
        prefetched = [offsets.reshape(-1), starts.reshape(-1), entries.reshape(-1)]
    axes = varying_axes(prefetched, arrays)
    operands = vary((*prefetched, *arrays), axes)
    varying = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=specs,
            out_specs=[spec for *_, spec in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), manual_axis_type=varying)
            for shape, dtype, _ in outputs
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes() * 7 // 8,
            disable_bounds_checks=True,
        ),
        name=kernel.__name__.replace("_kernel", "").replace("_", "block_sparse_attention_", 1),
        interpret=interpret,
    )(*operands)
