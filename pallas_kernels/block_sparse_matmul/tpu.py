"""Block-sparse products as Pallas TPU kernels: `x w`, `dy w^T`, and the gradient of stored blocks.

What the kernels are built around:

* A panel of rows of x stays in VMEM for all blocks (a block of w brings only itself from HBM), and
  so does the panel of y. Reading x and writing y once is the least any kernel can do.
* The stored blocks are one list, cut into chunks of `G` with no regard to where a block column
  ends. Within a chunk the code is straight: multiply, add to the running sum, which starts afresh
  where a column starts, and store the sum in its column of the panel. The last store of a column
  is its value; the sum is carried to the next chunk. So the cost of a block does not depend on how
  the blocks are spread, no block is padded, and one program serves every pattern.
* The rows of a panel are walked in slices that are small enough for the running sum to stay in
  registers. Long straight code is what keeps the matrix units fed: filling and draining them costs
  more than a hundred cycles, paid once for a chunk.
* Finished columns of y leave for HBM while the next ones are computed; a column's place in the
  panel is written again only after its last copy has left.

The gradient of stored blocks keeps panels of x and dy (a slice of tokens) in VMEM, and the float32
sums of as many blocks as fit; with more blocks the tokens are read again for each lot.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import target_platform
from pallas_kernels._formats import Array
from pallas_kernels._tpu import LANES, Chip, chip, compiler_params, in_32_bits, result, round_up
from pallas_kernels.block_sparse_matmul.format import BlockSparse

MAX_BLOCKS = 16_384  # their coordinates have to fit in the scalar memory
_ROWS = 64  # rows of a slice: the running sum [64, 128] float32 takes 8 registers
_PANEL = 1024  # rows of x that stay in VMEM, if they fit
_TOKENS = 512  # the same in the weight gradient
_FLUSH = 512  # columns of y that leave together
_CHUNKS = 8  # of a panel, so that columns of y leave early; but not fewer or more than so many
_CHUNK = (16, 64)  # 128 x 128 tiles
_TILES = 32  # tiles whose code is unrolled, in at most so many blocks (the time to compile grows
_PART = 16  # with their square)
_SPARE = 8 << 20  # bytes of VMEM beyond what is planned


def why_not(x: Array, w: BlockSparse, interpret: bool) -> str | None:
    """The reason why these kernels cannot multiply x by w, or None."""
    if target_platform() != "tpu" and not interpret:
        return f"it runs on TPU, not on {target_platform()} (interpret=True emulates it)"
    if w.values.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {w.values.dtype}"
    if w.block_shape[0] % LANES or w.block_shape[1] % LANES:
        return f"it takes blocks of multiples of {LANES}, not {w.block_shape}"
    if not 1 <= w.num_blocks <= MAX_BLOCKS:
        return f"it takes 1 to {MAX_BLOCKS} stored blocks, not {w.num_blocks}"
    if max(w.grid[0] * w.block_shape[0], w.grid[1] * w.block_shape[1]) > 1 << 16:
        return f"it takes up to {1 << 16} rows and columns, so that panels fit, not {w.shape}"
    if max(w.block_shape) > 1024:
        return f"it takes blocks of up to 1024, not {w.block_shape}"
    return None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How the rows of x (and dy) are cut into panels; the last one may be short."""

    panel: int
    tiles: int
    last: int

    @classmethod
    def cut(cls, rows: int, most: int, sublanes: int, parts: int = 1) -> "_Rows":
        """Panels of at most `most` rows, small enough to give every part (core) one."""
        most = 1 << int(math.log2(max(most, sublanes)))
        panel = min(most, round_up(-(-rows // parts), sublanes))
        tiles = -(-rows // panel)
        return cls(panel, tiles, rows - (tiles - 1) * panel)

    def at(self, tile: Array, body: Callable[[Any, int], None]) -> None:
        """In a kernel: body(the rows of a panel in HBM, how many they are)."""
        start = pl.multiple_of(tile * self.panel, self.panel)
        if self.last == self.panel:
            body(pl.ds(start, self.panel), self.panel)
            return

        @pl.when(tile < self.tiles - 1)
        def _():
            body(pl.ds(start, self.panel), self.panel)

        @pl.when(tile == self.tiles - 1)
        def _():
            body(pl.ds((self.tiles - 1) * self.panel, self.last), self.last)


def _chunks(blocks: int, most: int) -> tuple[int, int]:
    """Blocks at a time, `most` or fewer, and how often: of equal length, to waste little."""
    chunks = -(-blocks // max(1, most))
    return -(-blocks // chunks), chunks


def _pad(x: Array, sublanes: int, cols: int) -> Array:
    """Rows to a multiple of `sublanes`, columns to `cols`."""
    return jnp.pad(x, ((0, -x.shape[0] % sublanes), (0, cols - x.shape[1])))


def _budget(this: Chip) -> int:
    """Bytes of VMEM that a call may plan with."""
    return this.vmem * 7 // 8


def _tiles_of(block: tuple[int, int]) -> int:
    """128 x 128 tiles of a block."""
    return block[0] // LANES * (block[1] // LANES)


# ---- x w and dy w^T -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product:
    """Everything static about one product, shared by the call and the kernel."""

    rows: _Rows
    cores: int
    block: tuple[int, int]  # as the product sees it: rows of x's side first
    group: int  # blocks of a chunk
    part: int  # of which so many are unrolled
    chunks: int
    slice_rows: int  # rows that are multiplied at a time
    columns: int  # block columns of y
    per: int  # of which so many leave together
    transposed: bool
    precision: lax.PrecisionLike
    vmem: int

    @property
    def each(self) -> int:
        """Panels of a core."""
        return -(-self.rows.tiles // self.cores)

    @property
    def groups(self) -> int:
        """Groups of columns that leave together."""
        return self.columns // self.per


@in_32_bits
def matmul(
    x: Array,
    w: BlockSparse,
    *,
    transposed: bool = False,
    precision: lax.PrecisionLike = None,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> Array:
    """`x @ w`, or `x @ w.T` if `transposed`, for `x [rows, in]` of the dtype of w."""
    (gk, gj), (bk, bn), width = w.grid, w.block_shape, w.shape[1]
    if transposed:
        (gk, gj), (bk, bn), width = (gj, gk), (bn, bk), w.shape[0]
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    tokens, size = x.shape[0], x.dtype.itemsize
    sublanes = 32 // min(size, out_dtype.itemsize)
    x = _pad(x, sublanes, gk * bk)

    # How much at a time. The code is unrolled over the blocks of a part and the rows of a panel,
    # as long as the compiler's patience allows.
    this, slow, area = chip(), 1 if size == 2 else 4, _tiles_of((bk, bn))
    chunk = min(_CHUNK[1], max(_CHUNK[0], w.num_blocks * area // _CHUNKS))
    group, chunks = _chunks(w.num_blocks, chunk // area // slow)
    part, parts = _chunks(group, min(_PART, _TILES // area) // slow)
    group = part * parts
    per_row = 2 * gk * bk * size + (gj + 1) * bn * out_dtype.itemsize + bn * 4
    fixed = 2 * group * bk * bn * size + (4 << 20)
    most = min((_budget(this) - fixed) // per_row, _PANEL, _PANEL * _TILES // (part * area * slow))
    rows = _Rows.cut(x.shape[0], most, sublanes, this.cores)
    p = _Product(
        rows=rows,
        cores=this.cores,
        block=(bk, bn),
        group=group,
        part=part,
        chunks=chunks,
        slice_rows=min(rows.panel, _ROWS if bn <= 2 * LANES else 2 * _ROWS),
        columns=gj,
        per=next(p for p in range(max(1, _FLUSH // bn), 0, -1) if gj % p == 0),
        transposed=transposed,
        precision=precision,
        vmem=rows.panel * per_row + fixed,
    )
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    y = pl.pallas_call(
        functools.partial(_matmul_kernel, p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.cores, p.each, p.chunks),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, rows.panel, gk * bk), x.dtype),
                pltpu.VMEM((2, group, *w.block_shape), x.dtype),
                pltpu.VMEM((rows.panel, (gj + 1) * bn), out_dtype),
                pltpu.VMEM((rows.panel, bn), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((p.groups,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=result((x.shape[0], gj * bn), out_dtype, x),
        name="block_sparse_matmul_t" if transposed else "block_sparse_matmul",
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * w.values.size,
            transcendentals=0,
            bytes_accessed=(x.size + rows.tiles * w.values.size) * size
            + x.shape[0] * gj * bn * out_dtype.itemsize,
        ),
        compiler_params=compiler_params(("parallel", "arbitrary", "arbitrary"), p.vmem + _SPARE),
        interpret=interpret,
    )(_scalars(w, p, gk), x, w.values)
    return y[:tokens, :width]


def _scalars(w: BlockSparse, p: _Product, rows_of_blocks: int) -> Array:
    """int32 `[3 or 4, chunks * group + 1]`: the places, for the scalar memory.

    One array, made by one operation: each one before the kernel costs more than a thousand cycles.
    Unused blocks (last in both orders), and what fills up the last chunk, add to a column beyond
    those of y.
    """
    of_j = 0 if p.transposed else 1
    spare = p.chunks * p.group + 1 - w.num_blocks
    plan = jnp.pad(w.places, ((0, 0), (0, spare)), constant_values=-1)
    kind, at = (lax.broadcasted_iota(jnp.int32, plan.shape, a) for a in (0, 1))
    end = jnp.where(kind == of_j, p.columns, rows_of_blocks)
    inside = (plan >= 0) & (plan < end) & (at < w.num_blocks)
    plan = jnp.where(kind >= 2, jnp.where(plan < 0, at, plan), plan)
    return jnp.where((kind >= 2) | inside, plan, jnp.where(kind == of_j, p.columns, 0))


def _matmul_kernel(
    p: _Product,
    plan_ref,
    x_hbm,
    w_hbm,
    y_hbm,
    x_buf,
    w_buf,
    y_buf,
    sum_buf,
    x_sem,
    w_sem,
    y_sem,
    w_slot_ref,
):
    """Grid: cores x row panels of a core x chunks of blocks."""
    core, i, c = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    (bk, bn), group, panel, columns = p.block, p.group, p.rows.panel, p.columns
    mine = jnp.minimum(p.each, p.rows.tiles - core * p.each)  # panels of this core
    slot = lax.rem(i, 2)
    of_k, of_j = (1, 0) if p.transposed else (0, 1)

    # The storage order is right for w if blocks are stored by column; else an order leads through it.
    by = 2 if p.transposed else 3
    ordered = by >= plan_ref.shape[0]

    def stored(at):
        return at if ordered else plan_ref[by, at]

    # Columns are ascending. Chunk c sees to the columns from its first block's to the one before
    # the next chunk's first block's. To write to a group of columns it must have been opened; when
    # all its columns have been seen to, it is closed, that is, sent off.
    end = c == p.chunks - 1
    base = c * group
    first, last = (plan_ref[of_j, stored(base + g)] for g in (0, group - 1))
    before = jnp.where(c == 0, -1, plan_ref[of_j, stored(jnp.maximum(base - 1, 0))])
    start = jnp.where(c == 0, 0, first)
    stop = jnp.where(end, columns, plan_ref[of_j, stored(base + group)])
    opened = jnp.minimum((jnp.maximum(start - 1, before) + p.per) // p.per, p.groups)
    to_open = jnp.minimum((jnp.maximum(stop - 1, last) + p.per) // p.per, p.groups)
    closed = start // p.per
    to_close = stop // p.per
    busy, next_busy = first < columns, ~end & (stop < columns)

    def x_copy(t, s, do):
        def body(rows, n):
            buf = x_buf.at[s, pl.ds(0, n)]
            do(pltpu.make_async_copy(x_hbm.at[rows, :], buf, x_sem.at[s]))

        p.rows.at(core * p.each + t, body)

    def y_copy(q, t, do):
        cols = pl.ds(pl.multiple_of(q * p.per * bn, p.per * bn), p.per * bn)

        def body(rows, n):
            buf = y_buf.at[pl.ds(0, n), cols]
            do(pltpu.make_async_copy(buf, y_hbm.at[rows, cols], y_sem.at[q]))

        p.rows.at(core * p.each + t, body)

    def fetch_blocks(chunk, s):
        # chunks that lie in one piece
        one = w_hbm.shape[0] // group if ordered else 0
        if one:

            @pl.when(chunk < one)
            def _():
                piece = w_hbm.at[pl.ds(chunk * group, group)]
                pltpu.make_async_copy(piece, w_buf.at[s], w_sem.at[s]).start()

        @pl.when(chunk >= one)
        def _():
            for g in range(group):
                at = jnp.minimum(stored(chunk * group + g), w_hbm.shape[0] - 1)
                pltpu.make_async_copy(w_hbm.at[at], w_buf.at[s, g], w_sem.at[s]).start()

    start_copy, wait_copy = (lambda copy: copy.start()), (lambda copy: copy.wait())

    @pl.when(i < mine)
    def _():
        @pl.when((i == 0) & (c == 0))
        def _():
            x_copy(0, 0, start_copy)
            w_slot_ref[0] = 0

            # Columns without blocks are zeros. Nothing else is ever written there, so that one
            # cleaning serves all panels.
            def clear(j, carry):
                cols = pl.ds(pl.multiple_of(j * bn, bn), bn)
                y_buf[:, cols] = jnp.zeros((panel, bn), y_buf.dtype)
                return carry

            lax.fori_loop(0, columns, clear, 0)

            @pl.when(busy)
            def _():
                fetch_blocks(0, 0)

        w_slot = w_slot_ref[0]

        @pl.when(busy & (next_busy | (i + 1 < mine)))
        def _():
            fetch_blocks(jnp.where(next_busy, c + 1, 0), 1 - w_slot)

        @pl.when(c == 0)
        def _():
            x_copy(i, slot, wait_copy)

            @pl.when(i + 1 < mine)
            def _():
                x_copy(i + 1, 1 - slot, start_copy)

        def open_group(q, carry):
            @pl.when(i > 0)
            def _():
                y_copy(q, i - 1, wait_copy)

            return carry

        lax.fori_loop(opened, to_open, open_group, 0)

        @pl.when(busy)
        def _():
            w_slot_ref[0] = 1 - w_slot
            here = w_buf.at[w_slot]
            pltpu.make_async_copy(here, here, w_sem.at[w_slot]).wait()  # for so many bytes
            contract = (((1,), (1 if p.transposed else 0,)), ((), ()))

            def multiply(part, carry):
                at = part * p.part
                ks = [plan_ref[of_k, stored(base + at + g)] for g in range(p.part)]
                cols = [plan_ref[of_j, stored(base + at + g)] for g in range(p.part)]
                left = plan_ref[of_j, stored(jnp.maximum(base + at - 1, 0))]
                left = jnp.where(base + at == 0, -1, left)
                fresh = [j != i for i, j in zip([left, *cols], cols)]
                for r in range(0, panel, p.slice_rows):
                    rows = slice(r, min(r + p.slice_rows, panel))
                    total = sum_buf[rows]
                    for g in range(p.part):
                        product = lax.dot_general(
                            x_buf[slot, rows, pl.ds(pl.multiple_of(ks[g] * bk, bk), bk)],
                            w_buf[w_slot, at + g],
                            contract,
                            precision=p.precision,
                            preferred_element_type=jnp.float32,
                        )
                        total = product + jnp.where(fresh[g], 0.0, total)
                        to = pl.ds(pl.multiple_of(cols[g] * bn, bn), bn)
                        y_buf[rows, to] = total.astype(y_buf.dtype)
                    sum_buf[rows] = total
                return carry

            lax.fori_loop(0, group // p.part, multiply, 0)

        def close_group(q, carry):
            y_copy(q, i, start_copy)
            return carry

        lax.fori_loop(closed, to_close, close_group, 0)

        @pl.when((c == p.chunks - 1) & (i == mine - 1))
        def _():
            def drain(q, carry):
                y_copy(q, i, wait_copy)
                return carry

            lax.fori_loop(0, p.groups, drain, 0)


# ---- the gradient of the stored blocks ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """Everything static about the gradient of stored blocks."""

    rows: _Rows
    block: tuple[int, int]
    blocks: int
    group: int  # blocks of a chunk
    chunks: int  # of a lot
    lots: int  # of a core; the tokens are read again for each
    cores: int
    precision: lax.PrecisionLike
    vmem: int


@in_32_bits
def weight_gradient(
    x: Array,
    dy: Array,
    w: BlockSparse,
    *,
    precision: lax.PrecisionLike = None,
    interpret: bool = False,
) -> Array:
    """The stored blocks of `x^T dy`, `[num_blocks, bh, bw]` in the dtype of w; unused ones are 0.

    x `[tokens, in]` and dy `[tokens, out]` have the dtype of w.
    """
    (gk, gj), (bk, bn) = w.grid, w.block_shape
    n, size = w.num_blocks, x.dtype.itemsize
    sublanes = 32 // size
    x, dy = _pad(x, sublanes, gk * bk), _pad(dy, sublanes, gj * bn)

    this, slow = chip(), 1 if size == 2 else 4
    group, chunks = _chunks(n, min(_PART, _TILES // _tiles_of((bk, bn))) // slow)
    per_row = 2 * size * (gk * bk + gj * bn)
    per_block = 4 * bk * bn
    fixed = 2 * group * bk * bn * size + (4 << 20)
    # Fewer rows if the panels would take more than half of the memory.
    rows = _Rows.cut(x.shape[0], min(_TOKENS, _budget(this) // 2 // per_row), sublanes)
    room = max(group, (_budget(this) - fixed - rows.panel * per_row) // per_block)
    lots = min(chunks, this.cores * max(1, -(-chunks * group // (room * this.cores))))
    chunks = -(-chunks // lots)
    cores = this.cores if lots % this.cores == 0 else 1
    p = _Gradient(
        rows=rows,
        block=(bk, bn),
        blocks=n,
        group=group,
        chunks=chunks,
        lots=lots // cores,
        cores=cores,
        precision=precision,
        vmem=rows.panel * per_row + chunks * group * per_block + fixed,
    )
    used = w.used
    k, j = jnp.where(used, w.block_rows, 0), jnp.where(used, w.block_cols, 0)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(p.cores, p.lots, rows.tiles, p.chunks),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, rows.panel, gk * bk), x.dtype),
                pltpu.VMEM((2, rows.panel, gj * bn), dy.dtype),
                pltpu.VMEM((chunks * group, bk, bn), jnp.float32),
                pltpu.VMEM((2, group, bk, bn), w.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=result((n, bk, bn), w.dtype, x),
        name="block_sparse_weight_gradient",
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * n * bk * bn,
            transcendentals=0,
            bytes_accessed=lots * (x.size + dy.size) * size + n * bk * bn * w.dtype.itemsize,
        ),
        compiler_params=compiler_params(("parallel", *3 * ("arbitrary",)), p.vmem + _SPARE),
        interpret=interpret,
    )(k, j, used.astype(jnp.int32), x, dy)


def _gradient_kernel(
    p: _Gradient,
    k_ref,
    j_ref,
    used_ref,
    x_hbm,
    dy_hbm,
    out_hbm,
    x_buf,
    dy_buf,
    sum_buf,
    out_buf,
    in_sem,
    out_sem,
):
    """Grid: cores x lots of blocks x token panels x chunks of a lot."""
    core, lot, i, c = (pl.program_id(a) for a in range(4))
    (bk, bn), group, tiles = p.block, p.group, p.rows.tiles
    step, steps = lot * tiles + i, p.lots * tiles
    slot, out_slot = lax.rem(step, 2), lax.rem(c, 2)
    # The last chunks may reach beyond the last block: they are moved back and repeat some blocks.
    base = jnp.minimum(((core * p.lots + lot) * p.chunks + c) * group, p.blocks - group)

    def panels(t, s, do):
        def body(rows, n):
            for a, (hbm, buf) in enumerate(((x_hbm, x_buf), (dy_hbm, dy_buf))):
                do(pltpu.make_async_copy(hbm.at[rows, :], buf.at[s, pl.ds(0, n)], in_sem.at[s, a]))

        p.rows.at(lax.rem(t, tiles), body)

    def out_copy(chunk_base, s):
        piece = out_hbm.at[pl.ds(chunk_base, group)]
        return pltpu.make_async_copy(out_buf.at[s], piece, out_sem.at[s])

    @pl.when(c == 0)
    def _():
        @pl.when(step == 0)
        def _():
            panels(0, 0, lambda copy: copy.start())

        panels(step, slot, lambda copy: copy.wait())

        @pl.when(step + 1 < steps)
        def _():
            panels(step + 1, 1 - slot, lambda copy: copy.start())

        if p.rows.last < p.rows.panel:

            @pl.when(i == tiles - 1)
            def _():  # rows that do not exist must not contribute, whatever the memory holds
                for buf in (x_buf, dy_buf):
                    shape = (p.rows.panel - p.rows.last, buf.shape[2])
                    buf[slot, p.rows.last : p.rows.panel, :] = jnp.zeros(shape, buf.dtype)

    ks = [pl.multiple_of(k_ref[base + g] * bk, bk) for g in range(group)]
    js = [pl.multiple_of(j_ref[base + g] * bn, bn) for g in range(group)]
    for g in range(group):
        product = lax.dot_general(
            x_buf[slot, :, pl.ds(ks[g], bk)],
            dy_buf[slot, :, pl.ds(js[g], bn)],
            (((0,), (0,)), ((), ())),
            precision=p.precision,
            preferred_element_type=jnp.float32,
        )
        sum_buf[c * group + g] = product + jnp.where(i == 0, 0.0, sum_buf[c * group + g])

    @pl.when(i == tiles - 1)
    def _():
        @pl.when(c >= 2)
        def _():
            out_copy(base, out_slot).wait()

        for g in range(group):
            keep = used_ref[base + g] == 1
            total = jnp.where(keep, sum_buf[c * group + g], 0.0)
            out_buf[out_slot, g] = total.astype(out_buf.dtype)
        out_copy(base, out_slot).start()

        @pl.when(c == p.chunks - 1)
        def _():
            out_copy(base, out_slot).wait()
            if p.chunks > 1:
                out_copy(base, 1 - out_slot).wait()
