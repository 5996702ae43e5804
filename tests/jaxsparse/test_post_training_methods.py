"""Methods that read gradients or tokens, groups, adapters and allocations, against NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import post_training as pt
from jaxsparse.post_training import calibration, chita, fisher, gqsa, models
from jaxsparse.structures import Block, FanIn


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def f32(x):
    return jnp.asarray(x, jnp.float32)


# -- OBD, WoodFisher, M-FAC ------------------------------------------------------------------------


def test_brain_damage_ranks_by_the_mean_of_squared_gradients_of_samples():
    w, g = normal(0, 8, 4), normal(1, 5, 8, 4)
    found = pt.obd_core(f32(w), f32(g), 0.5)
    score = np.mean(g**2, 0) * w**2
    assert np.array_equal(found.mask, score > np.sort(score.ravel())[15])
    assert np.array_equal(found.weights, np.where(found.mask, f32(w), 0))
    alike = pt.obd_core(f32(w), f32(np.ones((3, 8, 4))), 0.5)
    assert jnp.array_equal(alike.mask, pt.magnitude_core(f32(w), 0.5).mask)


def dense_step(w, g, left, keep, damping, blocks):
    """One step of WoodFisher in float64, with explicit inverses of the blocks of what is left."""
    n = w.size
    f = damping * np.eye(n) + g.T @ g / len(g)
    inverse = np.zeros((n, n))
    for start in range(0, n, blocks):
        at = np.arange(start, min(start + blocks, n))
        at = at[left[at]]
        inverse[np.ix_(at, at)] = np.linalg.inv(f[np.ix_(at, at)])
    cost = np.where(left, w**2 / np.where(left, np.diag(inverse), 1), np.inf)
    mask = np.zeros(n, bool)
    mask[np.argsort(-np.where(left, cost, -1), kind="stable")[:keep]] = True
    push = np.where(left & ~mask, w / np.where(left, np.diag(inverse), 1), 0)
    return np.where(mask, w - inverse @ push, 0), mask


@pytest.mark.parametrize("block,steps", [(16, 1), (None, 1), (None, 3)])
def test_the_fisher_information_of_blocks_and_of_layers_is_that_of_dense_inverses(block, steps):
    w, g = normal(2, 8, 4).ravel(), normal(3, 12, 32)
    found = pt.woodfisher_core(
        f32(w.reshape(8, 4)),
        f32(g.reshape(12, 8, 4)),
        0.5,
        damping=0.1 / np.mean(g**2),
        block=block,
        steps=steps,
    )
    v, left = w, np.ones(32, bool)
    for keep in [round(32 * 0.5 ** (i / steps) - 0.5) for i in range(1, steps)] + [16]:
        v, left = dense_step(v, g, left, keep, 0.1, block or 32)
    assert np.array_equal(np.asarray(found.mask).ravel(), left)
    np.testing.assert_allclose(np.asarray(found.weights).ravel(), v, atol=1e-4)


def test_one_removal_attains_the_cost_of_brain_surgery_and_a_diagonal_moves_nothing():
    w, g = normal(4, 6, 4), normal(5, 9, 24)
    found = pt.woodfisher_core(
        f32(w), f32(g.reshape(9, 6, 4)), 1 / 24, damping=0.5 / np.mean(g**2), block=None
    )
    f = 0.5 * np.eye(24) + g.T @ g / 9
    d = w.ravel() - np.asarray(found.weights, np.float64).ravel()
    cost = w.ravel() ** 2 / (2 * np.diag(np.linalg.inv(f)))
    assert 0.5 * d @ f @ d == pytest.approx(cost.min(), rel=1e-3)
    flat = np.zeros((24, 24))
    flat[np.arange(24), np.arange(24)] = np.arange(1, 25)
    still = pt.woodfisher_core(f32(w), f32(flat.reshape(24, 6, 4)), 0.5, damping=0.5)
    np.testing.assert_allclose(still.weights, np.where(still.mask, w, 0), atol=1e-5)
    unmoved = pt.woodfisher_core(f32(w), f32(g.reshape(9, 6, 4)), 0.5, damping=0.5, update=0.0)
    np.testing.assert_allclose(unmoved.weights, np.where(unmoved.mask, w, 0), atol=1e-6)
    with pytest.raises(ValueError, match="steps=0: give an integer of at least 1"):
        pt.woodfisher_core(f32(w), f32(g.reshape(9, 6, 4)), 0.5, steps=0)
    assert fisher.woodfisher_core is pt.woodfisher_core


def test_small_dampings_leave_no_weight_that_is_not_finite():
    w, g = f32(normal(6, 8, 4)), f32(normal(7, 40, 8, 4) * 1e3)
    found = pt.woodfisher_core(w, g, 0.5, damping=1e-7)
    assert np.isfinite(found.weights).all() and int(found.mask.sum()) == 16


# -- CHITA -------------------------------------------------------------------------------------------


def chita_case():
    """20 gradients of a layer [12, 5]."""
    return normal(8, 12, 5), normal(9, 20, 12, 5)


def test_the_weights_of_a_support_are_those_of_ridge_regression():
    w, g = chita_case()
    a, w0 = g.reshape(20, 60), w.ravel()
    mask = np.random.default_rng(0).random(60) < 0.4
    ridge = 20 * 0.01
    expected = np.zeros(60)
    s = a[:, mask]
    right = s.T @ (a @ w0) + ridge * w0[mask]
    expected[mask] = np.linalg.solve(s.T @ s + ridge * np.eye(mask.sum()), right)
    found = chita.solve_support(f32(w0), f32(a), ridge, jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    d = w0 - expected
    value = 0.5 * d @ (a.T @ a + ridge * np.eye(60)) @ d
    q = chita.objective(f32(expected), f32(w0), f32(a), ridge)
    assert float(q) == pytest.approx(value, rel=1e-4)


def test_the_search_of_chita_is_below_its_start_and_both_far_below_magnitude():
    w, g = chita_case()
    a, w0, ridge = f32(g.reshape(20, 60)), f32(w.ravel()), 20 * 0.01 * np.mean(g**2)
    q = lambda v: float(chita.objective(v.weights.ravel(), w0, a, ridge))
    cut = pt.magnitude_core(f32(w), 35 / 60)
    tried = [pt.chita_core(f32(w), f32(g), 35 / 60, steps=n) for n in (0, 10, 60)]
    assert [int(p.mask.sum()) for p in tried] == [25] * 3
    assert jnp.array_equal(tried[0].mask, cut.mask)
    assert q(tried[0]) < 0.1 * q(cut)
    assert q(tried[2]) <= q(tried[1]) < 0.8 * q(tried[0])
    dense = pt.chita_core(f32(w), f32(g), 0.0)
    np.testing.assert_allclose(dense.weights, w, atol=1e-5)


# -- Net-Trim ------------------------------------------------------------------------------------------


def test_net_trim_recovers_sparse_weights_behind_a_relu():
    rng = np.random.default_rng(0)
    x, truth = rng.normal(size=(120, 40)), np.zeros((40, 3))
    for o in range(3):
        truth[rng.choice(40, 5, replace=False), o] = rng.normal(size=5) + 2 * rng.choice([-1, 1], 5)
    # Weights that answer alike where the layer speaks, and are not sparse.
    y = np.maximum(x @ truth, 0)
    dense = truth.copy()
    for o in range(3):
        silent = x[y[:, o] <= 0]
        direction = rng.normal(size=40)
        speaks = x[y[:, o] > 0]
        null = direction - np.linalg.lstsq(speaks, speaks @ direction, rcond=None)[0]
        step = 0.1 * null / np.max(np.abs(silent @ null) / np.maximum(-silent @ truth[:, o], 1e-3))
        dense[:, o] += step * 5
    found = pt.net_trim_core(f32(truth), f32(x), tolerance=1e-3, relu=True, steps=4000)
    np.testing.assert_allclose(found.weights, truth, atol=0.05)
    assert np.asarray(found.mask)[truth != 0].all() and int(found.mask.sum()) <= 20
    answers = np.maximum(x @ np.asarray(found.weights), 0)
    on = y > 1e-6
    assert np.linalg.norm((answers - y)[on]) <= 1.2e-3 * np.linalg.norm(y) + 0.02
    assert (x @ np.asarray(found.weights))[~on].max() < 0.05


def test_a_larger_tolerance_is_sparser_and_none_gives_the_weights_back():
    x, w = normal(1, 60, 10), normal(2, 10, 3)
    counts = [
        int(pt.net_trim_core(f32(w), f32(x), tolerance=t, steps=2000).mask.sum())
        for t in (1e-4, 0.2, 0.6)
    ]
    assert counts[0] == 30 and counts[0] > counts[1] > counts[2] > 0
    same = pt.net_trim_core(f32(w), f32(x), tolerance=1e-4, steps=2000)
    np.testing.assert_allclose(same.weights, w, atol=0.01)
    assert int(pt.net_trim_core(f32(w), f32(x), 0.5).mask.sum()) == 15
    bias = f32([1.0, -1.0, 0.5])
    biased = pt.net_trim_core(f32(w), f32(x), tolerance=1e-4, relu=True, bias=bias, steps=3000)
    before, after = (x @ np.asarray(v) + np.asarray(bias) for v in (w, biased.weights))
    np.testing.assert_allclose(np.maximum(after, 0), np.maximum(before, 0), atol=0.1)
    with pytest.raises(ValueError, match="tolerance=0: give a positive fraction"):
        pt.net_trim_core(f32(w), f32(x), 0.5, tolerance=0)


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_by_every_method_that_reads_gradients():
    w, zero = f32(normal(20, 8, 4)), jnp.zeros((3, 8, 4))
    size = np.sort(np.abs(w), axis=0)
    for found in (
        pt.obd_core(w, zero, 0.5, structure="fan_in"),
        pt.woodfisher_core(w, zero, 0.5, structure="fan_in"),
        pt.chita_core(w, zero, 0.5, structure="fan_in"),
        pt.wanda_plus_plus_core(w, jnp.zeros(8), zero, 0.5),
    ):
        assert np.array_equal(found.mask, np.abs(w) >= size[4])
        np.testing.assert_allclose(found.weights, np.where(found.mask, w, 0), rtol=1e-6)


# -- Wanda++, GQSA -------------------------------------------------------------------------------------


def test_without_gradients_wanda_plus_plus_is_wanda():
    w, squares, g = f32(normal(3, 16, 4)), f32(normal(4, 16) ** 2), f32(normal(5, 3, 16, 4))
    plain = pt.wanda_core(w, squares, 0.5)
    assert jnp.array_equal(pt.wanda_plus_plus_core(w, squares, g, 0.5, alpha=0.0).mask, plain.mask)
    score = np.abs(w) * (
        np.sqrt(np.mean(g**2, 0)) / np.mean(np.sqrt(np.mean(g**2, 0)))
        + (np.sqrt(squares) / np.mean(np.sqrt(squares)))[:, None]
    )
    found = np.asarray(pt.wanda_plus_plus_core(w, squares, g, 0.5).mask)
    assert all(
        set(np.flatnonzero(found[:, o])) == set(np.argsort(score[:, o])[8:]) for o in range(4)
    )


def groups_case():
    w, x = normal(6, 32, 6), normal(7, 200, 32) * np.exp(normal(8, 32))
    return f32(w), f32(x.T @ x)


def test_groups_are_kept_or_dropped_as_a_whole_and_packed_rows_are_the_layer():
    w, gram = groups_case()
    found = pt.gqsa_core(w, gram, 0.5, group=4, bits=4)
    mask = np.asarray(found.mask).reshape(8, 4, 6)
    assert set(mask.sum(1).ravel()) == {0, 4} and mask.sum() == 96
    h = np.asarray(gram, np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(32))
    saliency = (np.asarray(w) / np.diag(inverse)[:, None]) ** 2
    pooled = saliency.reshape(8, 4, 6).sum(1)
    assert np.array_equal(mask.all(1), pooled > np.sort(pooled.ravel())[23])
    codes, scales = np.asarray(found.codes), np.repeat(np.asarray(found.scales), 4, axis=0)
    assert codes.dtype == np.int8 and np.abs(codes).max() <= 7
    np.testing.assert_allclose(found.weights, codes * scales, rtol=1e-6)
    rows = gqsa.pack(found, 4)
    np.testing.assert_allclose(rows.unpack(), found.weights, rtol=1e-6)
    assert rows.starts[-1] == 24 and rows.codes.shape == (24, 4)
    x = normal(9, 32)
    dense, y = x @ np.asarray(found.weights), np.zeros(6)
    for o in range(6):
        for i in range(rows.starts[o], rows.starts[o + 1]):
            at = slice(4 * rows.columns[i], 4 * rows.columns[i] + 4)
            y[o] += rows.scales[i] * (x[at] @ rows.codes[i])
    np.testing.assert_allclose(y, dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="it has no codes"):
        gqsa.pack(pt.magnitude_core(w, 0.5), 4)


def test_scales_solved_anew_make_no_output_worse_than_those_of_the_sweep():
    w, gram = groups_case()
    found = pt.gqsa_core(w, gram, 0.25, group=8, bits=3)
    swept = pt.sparsegpt_core(w, gram, mask=found.mask, quantize=pt.Int(3, 8))
    h = np.asarray(gram) + 0.01 * np.mean(np.diag(gram)) * np.eye(32)
    lost = lambda v: np.einsum("io,ij,jo->o", w - v.weights, h, w - v.weights)
    assert jnp.array_equal(found.codes, swept.codes)
    assert (lost(found) <= lost(swept) * (1 + 1e-4)).all() and lost(found).sum() < lost(swept).sum()
    with pytest.raises(ValueError, match=r"structure=FanIn\(\): gqsa drops Block\(16, 1\)"):
        pt.gqsa_core(w, gram, 0.5, structure=FanIn())
    with pytest.raises(ValueError, match="5 must divide its 32 rows"):
        pt.gqsa_core(w, gram, 0.5, group=5)
    assert Block(16, 1) == Block(16, 1)


def test_the_first_stage_rounds_input_by_input_and_lets_what_follows_make_up_for_it():
    """Optimal brain compression in the order of the inputs: after each, the inverse without it."""
    w, gram = groups_case()
    found = pt.gqsa_core(w, gram, 0.25, group=8, bits=3)
    h = np.asarray(gram, np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(32))
    mask, now = np.asarray(found.mask), np.asarray(w, np.float64)
    codes = np.zeros((32, 6))
    for i in range(32):
        if i % 8 == 0:  # the scale of a group is that of its weights when the sweep reaches it
            peak = np.abs(np.where(mask[i : i + 8], now[i : i + 8], 0)).max(0)
            scale = np.where(peak > 0, peak, 1) / 3
        codes[i] = np.where(mask[i], np.clip(np.round(now[i] / scale), -3, 3), 0)
        push = (now[i] - codes[i] * scale) / inverse[i, i]
        now -= np.outer(inverse[:, i], push)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert np.array_equal(found.codes, codes)


def test_the_second_stage_solves_the_scales_by_least_squares_with_integers_held_fixed():
    w, gram = groups_case()
    found = pt.gqsa_core(w, gram, 0.25, group=8, bits=3)
    h = np.asarray(gram, np.float64)
    root = np.linalg.cholesky(h + 0.01 * np.mean(np.diag(h)) * np.eye(32)).T
    codes = np.asarray(found.codes, np.float64).reshape(4, 8, 6)
    for o in range(6):
        spread = np.zeros((32, 4))
        for g in range(4):
            spread[8 * g : 8 * g + 8, g] = codes[g, :, o]
        kept = np.abs(spread).sum(0) > 0
        best = np.linalg.lstsq(root @ spread[:, kept], root @ np.asarray(w)[:, o], rcond=None)[0]
        np.testing.assert_allclose(np.asarray(found.scales)[kept, o], best, rtol=2e-3)


# -- Allocation ----------------------------------------------------------------------------------------


def test_water_filling_meets_the_budget_and_its_bounds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 200, 6).tolist()
        least = [int(n * 0.2) for n in sizes]
        keep = int(rng.integers(sum(least), sum(sizes) + 1))
        kept = pt.water_fill(rng.random(6).tolist(), sizes, keep, least)
        assert sum(kept) == keep
        assert all(a <= k <= n for a, k, n in zip(least, kept, sizes))
    assert pt.water_fill([1, 1, 1], [30, 30, 30], 45, [0, 0, 0]) == [15, 15, 15]
    assert pt.water_fill([0, 0], [10, 30], 20, [0, 0]) == [5, 15]
    with pytest.raises(ValueError, match="keep=5: blocks keep at least 8"):
        pt.water_fill([1, 1], [10, 10], 5, [4, 4])


def test_what_a_linear_loss_feels_is_the_norm_of_its_gradient():
    g = normal(0, 6, 4)
    model = (lambda p, x: x @ p["kernel"], {"kernel": f32(normal(1, 6, 4))})
    stream_rule = pt.ECoFLaP(draws=100, epsilon=1e-2)
    stream = calibration.Stream(models.of(model), [f32(normal(2, 3, 6))], None, None, None)
    losses = jax.jit(lambda p: jnp.sum(f32(g) * p[0])[None])
    felt = stream_rule.felt(losses, stream.kernels[0], [model[1]["kernel"]], 0)
    assert felt == pytest.approx(np.linalg.norm(g) * np.sqrt(2 / np.pi), rel=0.2)
    again = stream_rule.felt(losses, stream.kernels[0], [model[1]["kernel"]], 0)
    assert again == felt


def test_blocks_that_the_loss_feels_stay_denser_and_none_passes_the_most():
    found = pt.ECoFLaP(most=0.1).sparsities([5.0, 1.0, 1.0], [100, 100, 100], 0.5)
    assert sum(found) == pytest.approx(1.5) and max(found) <= 0.6 + 1e-9 and found[0] < found[1]
    equal = pt.ECoFLaP().sparsities([2.0, 2.0], [50, 50], 0.5)
    assert equal == [0.5, 0.5]
    weighted = pt.ECoFLaP(per_weight=True, most=0.5).sparsities([1.0, 3.0], [100, 300], 0.5)
    assert weighted == [0.0, pytest.approx(2 / 3)] or sum(weighted) > 0


def test_the_knapsack_is_the_best_of_all_choices():
    rng = np.random.default_rng(1)
    errors, costs = rng.random((5, 4)), rng.integers(1, 9, (5, 4))
    for budget in (8, 15, 25):
        tried = [
            (sum(errors[i, l] for i, l in enumerate(c)), c)
            for c in itertools.product(range(4), repeat=5)
            if sum(costs[i, l] for i, l in enumerate(c)) <= budget
        ]
        if not tried:
            with pytest.raises(ValueError, match=f"budget={budget}: the cheapest levels cost"):
                pt.knapsack(errors.tolist(), costs.tolist(), budget)
            continue
        assert tuple(pt.knapsack(errors.tolist(), costs.tolist(), budget)) == min(tried)[1]
    large = pt.knapsack(errors.tolist(), (costs * 1000).tolist(), 20_500, buckets=100)
    assert large == pt.knapsack(errors.tolist(), costs.tolist(), 20)  # counted in thousands
    coarse = pt.knapsack(errors.tolist(), (costs * 1000 + 1).tolist(), 20_500, buckets=100)
    assert sum(costs[i, l] * 1000 for i, l in enumerate(coarse)) <= 20_500


def test_the_search_finds_the_optimum_of_a_separable_problem():
    levels = [tuple(range(-8, 9))] * 8
    cost = lambda c: sum((i + 1) * np.exp(l / 2) for i, l in enumerate(c))
    seen = []

    def fitness(child, generation, round_):
        assert sum(child) == 0
        seen.append(child)
        return cost(child)

    found, history = pt.evolve(levels, fitness, generations=40, offspring=16)
    best = pt.knapsack(
        [[(i + 1) * np.exp(l / 2) for l in levels[0]] for i in range(8)],
        [[16 - (l + 8) for l in levels[0]]] * 8,
        64,
    )
    optimum = cost([levels[0][b] for b in best])
    assert optimum == pytest.approx(30.549, abs=1e-3) and cost((0,) * 8) > 33
    assert cost(found) == pytest.approx(optimum, rel=1e-6)
    assert all(b <= a for a, b in zip(history, history[1:]))
    again, _ = pt.evolve(levels, fitness, generations=40, offspring=16)
    assert again == found
    with pytest.raises(ValueError, match=r"survivors=\[1, 4\]"):
        pt.evolve(levels, fitness, survivors=(1, 4))
    with pytest.raises(ValueError, match="layer 0 has no level 0"):
        pt.evolve([(1, 2)], fitness)
