"""Block-sparse products as Pallas Triton kernels: `x w`, `dy w^T`, and the gradient of stored blocks.

* A program computes a tile of y: some rows under one block column. It walks the list of that column;
  block by block, the tile of x and the block of w come to shared memory, a few stages ahead of the
  tensor cores. So time follows the stored blocks, and nothing is padded.
* A column of a few times as many blocks as the mean is split: parts of its list go to programs of their
  own, which leave float32 sums that a second kernel adds up in order. How many parts there may be is
  static; which there are is a small table that is made before the kernel from the pattern. With few
  rows of x all lists are split, to fill the device.
* Programs that run at the same time share rows of x and columns of w, which stay in the L2 cache.
* The gradient of stored blocks: a program for each block (or part of 128 x 128), which walks the
  tokens. With few blocks the tokens are split and the sums added up in order.

Ragged edges are masked in the kernel, where the shape has some. No block of an output is written by
two programs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import _gpu
from pallas_kernels._gpu import Config, dot, in_32_bits, largest_tile, load, result
from pallas_kernels.block_sparse_matmul.format import BlockSparse

SMALLEST = 16  # side of a block
_GROUP = 8  # tiles of rows that run at the same time
_SPLIT = 4  # means beyond which a column is split
_WAVES = 2  # programs for each multiprocessor, at least, if there is work for them

# By the kind of numbers (`_gpu.kind`) and the columns of a tile; `tile` is rows of y, or of a block, and
# `depth` rows of a block, or tokens. "small": devices with less shared memory (L4, RTX).
PRODUCT: dict[str, dict[str, Config]] = {
    "h100": {
        "16 bits, 128": Config(128, 64, 8, 3),
        "16 bits, 64": Config(128, 64, 4, 4),
        "16 bits, 32": Config(128, 64, 4, 4),
        "16 bits, 16": Config(128, 64, 4, 4),
        "tf32, 128": Config(64, 32, 4, 3),
        "tf32, 64": Config(64, 32, 4, 3),
        "tf32, 32": Config(64, 32, 4, 3),
        "tf32, 16": Config(64, 32, 4, 3),
        "exact, 128": Config(64, 32, 4, 3),
        "exact, 64": Config(64, 32, 4, 3),
        "exact, 32": Config(64, 32, 4, 3),
        "exact, 16": Config(64, 32, 4, 3),
    },
    "a100": {
        "16 bits, 128": Config(128, 32, 4, 4),
        "16 bits, 64": Config(128, 32, 4, 4),
        "16 bits, 32": Config(128, 32, 4, 4),
        "16 bits, 16": Config(128, 32, 4, 4),
        "tf32, 128": Config(64, 32, 4, 3),
        "tf32, 64": Config(64, 32, 4, 3),
        "tf32, 32": Config(64, 32, 4, 3),
        "tf32, 16": Config(64, 32, 4, 3),
        "exact, 128": Config(32, 32, 4, 3),
        "exact, 64": Config(32, 32, 4, 3),
        "exact, 32": Config(32, 32, 4, 3),
        "exact, 16": Config(32, 32, 4, 3),
    },
}
GRADIENT: dict[str, dict[str, Config]] = {
    "h100": {
        "16 bits, 128": Config(128, 64, 8, 3),
        "16 bits, 64": Config(64, 64, 4, 4),
        "16 bits, 32": Config(32, 64, 4, 4),
        "16 bits, 16": Config(16, 64, 4, 4),
        "tf32, 128": Config(128, 32, 8, 3),
        "tf32, 64": Config(64, 32, 4, 3),
        "tf32, 32": Config(32, 32, 4, 3),
        "tf32, 16": Config(16, 32, 4, 3),
        "exact, 128": Config(64, 32, 4, 3),
        "exact, 64": Config(64, 32, 4, 3),
        "exact, 32": Config(32, 32, 4, 3),
        "exact, 16": Config(16, 32, 4, 3),
    },
    "a100": {
        "16 bits, 128": Config(128, 32, 8, 4),
        "16 bits, 64": Config(64, 32, 4, 4),
        "16 bits, 32": Config(32, 64, 4, 4),
        "16 bits, 16": Config(16, 64, 4, 4),
        "tf32, 128": Config(64, 32, 4, 3),
        "tf32, 64": Config(64, 32, 4, 3),
        "tf32, 32": Config(32, 32, 4, 3),
        "tf32, 16": Config(16, 32, 4, 3),
        "exact, 128": Config(32, 32, 4, 3),
        "exact, 64": Config(32, 32, 4, 3),
        "exact, 32": Config(32, 32, 4, 3),
        "exact, 16": Config(16, 32, 4, 3),
    },
}
for _table in (PRODUCT, GRADIENT):
    _table["small"] = _table["a100"]


def why_not(x: Array, w: BlockSparse, interpret: bool) -> str | None:
    """The reason why these kernels cannot multiply x by w, or None."""
    if (reason := _gpu.why_not(interpret)) is not None:
        return reason
    if w.values.dtype not in _gpu.DTYPES:
        return f"it takes float16, bfloat16 and float32, not {w.values.dtype}"
    if w.block_shape[0] % SMALLEST or w.block_shape[1] % SMALLEST:
        return f"it takes blocks of multiples of {SMALLEST}, not {w.block_shape}"
    if w.num_blocks < 1:
        return "it takes at least one stored block"
    if max(x.size, w.values.size) >= 1 << 31:
        return f"it takes up to 2^31 numbers, not {max(x.size, w.values.size)}"
    return None


def _config(
    kernel: str, table: _gpu.Table, dtype: Any, precision: lax.PrecisionLike, columns: int
) -> Config:
    return _gpu.config(kernel, f"{_gpu.kind(dtype, precision)}, {columns}", table)


# ---- x w and dy w^T -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product:
    """Everything static about one product."""

    shape: tuple[int, int]  # of the matrix as the product sees it
    rows: int
    block: tuple[int, int]
    tile: tuple[int, int]  # of y
    depth: int
    row_tiles: int
    columns: int  # block columns of y
    tasks: int
    most: int  # blocks of a task
    slots: int  # float32 tiles for the tasks of columns that are split
    transposed: bool

    @property
    def parts(self) -> int:
        """Tiles side by side in a block column."""
        return self.block[1] // self.tile[1]


def _plan(x: Array, w: BlockSparse, transposed: bool, how: Config) -> _Product:
    """How the product is cut: see the text at the top of the file."""
    grid, block, shape = w.grid, w.block_shape, w.shape
    if transposed:
        (gk, gj), (bk, bn), (k, j) = grid, block, shape
        grid, block, shape = (gj, gk), (bn, bk), (j, k)
    rows = x.shape[0]
    tile = min(how.tile, max(16, _gpu.power_of_2(rows))), largest_tile(block[1], 128)
    row_tiles = -(-rows // tile[0])
    mean = -(-w.num_blocks // grid[1])
    tiles_of_blocks = row_tiles * (block[1] // tile[1])
    fill = -(-w.num_blocks * tiles_of_blocks // (_WAVES * _gpu.chip().processors))
    enough = row_tiles * (block[1] // tile[1]) * grid[1] >= _WAVES * _gpu.chip().processors
    most = max(1, _SPLIT * mean if enough else min(_SPLIT * mean, fill))
    splits = most < min(grid[0], w.num_blocks)
    return _Product(
        shape=shape,
        rows=rows,
        block=block,
        tile=tile,
        depth=largest_tile(block[0], how.depth),
        row_tiles=row_tiles,
        columns=grid[1],
        tasks=grid[1] + (w.num_blocks // most if splits else 0),
        most=most,
        slots=2 * w.num_blocks // most if splits else 0,
        transposed=transposed,
    )


def _lists(w: BlockSparse, p: _Product) -> tuple[Array, Array, Array | None]:
    """What the programs are told, made from the pattern.

    Returns:
      For every place in the lists the block of rows and the stored block, int32 `[2, num_blocks]`.
      The tasks, int32 `[tasks, 4]`: column, first place, last place, slot; a column of -1 is no task
      and a slot of -1 no slot. Where columns may be split, the first slot of each and how many parts
      it has (0: it is not split), int32 `[columns, 2]`.
    """
    rows, cols, used = w.block_rows, w.block_cols, w.used
    order = w.order if p.transposed else w.column_order
    if p.transposed:
        rows, cols = cols, rows
    if p.transposed or w.places.shape[0] == 4:  # else they are stored in this order
        rows, cols, used = rows[order], cols[order], used[order]
    cols = jnp.where(used, cols, p.columns)
    of = jnp.arange(p.columns + 1, dtype=jnp.int32)
    starts = jnp.sum(cols[None, :] < of[:, None], 1, dtype=jnp.int32)
    entries = jnp.stack([jnp.where(used, rows, 0), order])
    if not p.slots:
        none = jnp.full((p.columns,), -1, jnp.int32)
        return entries, jnp.stack([of[:-1], starts[:-1], starts[1:], none], 1), None
    parts = jnp.maximum(1, (starts[1:] - starts[:-1] + p.most - 1) // p.most)
    first = jnp.cumsum(jnp.pad(parts, (1, 0)), dtype=jnp.int32)
    several = jnp.where(parts > 1, parts, 0)
    slots = jnp.cumsum(several, dtype=jnp.int32) - several
    task = jnp.arange(p.tasks, dtype=jnp.int32)
    column = jnp.sum(first[None, 1:] <= task[:, None], 1, dtype=jnp.int32)
    inside, at = column < p.columns, jnp.minimum(column, p.columns - 1)
    part = task - first[at]
    begin = jnp.where(inside, starts[at] + part * p.most, 0)
    end = jnp.where(inside, jnp.minimum(begin + p.most, starts[at + 1]), 0)
    slot = jnp.where(inside & (parts[at] > 1), slots[at] + part, -1)
    tasks = jnp.stack([jnp.where(inside, column, -1), begin, end, slot], 1)
    return entries, tasks, jnp.stack([slots, several], 1)


def _divide(a: Array, b: int | Array) -> tuple[Array, Array]:
    """Quotient and remainder of numbers that are not negative."""
    b = jnp.asarray(b, jnp.int32)
    return lax.div(a, b), lax.rem(a, b)


def _tile_of(program: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Row and column of a program: `_GROUP` rows of tiles at a time, so that the L2 cache serves both."""
    group, rest = _divide(program, _GROUP * columns)
    column, row = _divide(rest, jnp.minimum(rows - group * _GROUP, _GROUP))
    return group * _GROUP + row, column


def _below(start: Array, size: int, limit: int, axis: int, ragged: bool) -> Array | None:
    """Which of `size` positions are inside, as a row or column; None where all are."""
    if not ragged:
        return None
    at = start + lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)
    return at < limit


def _all(shape: tuple[int, int], *masks: Array | None) -> Array | None:
    """All of the masks that there are, in this shape."""
    known = [jnp.broadcast_to(m, shape) for m in masks if m is not None]
    return functools.reduce(jnp.logical_and, known) if known else None


def _product_kernel(p: _Product, multiply, tasks, entries, x, values, y, sums=None):
    (bk, bn), (tm, tn), depth = p.block, p.tile, p.depth
    i, program = _tile_of(pl.program_id(0), p.row_tiles, p.tasks * p.parts)
    task, part = _divide(program, p.parts)
    j, begin, end, slot = (tasks[task, n] for n in range(4))
    rows = _below(i * tm, tm, p.rows, 0, p.rows % tm != 0)
    ragged = p.shape[0] % bk != 0

    def step(at, total):
        place, within = _divide(at, bk // depth)
        k = entries[0, place] * bk + within * depth
        inside = _below(k, depth, p.shape[0], 1, ragged)
        mask = _all((tm, depth), rows, inside)
        a = load(x.at[pl.ds(i * tm, tm), pl.ds(k, depth)], mask)
        of_k, of_j = pl.ds(within * depth, depth), pl.ds(part * tn, tn)
        # What sticks out of the matrix may be anything, and 0 * NaN is NaN.
        if p.transposed:
            mask = _all((tn, depth), inside)
            b = load(values.at[entries[1, place], of_j, of_k], mask).T
        else:
            mask = _all((depth, tn), _below(k, depth, p.shape[0], 0, ragged))
            b = load(values.at[entries[1, place], of_k, of_j], mask)
        return total + multiply(a, b)

    steps = bk // depth
    total = lax.fori_loop(begin * steps, end * steps, step, jnp.zeros((tm, tn), jnp.float32))
    start = j * bn + part * tn
    columns = _below(start, tn, p.shape[1], 1, p.shape[1] % bn != 0)
    whole = None if sums is None else (j >= 0) & (slot < 0)
    mask = _all((tm, tn), rows, columns, whole)
    _gpu.store(y.at[pl.ds(i * tm, tm), pl.ds(start, tn)], total.astype(y.dtype), mask)
    if sums is not None:
        at = jnp.maximum(slot, 0) * p.parts + part
        _gpu.store(sums.at[at, pl.ds(i * tm, tm), :], total, _all((tm, tn), slot >= 0))


def _sum_kernel(p: _Product, splits, sums, _, y):
    """Adds up the parts of a column that was split; other columns stay as they are."""
    (tm, tn), bn = p.tile, p.block[1]
    i, (j, part) = pl.program_id(1), _divide(pl.program_id(0), p.parts)
    first, count = splits[j, 0], splits[j, 1]

    def step(at, total):
        return total + load(sums.at[(first + at) * p.parts + part, pl.ds(i * tm, tm), :])

    total = lax.fori_loop(0, count, step, jnp.zeros((tm, tn), jnp.float32))
    start = j * bn + part * tn
    rows = _below(i * tm, tm, p.rows, 0, p.rows % tm != 0)
    columns = _below(start, tn, p.shape[1], 1, p.shape[1] % bn != 0)
    mask = _all((tm, tn), rows, columns, count > 0)
    _gpu.store(y.at[pl.ds(i * tm, tm), pl.ds(start, tn)], total.astype(y.dtype), mask)


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
    """`x @ w`, or `x @ w.T` if `transposed`, for `x [rows, in]` of the dtype of w.

    float32 is multiplied as tf32, as XLA does on GPUs; with `precision="highest"` to float32's own
    precision, in three products.
    """
    how = _config(
        "product",
        PRODUCT,
        x.dtype,
        precision,
        largest_tile(w.block_shape[0 if transposed else 1], 128),
    )
    p = _plan(x, w, transposed, how)
    entries, tasks, splits = _lists(w, p)
    y = result((p.rows, p.shape[1]), out_dtype or x.dtype, x)
    sums = result((p.slots * p.parts, p.row_tiles * p.tile[0], p.tile[1]), jnp.float32, x)
    name = "block_sparse_matmul_t" if transposed else "block_sparse_matmul"
    out = _gpu.call(
        functools.partial(_product_kernel, p, dot(precision, interpret)),
        name,
        (p.row_tiles * p.tasks * p.parts,),
        (y,) if splits is None else (y, sums),
        how,
        interpret,
        tasks,
        entries,
        x,
        w.values,
        cost=pl.CostEstimate(
            flops=2 * p.rows * w.values.size,
            transcendentals=0,
            bytes_accessed=(x.size + w.values.size) * x.dtype.itemsize
            + p.rows * p.shape[1] * y.dtype.itemsize,
        ),
    )
    if splits is None:
        return out[0]
    return _gpu.call(
        functools.partial(_sum_kernel, p),
        f"{name}_sum",
        (p.columns * p.parts, p.row_tiles),
        y,
        Config(0, 0, 8, 1),
        interpret,
        splits,
        out[1],
        out[0],
        aliases={2: 0},
    )


# ---- the gradient of stored blocks --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """Everything static about one gradient."""

    shape: tuple[int, int]
    rows: int
    block: tuple[int, int]
    tile: tuple[int, int]
    depth: int
    steps: int  # of a program, through its tokens

    @property
    def parts(self) -> tuple[int, int]:
        """Tiles of a block."""
        return self.block[0] // self.tile[0], self.block[1] // self.tile[1]


def _gradient_kernel(p: _Gradient, multiply, places, x, dy, out):
    (bk, bn), (tk, tn), depth = p.block, p.tile, p.depth
    block, part = _divide(pl.program_id(0), p.parts[0] * p.parts[1])
    of_k, of_j = _divide(part, p.parts[1])
    k, j, used = (places[n, block] for n in range(3))
    k, j = k * bk + of_k * tk, j * bn + of_j * tn
    inside = _below(k, tk, p.shape[0], 1, p.shape[0] % bk != 0)
    columns = _below(j, tn, p.shape[1], 1, p.shape[1] % bn != 0)
    begin = pl.program_id(1) * p.steps

    def step(at, total):
        token = pl.ds(at * depth, depth)
        rows = _below(at * depth, depth, p.rows, 0, p.rows % (p.steps * depth) != 0)
        a = load(x.at[token, pl.ds(k, tk)], _all((depth, tk), rows, inside))
        b = load(dy.at[token, pl.ds(j, tn)], _all((depth, tn), rows, columns))
        return total + multiply(a.T, b)

    # For an unused block there is nothing to do.
    end = begin + used * p.steps
    total = lax.fori_loop(begin, end, step, jnp.zeros((tk, tn), jnp.float32))
    index = pl.ds(of_k * tk, tk), pl.ds(of_j * tn, tn)
    _gpu.store(out.at[pl.program_id(1), block, *index], total.astype(out.dtype))


@in_32_bits
def weight_gradient(
    x: Array,
    dy: Array,
    w: BlockSparse,
    *,
    precision: lax.PrecisionLike = None,
    interpret: bool = False,
) -> Array:
    """The stored blocks of `x^T dy`, `[num_blocks, bh, bw]` in the dtype of w; unused ones are 0."""
    columns = largest_tile(w.block_shape[1], 128)
    how = _config("gradient", GRADIENT, x.dtype, precision, columns)
    tile = largest_tile(w.block_shape[0], how.tile), columns
    depth = min(how.depth, max(16, _gpu.power_of_2(x.shape[0])))
    steps = -(-x.shape[0] // depth)
    programs = w.values.size // (tile[0] * tile[1])
    parts = max(1, min(steps, _WAVES * _gpu.chip().processors // programs))
    p = _Gradient(w.shape, x.shape[0], w.block_shape, tile, depth, -(-steps // parts))
    parts = -(-steps // p.steps)
    out = _gpu.call(
        functools.partial(_gradient_kernel, p, dot(precision, interpret)),
        "block_sparse_weight_gradient",
        (programs, parts),
        result((parts, *w.values.shape), w.dtype if parts == 1 else jnp.float32, x),
        how,
        interpret,
        jnp.stack(
            [
                jnp.where(w.used, w.block_rows, 0),
                jnp.where(w.used, w.block_cols, 0),
                w.used.astype(jnp.int32),
            ]
        ),
        x,
        dy,
        cost=pl.CostEstimate(
            flops=2 * p.rows * w.values.size,
            transcendentals=0,
            bytes_accessed=(x.size + dy.size + w.values.size) * x.dtype.itemsize,
        ),
    )
    return out[0] if parts == 1 else jnp.sum(out, 0).astype(w.dtype)
