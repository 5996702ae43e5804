"""Every operation under `jax_enable_x64`, and with promotion of ranks and of dtypes refused.

Traced only: shapes, dtypes and promotions are decided there.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsparse.nn import (
    BlockSparseAttention,
    BlockSparseLinear,
    CondensedLinear,
    NMLinear,
    SLoPeLinear,
    TwoViewConv,
    TwoViewLinear,
    top_blocks,
)
from pallas_kernels import (
    BlockMask,
    BlockSparse,
    Condensed,
    Grid,
    NMSparse,
    block_sparse_attention,
    block_sparse_decode,
    block_sparse_matmul,
    condensed_matmul,
    merge_attention,
    nm_matmul,
)


@contextlib.contextmanager
def strict():
    """No promotion of ranks nor of dtypes."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict": strict,
}


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def product(multiply, build, rows=(2, 3), dtype=jnp.float32, **options):
    """Forward and gradients of x times a matrix of ones in some format."""

    def run():
        with jax.ensure_compile_time_eval():  # a pattern that is known
            w = build(jnp.ones((128, 128), dtype))
        f = lambda x, values: multiply(x, w.with_values(values), **options)
        y, pull = jax.vjp(f, ones(*rows, 128, dtype=dtype), w.values)
        return y, *pull(y)

    return run


def attention(length=20, block=8, **options):
    def run():
        grid = Grid(length, block_q=block, block_kv=block)
        n = -(-length // block)
        mask = BlockMask.from_scores(ones(2, n, n), 2, grid) | BlockMask.sinks(grid, num_keys=3)
        mask &= BlockMask.local(grid, window=9) | BlockMask.strided(grid, stride=3)
        ids = jnp.zeros((1, length), jnp.int32)
        f = lambda *x: block_sparse_attention(
            *x, mask, causal=True, segment_ids=ids, softcap=2.0, return_lse=True, **options
        )
        out, pull = jax.vjp(f, ones(1, 2, length, 8), *2 * [ones(1, 1, length, 8)])
        return merge_attention([out, out]), pull(out), mask.to_dense(), mask.density

    return run


def decode():
    mask = BlockMask.from_indices(np.array([[[2, 0]]]), 4, (1, 8))
    cache = ones(2, 1, 32, 8)
    return block_sparse_decode(ones(2, 2, 8), cache, cache, mask, jnp.array([3, 9]))


def patterns():
    return [
        BlockMask.causal(Grid(20, block_q=8, block_kv=8)).to_dense(),
        BlockMask.prefix(Grid(20, block_q=8, block_kv=8), length=5).window(0, 1, 1, 1).to_dense(),
        BlockMask.bigbird(Grid(64, block_q=8, block_kv=8), heads=2).counts,
        BlockMask.from_scores(ones(3, 200), 2, forced=np.arange(200) == 5).codes,
    ]


def formats():
    w = BlockSparse.random(jax.random.key(0), (7, 9), (2, 3), density=0.5, pad=True)
    w = w.with_pattern(jnp.ones((4, 3), bool) & (jnp.arange(12).reshape(4, 3) < w.num_blocks))
    again = BlockSparse.from_coordinates(w.values, w.block_rows, w.block_cols, w.shape, pad=True)
    eye = jnp.eye(8, dtype=jnp.float32)
    split = BlockSparse.from_dense(eye, (2, 2)).split(2)
    nm = NMSparse.from_mask(eye, eye > 0, 2, 4, share=1).split(2, "rows")
    return w.T.to_dense(), again.to_dense(), split.values, nm.values


def layer(make, *shape):
    def run():
        with jax.ensure_compile_time_eval():
            model = make()
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        f = lambda params, x: nnx.merge(graph, params, rest)(x)
        y, pull = jax.vjp(f, params, ones(*shape))
        return y, pull(y)

    return run


def cached_attention():
    choose = top_blocks(2, block_q=8, block_kv=8)
    model = BlockSparseAttention(
        16, num_heads=4, num_kv_heads=2, mask=choose, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    out, cache = model.prefill(ones(1, 20, 16), model.init_cache(1, 32, block_kv=8))
    return out, model.decode(ones(1, 1, 16), cache, num_blocks=2)


def dense(rows, cols):
    return nnx.Linear(rows, cols, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


bfloat16 = dict(dtype=jnp.bfloat16)
blocks = lambda size: lambda d: BlockSparse.from_dense(d, (size, size))
two_of_four = lambda share: lambda d: NMSparse.from_dense(d, 2, 4, share=share)
tall = lambda d: NMSparse.from_dense(jnp.tile(d, (4, 1)), 2, 4)
TRIES = {
    "block_sparse_matmul, xla": product(block_sparse_matmul, blocks(16), implementation="xla"),
    "block_sparse_matmul, tpu": product(
        block_sparse_matmul, blocks(128), implementation="tpu", interpret=True
    ),
    "block_sparse_matmul, gpu": product(
        block_sparse_matmul, blocks(16), implementation="gpu", interpret=True
    ),
    "block_sparse_matmul, bfloat16": product(block_sparse_matmul, blocks(16), **bfloat16),
    "nm_matmul, elements": product(nm_matmul, two_of_four(1)),
    "nm_matmul, shared": product(nm_matmul, two_of_four(32), **bfloat16),
    "nm_matmul, tpu": lambda: nm_matmul(
        ones(4, 512, **bfloat16),
        tall(ones(128, 128, **bfloat16)),
        implementation="tpu",
        interpret=True,
    ),
    "condensed_matmul": product(condensed_matmul, lambda d: Condensed.from_dense(d, fan_in=128)),
    "condensed_matmul, few": lambda: condensed_matmul(
        ones(9, 128), Condensed.from_mask(ones(128, 8), np.eye(128, 8) > 0)
    ),
    "attention, xla": attention(implementation="xla"),
    "attention, reference": attention(implementation="reference"),
    "attention, tpu": attention(200, 128, implementation="tpu", interpret=True),
    "attention, gpu": attention(40, 16, implementation="gpu", interpret=True),
    "decode": decode,
    "patterns": patterns,
    "formats": formats,
    "BlockSparseLinear": layer(
        lambda: BlockSparseLinear(32, 16, block_shape=(8, 8), density=0.5, rngs=nnx.Rngs(0)), 2, 32
    ),
    "NMLinear": layer(lambda: NMLinear(32, 16, n=2, m=4, rngs=nnx.Rngs(0)), 2, 5, 32),
    "CondensedLinear": layer(
        lambda: CondensedLinear.from_dense(dense(32, 16), np.eye(32, 16) > 0), 2, 32
    ),
    "TwoViewLinear": layer(lambda: TwoViewLinear(8, 4, rngs=nnx.Rngs(0)), 2, 3, 8),
    "TwoViewConv": layer(lambda: TwoViewConv(4, 8, (3, 3), rngs=nnx.Rngs(0)), 2, 5, 5, 4),
    "SLoPeLinear": layer(lambda: SLoPeLinear(8, 4, rank=2, rngs=nnx.Rngs(0)), 2, 8),
    "BlockSparseAttention": cached_attention,
}
# A pattern that is known is made, not traced.
KNOWN = {"patterns", "formats", "decode", "CondensedLinear", "condensed_matmul, few"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRIES)
def test_it_runs_in_strict_modes(name, mode):
    run = TRIES[name] if name in KNOWN else lambda: jax.eval_shape(TRIES[name])
    with MODES[mode]():
        out = run()
    wide = [x for x in jax.tree.leaves(out) if x.dtype in (jnp.float64, jnp.complex128)]
    assert not wide, wide
