"""Block predictors: the closed forms and goldens of each, and what all of them promise."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import best, block_mass, exact, kept, probabilities, tiles
from contracts import QUICK
from flax import nnx

from jaxsparse import attention
from jaxsparse.attention import Layout, State, mass, select
from jaxsparse.attention.minference import _any_between, _lines, line_scores, unit_scores
from jaxsparse.attention.quest import page_scores
from jaxsparse.attention.sparge import sparge_scores
from pallas_kernels import BlockMask, Grid, block_sparse_attention, block_sparse_decode

RNG = np.random.default_rng(1)
quick = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(autouse=True)
def the_same_numbers_whichever_tests_run():
    RNG.bit_generator.state = np.random.default_rng(10).bit_generator.state


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


HEADS, GROUPS, N, DIM, B = 4, 2, 64, 8, 8
Q, K, V = normal(2, HEADS, N, DIM, scale=2), normal(2, GROUPS, N, DIM), normal(2, GROUPS, N, DIM)
X = normal(2, N, 16)
LAYOUT = Layout(B, B)
BARE = Layout(B, B, sinks=0, local=0)
GATE = attention.SeerGate(HEADS, GROUPS, DIM, layout=LAYOUT, rngs=nnx.Rngs(0))
LOW = attention.LowRank(16, GROUPS, 3, rngs=nnx.Rngs(0))
STATES = {"seer": State(params=GATE, q=Q, k=K), "dsv": State(params=LOW, x=X)}


def make(name):
    layout = LAYOUT
    lines: dict[str, Any] = {"patterns": [attention.VerticalSlash(N, 1, sample=16)]}
    fill = lambda d: lines if d == 1 else {"density": d}
    every = {
        "oracle": lambda d: attention.oracle(density=d, layout=layout),
        "moba": lambda d: attention.moba(density=d, layout=layout),
        "sparge": lambda d: attention.sparge(density=d, layout=layout),
        "nsa": lambda d: attention.nsa(density=d, layout=layout),
        "seer": lambda d: attention.seer(density=d, layout=layout),
        "dsv": lambda d: attention.dsv(density=d, layout=layout),
        "mra": lambda d: attention.mra(density=d, layout=layout),
        "adaspa": lambda d: attention.adaspa(density=d, layout=layout),
        "minference": lambda d: attention.minference(**fill(d), layout=layout),
        "flexprefill": lambda d: attention.flexprefill(
            alpha=1.0 if d == 1 else 0.3, minimum=N if d == 1 else 8, sample=16, unit=B, layout=layout
        ),
        "streaming": lambda d: attention.streaming(sinks=4, window=N if d == 1 else 12, layout=layout),
    }  # fmt: skip
    return every[name]


NAMES = ["oracle", "moba", "sparge", "nsa", "seer", "dsv", "mra", "adaspa", "minference", "flexprefill", "streaming"]  # fmt: skip
DENSE = exact(Q, K, V)
traces = []


@functools.partial(quick, static_argnums=0)
def run(choose, q, k, state):
    traces.append(choose.name)
    return choose(q, k, None, state)


TRUE = block_mass(Q, K, B, B).reshape(2, GROUPS, 2, 8, 8).mean(2)
CAUSAL = np.tri(8, dtype=int)


DEFAULT = ("oracle", "moba", "sparge", "minference", "streaming")
CASES = [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


@pytest.mark.parametrize("name", CASES)
def test_a_full_budget_is_dense_attention_and_choices_change_without_a_new_trace(name):
    state = STATES.get(name, State())
    full = run(make(name)(1.0), Q, K, state)
    assert (kept(full) == CAUSAL).all() and not np.asarray(full.dropped).any()
    if name in ("oracle", "streaming"):  # one mask from blocks, and one of rules
        out = quick(block_sparse_attention)(Q, K, V, full)
        np.testing.assert_allclose(out, DENSE, atol=2e-5)

    del traces[:]
    half = make(name)(0.8 if name == "minference" else 0.5)
    mask = run(half, Q, K, state)
    other = {
        "seer": State(params=GATE, q=Q[:, ::-1], k=K[::-1]),
        "dsv": State(params=LOW, x=X[::-1]),
    }
    other = other.get(name, state)
    again = run(half, Q[:, ::-1], K[::-1].at[:, :, 24:32].mul(6.0), other)
    assert traces == [half.name]
    blocks = kept(mask)
    if name != "streaming":
        assert (blocks != kept(again)).any()
    got = np.asarray(attention.density(mask))
    assert got.shape[1] == (1 if name == "streaming" else GROUPS)
    # Patterns per query head are joined in a group.
    assert (got <= 0.5 + 1e-6).all() or name in ("flexprefill", "minference", "streaming")
    assert (got > 0.2).all() and not np.asarray(mask.dropped).any()
    seen = np.asarray(mask.to_dense())
    assert not (seen & ~np.tri(N, dtype=bool)).any() and seen[..., 0].all() and seen.any(-1).all()
    # No choice of as many blocks per row has more recall than the oracle's.
    if name in ("moba", "sparge", "nsa", "seer", "dsv", "adaspa"):
        top = kept(run(ORACLE, Q, K, State()))
        assert (TRUE * blocks).sum() <= (TRUE * top).sum() + 1e-6


ORACLE = make("oracle")(0.5)


def test_a_cost_is_less_than_dense_attention_at_length_and_grows_with_it():
    sizes = attention.Sizes(32768, 32768, 8, 8, 128)
    for name in NAMES:
        choose = make(name)(0.5)
        share = choose.cost(sizes) / attention.dense_cost(sizes)
        assert (share == 0) == (name == "streaming"), name
        assert share <= (1.0 if name in ("oracle", "adaspa") else 0.3), (name, share)


@pytest.mark.slow
def test_heads_choose_apart_where_the_layout_says_so():
    together, apart = (
        attention.moba(density=0.5, layout=Layout(B, B, share=s)) for s in (True, False)
    )
    assert kept(together(Q, K)).shape[1] == GROUPS and kept(apart(Q, K)).shape[1] == HEADS
    same = apart(jnp.repeat(Q[:, ::2], 2, 1), K)
    np.testing.assert_array_equal(kept(same)[:, ::2], kept(same)[:, 1::2])


def test_what_does_not_fit_a_capacity_is_counted():
    choose = attention.moba(density=0.5, layout=Layout(B, B, capacity=10))
    mask = quick(choose)(Q, K)
    assert np.asarray(mask.dropped).tolist() == [[8, 8]] * 2 and int(mask.counts.max()) == 10


# ------------------------------------------------------------------ oracle, static


def test_the_oracle_takes_the_blocks_of_most_probability():
    mask = attention.oracle(
        rule=select.top_k(3), layout=Layout(B, B, sinks=0, local=0, share=False)
    )(Q, K)
    p = np.where(np.tri(8, dtype=bool), block_mass(Q, K, B, B), -np.inf)
    for index in np.ndindex(2, HEADS, 8):
        want = best(p[index], min(3, index[-1] + 1), [False] * 8)
        assert np.flatnonzero(kept(mask)[index]).tolist() == want


def test_streaming_shows_sinks_and_a_window_to_the_token():
    for q_len in (N, 20):
        seen = attention.streaming(sinks=3, window=11, layout=LAYOUT)(
            Q[:, :, :q_len], K
        ).to_dense()[0, 0]
        q, k = np.arange(q_len)[:, None] + N - q_len, np.arange(N)
        np.testing.assert_array_equal(seen, (k <= q) & ((k < 3) | (q - k < 11)))
    seen = attention.streaming(sinks=3, window=5, layout=Layout(B, B, causal=False))(
        Q, K
    ).to_dense()
    q = np.arange(N)[:, None]
    np.testing.assert_array_equal(seen[0, 0], (np.arange(N) < 3) | (abs(q - np.arange(N)) < 5))


# ------------------------------------------------------------------ MoBA


def test_moba_with_single_queries_is_the_published_rule():
    layout = Layout(1, B, sinks=0, local=1, share=False)
    q, k = Q[:, :2], K
    mask = kept(run(attention.moba(rule=select.top_k(3), layout=layout), q, k, State()))
    means = np.asarray(k).reshape(2, GROUPS, 8, B, DIM).mean(3)
    gate = np.einsum("bhtd,bhcd->bhtc", np.asarray(q), means)
    for b, h, t in np.ndindex(2, 2, N):
        own = t // B
        row = np.where(np.arange(8) > own, -np.inf, gate[b, h, t])
        want = best(row, min(3, own + 1), np.arange(8) == own)
        assert np.flatnonzero(mask[b, h, t]).tolist() == want


# ------------------------------------------------------------------ SpargeAttn


def test_a_constant_in_all_keys_is_smoothed_away():
    q = Q + 1.0
    near, far = (sparge_scores(q, k, 0.2, BARE) for k in (K, K + 3.0))
    np.testing.assert_allclose(near[0], far[0], atol=1e-4)
    np.testing.assert_array_equal(near[1], far[1])


@pytest.mark.slow
def test_nothing_alike_is_dense_and_so_is_a_mass_above_one():
    for similarity, tau in ((2.0, 0.1), (-1.0, 1.001)):
        rule = select.top_p(tau, rule="stop_before")
        mask = run(attention.sparge(rule=rule, similarity=similarity, layout=BARE), Q, K, State())
        np.testing.assert_array_equal(kept(mask)[0, 0], np.tri(8))


def test_blocks_that_cannot_be_predicted_are_kept_whole():
    k = K.at[:, :, 16:24].set(jnp.where(jnp.arange(8)[:, None] % 2 == 0, 3.0, -3.0))
    k = k.at[:, :, :16].set(1.0 + 0.01 * K[:, :, :16])
    q = Q.at[:].set(1.0 + 0.01 * Q).at[:, :, 40:48].set(Q[:, :, 40:48])
    logits, extra = sparge_scores(q, k, 0.9, BARE)
    assert np.isneginf(np.asarray(logits)[..., 2]).all() and np.asarray(extra)[..., 2].all()
    assert np.asarray(extra)[:, :, 5].all() and not np.asarray(extra)[:, :, 7, :2].any()
    mask = kept(
        run(attention.sparge(rule=select.top_k(1), similarity=0.9, layout=BARE), q, k, State())
    )
    assert mask[:, :, 2:, 2].all() and mask[:, :, 5, :6].all()


@pytest.mark.slow
def test_with_clustered_keys_the_predicted_mass_is_the_true_one():
    k = jnp.repeat(normal(1, 1, 8, DIM), B, 2)
    q = jnp.repeat(normal(1, 1, 8, DIM), B, 2)
    layout = Layout(B, B, causal=False, sinks=0, local=0)
    logits, extra = sparge_scores(q, k, 0.6, layout)
    got = select.masses(logits, layout.visible(layout.grid(N, N)))
    np.testing.assert_allclose(got, block_mass(q, k, B, B, causal=False), atol=1e-5)
    assert not np.asarray(extra).any()
    tau = 0.9
    choose = attention.sparge(
        rule=select.top_p(tau, rule="stop_before"), similarity=0.6, layout=layout
    )
    mask = run(choose, q, k, State())
    p = block_mass(q, k, B, B, causal=False)
    dropped = np.where(kept(mask) == 1, 0, p).max(-1)
    assert ((p * kept(mask)).sum(-1) >= tau - dropped - 1e-6).all()


@pytest.mark.slow
def test_tuning_finds_the_sparsest_setting_below_the_error():
    layout = Layout(B, B, causal=False, sinks=0, local=0)
    peaky = jnp.repeat(normal(1, 2, 8, DIM, scale=2), B, 2)
    q = k = peaky
    v = normal(1, 2, N, DIM)
    options: dict[str, Any] = dict(similarities=(-1.0,), masses=(0.9,), layout=layout)
    (a, b), (c, d) = attention.tune_sparge([(q, k, v)], error=0.3, **options)
    strict = attention.tune_sparge([(q, k, v)], error=1e-9, **options)
    assert (a, c) == (-1.0, -1.0) and max(b, d) < 1
    assert strict == [(2.0, 1.0)] * 2


# ------------------------------------------------------------------ MInference, FlexPrefill


def test_line_scores_are_sums_over_columns_and_diagonals():
    a = np.asarray(mass.sample_scores(Q, K, 16, causal=True))
    np.testing.assert_allclose(a, probabilities(Q, K)[:, :, -16:], atol=1e-6)
    vertical, slash = line_scores(Q, K, 16)
    np.testing.assert_allclose(vertical, a.sum(2), atol=1e-5)
    want = np.zeros((2, HEADS, N))
    for i in range(16):
        for j in range(N - 16 + i + 1):
            want[:, :, N - 16 + i - j] += a[:, :, i, j]
    np.testing.assert_allclose(slash, want, atol=1e-5)


@pytest.mark.parametrize("unit", [1, 9, 16, 20, 100])
def test_scores_of_units_are_means_over_their_keys_and_distances(unit):
    q, k = (
        Q[:, :, :50],
        K[:, :, :61],
    )  # whose last unit is short, and whose rows begin inside of one
    a = probabilities(q, k)[:, :, -11:]
    want = np.zeros((2, 2, HEADS, -(-61 // unit)))
    for i in range(11):
        for j in range(61 - 11 + i + 1):
            want[0, :, :, j // unit] += a[:, :, i, j]
            want[1, :, :, (61 - 11 + i - j) // unit] += a[:, :, i, j]
    want /= np.bincount(np.arange(61) // unit)
    for got, x in zip(unit_scores(q, k, 11, unit), want):
        np.testing.assert_allclose(got, x, atol=1e-5)


def test_ranges_of_keys_meet_the_chosen_units_that_they_touch():
    rng = np.random.default_rng(0)
    low = rng.integers(-9, 33, (6, 7))
    high = low + rng.integers(-1, 9, (6, 7))
    chosen = rng.random((1, 2, 5)) < 0.4
    got = _any_between(jnp.asarray(chosen), low, high, 6, 27)
    by_key = np.repeat(chosen, 6, -1)[..., :27]
    for at in np.ndindex(got.shape):
        here = slice(max(low[at[2:]], 0), max(high[at[2:]] + 1, 0))
        assert got[at] == by_key[at[:2]][here].any()


@pytest.mark.slow
def test_line_scores_of_padded_sequences_are_those_of_each_alone():
    lengths = jnp.array([N, 41])
    vertical, slash = quick(lambda q, k, n: line_scores(q, k, 16, n))(Q, K, lengths)
    for b, n in enumerate((N, 41)):
        alone = line_scores(Q[b : b + 1, :, :n], K[b : b + 1, :, :n], 16)
        for got, want in zip((vertical, slash), alone):
            np.testing.assert_allclose(got[b, :, :n], want[0], atol=1e-5)
            np.testing.assert_allclose(got[b, :, n:], 0, atol=1e-6)
    short = line_scores(Q, K, 16, jnp.array([5, 0]))
    np.testing.assert_allclose(short[0].sum(-1), [[5] * HEADS, [0] * HEADS], atol=1e-5)


def test_planted_columns_and_diagonals_are_found_and_their_blocks_kept():
    a = np.full((1, 1, 16, N), 1e-3)
    columns, distances = [3, 21, 30], [0, 18]
    a[..., columns] = 1.0
    for i in range(16):
        for o in distances:
            a[..., i, N - 16 + i - o] = 1.0
    vertical = jnp.asarray(a.sum(2), jnp.float32)
    slash = np.zeros((1, 1, N), np.float32)
    for i in range(16):
        for j in range(N - 16 + i + 1):
            slash[..., N - 16 + i - j] += a[..., i, j]
    grid = BARE.grid(N, N)
    # The own distances of the window are more than those of the columns.
    got = _lines(vertical, jnp.asarray(slash), 3, 2, 0, 0, 1, BARE, grid)[0, 0]
    q, k = np.arange(N)[:, None], np.arange(N)
    pairs = (np.isin(k, columns) | np.isin(q - k, distances)) & (k <= q)
    np.testing.assert_array_equal(got, tiles(pairs, B, B, lambda t: t.any((-1, -2))) > 0)


@pytest.mark.slow
def test_every_head_has_the_pattern_that_it_was_given():
    patterns = [
        attention.AShape(1, 8),
        attention.VerticalSlash(2, 2, sample=16, first=1, near=1),
        attention.TopBlocks(0.25),
    ]
    layout = Layout(B, B, share=False)
    heads = jnp.array([2, 0, 1, 0])
    got = kept(
        run(attention.minference(patterns=patterns, heads=heads, layout=layout), Q, K, State())
    )
    for h, which in enumerate([2, 0, 1, 0]):
        alone = kept(
            attention.minference(patterns=patterns[which:], heads=[0] * 4, layout=layout)(Q, K)
        )
        np.testing.assert_array_equal(got[:, h], alone[:, h])


def test_candidates_stand_in_the_same_order_at_every_length():
    lines = (attention.VerticalSlash,) * 3
    for length in (64, 1024, 4096, 8192):  # 2, 3 and more units of keys a row
        found = attention.candidates(0.05, length, 32)
        assert tuple(map(type, found)) == (attention.AShape, *lines, attention.TopBlocks)
        share = [p.vertical / (p.vertical + p.slash) for p in found[1:4]]
        assert share == sorted(share)


@pytest.mark.slow
def test_the_search_finds_planted_patterns():
    n = 128
    t = jnp.arange(n)
    near = jnp.exp(-0.5 * ((t[:, None] - t) / 3.0) ** 2)  # a head that looks nearby
    q_local = near @ normal(n, 16)
    far = jnp.zeros((n, 16)).at[:, 0].set(12.0)  # a head that looks at columns
    k_far = normal(n, 16, scale=0.1).at[jnp.array([37, 70]), 0].set(12.0)
    q = jnp.stack([8 * q_local, far])[None]
    k = jnp.stack([q_local, k_far])[None]
    patterns = [attention.AShape(1, 16), attention.VerticalSlash(2, 1, sample=16, first=0, near=0)]
    found, recall = attention.search_patterns(q, k, patterns, Layout(B, B, share=False))
    assert found.tolist() == [0, 1] and recall.shape == (2, 2)
    assert float(recall[1, 1]) > 0.9


@pytest.mark.slow
def test_flexprefill_takes_as_many_lines_as_reach_the_mass():
    choose = attention.flexprefill(
        alpha=0.4, minimum=1, sample=16, layout=Layout(B, B, share=False)
    )
    wide = attention.flexprefill(alpha=0.9, minimum=1, sample=16, layout=Layout(B, B, share=False))
    few, many = kept(run(choose, Q, K, State())), kept(run(wide, Q, K, State()))
    assert (few <= many).all() and few.sum() < many.sum()


def test_vertical_slash_attention_sees_its_blocks_and_columns_and_nothing_else():
    pattern = attention.VerticalSlash(9, 3, sample=16, first=2, near=1)
    q, k, v = Q[:1, :, :60], K[:1, :, :60], V[:1, :, :60]
    run = lambda q, k, v: attention.vertical_slash_attention(q, k, v, pattern, layout=BARE)
    out, grads = quick(lambda *x: (run(*x), jax.grad(lambda *y: run(*y).sum(), (0, 1, 2))(*x)))(
        q, k, v
    )
    a = probabilities(q, k)[0, :, -16:]
    seen = np.zeros((1, HEADS, 60, 60), bool)
    i, j = np.arange(60)[:, None], np.arange(60)
    for h in range(HEADS):
        slash = [sum(a[h, r, 44 + r - o] for r in range(16) if o <= 44 + r) for o in range(60)]
        distances = [0, *sorted(range(1, 60), key=lambda o: -slash[o])[:2]]
        touched = tiles(np.isin(i - j, distances), B, B, lambda t: t.any((-1, -2))) > 0
        columns = [0, 1, *sorted(range(2, 60), key=lambda c: -a[h, :, c].sum())[:7]]
        blocks = np.kron(touched, np.ones((B, B)))[:60, :60] > 0
        seen[0, h] = (blocks | np.isin(j, columns)) & (j <= i)
    np.testing.assert_allclose(out, exact(q, k, v, seen), atol=2e-5)
    assert all(np.isfinite(g).all() for g in grads)


# ------------------------------------------------------------------ AdaSpa


def test_adaspa_reuses_its_choice_which_is_that_of_a_fresh_search():
    layout = Layout(B, B, causal=False, sinks=0, local=0, share=False)
    method = attention.AdaSpa(density=0.25, warm_up=2, searches=(2, 4), layout=layout)
    step = quick(method.attend)
    state = method.init(Q, K)
    dense = exact(Q, K, V, causal=False)
    for i in range(6):
        out, state = step(Q, K, V, state)
        if i in (0, 1, 2, 4):
            np.testing.assert_allclose(out, dense, atol=2e-5)
            continue
        p = block_mass(Q, K, B, B, causal=False)
        want = np.zeros_like(p, int)
        for index in np.ndindex(p.shape[:3]):
            want[(*index, best(p[index], 2, [False] * 8))] = 1
        np.testing.assert_array_equal(np.asarray(state.keep), want)
        seen = np.kron(want, np.ones((B, B)))
        np.testing.assert_allclose(out, exact(Q, K, V, seen, causal=False), atol=2e-5)


@pytest.mark.slow
def test_the_mean_of_heads_stays_when_they_adapt():
    layout = Layout(B, B, causal=False, sinks=0, local=0, share=False)
    even = attention.AdaSpa(density=0.5, layout=layout)
    bent = attention.AdaSpa(density=0.5, head_step=0.5, layout=layout)
    q = Q * jnp.array([0.1, 1.0, 3.0, 0.5]).reshape(1, 4, 1, 1)
    lse = jax.nn.logsumexp(jnp.einsum("bhqd,bhkd->bhqk", q, jnp.repeat(K, 2, 1)) / DIM**0.5, -1)
    a, b = quick(even.search)(q, K, lse), quick(bent.search)(q, K, lse)
    assert int(a.sum()) == int(b.sum())
    p = block_mass(q, K, B, B, causal=False)
    first = np.where(a, p, 0).sum(-1).mean(-1)
    size = np.asarray(b).sum((2, 3))
    for r, n in zip(first, size):
        assert set(n[np.argsort(r)[:2]]) == {48} and set(n[np.argsort(r)[2:]]) == {16}


# ------------------------------------------------------------------ MRA


@functools.partial(quick, static_argnums=(3, 4))
def two_levels(q, k, v, density, layout):
    return attention.mra_attention(q, k, v, density=density, layout=layout)


def mra_by_definition(q, k, v, fine, b):
    """Numerators and denominators, block by block."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, d = q.shape
    num, den = np.zeros((n, v.shape[1])), np.zeros(n)
    for i in range(0, n, b):
        for j in range(0, n, b):
            s = q[i : i + b] @ k[j : j + b].T / np.sqrt(d)
            w = np.exp(s)
            if not fine[i // b, j // b]:
                mu = q[i : i + b].mean(0) @ k[j : j + b].mean(0) / np.sqrt(d)
                w = np.full_like(s, np.exp(mu))
            num[i : i + b] += w @ v[j : j + b]
            den[i : i + b] += w.sum(1)
    return num / den[:, None]


def test_mra_is_its_definition():
    layout = Layout(B, B, causal=False, sinks=0, local=1, share=False)
    q, k, v = Q[:1, :1, :60], K[:1, :1, :60], V[:1, :1, :60]
    got = two_levels(q, k, v, 0.4, layout)
    fine = kept(run(attention.mra(density=0.4, layout=layout), q, k, State()))[0, 0]
    assert fine.sum() == 25 and np.diag(fine).all()
    np.testing.assert_allclose(
        got[0, 0], mra_by_definition(q[0, 0], k[0, 0], v[0, 0], fine, B), atol=1e-5
    )


@pytest.mark.slow
def test_mra_is_exact_with_all_blocks_fine_or_constant_blocks():
    layout = Layout(B, B, causal=False, sinks=0, local=0)
    full = two_levels(Q, K, V, 1.0, layout)
    np.testing.assert_allclose(full, exact(Q, K, V, causal=False), atol=2e-5)
    q, k = (jnp.repeat(x[:, :, ::B], B, 2) for x in (Q, K))
    coarse = two_levels(q, k, V, 0.02, layout)
    np.testing.assert_allclose(coarse, exact(q, k, V, causal=False), atol=2e-5)


@pytest.mark.slow
def test_causal_mra_reads_nothing_later():
    layout = Layout(B, B, sinks=0)
    out = two_levels(Q, K, V, 0.3, layout)
    later = two_levels(Q, K.at[:, :, 41:].add(9.0), V.at[:, :, 41:].set(1e3), 0.3, layout)
    same = kept(run(attention.mra(density=0.3, layout=layout), Q, K, State())) == kept(
        attention.mra(density=0.3, layout=layout)(Q, K.at[:, :, 41:].add(9.0))
    )
    rows = np.repeat(same.all(-1), B, 2)[:, :, :40].repeat(2, 1)
    assert rows.any()
    np.testing.assert_allclose(
        np.asarray(out)[:, :, :40][rows], np.asarray(later)[:, :, :40][rows], atol=1e-5
    )


# ------------------------------------------------------------------ Quest

PAGE = 4


def test_page_scores_bound_every_key_and_grow_page_by_page():
    lengths = jnp.array([N, 37])
    bounds = attention.pages(K, PAGE, lengths)
    u = np.asarray(page_scores(Q[:, :, 5], bounds))
    s = np.einsum("bhd,bhkd->bhk", Q[:, :, 5], np.repeat(K, 2, 1))
    s = np.where(np.arange(N) < np.asarray(lengths)[:, None, None], s, -np.inf)
    largest = s.reshape(2, HEADS, -1, PAGE).max(-1)
    assert (u >= largest - 1e-5).all()
    assert (u[1, :, 10:] == 0).all() and np.isfinite(u).all()  # nothing of an empty page
    sign = np.einsum("bhd,bhpd->bhp", np.abs(Q[0:1, :, 5]), (np.sign(Q[0:1, :, 5, None, None]) * np.repeat(K[:1], 2, 1).reshape(1, HEADS, -1, PAGE, DIM)).max(3))  # fmt: skip
    np.testing.assert_allclose(u[:1], sign, rtol=1e-4, atol=1e-5)
    grown = attention.pages(K, PAGE, jnp.array([N - 9, 20]))
    for i in range(9):
        at = jnp.array([N - 9, 20]) + i
        new = jnp.stack([K[b, :, int(at[b])][:, None] for b in range(2)])
        grown = attention.append_page(grown, new, at, PAGE)
    for x, y in zip(grown, attention.pages(K, PAGE, jnp.array([N, 29]))):
        np.testing.assert_array_equal(x, y)


def test_quest_finds_a_needle_and_a_full_budget_is_dense():
    lengths = jnp.array([N - 1, 40])
    choose = quick(
        lambda q, k, n: attention.quest(budget=3 * PAGE, page=PAGE)(q, k, state=State(lengths=n))
    )
    q = Q[:, :, :1]
    mask = kept(choose(q, K.at[:, :, 9].set(4 * q[:, ::2, 0] + 4 * q[:, 1::2, 0]), lengths))
    assert mask[:, :, 0, 2].all() and mask.sum() == 2 * GROUPS * 3
    assert mask[0, :, 0, 15].all() and mask[1, :, 0, 9].all() and not mask[1, :, 0, 10:].any()
    full = attention.quest(budget=N, page=PAGE)(q, K, state=State(lengths=lengths))
    out = block_sparse_decode(q[:, :, 0], K, V, full, lengths)
    for b, n in enumerate(lengths.tolist()):
        want = exact(q[b : b + 1], K[b : b + 1, :, :n], V[b : b + 1, :, :n], causal=False)
        np.testing.assert_allclose(out[b : b + 1], want[:, :, 0], atol=1e-5)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: attention.moba()(Q, K), "give one of them"),
        (lambda: attention.moba(rule=4), "rule=4 must be a rule, as attention.top_k"),
        (lambda: attention.moba(rule=attention.top_k(1.5)), "num_blocks=1.5 must be an integer"),
        (lambda: attention.moba(density=0.5, layout=64), "layout=64 must be a Layout"),
        (lambda: Layout(8.0, 8), "block_q=8.0 must be an integer"),
        (lambda: attention.quest(budget=48, page=16)(Q[:, :, :1], K, state=State(params=attention.pages(K, 8))), "bounds of 8 pages; a cache of 64 keys has 4"),
        (lambda: attention.moba(density=0.5)(Q[0], K), r"q has shape .* give \[batch, heads"),
        (lambda: attention.moba(density=0.5)(Q[:, :3], K), "q has 3 heads, which are no multiple of the 2 of k"),
        (lambda: attention.streaming(sinks=0), "sinks=0, window=1024: both must be at least 1"),
        (lambda: attention.minference(), "density=None, patterns=None: give one of them"),
        (lambda: attention.minference(density=0.5, layout=Layout(B, B, causal=False)), "causal=False: patterns are read"),
        (lambda: attention.flexprefill(alpha=0.0), "alpha=0.0"),
        (lambda: attention.quest(budget=32, page=16), "budget=32, page=16, sinks=0: give a budget of at least 3 pages"),
        (lambda: attention.quest(budget=18, page=6)(Q[:, :, :1], K), "room for 64 keys, no multiple of page=6"),
        (lambda: attention.seer(density=0.5)(Q, K), "seer needs a gate"),
        (lambda: attention.seer(density=0.5, gate=GATE)(Q, K), r"blocks \(64, 64\), the gate \(8, 8\)"),
        (lambda: attention.dsv(density=0.5)(Q, K), "dsv needs a predictor and the layer's input"),
        (lambda: attention.mra(density=0.3, layout=LAYOUT)(Q, K), "fewer than the 15 forced ones"),
        (lambda: attention.AdaSpa(warm_up=3, searches=(2,)), "a dense step must come first"),
        (lambda: attention.nsa(density=0.5, layout=Layout(B, B, causal=False))(Q, K), "causal=False: nsa"),
        (lambda: attention.minference(density=0.5, heads=[0, 1], layout=LAYOUT)(Q, K), r"heads has shape \(2,\); give a pattern for each of the 4"),
        (lambda: jax.jit(attention.minference(density=0.5, heads=[0, 1, 9, 2], layout=LAYOUT))(Q, K), r"heads=\[0, 1, 9, 2\] must lie in \[0, 5\)"),
        (lambda: attention.minference(patterns=[]), r"patterns=\[\] must be AShape, VerticalSlash or TopBlocks"),
        (lambda: attention.candidates(2.0, 64, 8), r"density=2.0 must lie in \(0, 1\]"),
        (lambda: attention.VerticalSlash(0, 1), "vertical=0 must be at least 1"),
        (lambda: attention.AShape(0, 0), "sinks=0, window=0 must not be negative, one of them"),
        (lambda: attention.TopBlocks(1.5), r"share=1.5 must lie in \(0, 1\]"),
        (lambda: GATE(Q[:, :2], K), "the gate is for 4 heads of queries and 2 of keys, of size 8"),
        (lambda: LOW(X[..., :8]), r"x has shape .* give \[batch, length, 16\]"),
        (lambda: attention.dsv(density=0.5, model=LOW, layout=LAYOUT)(Q, K, None, State(x=X[:, :9])), "the predictor has 2 heads and x 9 positions"),
        (lambda: attention.dsv(density=0.5, model=LOW, sparse_heads=[True] * 4, layout=LAYOUT)(Q, K, None, State(x=X)), r"sparse_heads has shape \(4,\) .* give booleans \[2\]"),
        (lambda: attention.by_scores("mine", lambda q, k, s: jnp.ones((2, 4, 8, 7)), select.density(0.5), LAYOUT, lambda s: 0.0)(Q, K), r"scores of mine have shape \(2, 4, 8, 7\); give \[batch, 4 or 2 heads, 8"),
        (lambda: attention.adaspa(density=0.5, layout=LAYOUT)(Q, K, None, State(params=attention.AdaSpa(layout=Layout(16, 16)).init(Q, K))), "the state has 4 by 4 blocks"),
        (lambda: attention.nsa_attention(Q, K, V, jnp.ones((2, HEADS, N, 3)), window_kv=(K[:, :1], V)), "window_kv has shapes"),
        (lambda: attention.tune_sparge([]), "must not be empty"),
        (lambda: attention.quest(budget=48, page=16)(Q[:, :, :1], K, state=State(lengths=jnp.array([65, 1]))), r"lengths=\[65, 1\] must lie in \[0, 64\]"),
        (lambda: attention.moba(density=0.5)(Q, K, None, cast(Any, X)), "state is a .*; give an attention.State"),
        (lambda: attention.mean_blocks(4, 8), "length=4, stride=8"),
        (lambda: attention.nsa_attention(Q, K, V, jnp.ones((2, HEADS, N, 2))), r"gates \(2, 4, 64, 2\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_of_other_sizes_do_not_compose():
    with pytest.raises(ValueError, match="block_q=8 and block_q=16 cannot be composed"):
        _ = attention.moba(density=0.5, layout=LAYOUT)(Q, K) & BlockMask.causal(Grid(N, N, 16, 8))


def test_short_sequences_are_dense_and_long_ones_chosen():
    choose = attention.dense_below(attention.moba(density=0.5, layout=LAYOUT), 40)
    assert (kept(run(choose, Q[:, :, :32], K[:, :, :32], State())) == np.tri(4)).all()
    assert kept(run(choose, Q, K, State())).sum() == 2 * GROUPS * 18
    sizes = attention.Sizes(32, 32, 4, 2, 8)
    assert choose.cost(sizes) == 0 < choose.cost(sizes._replace(q_len=64, kv_len=64))
    with pytest.raises(ValueError, match="kv_len=0 must be at least 1"):
        attention.dense_below(choose, 0)
