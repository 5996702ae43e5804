"""Primitives of other fields, each held to its closed form, bound or brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import elsewhere
from jaxsparse import coding


@pytest.mark.parametrize("sizes", [{}, dict(b=0.5, low=-0.1, high=1.1)], ids=["scenes", "defaults"])
def test_gates_are_open_as_often_as_their_scores_say(sizes):
    score = jnp.array([0.05 / 0.95, 0.3 / 0.7, 1.0, 9.0, 99.0])  # the median is 1: p = d / (d + 1)
    p = np.asarray(score / (score + 1))
    logits = elsewhere.gate_logits(score, **sizes)
    np.testing.assert_allclose(elsewhere.open_probability(logits, **sizes)[:4], p[:4], rtol=1e-4)
    b, low, high = (sizes.get(k, d) for k, d in (("b", 0.3), ("low", -0.5), ("high", 1.01)))
    u = np.random.default_rng(0).uniform(1e-6, 1 - 1e-6, (200_000, 1))
    s = 1 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + np.asarray(logits)) / b))
    assert np.abs((s * (high - low) + low > 0).mean(0) - p)[:4].max() < 5e-3
    fixed = np.clip(np.asarray(jax.nn.sigmoid(logits / b)) * (high - low) + low, 0, 1)
    assert ((fixed == 0) == (p <= 0.5 + 1e-6)).all()


def test_a_budget_is_met_whatever_the_gates_start_from():
    weights = jnp.where(jnp.arange(200) < 20, 1.0, 0.01)
    loss = lambda p: (weights * (1 - p) ** 2).sum()
    for start in (0.0, 2.0):
        found = elsewhere.budgeted_gates(loss, jnp.full(200, start), 0.1)
        assert abs(float(found.multiplier * (found.gates.mean() - 0.1))) < 1e-3
        assert float(found.gates[:20].min()) > 0.95 and float(found.gates[20:].max()) < 0.01
    free = elsewhere.budgeted_gates(loss, jnp.zeros(200), 1.0, steps=500)
    assert float(free.multiplier) == 0


def test_bumps_that_are_narrow_or_wide_both_look_steady():
    t = jnp.linspace(0, 1, 50)
    found = [float(elsewhere.steadiness(t, 0.5, s)) for s in (1e-4, 1e-2, 0.1, 10.0)]
    np.testing.assert_allclose(found, [94.7, 59.4, 53.0, 91.0], atol=1.0)
    assert np.isfinite(found).all()


def test_points_move_with_open_anchors_only():
    rng = np.random.default_rng(0)
    points, anchors = rng.random((30, 2)), rng.random((5, 2))
    motion, gate = jnp.asarray(rng.normal(size=(5, 2))), jnp.array([1.0, 0, 1, 1, 0])
    move = lambda m, g: elsewhere.move_with_anchors(
        jnp.asarray(points), jnp.asarray(anchors), m, g, 0.2
    )
    still = move(motion.at[jnp.array([1, 4])].set(7.0), gate)
    np.testing.assert_array_equal(still, move(motion, gate))
    np.testing.assert_allclose(move(jnp.ones((5, 2)), jnp.ones(5)), 1.0, rtol=1e-5)


def test_noise_stays_where_the_slope_is_large_and_within_its_bound():
    slope = jax.random.normal(jax.random.key(0), (3, 4, 5))
    noise = elsewhere.local_noise(jnp.zeros((3, 4, 5)), slope, 0.25, 0.1, 1.0)
    assert ((noise != 0).sum((1, 2)) == 5).all() and float(jnp.abs(noise).max()) <= 0.1001
    for own, kept in zip(jnp.abs(slope), noise != 0):
        assert float(own[kept].min()) >= float(own[~kept].max())


def test_queries_of_a_bandit_grow_with_the_sparsity():
    truth = np.zeros(14)
    truth[[3, 9]] = -1, 1
    found, queries = elsewhere.eliminate(lambda a: float(truth @ a) - 0.08, 14, 2, 0.1)
    np.testing.assert_array_equal(found, truth)
    assert queries <= 14  # of 3 ** 14 vectors


def test_latents_of_a_linear_autoencoder_switch_off_at_the_noise():
    eigen = jnp.array([4.0, 2.0, 1.0, 0.5, 0.2])
    variance, moves = elsewhere.linear_posterior(eigen, 0.8)
    np.testing.assert_allclose(variance, [0.2, 0.4, 0.8, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(moves, [0.8, 0.6, 0.2, 0, 0], atol=1e-6)
    means = jax.random.normal(jax.random.key(0), (5000, 5)) * jnp.sqrt(moves)
    found = elsewhere.latent_activity(means, jnp.broadcast_to(variance, means.shape))
    assert found.active.tolist() == [True] * 3 + [False] * 2
    assert float(jnp.abs(found.divergence[3:]).max()) < 1e-6
    counts = [
        int((elsewhere.linear_posterior(eigen, 0.8, b)[1] > 0).sum()) for b in (0.1, 1, 2, 4, 9)
    ]
    assert counts == [int((eigen > b * 0.8).sum()) for b in (0.1, 1, 2, 4, 9)]


def test_inducing_points_are_exact_at_the_rank_and_their_residual_falls():
    x = jax.random.normal(jax.random.key(0), (40, 3))
    linear = lambda a, b: a @ b.T
    points, rest = elsewhere.pivoted_cholesky(linear, x, 3)
    assert len(set(points.tolist())) == 3
    np.testing.assert_allclose(elsewhere.nystrom(linear, x, points), x @ x.T, atol=1e-4)
    smooth = lambda a, b: jnp.exp(-((a[:, None] - b) ** 2).sum(-1))
    points, rest = elsewhere.pivoted_cholesky(smooth, x, 12)
    assert bool((rest >= 0).all()) and bool((jnp.diff(rest, axis=0) <= 1e-6).all())
    gap = smooth(x, x) - elsewhere.nystrom(smooth, x, points)
    assert float(jnp.linalg.norm(gap, 2)) <= float(rest[-1].sum()) + 1e-3


def test_a_product_quantiser_has_one_code_in_each_group_and_gets_no_worse():
    x = jax.random.normal(jax.random.key(0), (300, 6))
    error, books = (
        [],
        jax.random.normal(jax.random.key(1), (3, 8, 2)).at[0, 0].set(50.0),
    )  # a dead code
    for i in range(6):
        codes, near = elsewhere.product_quantise(x, books)
        error.append(float(((near - x) ** 2).sum()))
        books = elsewhere.lloyd(x, books, i)
    assert codes.shape == (300, 3) and all(b <= a + 1e-3 for a, b in zip(error, error[1:]))
    assert 0 in np.asarray(elsewhere.product_quantise(x, books)[0][:, 0])  # it lives again
    slope = jax.grad(lambda x: (elsewhere.product_quantise(x, books)[1] * 3).sum())(x)
    np.testing.assert_array_equal(slope, 3.0)


def test_matching_does_not_depend_on_the_order_of_queries():
    rng = np.random.default_rng(0)
    boxes, queries = jnp.asarray(rng.random((3, 2))), jnp.asarray(rng.random((5, 2)))
    at, cost = elsewhere.match_queries(boxes, queries)
    assert len(set(at.tolist())) == 3
    order = rng.permutation(5)
    again, same = elsewhere.match_queries(boxes, queries[order])
    assert (
        float(same) == pytest.approx(float(cost))
        and order[np.asarray(again)].tolist() == at.tolist()
    )
    assert len(elsewhere.match_queries(boxes, queries[:2])[0]) == 2


def test_the_cost_of_search_and_the_bound_of_slices():
    assert float(coding.search_cost(jnp.eye(8))) == pytest.approx(1 / 8)
    w = jnp.where(jnp.arange(6) < jnp.array([[2], [5]]), 1.0, 0.0)
    slope = jax.grad(lambda w: coding.search_cost(w, above=3))(w)
    assert bool((slope[0] == 0).all()) and bool((slope[1, :5] > 0).all())
    twice = jax.grad(lambda l: coding.term_weights(l, jnp.ones((1, 1), bool), twice=True).sum())
    assert float(twice(jnp.full((1, 1, 1), 1e-6))[0, 0, 0]) == pytest.approx(1, abs=1e-4)
    rng = np.random.default_rng(0)
    inexact = 0
    for _ in range(100):
        q, d = (np.zeros(6144) for _ in range(2))
        q[rng.choice(6144, 30, False)], d[rng.choice(6144, 60, False)] = (
            rng.random(30),
            rng.random(60),
        )
        d[np.flatnonzero(q)[:10]] = 1.0
        found = float(
            coding.gated_inner_product(*(coding.slice_terms(jnp.asarray(v), 768) for v in (q, d)))
        )
        assert found <= q @ d + 1e-5
        alone = lambda v: ((v.reshape(-1, 768) > 0).sum(0) <= 1).all()
        if alone(q) and alone(d):
            assert found == pytest.approx(q @ d, rel=1e-5)
        inexact += found < q @ d - 1e-5
    assert inexact > 0


def test_local_codes_sum_to_one_and_are_exact_for_neighbours():
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(4, 20))
    y = atoms[:, :3] @ np.array([0.5, 0.3, 0.2])
    near = np.argsort(((atoms - y[:, None]) ** 2).sum(0))[:3]
    code = np.asarray(coding.local_codes(jnp.asarray(atoms), jnp.asarray(y), 3, ridge=1e-8))
    assert sorted(np.flatnonzero(code)) == sorted(near) and code.sum() == pytest.approx(1, abs=1e-5)
    best = min(
        np.linalg.norm(y - atoms[:, near] @ np.array([a, b, 1 - a - b]))
        for a, b in itertools.product(np.linspace(-1, 2, 121), repeat=2)
    )
    assert np.linalg.norm(y - atoms @ code) <= best + 1e-4
