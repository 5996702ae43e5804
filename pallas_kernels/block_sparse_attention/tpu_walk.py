"""What the TPU kernels of block-sparse attention share: lists in SMEM, the walk over their chunks,
the fetching of blocks, the masks inside them, and the call itself.

Both kernels walk lists of *outer* blocks (of queries forward, of keys backward), each with its kept
*inner* blocks (of keys forward, of queries backward), a chunk of a few inner blocks at a time. The
scores of a chunk are `[outer, inner]` in both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import vary, varying_axes
from pallas_kernels._tpu import LANES, chip, compiler_params, result, round_up
from pallas_kernels.block_sparse_attention.inputs import LOG2E, MASKED, Inputs, pad_to
from pallas_kernels.block_sparse_attention.lists import (
    CODE_BITS,
    CODE_MASK,
    FULL,
    RULE_MASK,
    SEGMENTS,
)
from pallas_kernels.block_sparse_attention.rules import Rule, Window

FAR = 1 << 30  # beyond any position
NT = (((1,), (1,)), ((), ()))  # a @ b.T
TN = (((0,), (0,)), ((), ()))  # a.T @ b
# Sizes found with the compiler's static schedule: inner positions per chunk and outer positions per
# step of the walk, forward and backward. Forward steps are larger where matrix units are wider, if
# inner blocks need not be fetched and no branches for segments separate the steps.
CHUNK, STEP = 512, 512
BACKWARD_CHUNK, BACKWARD_STEP = 256, 1024
# Outer positions per grid step; their float32 accumulators stay in VMEM.
TILE = 4096
# Words of SMEM. Lists of all heads are prefetched if they fit, else streamed tile by tile.
PREFETCHED_WORDS, STREAMED_WORDS = 180_000, 56_000
# Fetched inner blocks arrive this many steps before they are multiplied. Steps are smaller if the
# blocks under way would take more VMEM than this.
AHEAD, RING_BYTES = 3, 8 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a call."""

    backward: bool
    batch: int
    heads: int
    kv_heads: int
    mask_batch: int
    mask_heads: int
    outer: int  # outer blocks per grid step
    tiles: int  # grid steps per head
    inner: int  # inner blocks of a head
    room: int  # entries of a list, and of the part of one tile if lists are streamed
    capacity: int
    group: int  # inner blocks per chunk
    width: int  # chunks per step of the walk
    outer_block: int
    inner_block: int
    kv_len: int
    rules: tuple[Rule, ...]
    segments: bool
    tiled_lists: bool
    scale: float
    softcap: float | None
    precision: Any
    fetched: bool = False  # inner blocks come from HBM chunk by chunk, else a head's are in VMEM

    @property
    def name(self) -> str:
        return ("backward" if self.backward else "forward") + "_fetched" * self.fetched

    @property
    def lists(self) -> int:
        return self.mask_batch * self.mask_heads

    @property
    def ragged(self) -> bool:
        return self.kv_len % (self.outer_block if self.backward else self.inner_block) != 0

    @property
    def exponent(self) -> float:
        """Stored scores times this are logits in base 2."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap)

    @property
    def tile_positions(self) -> int:
        return self.outer * self.outer_block

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

    @property
    def window(self) -> tuple[int, int | None] | None:
        """Its bounds, if a window is all that partial blocks ask for: cheap enough forward to be
        looked at in every block, as segments are then, which is better than a branch per step."""
        if len(self.rules) != 1 or self.backward or self.ragged:
            return None
        rule = self.rules[0]
        if not isinstance(rule, Window) or rule.low is None:
            return None
        return rule.low, rule.high


def make_plan(inputs: Inputs, *, backward: bool) -> Plan:
    q, mask = inputs.q, inputs.mask
    mask_batch, mask_heads, n, inner = mask.codes.shape
    outer_block, inner_block = mask.grid.block_q, mask.grid.block_kv
    chunk, step = CHUNK, STEP
    if backward:
        n, inner, outer_block, inner_block = inner, n, inner_block, outer_block
        chunk, step = BACKWARD_CHUNK, BACKWARD_STEP
    group = max(1, min(chunk // inner_block, inner))
    tiles = -(-n // max(1, TILE // outer_block))
    room = mask.capacity + group
    tiled_lists = mask_batch * mask_heads * (2 * (n + tiles) + room) > PREFETCHED_WORDS
    if tiled_lists:
        tiles = max(tiles, -(-n // max(1, STREAMED_WORDS // inner)))
        room = min(mask.capacity, -(-n // tiles) * inner) + group
    plan = Plan(
        backward=backward,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=inputs.k.shape[1],
        mask_batch=mask_batch,
        mask_heads=mask_heads,
        outer=-(-n // tiles),
        tiles=tiles,
        inner=inner,
        room=room,
        capacity=mask.capacity,
        group=group,
        width=1,
        outer_block=outer_block,
        inner_block=inner_block,
        kv_len=mask.grid.kv_len,
        rules=mask.rules,
        segments=inputs.segments is not None,
        tiled_lists=tiled_lists,
        scale=inputs.scale,
        softcap=inputs.softcap,
        precision=inputs.precision,
    )
    if not backward and (plan.window is not None or not plan.segments):
        step = step * chip().matrix_width // LANES
    return dataclasses.replace(plan, width=max(1, min(step // outer_block, mask.capacity)))


def fetching(plan: Plan, of_position: int) -> Plan:
    """The plan with inner blocks from HBM, of whose positions each has so many bytes."""
    most = plan.width if plan.backward else STEP // plan.outer_block
    fit = RING_BYTES // ring_bytes(dataclasses.replace(plan, width=1), of_position)
    return dataclasses.replace(plan, fetched=True, width=max(1, min(plan.width, most, fit)))


def ring_bytes(plan: Plan, of_position: int) -> int:
    """VMEM of fetched inner blocks."""
    return (AHEAD + 1) * plan.width * plan.group * plan.inner_block * of_position


# -------------------------------------------------------------------- lists


class Lists:
    """The list of the present head and tile, in SMEM: `table` holds the starts of its rows, then
    for each row which one at or after it is not empty (both with one more at the end)."""

    def __init__(self, plan: Plan, scalars: list[Any], segments: list[Any]):
        self.plan, self.segments = plan, segments
        self.offsets, self.table, self.entries = scalars
        self.list = plan.mask_index(pl.program_id(0))
        self.first = pl.program_id(1) * plan.outer
        tile = self.list * plan.tiles + pl.program_id(1)
        self.at_table, self.at_entries = tile * 2 * (plan.outer + 1), self.list * plan.room

    def _at(self, i: Any) -> Any:
        return self.table[0, 0, i] if self.plan.tiled_lists else self.table[self.at_table + i]

    def start(self, r: Any) -> Any:
        return self._at(jnp.minimum(r, self.plan.outer))

    def filled(self, r: Any) -> Any:
        """The first row from r on that has blocks."""
        return self._at(self.plan.outer + 1 + jnp.minimum(r, self.plan.outer))

    def entry(self, p: Any) -> Any:
        return self.entries[0, 0, p] if self.plan.tiled_lists else self.entries[self.at_entries + p]

    def chunk(self, r: Any, p: Any) -> tuple[list[Any], list[Any]]:
        """Indices and codes of the chunk at p of row r; behind the row's end code 0 and the first
        index again: what the list does not name is not read, whatever it holds."""
        end = self.start(r + 1)
        raw = [self.entry(p + g) for g in range(self.plan.group)]
        codes = [jnp.where(p + g < end, e & CODE_MASK, 0) for g, e in enumerate(raw)]
        raw = [jnp.where(p + g < end, e, raw[0]) if g else e for g, e in enumerate(raw)]
        return [e >> CODE_BITS for e in raw], codes

    def hide(self, s: Array, r: Any, p: Any) -> Array:
        """Scores of a chunk without those of absent blocks, behind the end of its row, and those
        that the plan's window hides."""
        plan, n = self.plan, self.plan.inner_block
        indices, codes = self.chunk(r, p)
        join = lambda rows: jnp.concatenate(rows, 1)
        if plan.window is None:
            if plan.group * plan.width == 1:
                return s  # only blocks that are there are accumulated
            present = join([jnp.full((1, n), c, jnp.int32) for c in codes]) != 0
            return jnp.where(present, s, MASKED)

        low, high = plan.window
        q = lax.broadcasted_iota(jnp.int32, s.shape, 0)
        k = lax.broadcasted_iota(jnp.int32, (1, n), 1)
        q0 = self.offsets[self.list * 2] + (self.first + r) * plan.outer_block
        k0 = self.offsets[self.list * 2 + 1] - q0

        first = k0 + low  # Queries from there on see key 0.
        codes = [c & RULE_MASK for c in codes]
        absent = [jnp.where(c == FULL, -FAR, FAR) for c in codes]
        starts = [jnp.where(c > FULL, i * n + first, x) for i, c, x in zip(indices, codes, absent)]
        start = join([k + x for x in starts])
        if high is None:
            seen = q >= start
        else:  # Unsigned: one comparison for both ends.
            span = max(0, high - low + 1)
            sizes = [jnp.where(c > FULL, span, 2 * FAR - 1) for c in codes]
            size = join([jnp.full((1, n), x, jnp.uint32) for x in sizes])
            seen = (q - start).astype(jnp.uint32) < size
        if plan.segments:  # blocks without the flag have the same id everywhere
            of_outer, of_inner = self.segments
            rows = block_of(of_outer, jnp.minimum(r, plan.outer - 1), plan.outer_block)
            parts = [of_inner[0, :1, pl.ds(pl.multiple_of(i * n, n), n)] for i in indices]
            seen &= join([rows] * (s.shape[1] // LANES)) == join(parts)
        return jnp.where(seen, s, MASKED)

    def next(self, r: Any, p: Any) -> tuple[Any, Any]:
        """The chunk after; beyond the last one all are empty."""
        end = self.start(r + 1)
        last = p + self.plan.group >= end
        return jnp.where(last, self.filled(r + 1), r), jnp.where(last, end, p + self.plan.group)

    def ahead(self, chunk: Any, count: int) -> list[Any]:
        """This chunk and `count` more."""
        chunks = [chunk]
        for _ in range(count):
            chunks.append(self.next(*chunks[-1]))
        return chunks


def block_of(ref: Any, index: Any, block: int) -> Array:
    """Rows of block `index` of a `[1, length, dim]` reference."""
    return ref[0, pl.ds(pl.multiple_of(index * block, block), block), :]


# -------------------------------------------------------------------- inner blocks of a chunk


class Resident:
    """Inner blocks from arrays of the whole head in VMEM: read once, whatever the list says."""

    def __init__(self, plan: Plan, lists: Lists, refs: list[Any]):
        self.plan, self.lists, self.refs = plan, lists, refs

    def begin(self, first: list[Any]) -> Any:
        return None

    def advance(self, state: Any, later: list[Any]) -> Any:
        return None

    def take(self, n: int, chunk: Any, state: Any, w: int) -> Array:
        """`[group * inner_block, dim]` of array n for a chunk."""
        indices, _ = self.lists.chunk(*chunk)
        parts = [block_of(self.refs[n], i, self.plan.inner_block) for i in indices]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)


class Fetched:
    """Inner blocks copied from HBM by the list, kept ones only, AHEAD steps before their use.

    A ring of AHEAD + 1 slots holds the chunks of as many steps: those whose values are used now,
    those multiplied now for the next step, and those on their way.
    """

    def __init__(self, plan: Plan, lists: Lists, refs: list[Any], rings: list[Any], arrived: Any):
        self.plan, self.lists, self.refs = plan, lists, refs
        self.rings, self.arrived = rings, arrived
        head = pl.program_id(0)
        self.head = head if plan.backward else plan.kv_index(head)

    def _each(self, chunk: Any, step: Any, w: int, do: Callable[[Any], None]) -> None:
        """do(copy) for the copies of a chunk, unless it is empty. What is absent from it is its first
        block again: it is multiplied, too, and a branch per block costs more than its copy."""
        slot, size = lax.rem(step, AHEAD + 1), self.plan.inner_block
        indices, codes = self.lists.chunk(*chunk)

        @pl.when(codes[0] != 0)
        def _used():
            for g, index in enumerate(indices):
                at = pl.ds(pl.multiple_of(index * size, size), size)
                for ref, ring in zip(self.refs, self.rings):
                    target = ring.at[slot, w, pl.ds(g * size, size), :]
                    source = ref.at[self.head, at, :]
                    do(pltpu.make_async_copy(source, target, self.arrived.at[slot]))

    def _fetch(self, front: Any, step: Any) -> Any:
        for w in range(self.plan.width):
            self._each(front, step, w, lambda copy: copy.start())
            front = self.lists.next(*front)
        return front

    def _wait(self, chunks: list[Any], step: Any) -> None:
        for w, chunk in enumerate(chunks):
            self._each(chunk, step, w, lambda copy: copy.wait())

    def begin(self, first: list[Any]) -> Any:
        @pl.when(pl.program_id(1) == 0)
        def _zeros():  # memory that nobody wrote may hold anything
            for ring in self.rings:
                ring[...] = jnp.zeros_like(ring)

        front = first[0]
        for step in range(AHEAD):
            front = self._fetch(front, jnp.int32(step))
        self._wait(first, jnp.int32(0))
        return front, jnp.int32(0)

    def advance(self, state: Any, later: list[Any]) -> Any:
        front, step = state
        front = self._fetch(front, step + AHEAD)
        self._wait(later, step + 1)
        return front, step + 1

    def take(self, n: int, chunk: Any, state: Any, w: int) -> Array:
        return self.rings[n][lax.rem(state[1], AHEAD + 1), w]


def rings(plan: Plan, dtype: Any, *dims: int) -> list[Any]:
    """Scratch of `Fetched`, empty if nothing is fetched."""
    if not plan.fetched:
        return []
    shape = AHEAD + 1, plan.width, plan.group * plan.inner_block
    return [
        [pltpu.VMEM((*shape, d), dtype) for d in dims],
        pltpu.SemaphoreType.DMA((AHEAD + 1,)),
    ]


# -------------------------------------------------------------------- walk


def walk(
    plan: Plan,
    lists: Lists,
    source: Resident | Fetched,
    segments: list[Any],
    multiply: Callable[..., None],
    accumulate: Callable[..., None],
    packed: list[Any],
    even: list[Any],
    odd: list[Any],
) -> None:
    """All chunks of the tile, `width` at a time: while the matrix units multiply the next chunks
    into one set of scratch references, the vector unit works on the other.
    """

    def score(w, chunk, state, refs):
        multiply(chunk, lambda n: source.take(n, chunk, state, w), *refs)

    def finish(w, chunk, state, refs):
        accumulate(chunk, lambda n: source.take(n, chunk, state, w), *refs, *packed[w])

    def step(carry, now, later):
        first, _, state = carry
        chunks = lists.ahead(first, 2 * plan.width)
        coming = chunks[plan.width : -1]
        ahead = source.advance(state, coming)
        # Which order overlaps best was found with the compiler's schedule.
        for w in range(plan.width):
            score(w, coming[w], ahead, later[w])
            if not plan.backward:
                finish(w, chunks[w], state, now[w])
        for w in range(plan.width if plan.backward else 0):
            finish(w, chunks[w], state, now[w])
        _hide_partial(plan, lists, segments, coming, later)
        return chunks[plan.width], chunks[-1], ahead

    chunks = lists.ahead((lists.filled(0), lists.start(0)), plan.width)
    state = source.begin(chunks[:-1])
    for w in range(plan.width):
        score(w, chunks[w], state, even[w])
    _hide_partial(plan, lists, segments, chunks[:-1], even)
    first, _, state = lax.while_loop(
        lambda carry: carry[1][0] < plan.outer,
        lambda carry: step(step(carry, even, odd), odd, even),
        (chunks[0], chunks[-1], state),
    )

    @pl.when(first[0] < plan.outer)
    def _last():  # of an odd number of steps
        for w, chunk in enumerate(lists.ahead(first, plan.width - 1)):
            finish(w, chunk, state, even[w])


def _hide_partial(
    plan: Plan, lists: Lists, segments: list[Any], chunks: list[Any], targets: list[Any]
) -> None:
    """Overwrite what partial blocks of freshly multiplied chunks must not show."""
    if plan.window is not None or not (plan.rules or plan.segments):
        return
    listed = [lists.chunk(*chunk) for chunk in chunks]
    partial = [code > FULL for _, codes in listed for code in codes]
    q_offset, k_offset = lists.offsets[lists.list * 2], lists.offsets[lists.list * 2 + 1]
    shape = plan.outer_block, plan.inner_block

    def hide(r, index, code, scores, at):
        for i, rule in enumerate(plan.rules):

            @pl.when((code & RULE_MASK) == FULL + 1 + i)
            def _rule(rule=rule):
                outer = lax.broadcasted_iota(jnp.int32, shape, 0) + (lists.first + r) * shape[0]
                inner = lax.broadcasted_iota(jnp.int32, shape, 1) + index * shape[1]
                q, k = (inner, outer) if plan.backward else (outer, inner)
                seen = rule(q + q_offset, k + k_offset)
                if plan.ragged:
                    seen = seen & (k < plan.kv_len)
                scores[:, at] = jnp.where(seen, scores[:, at], MASKED)

        if plan.segments:

            @pl.when(code >= SEGMENTS)
            def _segments():
                of_outer = block_of(segments[0], r, shape[0])[:, :1]
                inner = pl.ds(pl.multiple_of(index * shape[1], shape[1]), shape[1])
                seen = of_outer == segments[1][0, :1, inner]
                scores[:, at] = jnp.where(seen, scores[:, at], MASKED)

    @pl.when(functools.reduce(jnp.logical_or, partial))
    def _any():
        for (r, _), (indices, codes), (scores, *_) in zip(chunks, listed, targets):
            for g, (index, code) in enumerate(zip(indices, codes)):
                hide(r, index, code, scores, pl.ds(g * shape[1], shape[1]))


# -------------------------------------------------------------------- around the kernels


def padded(width: int) -> int:
    """Lanes that a row of this width takes."""
    return round_up(width, LANES)


def segment_arrays(plan: Plan, inputs: Inputs, outer_len: int, inner_len: int) -> list[Any]:
    """Ids of the outer positions down the sublanes (the same in all lanes), ids of the inner ones
    along the lanes, with their specs: `[(array, spec), ...]`."""
    if inputs.segments is None:
        return []
    of_q, of_k = inputs.segments
    of_outer, of_inner = (of_k, of_q) if plan.backward else (of_q, of_k)
    of_outer = pad_to(of_outer, 1, outer_len, -1)[:, :, None]
    of_outer = jnp.broadcast_to(of_outer, (*of_outer.shape[:2], LANES))
    of_inner = pad_to(of_inner, 1, inner_len, -1)[:, None]
    h = plan.heads
    return [
        (of_outer, pl.BlockSpec((1, plan.tile_positions, LANES), lambda i, t, *_: (i // h, t, 0))),
        (of_inner, pl.BlockSpec((1, 1, inner_len), lambda i, t, *_: (i // h, 0, 0))),
    ]


def call(
    kernel: Callable[..., None],
    plan: Plan,
    lists: tuple[Array, Array, Array],
    operands: dict[str, Any],
    outputs: dict[str, Any],
    scratch: list[Any],
    interpret: Any,
) -> dict[str, Array]:
    """kernel(plan, scalars, inputs, outputs, *scratch) over heads and tiles.

    Args:
      lists: starts, entries and offsets of the mask.
      operands: name -> list of (array, spec).
      outputs: name -> (shape, dtype, spec).
    """
    starts, entries, offsets = lists
    entries = entries.reshape(plan.lists, -1)
    starts = starts.reshape(plan.lists, -1)
    n, tiles = plan.tiles * plan.outer, plan.lists * plan.tiles
    starts = jnp.pad(starts, ((0, 0), (0, n + 1 - starts.shape[-1])), mode="edge")
    if plan.tiles > 1:
        of_rows = starts[:, :n].reshape(plan.lists, plan.tiles, plan.outer)
        starts = jnp.concatenate([of_rows, starts[:, plan.outer :: plan.outer, None]], -1)
    starts = starts.reshape(plan.lists, plan.tiles, plan.outer + 1)
    row = jnp.arange(plan.outer)[None]
    not_empty = (starts[..., 1:] > starts[..., :-1])[..., None, :]
    later = not_empty & (row >= jnp.arange(plan.outer + 1)[:, None])[None, None]
    filled = jnp.min(jnp.where(later, row[None, None], plan.outer), -1)
    of_lists = []
    if plan.tiled_lists:
        # The part of the list that belongs to each tile, with starts relative to it.
        entries = pad_to(entries, 1, entries.shape[1] + plan.room)
        cut = jax.vmap(jax.vmap(lambda x, i: lax.dynamic_slice_in_dim(x, i, plan.room), (None, 0)))
        entries = cut(entries, starts[..., 0]).reshape(tiles, 1, plan.room)
        table = jnp.concatenate([starts - starts[..., :1], filled], -1).reshape(tiles, 1, -1)

        def of_list(i: Any, t: Any, *_: Any) -> tuple[Any, int, int]:
            return plan.mask_index(i) * plan.tiles + t, 0, 0

        of_lists = [
            (x, pl.BlockSpec((1, 1, x.shape[-1]), of_list, memory_space=pltpu.SMEM))
            for x in (table, entries)
        ]
        prefetched = [offsets.reshape(-1)]
    else:
        table = jnp.concatenate([starts, filled], -1)
        entries = pad_to(entries, 1, plan.room)
        prefetched = [offsets.reshape(-1), table.reshape(-1), entries.reshape(-1)]
    pairs = dict(operands, lists=of_lists)
    arrays = {name: [x for x, _ in group] for name, group in pairs.items()}
    specs = {name: [spec for _, spec in group] for name, group in pairs.items()}
    axes = varying_axes(prefetched, arrays)
    prefetched, arrays = vary((prefetched, arrays), axes)

    def body(*refs: Any) -> None:
        scalars = list(refs[: len(prefetched)])
        inputs, results, *scratch = refs[len(prefetched) :]
        kernel(plan, [*scalars, *inputs["lists"]], inputs, results, *scratch)

    body.__name__ = kernel.__name__
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(plan.batch * plan.heads, plan.tiles),
            in_specs=[specs],
            out_specs={name: spec for name, (*_, spec) in outputs.items()},
            scratch_shapes=scratch,
        ),
        out_shape={
            name: result(shape, jnp.dtype(dtype), prefetched[0])
            for name, (shape, dtype, _) in outputs.items()
        },
        compiler_params=compiler_params(("parallel", "arbitrary"), chip().vmem * 7 // 8),
        name=f"block_sparse_attention_{plan.name}",
        interpret=interpret,
    )(*prefetched, arrays)
