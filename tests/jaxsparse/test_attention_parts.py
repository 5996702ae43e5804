"""The shared parts of choices: pooling, rules, forced blocks, budgets, exact measures."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import best, block_mass, exact, probabilities, tiles
from hypothesis import given
from hypothesis import strategies as st

from jaxsparse.attention import Layout, budgets, measure, pool, select
from jaxsparse.attention import block_mass as mass_of
from pallas_kernels import BlockMask, Grid, block_sparse_attention

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_numbers_whichever_tests_run():
    RNG.bit_generator.state = np.random.default_rng(00).bit_generator.state


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# ------------------------------------------------------------------ pooling


def test_pools_divide_by_true_counts_and_know_lengths():
    x = normal(2, 1, 10, 3)
    lengths = jnp.array([10, 5])
    got = pool.mean(x, 4, lengths)
    want = [
        [x[0, 0, i : i + 4].mean(0) for i in (0, 4, 8)],
        [x[1, 0, :4].mean(0), x[1, 0, 4], [0] * 3],
    ]
    for b in range(2):
        np.testing.assert_allclose(got[b, 0], np.stack(want[b]), atol=1e-6)
    np.testing.assert_allclose(pool.maximum(x, 4, lengths)[1, 0, 1], x[1, 0, 4])
    assert (pool.minimum(x, 4, lengths)[1, 0, 2] == np.inf).all()
    assert (pool.maximum(x, 4, lengths)[1, 0, 2] == -np.inf).all()


def test_self_similarity_is_the_mean_cosine_of_all_pairs():
    x = np.asarray(normal(7, 5), np.float64)
    x[2] = 0
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / np.where(norm == 0, 1, norm)
    want = [(unit[i : i + 4] @ unit[i : i + 4].T).mean() for i in (0, 4)]
    np.testing.assert_allclose(pool.self_similarity(jnp.asarray(x), 4), want, atol=1e-6)


# ------------------------------------------------------------------ rules


def by_sorting(p, target, rule):
    """The two published rules, written with a sort; in units that add exactly."""
    order = np.sort(p)[::-1]
    total = np.cumsum(order)
    if total[-1] < target or (rule == "stop_before" and total[-1] <= target):
        return len(p)
    return int((total < target).sum()) + 1 if rule == "reach" else int((total <= target).sum())


@given(
    st.lists(st.integers(0, 16), min_size=1, max_size=9),
    st.integers(1, 80),
    st.sampled_from(["reach", "stop_before"]),
)
def test_mass_rules_are_those_of_a_sort(units, target, rule):
    p = np.zeros(9)
    p[: len(units)] = units
    got = int(count(jnp.asarray(p, jnp.float32) / 64, target / 64, rule))
    want = by_sorting(p, target, rule)
    # Entries without mass are neither here nor there.
    positive = int((p > 0).sum())
    assert min(got, positive) == min(want, positive)


count = jax.jit(select.mass_count, static_argnums=2)


def test_the_two_rules_are_told_apart_at_equality_and_between():
    row = jnp.array([0.5, 0.25, 0.125, 0.125])
    found = {
        rule: [int(select.mass_count(row, p, rule)) for p in (0.4, 0.5, 0.6, 0.875, 0.9)]
        for rule in ("reach", "stop_before")
    }
    # Half of the mass has 0.875: of the ties, one.
    assert found == {"reach": [1, 1, 2, 3, 4], "stop_before": [0, 1, 1, 3, 3]}


@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_a_rule_takes_forced_blocks_first_and_then_the_best(seed, number, ties):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (5, 6)).astype(np.float32) if ties else rng.normal(size=(5, 6))
    visible, forced = rng.random((5, 6)) < 0.8, rng.random((5, 6)) < 0.2
    forced = forced & visible & (np.cumsum(forced & visible, -1) <= number)
    got = select.keep(jnp.asarray(logits, jnp.float32), select.top_k(number), visible, forced)
    for i in range(5):
        row = np.where(visible[i], logits[i], -np.inf)
        full = forced[i].sum() == visible[i].sum()
        want = best(row, visible[i].sum() if full else number, forced[i])
        assert np.flatnonzero(got[i]).tolist() == want


def test_forced_blocks_count_inside_a_mass():
    logits = jnp.log(jnp.array([[0.125, 0.5, 0.25, 0.125]]))
    visible, forced = np.ones((1, 4), bool), np.array([[True, False, False, False]])
    keep = lambda rule: select.keep(logits, rule, visible, forced)[0].astype(int).tolist()
    assert keep(select.top_p(0.6)) == [1, 1, 0, 0]
    assert keep(select.top_p(0.7, rule="reach")) == [1, 1, 1, 0]
    assert keep(select.top_p(0.7, rule="stop_before")) == [1, 1, 0, 0]
    assert keep(select.top_p(0.1, rule="stop_before")) == [1, 0, 0, 0]
    assert keep(select.threshold(0.2)) == [1, 1, 1, 0]
    assert keep(select.top_p(1.1)) == [1, 1, 1, 1]


@given(st.integers(2, 30), st.floats(0.02, 1.0), st.integers(0, 2), st.integers(0, 2))
def test_a_density_is_met_from_below_and_nearly(n, value, sinks, local):
    layout, grid = Layout(4, 4, sinks=sinks, local=local), Grid(4 * n, 4 * n, 4, 4)
    visible, forced = layout.visible(grid), layout.forced(grid)
    rows = select.per_row(value, visible, forced)
    budget = value * visible.sum() + 1e-9
    if rows is None:
        assert forced.sum() > budget
        return
    assert (
        rows.sum() <= budget and (rows >= forced.sum(-1)).all() and (rows <= visible.sum(-1)).all()
    )
    assert rows.sum() + 1 > np.floor(budget)


def test_a_density_under_a_causal_mask_has_the_closed_form():
    visible = np.tri(200, dtype=bool)
    rows = select.per_row(0.3, visible, np.zeros_like(visible))
    assert rows is not None
    assert rows.max() == pytest.approx((1 - np.sqrt(1 - 0.3)) * 200, abs=1.5)
    # k blocks per row: the sparsity of the method card.
    rows = np.minimum(8, np.tri(64).sum(-1))
    assert 1 - rows.sum() / (64 * 65 / 2) == pytest.approx(0.767, abs=1e-3)


@pytest.mark.parametrize("causal, q_len, kv_len", [(True, 40, 40), (True, 12, 40), (False, 24, 40)])
def test_visible_and_forced_blocks_are_those_of_their_positions(causal, q_len, kv_len):
    layout = Layout(8, 4, causal=causal, sinks=1, local=2, last=1)
    grid = layout.grid(q_len, kv_len)
    shift = kv_len - q_len if causal else 0
    q, k = np.arange(q_len)[:, None] + shift, np.arange(kv_len)
    seen = (k <= q) if causal else np.ones((q_len, kv_len), bool)
    some = lambda pairs: tiles(pairs, 8, 4, lambda t: t.any((-1, -2))).astype(bool)
    np.testing.assert_array_equal(layout.visible(grid), some(seen))
    own = some(k // 4 == q // 4)
    near = own.copy()
    near[:, :-1] |= own[:, 1:]
    if not causal:
        near[:, 1:] |= own[:, :-1]
    near[:, 0] = True
    near[-1] = True
    np.testing.assert_array_equal(layout.forced(grid), near & some(seen))


# ------------------------------------------------------------------ budgets


def test_a_floor_under_a_ranking_of_all_heads():
    scores = np.asarray(normal(2, 4, 12))
    got = np.asarray(budgets.with_floor(jnp.asarray(scores), 20, 3))
    assert (got.sum((1, 2)) == 20).all() and (got.sum(-1) >= 3).all()
    for b in range(2):
        floor = np.zeros((4, 12), bool)
        for h in range(4):
            floor[h, np.argsort(-scores[b, h])[:3]] = True
        rest = np.where(floor, -np.inf, scores[b])
        floor.flat[np.argsort(-rest, axis=None)[:8]] = True
        np.testing.assert_array_equal(got[b], floor)
    with pytest.raises(ValueError, match="total=11 is below floor=3 for each of 4 heads"):
        budgets.with_floor(jnp.asarray(scores), 11, 3)


def test_layers_get_what_a_global_ranking_gives_them():
    scores = normal(4, 2, 50)
    assert budgets.by_counts(jnp.stack([scores[0]] * 4), 10, 40).tolist() == [10] * 4
    for most in (12, 40):
        lengths = budgets.by_counts(scores + jnp.array([2.0, 0, 0, 0]).reshape(4, 1, 1), 10, most)
        assert int(lengths.sum()) == 40 and int(lengths.min()) >= 0 and int(lengths.max()) <= most
        assert int(lengths[0]) == int(lengths.max()) > 10


def test_heads_of_low_recall_take_blocks_and_the_mean_stays():
    recall = jnp.asarray(RNG.random((3, 7)), jnp.float32)
    got = np.asarray(budgets.by_recall(recall, 10, 4))
    assert (got.sum(-1) == 70).all()
    assert (got[np.arange(3), np.asarray(recall).argmin(-1)] == 14).all()


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(1, 5))
def test_balanced_heads_are_all_there_and_no_worse_than_dealt(costs, devices):
    groups = budgets.balance(costs, devices)
    assert sorted(h for g in groups for h in g) == list(range(len(costs)))
    load = lambda gs: max(sum(costs[h] for h in g) for g in gs)
    assert load(groups) <= load([range(d, len(costs), devices) for d in range(devices)]) + 1e-9


# ------------------------------------------------------------------ measures

Q, K, V = normal(2, 4, 37, 8), 2 * normal(2, 2, 37, 8), normal(2, 2, 37, 5)


@pytest.mark.parametrize("causal", [True, False])
def test_block_mass_is_that_of_the_whole_matrix(causal):
    layout = Layout(8, 16, causal=causal)
    np.testing.assert_allclose(mass_of(Q, K, layout), block_mass(Q, K, 8, 16, causal), atol=1e-6)
    want = tiles(probabilities(Q, K, causal), 8, 16, lambda t: t.max((-1, -2)))
    np.testing.assert_allclose(mass_of(Q, K, layout, reduce="max"), want, atol=1e-6)


def test_with_the_true_lse_mass_is_conserved_and_one_that_drifted_is_clipped():
    layout = Layout(8, 8)
    full = BlockMask.causal(Grid(37, 37, 8, 8))
    _, lse = block_sparse_attention(Q, K, V, full, return_lse=True)
    got = mass_of(Q, K, layout, lse=lse)
    np.testing.assert_allclose(got, mass_of(Q, K, layout), atol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)
    assert float(mass_of(Q, K, layout, lse=lse - 50).max()) <= 8


def test_recall_is_the_kept_probability_and_bounds_the_error():
    keep = RNG.random((2, 4, 5, 5)) < 0.5
    keep |= np.eye(5, dtype=bool)
    grid = Grid(37, 37, 8, 8)
    mask = BlockMask.from_dense(jnp.asarray(keep), grid) & BlockMask.causal(grid)
    out, lse = block_sparse_attention(Q, K, V, mask, return_lse=True)
    got = measure.recall(Q, K, lse, samples=None)
    p, seen = probabilities(Q, K), np.asarray(mask.to_dense())
    np.testing.assert_allclose(got, (p * seen).sum(-1), atol=1e-5)
    error = np.linalg.norm(np.asarray(out) - exact(Q, K, V), axis=-1)
    bound = np.asarray(measure.error_bound(got, V))
    assert (error <= bound + 1e-5).all() and error.max() > 0.2 * bound.max()
    few = measure.recall(Q, K, lse, samples=5)
    np.testing.assert_allclose(few, got[:, :, measure.sampled_rows(37, 5)], atol=1e-6)
    assert measure.density(BlockMask.causal(grid)).tolist() == [[1.0]]
    want = (keep & np.tri(5, dtype=bool)).sum((2, 3)) / 15
    np.testing.assert_allclose(measure.density(mask), want, atol=1e-6)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: select.top_k(0), "num_blocks=0 must be an integer, at least 1"),
        (lambda: select.density(1.5), r"density=1.5 must lie in \(0, 1\]"),
        (lambda: select.top_p(0.0), "p=0.0 must be positive"),
        (lambda: select.top_p(0.5, rule=cast(Any, "nucleus")), "rule='nucleus' must be 'reach' or 'stop_before'"),
        (lambda: select.threshold(-1.0), "threshold=-1.0 must not be negative"),
        (lambda: select.rule_of(0.1, select.top_k(2)), "give one of them"),
        (lambda: select.rule_of(None, None), "give one of them"),
        (lambda: Layout(block_q=0), "block_q=0 must be an integer, at least 1"),
        (lambda: Layout(sinks=-1), "sinks=-1 must not be negative"),
        (lambda: Layout(capacity=0), "capacity=0 must be None or at least 1"),
        (lambda: Layout(4, 4).grid(9, 8), "q_len=9 is more than kv_len=8"),
        (lambda: Layout(4, 4, sinks=2).choose(jnp.zeros((8, 8)), select.top_k(2), Grid(32, 32, 4, 4)),
         "num_blocks=2 is below the 3 forced blocks of a row"),
        (lambda: Layout(4, 4).choose(jnp.zeros((8, 8)), select.density(0.2), Grid(32, 32, 4, 4)),
         "density=0.2 has no room for the forced blocks .* 15 of 36; give at least 0.417"),
        (lambda: budgets.by_counts(jnp.zeros((2, 1, 4)), 3, 2), r"base=3 must lie in \[1, most\]"),
        (lambda: measure.density(cast(Any, 0.1)), "mask=0.1 is no BlockMask"),
        (lambda: budgets.by_recall(jnp.zeros(2), 2, 2), r"step=2 must lie in \[0, base\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_means_of_16_bit_numbers_are_sums_in_32():
    x = jnp.ones((1, 2, 512, 4), jnp.bfloat16).at[:, :, ::2].set(1.0078125)
    assert pool.mean(x, 512).dtype == jnp.float32
    np.testing.assert_allclose(pool.mean(x, 512), 1.00390625, rtol=1e-6)
