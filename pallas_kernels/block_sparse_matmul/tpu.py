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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import target_platform
from pallas_kernels.formats.block_sparse import Array, BlockSparse, decode_pattern

LANES = 128
MAX_BLOCKS = 16_384  # their coordinates have to fit in the scalar memory
_ROWS = 64  # rows of a slice: the running sum [64, 128] float32 takes 8 registers
_PANEL = 1024  # rows of x that stay in VMEM, if they fit
_TOKENS = 512  # the same in the weight gradient
_FLUSH = 512  # columns of y that leave together


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels adapt to."""

    cores: int = 1
    vmem: int = 64 << 20

    @property
    def budget(self) -> int:
        return self.vmem * 7 // 8


def chip() -> Chip:
    """The chip that code traced now is for; a small one in the interpreter."""
    if target_platform() != "tpu":
        return Chip()
    info = pltpu.get_tpu_info()
    return Chip(info.num_cores, info.vmem_capacity_bytes)


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


def _split_rows(rows: int, most: int, sublanes: int, parts: int) -> int:
    """Rows of a panel: at most `most`, and small enough to give every part (core) one."""
    fair = -(-rows // parts)
    return min(most, -(-fair // sublanes) * sublanes)


def _pad_rows(x: Array, multiple: int) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def _pad_cols(x: Array, cols: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, cols - x.shape[1])))


def _compiler_params(dimensions: tuple[Any, ...], vmem: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=dimensions,
        disable_bounds_checks=True,  # indices are clipped before; the checks cost 5 %
        vmem_limit_bytes=vmem,
    )


# ---- x w and dy w^T -----------------------------------------------------------------------------


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
    tokens = x.shape[0]
    sublanes = 32 // min(x.dtype.itemsize, out_dtype.itemsize)
    x = _pad_cols(_pad_rows(x, sublanes), gk * bk)

    # How much at a time. A chunk is as long as the compiler's patience allows: its code is
    # unrolled over the blocks of the chunk and the rows of the panel.
    this = chip()
    size = x.dtype.itemsize
    slow = 1 if size == 2 else 4
    area = -(-bk // LANES) * -(-bn // LANES)
    group = max(1, min(16, 32 // area, w.num_blocks) // slow)
    per_row = 2 * gk * bk * size + (gj + 1) * bn * out_dtype.itemsize + bn * 4
    fixed = 2 * group * bk * bn * size + (4 << 20)
    most = (this.budget - fixed) // per_row
    most = min(most, _PANEL, (1 << 15) // (group * area * slow))
    most = 1 << int(math.log2(max(most, sublanes)))
    panel = _split_rows(x.shape[0], most, sublanes, this.cores)
    tiles = -(-x.shape[0] // panel)
    last_rows = x.shape[0] - (tiles - 1) * panel
    slice_rows = min(panel, _ROWS if bn <= 2 * LANES else 2 * _ROWS)

    # Columns of y leave in groups.
    per = next(p for p in range(max(1, _FLUSH // bn), 0, -1) if gj % p == 0)
    groups = gj // per
    chunks = -(-w.num_blocks // group)
    # One array of scalars, made by one operation: each one before the kernel costs more than a
    # thousand cycles. Unused blocks (last in both orders), and what fills up the last chunk, add
    # to a column beyond those of y.
    of_k, of_j = (1, 0) if transposed else (0, 1)
    spare = chunks * group + 1 - w.num_blocks
    plan = jnp.pad(decode_pattern(w.pattern), ((0, 0), (0, spare)), constant_values=-1)
    kind, at = (lax.broadcasted_iota(jnp.int32, plan.shape, a) for a in (0, 1))
    inside = (plan >= 0) & (plan < jnp.where(kind == of_j, gj, gk)) & (at < w.num_blocks)
    plan = jnp.where(kind == 2, jnp.where(plan < 0, at, plan), plan)
    plan = jnp.where((kind == 2) | inside, plan, jnp.where(kind == of_j, gj, 0))
    kernel = functools.partial(
        _matmul_kernel,
        block=(bk, bn),
        group=group,
        chunks=chunks,
        panel=panel,
        slice_rows=slice_rows,
        tiles=tiles,
        cores=this.cores,
        last_rows=last_rows,
        columns=gj,
        per=per,
        transposed=transposed,
        precision=precision,
    )
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    vmem = panel * per_row + fixed
    flops = 2 * x.shape[0] * w.num_blocks * bk * bn
    traffic = x.size * size + tiles * w.values.size * size
    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(this.cores, -(-tiles // this.cores), chunks),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, panel, gk * bk), x.dtype),
                pltpu.VMEM((2, group, *w.block_shape), x.dtype),
                pltpu.VMEM((panel, (gj + 1) * bn), out_dtype),
                pltpu.VMEM((panel, bn), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((groups,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], gj * bn), out_dtype),
        name="block_sparse_matmul_t" if transposed else "block_sparse_matmul",
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=0,
            bytes_accessed=traffic + x.shape[0] * gj * bn * out_dtype.itemsize,
        ),
        compiler_params=_compiler_params(("parallel", "arbitrary", "arbitrary"), vmem + (8 << 20)),
        interpret=interpret,
    )(plan, x, w.values)
    return y[:tokens, :width]


def _matmul_kernel(
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
    *,
    block,
    group,
    chunks,
    panel,
    slice_rows,
    tiles,
    cores,
    last_rows,
    columns,
    per,
    transposed,
    precision,
):
    """Grid: cores x row panels of a core x chunks of blocks."""
    core, i, c = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    bk, bn = block
    each = -(-tiles // cores)
    mine = jnp.minimum(each, tiles - core * each)  # panels of this core
    slot = lax.rem(i, 2)
    flush, groups = per * bn, columns // per
    of_k, of_j = (1, 0) if transposed else (0, 1)

    def stored(at):  # storage order is right for w; `order` leads through it for w^T
        return plan_ref[2, at] if transposed else at

    # Columns are ascending. Chunk c sees to the columns from its first block's to the one before
    # the next chunk's first block's. To write to a group of columns it must have been opened; when
    # all its columns have been seen to, it is closed, that is, sent off.
    end = c == chunks - 1
    base = c * group
    first, last = (plan_ref[of_j, stored(base + g)] for g in (0, group - 1))
    before = jnp.where(c == 0, -1, plan_ref[of_j, stored(jnp.maximum(base - 1, 0))])
    start = jnp.where(c == 0, 0, first)
    stop = jnp.where(end, columns, plan_ref[of_j, stored(base + group)])
    opened = jnp.minimum((jnp.maximum(start - 1, before) + per) // per, groups)
    to_open = jnp.minimum((jnp.maximum(stop - 1, last) + per) // per, groups)
    closed = start // per
    to_close = stop // per
    busy, next_busy = first < columns, ~end & (stop < columns)

    def for_rows(t, body):
        """body(rows of panel t in HBM, their number): the last panel may be short."""
        tile = core * each + t
        if last_rows == panel:
            body(pl.ds(pl.multiple_of(tile * panel, panel), panel), panel)
            return

        @pl.when(tile < tiles - 1)
        def _():
            body(pl.ds(pl.multiple_of(tile * panel, panel), panel), panel)

        @pl.when(tile == tiles - 1)
        def _():
            body(pl.ds((tiles - 1) * panel, last_rows), last_rows)

    def x_copy(t, s, do):
        for_rows(
            t,
            lambda rows, n: do(
                pltpu.make_async_copy(x_hbm.at[rows, :], x_buf.at[s, pl.ds(0, n)], x_sem.at[s])
            ),
        )

    def y_copy(q, t, do):
        cols = pl.ds(pl.multiple_of(q * flush, flush), flush)
        for_rows(
            t,
            lambda rows, n: do(
                pltpu.make_async_copy(
                    y_buf.at[pl.ds(0, n), cols], y_hbm.at[rows, cols], y_sem.at[q]
                )
            ),
        )

    def fetch_blocks(chunk, s):
        one = 0 if transposed else w_hbm.shape[0] // group  # chunks that lie in one piece

        @pl.when(chunk < one)
        def _():
            piece = w_hbm.at[pl.ds(chunk * group, group)]
            pltpu.make_async_copy(piece, w_buf.at[s], w_sem.at[s]).start()

        @pl.when(chunk >= one)
        def _():
            for g in range(group):
                at = jnp.minimum(stored(chunk * group + g), w_hbm.shape[0] - 1)
                pltpu.make_async_copy(w_hbm.at[at], w_buf.at[s, g], w_sem.at[s]).start()

    @pl.when(i < mine)
    def _():
        @pl.when((i == 0) & (c == 0))
        def _():
            x_copy(0, 0, lambda copy: copy.start())
            w_slot_ref[0] = 0

            # Columns without blocks are zeros. Nothing else is ever written there, so that one
            # cleaning serves all panels.
            def clear(j, carry):
                y_buf[:, pl.ds(pl.multiple_of(j * bn, bn), bn)] = jnp.zeros(
                    (panel, bn), y_buf.dtype
                )
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
            x_copy(i, slot, lambda copy: copy.wait())

            @pl.when(i + 1 < mine)
            def _():
                x_copy(i + 1, 1 - slot, lambda copy: copy.start())

        def open_group(q, carry):
            @pl.when(i > 0)
            def _():
                y_copy(q, i - 1, lambda copy: copy.wait())

            return carry

        lax.fori_loop(opened, to_open, open_group, 0)

        @pl.when(busy)
        def _():
            w_slot_ref[0] = 1 - w_slot
            pltpu.make_async_copy(
                w_hbm.at[pl.ds(0, group)], w_buf.at[w_slot], w_sem.at[w_slot]
            ).wait()
            ks = [plan_ref[of_k, stored(base + g)] for g in range(group)]
            ks = [pl.multiple_of(k * bk, bk) for k in ks]
            cols = [plan_ref[of_j, stored(base + g)] for g in range(group)]
            js = [pl.multiple_of(j * bn, bn) for j in cols]
            fresh = [j != left for left, j in zip([before, *cols], cols)]
            contract = (((1,), (1 if transposed else 0,)), ((), ()))
            for r in range(0, panel, slice_rows):
                rows = slice(r, min(r + slice_rows, panel))
                total = sum_buf[rows]
                for g in range(group):
                    product = lax.dot_general(
                        x_buf[slot, rows, pl.ds(ks[g], bk)],
                        w_buf[w_slot, g],
                        contract,
                        precision=precision,
                        preferred_element_type=jnp.float32,
                    )
                    total = product + jnp.where(fresh[g], 0.0, total)
                    y_buf[rows, pl.ds(js[g], bn)] = total.astype(y_buf.dtype)
                sum_buf[rows] = total

        def close_group(q, carry):
            y_copy(q, i, lambda copy: copy.start())
            return carry

        lax.fori_loop(closed, to_close, close_group, 0)

        @pl.when((c == chunks - 1) & (i == mine - 1))
        def _():
            def drain(q, carry):
                y_copy(q, i, lambda copy: copy.wait())
                return carry

            lax.fori_loop(0, groups, drain, 0)


# ---- the gradient of the stored blocks ----------------------------------------------------------


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
    x = _pad_cols(_pad_rows(x, sublanes), gk * bk)
    dy = _pad_cols(_pad_rows(dy, sublanes), gj * bn)

    this = chip()
    slow = 1 if size == 2 else 4
    area = -(-bk // LANES) * -(-bn // LANES)
    group = max(1, min(16, 32 // area, n) // slow)
    per_row = 2 * size * (gk * bk + gj * bn)
    per_block = 4 * bk * bn
    fixed = 2 * group * bk * bn * size + (4 << 20)
    # Fewer rows if the panels would take more than half of the memory.
    most = min(_TOKENS, this.budget // 2 // per_row)
    most = 1 << int(math.log2(max(most, sublanes)))
    panel = _split_rows(x.shape[0], most, sublanes, 1)
    tiles = -(-x.shape[0] // panel)
    last_rows = x.shape[0] - (tiles - 1) * panel
    room = max(group, (this.budget - fixed - panel * per_row) // per_block)
    chunks = -(-n // group)
    lots = this.cores * max(1, -(-chunks * group // (room * this.cores)))
    lots = min(lots, chunks)
    chunks = -(-chunks // lots)  # of a lot

    used = w.used
    k = jnp.where(used, w.block_rows, 0)
    j = jnp.where(used, w.block_cols, 0)
    cores = this.cores if lots % this.cores == 0 else 1
    kernel = functools.partial(
        _gradient_kernel,
        block=(bk, bn),
        group=group,
        chunks=chunks,
        panel=panel,
        tiles=tiles,
        last_rows=last_rows,
        lots=lots // cores,
        blocks=n,
        precision=precision,
    )
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    vmem = panel * per_row + chunks * group * per_block + fixed
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, lots // cores, tiles, chunks),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, panel, gk * bk), x.dtype),
                pltpu.VMEM((2, panel, gj * bn), dy.dtype),
                pltpu.VMEM((chunks * group, bk, bn), jnp.float32),
                pltpu.VMEM((2, group, bk, bn), w.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((n, bk, bn), w.dtype),
        name="block_sparse_weight_gradient",
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * n * bk * bn,
            transcendentals=0,
            bytes_accessed=lots * (x.size + dy.size) * size + n * bk * bn * w.dtype.itemsize,
        ),
        compiler_params=_compiler_params(
            ("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem + (8 << 20)
        ),
        interpret=interpret,
    )(k, j, used.astype(jnp.int32), x, dy)


def _gradient_kernel(
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
    *,
    block,
    group,
    chunks,
    panel,
    tiles,
    last_rows,
    lots,
    blocks,
    precision,
):
    """Grid: cores x lots of blocks x token panels x chunks of a lot."""
    core, lot, i, c = (pl.program_id(a) for a in range(4))
    bk, bn = block
    step, steps = lot * tiles + i, lots * tiles
    slot, out_slot = lax.rem(step, 2), lax.rem(c, 2)
    # The last chunks may reach beyond the last block: they are moved back and repeat some blocks.
    base = jnp.minimum(((core * lots + lot) * chunks + c) * group, blocks - group)

    def panels(t, s, do):
        tile = lax.rem(t, tiles)

        def copy(rows, n):
            for a, (hbm, buf) in enumerate(((x_hbm, x_buf), (dy_hbm, dy_buf))):
                do(pltpu.make_async_copy(hbm.at[rows, :], buf.at[s, pl.ds(0, n)], in_sem.at[s, a]))

        if last_rows == panel:
            copy(pl.ds(pl.multiple_of(tile * panel, panel), panel), panel)
            return

        @pl.when(tile < tiles - 1)
        def _():
            copy(pl.ds(pl.multiple_of(tile * panel, panel), panel), panel)

        @pl.when(tile == tiles - 1)
        def _():
            copy(pl.ds((tiles - 1) * panel, last_rows), last_rows)

    def out_copy(chunk_base, s):
        return pltpu.make_async_copy(
            out_buf.at[s], out_hbm.at[pl.ds(chunk_base, group)], out_sem.at[s]
        )

    @pl.when(c == 0)
    def _():
        @pl.when(step == 0)
        def _():
            panels(0, 0, lambda copy: copy.start())

        panels(step, slot, lambda copy: copy.wait())

        @pl.when(step + 1 < steps)
        def _():
            panels(step + 1, 1 - slot, lambda copy: copy.start())

        if last_rows < panel:

            @pl.when(i == tiles - 1)
            def _():  # rows that do not exist must not contribute, whatever the memory holds
                for buf in (x_buf, dy_buf):
                    shape = (panel - last_rows, buf.shape[2])
                    buf[slot, last_rows:panel, :] = jnp.zeros(shape, buf.dtype)

    ks = [pl.multiple_of(k_ref[base + g] * bk, bk) for g in range(group)]
    js = [pl.multiple_of(j_ref[base + g] * bn, bn) for g in range(group)]
    for g in range(group):
        product = lax.dot_general(
            x_buf[slot, :, pl.ds(ks[g], bk)],
            dy_buf[slot, :, pl.ds(js[g], bn)],
            (((0,), (0,)), ((), ())),
            precision=precision,
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

        @pl.when(c == chunks - 1)
        def _():
            out_copy(base, out_slot).wait()
            if chunks > 1:
                out_copy(base, 1 - out_slot).wait()
