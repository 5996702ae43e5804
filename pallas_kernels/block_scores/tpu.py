"""Block scores as a Pallas TPU kernel.

The grid walks tiles of the gradient matrix and, innermost, panels of tokens. A tile is summed over the
tokens in VMEM; with the last panel its blocks are summed to one number each, and these numbers are all
that leaves for HBM: for each tile one register `[8, 128]`, of which the corner is used.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import target_platform
from pallas_kernels._formats import Array
from pallas_kernels._tpu import LANES, chip, compiler_params, in_32_bits, result, round_up

# Most rows and columns of the gradient that are summed at a time, or those of a larger block. With tiles of 512
# a v6e waits for memory; the vector memory of a v4 holds no larger ones.
_TILE, _SMALL_TILE, _ROOM = 1024, 512, 64 << 20
_TOKENS = 2048  # long sums keep the matrix units fed: 512 cost a seventh more
_LARGEST = 1024  # side of a block


def why_not(x: Array, dy: Array, block_shape: tuple[int, int], interpret: bool) -> str | None:
    """The reason why this kernel cannot score these arguments, or None."""
    if target_platform() != "tpu" and not interpret:
        return f"it runs on TPU, not on {target_platform()} (interpret=True emulates it)"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {x.dtype}"
    if block_shape[0] % LANES or block_shape[1] % LANES or max(block_shape) > _LARGEST:
        return f"it takes blocks of multiples of {LANES} up to {_LARGEST}, not {tuple(block_shape)}"
    return None


@in_32_bits
def scores(
    x: Array,
    dy: Array,
    block_shape: tuple[int, int],
    *,
    precision: lax.PrecisionLike = None,
    interpret: bool = False,
) -> Array:
    """`[block rows, block columns]`, float32, for x and dy of one dtype."""
    (bh, bw), (rows, cols) = block_shape, (x.shape[1], dy.shape[1])
    gr, gc = -(-rows // bh), -(-cols // bw)
    tile = _TILE if chip().vmem >= _ROOM else _SMALL_TILE
    high, wide = _share(gr, tile // bh), _share(gc, tile // bw)
    tokens = min(_TOKENS, round_up(x.shape[0], 32 // x.dtype.itemsize))
    pad = lambda a, n: jnp.pad(a, ((0, -a.shape[0] % tokens), (0, -a.shape[1] % n)))
    x, dy = pad(x, high * bh), pad(dy, wide * bw)
    tiles = x.shape[1] // (high * bh), dy.shape[1] // (wide * bw)
    size = x.dtype.itemsize
    area = high * bh * wide * bw
    found = pl.pallas_call(
        functools.partial(_kernel, (bh, bw), (high, wide), precision),
        grid=(*tiles, x.shape[0] // tokens),
        in_specs=[
            pl.BlockSpec((tokens, high * bh), lambda i, j, t: (t, i)),
            pl.BlockSpec((tokens, wide * bw), lambda i, j, t: (t, j)),
        ],
        out_specs=pl.BlockSpec((1, 1, 8, LANES), lambda i, j, t: (i, j, 0, 0)),
        out_shape=result((*tiles, 8, LANES), jnp.dtype(jnp.float32), x),
        scratch_shapes=[pltpu.VMEM((high * bh, wide * bw), jnp.float32)],
        name="block_scores",
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * dy.shape[1],
            transcendentals=0,
            bytes_accessed=(tiles[1] * x.size + tiles[0] * dy.size) * size,
        ),
        compiler_params=compiler_params(
            ("parallel", "parallel", "arbitrary"),
            4 * area * 3 + 2 * tokens * (high * bh + wide * bw) * size + (8 << 20),
        ),
        interpret=interpret,
    )(x, dy)
    corner = found[:, :, :high, :wide].transpose(0, 2, 1, 3)
    return corner.reshape(tiles[0] * high, tiles[1] * wide)[:gr, :gc]


def _share(blocks: int, most: int) -> int:
    """How many of the blocks along an axis a tile has, `most` of them or 1: all alike, so that little is padded."""
    tiles = -(-blocks // max(1, most))
    return -(-blocks // tiles)


def _kernel(block, blocks, precision, x_ref, dy_ref, out_ref, sum_ref):
    (bh, bw), (high, wide), t = block, blocks, pl.program_id(2)
    product = lax.dot_general(
        x_ref[...],
        dy_ref[...],
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )

    @pl.when(t == 0)
    def _():
        sum_ref[...] = product

    @pl.when(t > 0)
    def _():
        sum_ref[...] += product

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        tile = jnp.zeros((8, LANES), jnp.float32)
        row, lane = (lax.broadcasted_iota(jnp.int32, tile.shape, a) for a in (0, 1))
        for r in range(high):
            columns = jnp.sum(jnp.abs(sum_ref[r * bh : (r + 1) * bh, :]), 0, keepdims=True)
            for c in range(wide):
                total = jnp.sum(columns[:, c * bw : (c + 1) * bw], 1, keepdims=True)
                tile = jnp.where((row == r) & (lane == c), total, tile)
        out_ref[0, 0] = tile
