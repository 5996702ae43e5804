"""Attention: what a query does not see reaches neither its output nor a gradient, NaN and inf included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockMask,
    Grid,
    block_sparse_attention,
    block_sparse_decode,
    merge_attention,
)
from pallas_kernels.block_sparse_attention import tpu, tpu_walk
from pallas_kernels.block_sparse_attention.inputs import Inputs

quick = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)
LENGTH, FILLED = 40, 21  # the rest is padding
CASES = {
    # mask and segment ids that hide the padding from the queries before it
    "causal": lambda n, block: (BlockMask.causal(Grid(n, block_q=block, block_kv=block)), None),
    "window": lambda n, block: (
        BlockMask.local(Grid(n, block_q=block, block_kv=block), window=(n // 4, 0)),
        None,
    ),
    "sinks or window": lambda n, block: (
        BlockMask.sinks(Grid(n, block_q=block, block_kv=block), num_keys=3)
        | BlockMask.local(Grid(n, block_q=block, block_kv=block), window=n // 4),
        None,
    ),
    "segments": lambda n, block: (
        BlockMask.from_dense(
            np.ones((-(-n // block),) * 2, bool), Grid(n, block_q=block, block_kv=block)
        ),
        (jnp.arange(n) >= FILLED * n // LENGTH).astype(jnp.int32)[None],
    ),
}


def problem(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (1, 2, length, 8), (1, 1, length, 8), (1, 1, length, 8)
    return [jnp.asarray(rng.normal(size=s).astype("f4")) for s in shapes]


def attend(q, k, v, mask, ids, implementation):
    interpret = implementation == "tpu"
    return block_sparse_attention(
        q,
        k,
        v,
        mask,
        segment_ids=ids,
        return_lse=True,
        implementation=implementation,
        interpret=interpret,
    )


@functools.partial(quick, static_argnames="implementation")
def outputs_and_gradients(q, k, v, mask, ids, rows, implementation):
    """Output and LSE, and the gradients of a loss that reads the first `rows` rows."""

    def loss(q, k, v):
        out, lse = attend(q, k, v, mask, ids, implementation)
        read = (jnp.arange(q.shape[2]) < rows)[None, None]
        of_out, of_lse = jnp.where(read[..., None], out, 0), jnp.where(read, lse, 0)
        return jnp.sum(jnp.sin(of_out)) + jnp.sum(jnp.cos(of_lse)), (out, lse)

    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, lse, *grads


def check(case, implementation, length, block, bad):
    mask, ids = CASES[case](length, block)
    rows = FILLED * length // LENGTH
    clean = problem(length)
    poisoned = [x.at[:, :, rows:].set(bad) for x in clean]
    run = functools.partial(outputs_and_gradients, implementation=implementation)
    want, got = (run(*x, mask, ids, rows) for x in (clean, poisoned))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        np.testing.assert_allclose(
            a[:, :, :rows], b[:, :, :rows], atol=1e-6, err_msg=f"{name} of {case}"
        )
    for name, a in zip(("dq", "dk", "dv"), got[2:]):
        np.testing.assert_array_equal(a[:, :, rows:], 0, err_msg=f"{name} of {case}")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_that_is_not_finite_changes_nothing_before_it(implementation, case, bad):
    check(case, implementation, LENGTH, 8, bad)


@pytest.fixture
def small_steps(monkeypatch):
    """Less unrolling, so that the interpreter's compilation is short; two blocks are a chunk."""
    for name in ("CHUNK", "BACKWARD_CHUNK"):
        monkeypatch.setattr(tpu_walk, name, 256)
    for name in ("STEP", "BACKWARD_STEP"):
        monkeypatch.setattr(tpu_walk, name, 128)


@pytest.mark.parametrize(
    "case", ["segments", *(pytest.param(c, marks=pytest.mark.slow) for c in list(CASES)[:3])]
)
def test_the_tpu_kernels_keep_padding_apart_too(small_steps, case):
    check(case, "tpu", 300, 128, np.nan)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
def test_blocks_that_are_not_kept_may_hold_anything(small_steps, implementation):
    block = 128 if implementation == "tpu" else 8
    # The first block is in no list; absent entries of a chunk must not stand for it.
    keep = np.array([[False, True, False], [False, True, True], [False, False, False]])
    mask = BlockMask.from_dense(keep, (block, block))
    q, k, v = problem(3 * block)
    bad = [x.at[:, :, :block].set(jnp.nan) for x in (k, v)]
    run = quick(functools.partial(attend, ids=None, implementation=implementation))
    for a, b in zip(run(q, *bad, mask), run(q, k, v, mask)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_absent_blocks_of_a_fetched_chunk_may_hold_anything(small_steps):
    # Row 0 fetches blocks 0 and 1 (NaN), row 1 has one block: what row 0 left must not reach it.
    keep = np.array([[True, True, False], [False, False, True]])
    mask = BlockMask.from_dense(keep, (128, 128))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1, n, 8)), jnp.float32) for n in (256, 384, 384))
    bad = [x.at[:, :, 128:256].set(jnp.nan) for x in (k, v)]

    @quick
    def run(q, k, v):
        inputs = Inputs(q, k, v, mask, None, 0.3, None)
        out, lse = tpu.forward(inputs, fetch=True, interpret=True)
        return out[:, :, 128:], lse[:, :, 128:]

    for a, b in zip(run(q, *bad), run(q, k, v)):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("which", [1, 2])
def test_what_a_query_sees_reaches_it(implementation, which):
    mask = BlockMask.causal(Grid(LENGTH, block_q=8, block_kv=8))
    args = problem(LENGTH)
    args[which] = args[which].at[0, 0, 12, 3].set(jnp.nan)
    out, lse, dq, *_ = outputs_and_gradients(*args, mask, None, LENGTH, implementation)
    for x in (out, lse[..., None], *([dq] if implementation == "xla" else [])):
        np.testing.assert_array_equal(np.isnan(x).any((0, 1, 3)), np.arange(LENGTH) >= 12)
    merged, total = merge_attention([(out, lse), (out, lse)])
    np.testing.assert_array_equal(np.isnan(merged), np.isnan(out))
    np.testing.assert_array_equal(np.isnan(total), np.isnan(lse))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_room_of_a_cache_that_is_not_filled_may_hold_anything(bad):
    q, cache = jnp.ones((1, 2, 8)), jax.random.normal(jax.random.key(0), (1, 2, 64, 8))
    filled = (jnp.arange(64) < 37)[:, None]
    mask = BlockMask.from_dense(jnp.ones((1, 4), bool), (1, 16))

    @quick
    def run(q, k, v):
        f = lambda *x: block_sparse_decode(*x, mask, jnp.array([37]))
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(jnp.ones_like(out))

    want = run(q, cache, cache)
    stained = jnp.where(filled, cache, bad)
    for got in (run(q, stained, cache), run(q, cache, stained), run(q, stained, stained)):
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("lengths", [np.array([3]), np.array(3), np.array([3.0, 4.0])])
def test_decode_wants_one_length_for_each_sequence(lengths):
    mask = BlockMask.from_dense(np.ones((1, 4), bool), (1, 16))
    cache = jnp.ones((2, 1, 64, 8))
    with pytest.raises(ValueError, match=r"lengths has shape .* it must be integer \[2\]"):
        block_sparse_decode(jnp.ones((2, 1, 8)), cache, cache, mask, jnp.asarray(lengths))
