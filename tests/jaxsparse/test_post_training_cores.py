"""Methods of post-training pruning on one layer, against NumPy in float64 written from the papers.

The oracles work on W `[out, in]`, one row after the other, as the papers do.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import post_training as pt
from jaxsparse.post_training import _layer, alps, exact_obs, ria, sparsegpt
from jaxsparse.structures import NM, Block, Channel, FanIn, Unstructured

# -- The layers of the golden values -----------------------------------------------------------------


def b1(seed):
    """W [32, 64] and its damped H: inputs of very different scale."""
    g = np.random.default_rng(seed)
    a, t, z, w = (g.normal(size=s) for s in ((64, 64), (1, 64), (64, 512), (32, 64)))
    x = (a * np.exp(t)) @ z
    h = x @ x.T
    return w, h + 0.01 * np.mean(np.diag(h)) * np.eye(64)


def b2():
    """W [8, 24] and its damped H."""
    g = np.random.default_rng(0)
    a, z, w = (g.normal(size=s) for s in ((24, 24), (24, 200), (8, 24)))
    x = a @ z
    h = x @ x.T
    return w, h + 0.01 * np.mean(np.diag(h)) * np.eye(24)


def error(h, w, v):
    """Relative error, of matrices [out, in]."""
    d = w - np.asarray(v, np.float64)
    return np.trace(d @ h @ d.T) / np.trace(w @ h @ w.T)


def squares(h):
    return jnp.asarray(np.diag(h), jnp.float32)


def rows(pruned):
    """The weights [out, in], after a check that they are zero outside of the mask."""
    v, m = np.asarray(pruned.weights), np.asarray(pruned.mask)
    assert v.dtype == np.float32 and m.dtype == bool and not v[~m].any()
    return v.T


def zeros(pruned):
    return int(np.sum(~np.asarray(pruned.mask)))


# -- Oracles ---------------------------------------------------------------------------------------


def oracle_sparsegpt(w, h, prune, block, sparsity=None, nm=None):
    """`prune` zeros per block, or n kept of m; one column after the other."""
    w, c = w.copy(), w.shape[1]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    out, losses = np.zeros_like(w), 0.0
    for start in range(0, c, block):
        stop = min(start + block, c)
        if nm is None:
            s = (w[:, start:stop] / np.diag(u)[start:stop]) ** 2
            gone = np.zeros(s.size, bool)
            gone[np.argsort(s.ravel(), kind="stable")[: prune(start, stop)]] = True
            gone = gone.reshape(s.shape)
        for i in range(start, stop):
            if nm is not None:
                n, m = nm
                if i % m == 0:
                    s = (w[:, i : i + m] / np.diag(u)[i : i + m]) ** 2
                    order = np.argsort(s, axis=1, kind="stable")
                    group = np.zeros(s.shape, bool)
                    np.put_along_axis(group, order[:, : m - n], True, axis=1)
                drop = group[:, i % m]
            else:
                drop = gone[:, i - start]
            q = np.where(drop, 0.0, w[:, i])
            e = (w[:, i] - q) / u[i, i]
            w[:, i:] -= np.outer(e, u[i, i:])
            out[:, i] = q
            losses += np.sum(e**2)
    return out, losses


def oracle_least_squares(w, h, mask):
    """Each row by the normal equations of what its mask keeps."""
    v = np.zeros_like(w)
    for r, m in enumerate(mask):
        if m.any():
            v[r, m] = np.linalg.solve(h[np.ix_(m, m)], (h @ w[r])[m])
    return v


def oracle_obs_row(w, h, count):
    """Greedy optimal brain surgery of one row, inverting the matrix of what is left each time."""
    left, cost, v = np.ones(w.size, bool), [], w.copy()
    for _ in range(count):
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        index = np.flatnonzero(left)
        scores = v[index] ** 2 / np.diag(inverse)
        j = int(np.argmin(scores))
        v[index] -= inverse[:, j] * v[index[j]] / inverse[j, j]
        v[index[j]] = 0.0
        left[index[j]] = False
        cost.append(scores[j])
    return v, cost


def oracle_least_scores(scores, count):
    """The mask of a row that drops the lowest `count`."""
    mask = np.ones(scores.shape, bool)
    order = np.argsort(scores, axis=1, kind="stable")
    np.put_along_axis(mask, order[:, :count], False, axis=1)
    return mask


# -- Magnitude, Wanda, RIA -------------------------------------------------------------------------

GOLDEN = {  # seed: magnitude, Wanda, SparseGPT, OBC, ALPS
    0: (0.1310, 0.1218, 0.0507, 0.0107, 0.0103),
    1: (0.1155, 0.1013, 0.0465, 0.0078, 0.0080),
    2: (0.0947, 0.1002, 0.0395, 0.0067, 0.0068),
    3: (0.1271, 0.1377, 0.0414, 0.0061, 0.0065),
    4: (0.1337, 0.1299, 0.0472, 0.0111, 0.0102),
}


@pytest.mark.parametrize("seed", GOLDEN)
def test_errors_are_those_of_the_golden_table(seed):
    w, h = b1(seed)
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    found = (
        pt.magnitude_core(k, 0.6, structure=FanIn()),
        pt.wanda_core(k, squares(h), 0.6),
        pt.sparsegpt_core(k, gram, 0.6, block=16, damping=0.0),
        pt.exact_obs_core(k, gram, 0.6, structure=FanIn(), damping=0.0),
        pt.alps_core(k, gram, 0.6, damping=0.0, refit_steps=200),
    )
    assert [zeros(p) for p in found] == [32 * 38] * 2 + [4 * 307, 32 * 38, 1228]
    magnitude, wanda, sgpt, obc, admm = [error(h, w, rows(p)) for p in found]
    np.testing.assert_allclose((magnitude, wanda, sgpt), GOLDEN[seed][:3], atol=6e-5)
    assert obc == pytest.approx(GOLDEN[seed][3], abs=3e-4)
    assert admm == pytest.approx(GOLDEN[seed][4], rel=0.05)
    assert sgpt < 0.6 * min(magnitude, wanda)
    assert max(obc, admm) < 0.35 * sgpt
    assert abs(obc - admm) < 0.15 * max(obc, admm)


def test_errors_at_half_with_masks_refitted_are_those_of_the_golden_table():
    w, h = b2()
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    refit = lambda p: pt.refit_core(k, gram, p, damping=0.0, steps=300)
    magnitude = pt.magnitude_core(k, 0.5, structure=FanIn())
    wanda = pt.wanda_core(k, squares(h), 0.5)
    sgpt = pt.sparsegpt_core(k, gram, 0.5, block=8, damping=0.0)
    pairs = [
        (magnitude, 0.0534),
        (wanda, 0.0442),
        (sgpt, 0.0364),
        (refit(magnitude), 0.0281),
        (refit(sgpt), 0.0240),
        (refit(wanda), 0.0239),
        (pt.exact_obs_core(k, gram, 0.5, structure=FanIn(), damping=0.0), 0.0178),
    ]
    np.testing.assert_allclose([error(h, w, rows(p)) for p, _ in pairs], [g for _, g in pairs],
                               atol=1e-4)  # fmt: skip
    admm = pt.alps_core(k, gram, 0.5, damping=0.0, refit_steps=300)
    assert error(h, w, rows(admm)) == pytest.approx(0.0108, rel=0.05)


def test_errors_of_two_of_four_are_those_of_the_golden_table():
    w, h = b2()
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    sgpt = pt.sparsegpt_core(k, gram, structure=NM(2, 4), block=8, damping=0.0)
    again = pt.refit_core(k, gram, sgpt, damping=0.0, steps=300)
    admm = pt.alps_core(k, gram, structure=NM(2, 4), damping=0.0, refit_steps=300)
    for pruned, golden in ((sgpt, 0.0742), (again, 0.0493)):
        assert error(h, w, rows(pruned)) == pytest.approx(golden, abs=1e-4)
    assert error(h, w, rows(admm)) == pytest.approx(0.0282, rel=0.05)
    for pruned in (sgpt, admm):
        assert (np.asarray(pruned.mask).reshape(6, 4, 8).sum(1) == 2).all()


def test_magnitude_ranks_the_layer_and_wanda_each_output():
    w, h = b2()
    k = jnp.asarray(w.T, jnp.float32)
    order = np.sort(np.abs(w).ravel())
    assert np.array_equal(pt.magnitude_core(k, 0.5).mask.T, np.abs(w) > order[95])
    expected = oracle_least_scores(np.abs(w) * np.sqrt(np.diag(h)), 12)
    assert np.array_equal(pt.wanda_core(k, squares(h), 0.5).mask.T, expected)


def test_wanda_does_not_see_how_features_are_scaled():
    w, h = b2()
    k, c = jnp.asarray(w.T, jnp.float32), jnp.asarray(np.exp(np.linspace(-2, 2, 24)), jnp.float32)
    scaled = pt.wanda_core(k / c[:, None], squares(h) * c**2, 0.5)
    assert jnp.array_equal(scaled.mask, pt.wanda_core(k, squares(h), 0.5).mask)
    assert not jnp.array_equal(
        pt.magnitude_core(k / c[:, None], 0.5).mask, pt.magnitude_core(k, 0.5).mask
    )


def test_wanda_with_equal_inputs_is_magnitude_of_each_output_and_keeps_an_outlier_feature():
    k = jax.random.normal(jax.random.key(0), (16, 5))
    same = pt.wanda_core(k, jnp.full(16, 3.0), 0.5)
    assert jnp.array_equal(same.mask, pt.magnitude_core(k, 0.5, structure=FanIn()).mask)
    assert jnp.array_equal(pt.wanda_core(k, jnp.zeros(16), 0.5).mask, same.mask)  # nothing was seen
    small = k.at[3].set(0.05)
    outlier = pt.wanda_core(small, jnp.ones(16).at[3].set(1e4), 0.5)
    assert outlier.mask[3].all()


def test_relative_importance_adds_up_and_ignores_the_scale_of_weights():
    k, ones = jax.random.normal(jax.random.key(1), (12, 7)), jnp.ones(12)
    assert float(jnp.sum(ria.ria_scores(k, ones))) == pytest.approx(19.0, rel=1e-6)
    w, norms = np.abs(np.asarray(k, np.float64)), np.sqrt(np.arange(1.0, 13))
    expected = (w / w.sum(0) + w / w.sum(1, keepdims=True)) * np.sqrt(norms)[:, None]
    found = ria.ria_scores(k, jnp.arange(1.0, 13))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert jnp.array_equal(pt.ria_core(k, ones, 0.5).mask, pt.ria_core(7 * k, ones, 0.5).mask)
    empty = pt.ria_core(k.at[2].set(0.0).at[:, 1].set(0.0), ones, 0.5)
    assert jnp.isfinite(empty.weights).all() and zeros(empty) == 42


def test_a_permutation_of_inputs_lets_two_of_four_keep_more():
    scores = jnp.abs(jax.random.normal(jax.random.key(2), (16, 6))) * jnp.arange(1.0, 17)[:, None]
    identity = jnp.arange(16)
    kept = [ria.retained(scores, identity, NM(2, 4))]
    for rounds in (1, 2):
        order = pt.permute_inputs(scores, NM(2, 4), rounds)
        assert np.array_equal(np.sort(order), np.arange(16))
        kept.append(ria.retained(scores, order, NM(2, 4)))
    assert kept[0] < kept[1] <= kept[2] + 1e-4
    pruned = pt.ria_core(scores, jnp.ones(16), structure=NM(2, 4), permute=True)
    assert (np.asarray(pruned.mask[pruned.permutation]).reshape(4, 4, 6).sum(1) == 2).all()


def test_the_assignment_of_one_place_is_the_best_of_all():
    scores = jax.random.uniform(jax.random.key(3), (12, 4))
    order = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    found = ria._assign_slot(order, scores, 2, 1).reshape(-1)
    best = -np.inf
    for p in itertools.permutations(range(3)):
        tried = np.arange(12).reshape(3, 4)
        tried[:, 1] = tried[list(p), 1]
        best = max(best, float(ria.retained(scores, jnp.asarray(tried.ravel()), NM(2, 4))))
    assert float(ria.retained(scores, found, NM(2, 4))) == pytest.approx(best, rel=1e-6)


# -- SparseGPT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nm", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("block", [8, 10, 24, 128])
def test_the_sweep_is_that_of_the_paper(nm, block):
    w, h = b2()
    if nm is not None:
        block = max(nm[1], block // nm[1] * nm[1])
    prune = lambda a, b: (8 * b) // 2 - (8 * a) // 2
    expected, losses = oracle_sparsegpt(w, h, prune, min(block, 24), nm=nm)
    options = dict(structure=NM(*nm)) if nm else dict(sparsity=0.5)
    found = pt.sparsegpt_core(
        jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32), **options, block=block,
        damping=0.0,
    )  # fmt: skip
    assert np.array_equal(rows(found) != 0, expected != 0)
    np.testing.assert_allclose(rows(found), expected, atol=2e-3)
    assert losses == pytest.approx(np.trace((w - expected) @ h @ (w - expected).T), rel=1e-9)


def test_the_error_is_the_sum_of_squares_of_what_is_pushed_on():
    w, h = b1(0)
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    u, _ = _layer.inverse_factor(gram, 0.0)
    kept = jnp.asarray([205] * 4)
    v, _, _, _, e = sparsegpt.sweep(k, u, kept, None, Unstructured(), 16, None)
    np.testing.assert_allclose(k - v, u.T @ e, atol=2e-3)
    true = error(h, w, np.asarray(v).T) * np.trace(w @ h @ w.T)
    assert float(jnp.sum(e**2)) == pytest.approx(true, rel=1e-3)


def test_the_factor_of_a_large_gram_matrix_is_that_of_its_inverse():
    x = np.random.default_rng(0).normal(size=(1500, 601))
    h = x.T @ x
    u, used = _layer.inverse_factor(jnp.asarray(h, jnp.float32), 0.01)
    expected = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(601))
    assert np.array_equal(u, np.triu(u)) and float(used) == pytest.approx(0.01)
    np.testing.assert_allclose(u.T @ u, expected, atol=1e-4 * np.abs(expected).max())


def test_for_a_given_mask_the_block_does_not_matter():
    w, h = b1(1)
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, k.shape)
    found = [pt.sparsegpt_core(k, gram, mask=mask, block=b).weights for b in (5, 16, 64)]
    np.testing.assert_allclose(found[0], found[1], atol=2e-4)
    np.testing.assert_allclose(found[0], found[2], atol=2e-4)


def test_where_the_first_inputs_are_pruned_the_sweep_is_exact_least_squares():
    w, h = b2()
    mask = np.arange(24) >= np.arange(8)[:, None] + 3
    found = pt.sparsegpt_core(
        jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32), mask=jnp.asarray(mask.T),
        damping=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(rows(found), oracle_least_squares(w, h, mask), atol=1e-3)


def test_on_orthogonal_inputs_methods_are_magnitude_pruning():
    k = jax.random.normal(jax.random.key(4), (16, 6))
    gram = 3.0 * jnp.eye(16)
    whole = pt.magnitude_core(k, 0.5)
    for found in (
        pt.sparsegpt_core(k, gram, 0.5, block=16),
        pt.exact_obs_core(k, gram, 0.5),
    ):
        assert jnp.array_equal(found.mask, whole.mask)
        np.testing.assert_allclose(found.weights, whole.weights, atol=1e-5)
    diagonal = jnp.diag(jnp.arange(1.0, 17))
    sgpt = pt.sparsegpt_core(k, diagonal, 0.5, structure=FanIn(), block=16, damping=0.0)
    assert jnp.array_equal(sgpt.mask, pt.wanda_core(k, jnp.arange(1.0, 17), 0.5).mask)


def test_zeros_are_exactly_as_many_as_asked_whatever_the_block():
    k, x = (
        jax.random.normal(jax.random.key(5), (50, 7)),
        jax.random.normal(jax.random.key(6), (90, 50)),
    )
    for block in (1, 7, 16, 64):
        pruned = pt.sparsegpt_core(k, x.T @ x, 0.37, block=block)
        assert zeros(pruned) == int(350 * 37 // 100)
    fan_in = pt.sparsegpt_core(k, x.T @ x, 0.37, block=16, structure=FanIn())
    assert (np.sum(~np.asarray(fan_in.mask), axis=0) == 18).all()


def test_features_that_are_never_active_get_no_weight_and_change_nothing_else():
    k = jax.random.normal(jax.random.key(7), (12, 5))
    x = jax.random.normal(jax.random.key(8), (64, 12)).at[:, 4].set(0.0)
    pruned = pt.sparsegpt_core(k, x.T @ x, 0.5, block=12)
    assert not pruned.weights[4].any() and jnp.isfinite(pruned.weights).all()
    unseen = pt.sparsegpt_core(k, jnp.zeros((12, 12)), 0.5, block=12)
    assert jnp.array_equal(unseen.mask, pt.magnitude_core(k, 0.5).mask) and unseen.weights[4].any()


def test_damping_grows_where_the_gram_matrix_has_no_factor_and_says_so():
    k = jax.random.normal(jax.random.key(9), (8, 3))
    x = jax.random.normal(jax.random.key(10), (20, 8))
    fine = pt.sparsegpt_core(k, x.T @ x, 0.5)
    assert float(fine.damping) == pytest.approx(0.01)
    indefinite = jnp.ones((8, 8)) - 2 * jnp.eye(8).at[0, 0].set(0) + jnp.eye(8) * 2.5
    indefinite = indefinite.at[0, 1].set(9.0).at[1, 0].set(9.0)
    grown = pt.sparsegpt_core(k, indefinite, 0.5)
    assert float(grown.damping) > 0.05 and jnp.isfinite(grown.weights).all()
    few = pt.sparsegpt_core(k, jnp.outer(x[0], x[0]), 0.5, damping=0.0)  # one token
    assert jnp.isfinite(few.weights).all()


def test_sparse_and_quantized_at_once():
    w, h = b1(2)
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    grid = pt.Int(4, group=16)
    both = pt.sparsegpt_core(k, gram, 0.5, quantize=grid)
    assert zeros(both) == 1024 and both.scales.shape == (4, 32) and both.codes.dtype == jnp.int8
    assert int(jnp.abs(both.codes).max()) == 7 and not both.codes[~both.mask].any()
    again = both.codes * jnp.repeat(both.scales, 16, axis=0)
    np.testing.assert_allclose(both.weights, again, atol=1e-7)
    # The sweep makes up for rounding: rounding the weights of the sparse layer alone is worse.
    sparse = pt.sparsegpt_core(k, gram, 0.5, block=16)
    groups = sparse.weights.reshape(4, 16, 32)
    scales = jax.vmap(grid.scales)(groups)
    rounded = (jax.vmap(grid.codes)(groups, scales) * scales).reshape(64, 32)
    assert error(h, w, rows(both)) < error(h, w, np.asarray(rounded).T)
    fine = pt.sparsegpt_core(k, gram, 0.0, quantize=pt.Int(8, group=16))
    assert error(h, w, rows(fine)) < 1e-4 and zeros(fine) == 0


# -- Optimal brain surgery -----------------------------------------------------------------------------


def test_exact_obs_is_greedy_brain_surgery_and_its_costs_add_up():
    w, h = b2()
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    u, _ = _layer.inverse_factor(gram, 0.0)
    v, mask, costs = exact_obs.remove(k, u.T @ u, jnp.full(8, 12), structure=FanIn(), together=4)
    for r in range(8):
        expected, cost = oracle_obs_row(w[r], h, 12)
        assert np.array_equal(np.asarray(mask)[:, r], expected != 0)
        np.testing.assert_allclose(v[:, r], expected, atol=2e-3)
        np.testing.assert_allclose(costs[:12, r], cost, rtol=2e-2, atol=1e-3)
        d = w[r] - np.asarray(v)[:, r]
        assert float(jnp.sum(costs[:12, r])) == pytest.approx(d @ h @ d, rel=1e-3)
    np.testing.assert_allclose(
        np.asarray(v).T, oracle_least_squares(w, h, np.asarray(mask).T), atol=3e-3
    )


def test_removing_one_weight_is_the_best_of_all_and_costs_what_it_says():
    w, h = b2()
    k, gram = jnp.asarray(w.T, jnp.float32)[:, :1], jnp.asarray(h, jnp.float32)
    found = pt.exact_obs_core(k, gram, 1 / 24, damping=0.0)
    masks = ~np.eye(24, dtype=bool)
    tried = [oracle_least_squares(w[:1], h, m[None])[0] for m in masks]
    losses = [(w[0] - v) @ h @ (w[0] - v) for v in tried]
    assert int(np.argmin(losses)) == int(jnp.argmin(found.mask[:, 0])) and zeros(found) == 1
    np.testing.assert_allclose(found.weights[:, 0], tried[int(np.argmin(losses))], atol=2e-3)


def test_a_layer_is_cut_by_the_cheapest_removals_of_all_outputs():
    w, h = b2()
    scale = np.exp(np.linspace(-2, 2, 8))[:, None]
    k, gram = jnp.asarray((scale * w).T, jnp.float32), jnp.asarray(h, jnp.float32)
    found = pt.exact_obs_core(k, gram, 0.5, damping=0.0)
    costs = np.array([oracle_obs_row(scale[r] * w[r], h, 24)[1] for r in range(8)])
    cheapest = np.sort(costs.ravel())[95]
    assert np.array_equal(np.sum(~np.asarray(found.mask), axis=0), (costs <= cheapest).sum(1))
    even = pt.exact_obs_core(k, gram, 0.5, structure=FanIn(), damping=0.0)
    assert error(h, scale * w, rows(found)) < error(h, scale * w, rows(even))


def test_exact_obs_keeps_two_of_four():
    w, h = b2()
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    found = pt.exact_obs_core(k, gram, structure=NM(2, 4), damping=0.0)
    assert (np.asarray(found.mask).reshape(6, 4, 8).sum(1) == 2).all()
    sgpt = pt.sparsegpt_core(k, gram, structure=NM(2, 4), damping=0.0)
    assert error(h, w, rows(found)) < error(h, w, rows(sgpt))


def test_saliencies_of_the_fisher_information_are_those_of_the_dense_inverse():
    g = np.random.default_rng(0).normal(size=(12, 50))
    f = 0.1 * np.eye(50) + g.T @ g / 12
    fisher = pt.inverse_fisher(jnp.asarray(g, jnp.float32), damping=0.1)
    x = np.random.default_rng(1).normal(size=50)
    np.testing.assert_allclose(
        fisher(jnp.asarray(x, jnp.float32)), np.linalg.solve(f, x), atol=1e-4
    )
    np.testing.assert_allclose(fisher.diagonal(), np.diag(np.linalg.inv(f)), atol=1e-4)


def test_brain_surgery_of_a_set_attains_its_cost_and_beats_brain_damage():
    w, h = b2()
    x, f = jnp.asarray(w[0], jnp.float32), jnp.asarray(h, jnp.float32)
    inverse = jnp.asarray(np.linalg.inv(h), jnp.float32)
    one = jnp.arange(24) == 5
    v = np.asarray(pt.obs_remove(x, inverse, one), np.float64)
    cost = 0.5 * (w[0] - v) @ h @ (w[0] - v)
    assert cost == pytest.approx(float(pt.obs_saliency(x, jnp.diagonal(inverse))[5]), rel=1e-3)
    assert cost < float(pt.obd_saliency(x, jnp.diagonal(f))[5]) and v[5] == 0.0
    several = jnp.arange(24) % 3 == 0
    expected = oracle_least_squares(w[:1], h, np.asarray(~several)[None])[0]
    np.testing.assert_allclose(pt.obs_remove(x, inverse, several), expected, atol=2e-3)
    diagonal = jnp.diag(1 / jnp.arange(1.0, 25))
    assert jnp.array_equal(pt.obs_remove(x, diagonal, one), jnp.where(one, 0.0, x))


# -- Least squares, ADMM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_refit_solves_masked_least_squares(seed):
    w, h = b1(seed)
    mask = np.random.default_rng(seed).random(w.shape) < 0.4
    mask[3], mask[4] = False, True  # an output without weights, one that is dense
    start = pt.Pruned(jnp.asarray(np.where(mask, w, 0).T, jnp.float32), jnp.asarray(mask.T))
    found = pt.refit_core(
        jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32), start, damping=0.0, steps=500
    )
    expected = oracle_least_squares(w, h, mask)
    assert error(h, w, rows(found)) == pytest.approx(error(h, w, expected), rel=1e-3)
    assert not rows(found)[3].any()
    np.testing.assert_allclose(rows(found)[4], w[4], rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_refit_never_makes_an_output_worse(steps):
    w, h = b1(3)
    k, gram = jnp.asarray(w.T, jnp.float32), jnp.asarray(h, jnp.float32)
    for pruned in (pt.wanda_core(k, squares(h), 0.7), pt.sparsegpt_core(k, gram, 0.7, block=16)):
        after = pt.refit_core(k, gram, pruned, damping=0.0, steps=steps)
        lost = lambda v: np.einsum("oi,ij,oj->o", w - rows(v), h, w - rows(v))
        assert (lost(after) <= lost(pruned) * (1 + 1e-4)).all()
        assert jnp.array_equal(after.mask, pruned.mask)


def test_the_residual_of_alps_falls_and_its_support_is_exact():
    w, h = b1(0)
    scale = np.sqrt(np.diag(h))
    start = jnp.asarray(scale[:, None] * w.T, jnp.float32)
    unit = jnp.asarray(h / np.outer(scale, scale), jnp.float32)
    run = lambda steps: alps.search(start, unit, 0.1, jnp.int32(820), steps, Unstructured())
    residuals = [float(run(steps).residual) for steps in (50, 150, 300)]
    assert residuals[2] <= residuals[1] <= residuals[0] and residuals[2] < 1e-2
    assert int(run(300).support.sum()) == 820
    few = pt.alps_core(jnp.asarray(w.T), jnp.asarray(h), 0.6, damping=0.0, refit_steps=0)
    more = pt.alps_core(jnp.asarray(w.T), jnp.asarray(h), 0.6, damping=0.0, refit_steps=10)
    assert error(h, w, rows(more)) < error(h, w, rows(few))


def test_alps_on_orthogonal_inputs_is_nearly_wanda_of_the_whole_layer():
    k, scale = jax.random.normal(jax.random.key(11), (32, 16)), jnp.arange(1.0, 33)
    found = pt.alps_core(k, jnp.diag(scale), 0.5, damping=0.0)
    best = pt.wanda_core(k, scale, 0.5, structure=Unstructured())
    kept = found.mask
    np.testing.assert_allclose(found.weights[kept], k[kept], rtol=1e-5)
    assert float(jnp.mean(found.mask == best.mask)) > 0.97
    lost = lambda p: float(jnp.sum(_layer.errors(jnp.diag(scale), k - p.weights)))
    assert lost(found) < 1.03 * lost(best)


# -- DSnoT ---------------------------------------------------------------------------------------------


def dsnot_layer():
    g = np.random.default_rng(0)
    x = g.normal(size=(300, 128)) * np.exp(g.normal(size=128)) + g.normal(size=128)
    k = jnp.asarray(g.normal(size=(128, 16)), jnp.float32)
    return k, jnp.asarray(x.mean(0), jnp.float32), jnp.asarray((x**2).mean(0), jnp.float32), x


@pytest.mark.parametrize("structure", [FanIn(), NM(2, 4)])
def test_swaps_lower_the_expected_error_of_every_output(structure):
    k, mean, sq, _ = dsnot_layer()
    sparsity = 0.5
    start = pt.wanda_core(k, sq, sparsity, structure=structure)
    expected = lambda m: np.abs(np.sum(np.where(m, 0.0, k * mean[:, None]), axis=0))
    before = [expected(start.mask)]
    for cycles in (1, 3, 10):
        found = pt.dsnot_core(k, mean, sq, sparsity, structure=structure, cycles=cycles)
        assert np.array_equal(found.mask.sum(0), start.mask.sum(0))
        assert (expected(found.mask) <= before[-1] + 1e-4).all()
        assert np.array_equal(found.weights, np.where(found.mask, k, 0.0))
        before.append(expected(found.mask))
    assert before[-1].mean() < (0.8 if isinstance(structure, NM) else 0.3) * before[0].mean()
    if isinstance(structure, NM):
        assert (np.asarray(found.mask).reshape(32, 4, 16).sum(1) == 2).all()


def test_one_swap_of_dsnot_is_that_of_the_paper():
    k, mean, sq, _ = dsnot_layer()
    w, m, s = (np.asarray(a, np.float64) for a in (k, mean, sq))
    start = np.asarray(pt.wanda_core(k, sq, 0.5).mask)
    found = np.asarray(pt.dsnot_core(k, mean, sq, 0.5, cycles=1).mask)
    for o in range(16):
        c = w[:, o] * m
        e = c[~start[:, o]].sum()
        pruned, kept = np.flatnonzero(~start[:, o]), np.flatnonzero(start[:, o])
        grow = pruned[np.argmax(np.sign(e) * (c / (s - m**2))[pruned])]
        others = kept[np.sign(e) * c[kept] < 0]
        drop = others[np.argmin((np.abs(w[:, o]) * np.sqrt(s))[others])]
        expected = start[:, o].copy()
        if abs(e - c[grow] + c[drop]) < abs(e):
            expected[[grow, drop]] = True, False
        assert np.array_equal(found[:, o], expected)


def test_inputs_of_mean_zero_are_never_swapped_and_the_gram_matrix_takes_back_what_hurts():
    k, mean, sq, x = dsnot_layer()
    still = pt.dsnot_core(k, jnp.zeros_like(mean), sq, 0.5)
    assert jnp.array_equal(still.mask, pt.wanda_core(k, sq, 0.5).mask)
    gram = jnp.asarray(x.T @ x / 300, jnp.float32)
    free = pt.dsnot_core(k, mean, sq, 0.6)
    guarded = pt.dsnot_core(k, mean, sq, 0.6, gram=gram)
    lost = lambda p: np.asarray(_layer.errors(gram, k - p.weights))
    start = lost(pt.wanda_core(k, sq, 0.6))
    assert (lost(guarded) <= start * (1 + 1e-5)).all() and (lost(free) > start * 1.01).any()


# -- All -------------------------------------------------------------------------------------------------


def core_calls(structure, sparsity):
    k, x = (
        jax.random.normal(jax.random.key(12), (16, 8)),
        jax.random.normal(jax.random.key(13), (99, 16)),
    )
    gram = x.T @ x
    sq = jnp.diagonal(gram)
    return {
        "magnitude": lambda: pt.magnitude_core(k, sparsity, structure=structure),
        "wanda": lambda: pt.wanda_core(k, sq, sparsity, structure=structure),
        "ria": lambda: pt.ria_core(k, sq, sparsity, structure=structure),
        "sparsegpt": lambda: pt.sparsegpt_core(k, gram, sparsity, structure=structure),
        "exact_obs": lambda: pt.exact_obs_core(k, gram, sparsity, structure=structure),
        "alps": lambda: pt.alps_core(k, gram, sparsity, structure=structure),
        "dsnot": lambda: pt.dsnot_core(k, jnp.mean(x, 0), sq / 99, sparsity, structure=structure),
    }


@pytest.mark.parametrize("name", core_calls(None, None))
def test_every_core_is_deterministic_and_refuses_what_it_cannot_do(name):
    call = lambda structure, sparsity: core_calls(structure, sparsity)[name]()
    first, second = call(FanIn(), 0.5), call(FanIn(), 0.5)
    assert jnp.array_equal(first.weights, second.weights)
    assert (np.asarray(first.mask).sum(0) == 8).all()
    with pytest.raises(ValueError, match="sparsity=1.5: must be in"):
        call(FanIn(), 1.5)
    with pytest.raises(ValueError, match="sparsity is missing"):
        call(FanIn(), None)
    with pytest.raises(ValueError, match="contradicts structure"):
        call(NM(2, 4), 0.7)
    with pytest.raises(ValueError, match="m=5 does not divide"):
        call(NM(2, 5), None)


def test_scores_alone_take_any_structure_and_sweeps_say_that_they_do_not():
    for name in ("magnitude", "wanda", "ria"):
        block = core_calls(Block(4, 4), 0.5)[name]()
        assert zeros(block) == 64
        assert (np.asarray(block.mask).reshape(4, 4, 2, 4).sum((1, 3)) % 16 == 0).all()
        assert zeros(core_calls(Channel(-2), 0.5)[name]()) == 64
        with pytest.raises(ValueError, match="leaves nothing"):
            core_calls(Block(16, 8), 0.5)[name]()
    for name in ("sparsegpt", "exact_obs", "alps", "dsnot"):
        with pytest.raises(ValueError, match=f"structure=Block.*{name}"):
            core_calls(Block(4, 4), 0.5)[name]()
