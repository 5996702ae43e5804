"""Blocks that the running maximum makes negligible are skipped (SpargeAttn's second stage)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Grid, block_sparse_attention

quick = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)
CAUSAL = BlockMask.causal(Grid(40, 40, 8, 8))


@functools.partial(quick, static_argnames=("implementation", "below"))
def attend(q, k, v, mask, below, implementation, segments=None):
    return block_sparse_attention(
        q, k, v, mask, skip_below=below, scale=1.0, return_lse=True, segment_ids=segments,
        implementation=implementation,
    )  # fmt: skip


def walk(q, k, v, seen, below, block):
    """The definition, one head: blocks of a row in turn, each against the maxima so far. Also how many were skipped."""
    n, m = seen.shape
    out, lse, skipped = np.zeros((n, v.shape[-1])), np.full(n, -np.inf), 0
    for i in range(0, n, block):
        rows = slice(i, i + block)
        size = len(q[rows])
        top, total, acc = np.full(size, -np.inf), np.zeros(size), np.zeros((size, v.shape[-1]))
        for j in range(0, m, block):
            here = seen[rows, j : j + block]
            if not here.any():
                continue
            s = np.where(here, q[rows] @ k[j : j + block].T, -np.inf)
            look = here.any(1)  # the queries that see something of the block
            gain = np.max(np.where(np.isneginf(top), np.inf, s.max(1) - top)[look])
            if gain * np.log2(np.e) <= -below:
                skipped += 1
                continue
            new = np.maximum(top, s.max(1))
            safe = np.where(np.isneginf(new), 0.0, new)
            p = np.where(here, np.exp(s - safe[:, None]), 0.0)
            shrink = np.where(np.isneginf(top), 0.0, np.exp(top - safe))
            top, total = new, total * shrink + p.sum(1)
            acc = acc * shrink[:, None] + p @ v[j : j + block]
        some = total > 0
        out[rows][some] = (acc / np.where(some, total, 1)[:, None])[some]
        lse[rows] = np.where(some, top + np.log(np.where(some, total, 1)), -np.inf)
    return out, lse, skipped


def qkv(seed, spread, length=36):
    """Scores are positive, and some blocks of keys are small throughout."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(1, 2, length, 4)).astype(np.float32) for _ in range(3))
    size = np.repeat(np.float32([0.7, 1.0, 0.3, 0.6, 0.1]), 8)[:length, None]
    return spread * (1 + np.abs(q)), (1 + np.abs(k[:, :1])) * size, v[:, :1]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("below, some", [(0.0, True), (2.0, True), (6.0, True), (200.0, False)])
def test_it_is_its_definition_and_nothing_where_lambda_is_large(implementation, below, some):
    q, k, v = qkv(0, 3.0)
    grid = Grid(36, 36, 8, 8)  # the last row and column are short
    keep = np.random.default_rng(1).random((5, 5)) < 0.8
    mask = BlockMask.from_dense(keep, grid) & BlockMask.causal(grid)
    out, lse = attend(q, k, v, mask, below, implementation)
    seen = np.asarray(mask.to_dense())[0, 0]
    total = 0
    for h in range(2):
        want, logs, skipped = walk(q[0, h], k[0, 0], v[0, 0], seen, below, 8)
        np.testing.assert_allclose(out[0, h], want, atol=2e-5)
        np.testing.assert_allclose(lse[0, h], logs, atol=2e-5)
        total += skipped
    assert (total > 0) == some
    if not some:
        plain = attend(q, k, v, mask, None, implementation)
        np.testing.assert_allclose(out, plain[0], atol=1e-6)


def test_constant_scores_read_the_first_block_alone_at_lambda_0_and_all_above():
    q, k = jnp.zeros((1, 1, 40, 4)), jnp.ones((1, 1, 40, 4))
    v = jnp.arange(40.0)[None, None, :, None] * jnp.ones(4)
    whole = BlockMask.from_dense(np.ones((5, 5), bool), Grid(40, 40, 8, 8))
    first, lse = attend(q, k, v, whole, 0.0, "xla")
    np.testing.assert_allclose(first, 3.5)  # the mean of 0 to 7
    np.testing.assert_allclose(lse, np.log(8.0), rtol=1e-6)
    every, lse = attend(q, k, v, whole, 1e-3, "xla")
    np.testing.assert_allclose(every, 19.5, rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(40.0), rtol=1e-6)


@pytest.mark.parametrize("below, spread", [(1.0, 0.3), (4.0, 0.6), (8.0, 1.0)])
def test_what_is_skipped_weighs_no_more_than_the_bound(below, spread):
    q, k, v = qkv(3, spread, 40)
    out, lse = attend(q, k, v, CAUSAL, below, "xla")
    dense, whole = attend(q, k, v, CAUSAL, None, "xla")
    lost = 1 - np.exp(lse - whole)  # the share of the weights that was skipped
    bound = 5 * 8 * 2.0**-below
    assert lost.max() > 0 and (lost <= bound).all()
    largest = np.linalg.norm(v, axis=-1).max()
    assert (np.linalg.norm(out - dense, axis=-1) <= 2 * lost * largest + 1e-5).all()


def test_padding_and_other_documents_keep_no_block_alive():
    q, k, v = qkv(4, 3.0, 40)
    ids = jnp.where(jnp.arange(40) < 20, 0, 1)[None]
    seen = np.tri(40, dtype=bool) & (np.asarray(ids)[0][:, None] == np.asarray(ids)[0])
    for implementation in ("xla", "reference"):
        out, _ = attend(q, k, v, CAUSAL, 3.0, implementation, ids)
        want, _, skipped = walk(q[0, 0], k[0, 0], v[0, 0], seen, 3.0, 8)
        assert skipped > 0
        np.testing.assert_allclose(out[0, 0], want, atol=2e-5, err_msg=implementation)


def test_sequences_under_vmap_skip_their_own_blocks():
    many = [qkv(seed, 3.0, 40) for seed in (5, 6)]
    stacked = [jnp.stack(x) for x in zip(*many)]
    out, _ = jax.vmap(lambda *x: attend(*x, CAUSAL, 2.0, "xla"))(*stacked)
    for got, one in zip(out, many):
        np.testing.assert_allclose(got, attend(*one, CAUSAL, 2.0, "xla")[0], atol=1e-6)


def test_what_it_cannot_do_is_named():
    q, k, v = qkv(7, 1.0, 40)
    run = lambda q, **options: block_sparse_attention(q, k, v, CAUSAL, **options).sum()
    with pytest.raises(ValueError, match="skip_below=-1.0 must be None or at least 0"):
        run(q, skip_below=-1.0)
    with pytest.raises(ValueError, match="'tpu' does not support these arguments: skip_below"):
        run(q, skip_below=4.0, implementation="tpu", interpret=True)
    with pytest.raises(ValueError, match="skip_below=4.0 is for inference and has no gradient"):
        jax.grad(lambda q: run(q, skip_below=4.0, implementation="xla"))(q)
