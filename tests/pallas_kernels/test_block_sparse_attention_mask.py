"""BlockMask: lists, patterns, composition, capacity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BlockMask, Grid
from pallas_kernels.block_sparse_attention.lists import SEGMENTS
from pallas_kernels.block_sparse_attention.mask import within_segments

SHAPE = Grid(q_len=44, kv_len=37, block_q=8, block_kv=16)
Q, K = np.arange(44)[:, None], np.arange(37)


def lists(starts, entries):
    """The rows of indices that compact lists hold."""
    return [list(entries[a:b] >> 7) for a, b in zip(starts[:-1], starts[1:])]


@settings(max_examples=10)
@given(
    st.integers(0, 2**16),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 4, 7]),
    st.sampled_from([1, 6]),
)
def test_lists_hold_the_kept_blocks_by_row_and_by_column(seed, density, nq, nk):
    keep = np.random.default_rng(seed).random((2, nq, nk)) < density
    build = functools.partial(BlockMask.from_dense, grid=(4, 4))
    for mask in (build(keep), jax.jit(build)(keep)):
        for h in range(2):
            rows = lists(np.asarray(mask.row_starts[0, h]), np.asarray(mask.row_entries[0, h]))
            cols = lists(np.asarray(mask.col_starts[0, h]), np.asarray(mask.col_entries[0, h]))
            assert rows == [list(np.flatnonzero(r)) for r in keep[h]]
            assert cols == [list(np.flatnonzero(c)) for c in keep[h].T]
        np.testing.assert_array_equal(mask.counts[0], keep.sum((1, 2)))
        np.testing.assert_allclose(mask.density[0], keep.mean((1, 2)), rtol=1e-6)


PATTERNS = {
    "causal": (lambda grid: BlockMask.causal(grid), Q >= K),
    "aligned ends": (lambda grid: BlockMask.causal(grid, offset=-7), Q - 7 >= K),
    "window": (lambda grid: BlockMask.local(grid, window=9), (Q >= K) & (Q - K < 9)),
    "two sides": (lambda grid: BlockMask.local(grid, window=(9, 4)), (Q - K <= 9) & (K - Q <= 4)),
    "strided": (lambda grid: BlockMask.strided(grid, stride=6), (Q - K) % 6 == 0),
    "power of two": (lambda grid: BlockMask.strided(grid, stride=32), (Q - K) % 32 == 0),
    "sinks": (lambda grid: BlockMask.sinks(grid, num_keys=5), (K < 5) & (Q >= 0)),
    "prefix": (lambda grid: BlockMask.prefix(grid, length=20), (K < 20) | (Q >= K)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_show_their_formula_and_drop_empty_blocks(name):
    build, want = PATTERNS[name]
    mask = build(SHAPE)
    np.testing.assert_array_equal(mask.to_dense()[0, 0], want)
    blocks = np.pad(want, ((0, 4), (0, 11))).reshape(6, 8, 3, 16).swapaxes(1, 2)
    if name != "prefix":  # a union may call a full block partial, so codes are not compared there
        full = (
            blocks
            | (np.arange(48) >= 37).reshape(3, 1, 16)
            | (np.arange(48) >= 44).reshape(6, 1, 8, 1)
        ).all((2, 3))
        np.testing.assert_array_equal(mask.codes[0, 0, :, :2] == 1, full[:, :2])
    np.testing.assert_array_equal(mask.codes[0, 0] != 0, blocks.any((2, 3)))
    assert mask.capacity == int(mask.counts[0, 0])


@given(st.sampled_from(sorted(PATTERNS)), st.sampled_from(sorted(PATTERNS)), st.integers(0, 99))
def test_composition_is_logical_on_the_visible_pairs(first, second, seed):
    keep = np.random.default_rng(seed).random((2, 6, 3)) < 0.5
    chosen = BlockMask.from_dense(keep, SHAPE)
    shown = np.kron(keep, np.ones((8, 16), bool))[:, :44, :37]
    (make_a, a), (make_b, b) = PATTERNS[first], PATTERNS[second]
    a_mask, b_mask = make_a(SHAPE), make_b(SHAPE)
    for mask, want in (
        (a_mask & b_mask, a & b),
        (a_mask | b_mask, a | b),
        ((chosen | a_mask) & b_mask, (shown | a) & b),
        ((chosen & a_mask) | b_mask, (shown & a) | b),
        ((chosen | a_mask) & (chosen | b_mask), (shown | a) & (shown | b)),
    ):
        np.testing.assert_array_equal(
            mask.to_dense()[0], np.broadcast_to(want, mask.to_dense()[0].shape)
        )


def test_bigbird_rows_have_window_global_and_random_blocks_per_head():
    mask = BlockMask.bigbird(Grid(16 * 12, block_q=16, block_kv=16), heads=3, seed=1)
    keep = np.asarray(mask.codes[0] != 0)
    assert keep[:, [0, -1]].all() and keep[:, :, [0, -1]].all()
    np.testing.assert_array_equal(keep[:, 2:-2].sum(-1), 5 + 3)
    assert all(keep[:, i, j].all() for i in range(1, 11) for j in (i - 1, i, i + 1))
    assert (keep[0] != keep[1]).any()
    same = BlockMask.bigbird(Grid(16 * 12, block_q=16, block_kv=16), heads=3, seed=1)
    np.testing.assert_array_equal(keep, same.codes[0] != 0)


@functools.partial(jax.jit, static_argnums=1)
def best_blocks(scores, k):
    return BlockMask.from_scores(scores, k, (8, 8))


@given(st.integers(0, 2**16), st.sampled_from([(0, 5), (3, 5), (6, 5), (70, 200)]))
def test_from_scores_keeps_exactly_the_best_and_breaks_ties_by_position(seed, k_of_n):
    k, n = k_of_n  # long rows are ranked in another way than short ones
    rng = np.random.default_rng(seed)
    scores = rng.choice([-np.inf, -2.0, -0.0, 0.0, 1.5, 3.0, np.nan, np.inf], (2, 4, n)).astype(
        "f4"
    )
    mask = best_blocks(scores, k)
    eligible = scores > -np.inf
    order = np.argsort(np.where(eligible, -scores, np.inf), -1, kind="stable")
    want = np.zeros_like(eligible)
    np.put_along_axis(want, order[..., :k], True, -1)
    np.testing.assert_array_equal(mask.codes[0] != 0, want & eligible)


def test_forced_blocks_count_inside_the_budget():
    scores = jnp.array([[5.0, 4.0, 3.0, 2.0]])
    mask = BlockMask.from_scores(scores, 2, forced=np.array([False, False, False, True]))
    np.testing.assert_array_equal(mask.codes[0, 0], [[1, 0, 0, 1]])


def test_a_number_of_blocks_per_row_may_be_traced():
    scores = jnp.tile(jnp.arange(4.0), (3, 1))
    mask = jax.jit(lambda n: BlockMask.from_scores(scores, n))(jnp.array([0, 2, 9]))
    np.testing.assert_array_equal((mask.codes != 0).sum(-1)[0, 0], [0, 2, 4])


def test_an_overflow_is_an_error_when_concrete_and_counted_when_traced():
    keep = np.ones((2, 3, 4), bool)
    keep[1, 1:] = False
    with pytest.raises(ValueError, match="capacity=10 is too small: 2 blocks .* at least 12"):
        BlockMask.from_dense(keep, capacity=10)
    mask = jax.jit(lambda x: BlockMask.from_dense(x, capacity=10))(keep)
    np.testing.assert_array_equal(mask.dropped[0], [2, 0])
    np.testing.assert_array_equal(mask.counts[0], [10, 4])
    assert int((mask.codes[0, 0, 2] != 0).sum()) == 2  # the last ones went
    assert int(mask.col_starts[0, 0, -1]) == 10  # in both lists


def test_a_window_of_a_mask_is_a_part_of_what_it_shows():
    grid = Grid(48, block_q=8, block_kv=16)
    keep = np.random.default_rng(0).random((2, 6, 3)) < 0.7
    mask = BlockMask.from_dense(keep, grid) & BlockMask.causal(grid)
    part = jax.jit(lambda i: mask.window(i, 2, 1, 2))(3)
    np.testing.assert_array_equal(part.to_dense(), mask.to_dense()[:, :, 24:40, 16:48])
    with pytest.raises(ValueError, match="compose first, then take windows"):
        part & part
    ragged = BlockMask.causal(SHAPE)
    assert (
        ragged.window(4, 2, 1, 2).grid.q_len == 12 and ragged.window(0, 1, 1, 2).grid.kv_len == 21
    )
    np.testing.assert_array_equal(
        ragged.window(4, 2, 1, 2).to_dense(), ragged.to_dense()[:, :, 32:, 16:]
    )
    with pytest.raises(ValueError, match="a traced start needs whole blocks"):
        jax.jit(lambda i: ragged.window(i, 1, 0, 1))(0)
    with pytest.raises(ValueError, match="2 blocks from 5 on leave"):
        ragged.window(5, 2, 0, 1)
    with pytest.raises(ValueError, match="num_q=7"):
        ragged.window(0, 7, 0, 1)


@given(st.integers(0, 2**16), st.booleans())
def test_segments_drop_blocks_that_cannot_meet_and_flag_those_that_may_differ(seed, is_sorted):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(-1, 3, (2, n)).astype("i4") for n in (44, 37)]
    if is_sorted:
        ids = [np.sort(x, -1) for x in ids]
    equal = ids[0][:, None, :, None] == ids[1][:, None, None, :]
    before = BlockMask.from_dense(rng.random((2, 6, 3)) < 0.7, SHAPE) & BlockMask.causal(SHAPE)
    after = jax.jit(within_segments)(before, *ids)
    shown = np.asarray(before.to_dense()) & equal
    np.testing.assert_array_equal(np.asarray(after.to_dense()) & equal, shown)
    codes = np.asarray(after.codes)

    padded = np.pad(equal, ((0, 0), (0, 0), (0, 4), (0, 11)), constant_values=True)
    all_equal = padded.reshape(2, 1, 6, 8, 3, 16).all((3, 5))
    unflagged = (codes != 0) & (codes < SEGMENTS)
    assert all_equal[unflagged.any(1, keepdims=True)].all()
    assert not (codes != 0)[np.broadcast_to(before.codes == 0, codes.shape)].any()
    np.testing.assert_array_equal(after.counts, (codes != 0).sum((2, 3)))


ERRORS = {
    "keep has dtype float32": lambda: BlockMask.from_dense(np.ones((2, 2), "f4")),
    "keep has 2 x 2 blocks": lambda: BlockMask.from_dense(np.ones((2, 2), bool), Grid(500)),
    r"causal\(q_len=64, block_q=16\): .* grid=Grid\(q_len, kv_len, block_q, block_kv\)": lambda: (
        BlockMask.causal(q_len=64, block_q=16)
    ),
    r"from_dense\(block_kv=16\): .* one argument, grid=Grid": lambda: BlockMask.from_dense(
        np.ones((2, 2), bool), block_kv=16
    ),
    "block_q=0": lambda: BlockMask.causal(Grid(8, block_q=0)),
    "q_len=0": lambda: BlockMask.causal(0),
    "capacity=0 must be": lambda: BlockMask.from_dense(np.zeros((2, 2), bool), capacity=0),
    "scores has dtype int32": lambda: BlockMask.from_scores(jnp.ones((2, 2), int), 1),
    "num_blocks=-1": lambda: BlockMask.from_scores(jnp.ones((2, 2)), -1),
    "indices lists a block twice": lambda: BlockMask.from_indices(np.array([[1, 1]]), 3),
    r"indices lie in \[0, 3\]": lambda: BlockMask.from_indices(np.array([[0, 3]]), 3),
    "indices has dtype float64": lambda: BlockMask.from_indices(np.ones((1, 1)), 3),
    "window=0": lambda: BlockMask.local(8, window=0),
    r"window=\(-1, 2\)": lambda: BlockMask.local(8, window=(-1, 2)),
    "stride=0": lambda: BlockMask.strided(8, stride=0),
    "num_keys=0": lambda: BlockMask.sinks(8, num_keys=0),
    "length=-1": lambda: BlockMask.prefix(8, length=-1),
    "num_window=2": lambda: BlockMask.bigbird(512, num_window=2),
    "with block_q=128 and block_q=64": lambda: (
        BlockMask.causal(128) & BlockMask.causal(Grid(128, block_q=64))
    ),
    "a mask of 8192 x 8192 blocks is too large": lambda: BlockMask.causal(
        Grid(8192, block_q=1, block_kv=1)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
