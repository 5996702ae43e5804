"""Transport, factors, predicted codes, signatures, change points, coverage, low rank, movies: the checks of
their cards, against oracles in NumPy and SciPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.interpolate
import scipy.linalg
import scipy.optimize
from sklearn.linear_model import LassoCV, MultiTaskLassoCV

from jaxsparse import coding
from pallas_kernels import Condensed, condensed_matmul


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


# ---- transport ------------------------------------------------------------------------------------


def test_sparse_newton_needs_a_fraction_of_the_sweeps(double):
    n, eta = 60, 200.0
    rng = np.random.default_rng(0)
    cost, uniform = jnp.asarray(rng.random((n, n))), jnp.full(n, 1 / n)
    newton = jax.jit(lambda c: coding.sinkhorn_newton(c, uniform, uniform, eta, tolerance=1e-10))
    sweeps = jax.jit(
        lambda c: coding.sinkhorn(c, uniform, uniform, eta, steps=60_000, tolerance=1e-10)
    )
    found, slow = newton(cost), sweeps(cost)
    assert float(found.error) <= 1e-10 and int(found.steps) <= 120
    assert int(slow.steps) > 10 * int(found.steps)
    plan = np.asarray(coding.transport_plan(found, cost, eta))
    np.testing.assert_allclose(plan.sum(0), 1 / n, atol=1e-10)
    np.testing.assert_allclose(plan, coding.transport_plan(slow, cost, eta), atol=1e-8)
    full = coding.sinkhorn_newton(cost, uniform, uniform, eta, density=1.0, tolerance=1e-10)
    assert int(full.steps) <= 20 + 12


def test_a_cold_plan_is_the_best_assignment(double):
    rng = np.random.default_rng(1)
    cost, ones = rng.random((8, 8)), jnp.ones(8)
    found = coding.sinkhorn_newton(jnp.asarray(cost), ones, ones, 500.0, tolerance=1e-9)
    _, best = scipy.optimize.linear_sum_assignment(cost)
    plan = np.asarray(coding.transport_plan(found, jnp.asarray(cost), 500.0))
    assert plan.argmax(1).tolist() == best.tolist()


# ---- products of sparse factors -------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 4])
def test_a_hadamard_matrix_is_its_butterflies(double, levels):
    n = 2**levels
    h = jnp.asarray(scipy.linalg.hadamard(n), jnp.float64)
    own = [coding.keep_in_rows_or_columns(2)] * (levels - 1)
    rest = [coding.keep_in_rows_or_columns(n // 2**i) for i in range(1, levels)]
    found = coding.factorize(h, own, rest)
    assert np.linalg.norm(found.dense - h) / np.linalg.norm(h) < 1e-12
    assert [int((s != 0).sum()) for s in found.factors] == [2 * n] * levels
    assert all(abs(np.linalg.norm(s) - 1) < 1e-12 for s in found.factors)
    residual = np.asarray(h - found.dense)
    assert abs((residual * np.asarray(found.dense)).sum()) < 1e-9
    x, y = jnp.ones((2, n), jnp.float32), jnp.ones((2, n), jnp.float32)
    for s in found.factors:  # the factors run as stored
        y = condensed_matmul(y, Condensed.from_dense(s.astype(jnp.float32)))
    np.testing.assert_allclose(found.scale * y, x @ h, atol=1e-3)


def test_for_a_fixed_scale_the_error_never_grows(double):
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(9, 12)))
    start = coding.Factors(
        jnp.asarray(3.0), (jnp.eye(9), jnp.asarray(rng.normal(size=(9, 12))) / 10)
    )
    sets = [coding.keep(30), coding.keep_in_columns(3)]
    start = start._replace(factors=tuple(p(s) for p, s in zip(sets, start.factors)))
    errors = []
    for _ in range(12):
        errors.append(float(jnp.linalg.norm(start.dense - a)))
        start = coding.palm(a, start, sets, steps=1)._replace(scale=jnp.asarray(3.0))
    assert all(after <= before + 1e-9 for before, after in zip(errors, errors[1:]))
    for p, s in zip(sets, start.factors):
        np.testing.assert_allclose(p(s), s, atol=1e-12)


# ---- predicted codes ------------------------------------------------------------------------------


def test_codes_of_an_orthonormal_dictionary_are_in_closed_form(double):
    rng = np.random.default_rng(0)
    b, y = np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.normal(size=(4, 6))
    f = rng.normal(size=(4, 6))
    solve = lambda alpha: coding.psd_codes(
        *map(jnp.asarray, (b, y, f)), 0.6, alpha=alpha, steps=600
    )
    v = y @ b + 0.7 * f
    want = np.sign(v) * np.maximum(np.abs(v) - 0.3, 0) / 1.7
    np.testing.assert_allclose(solve(0.7), want, atol=1e-9)
    np.testing.assert_allclose(solve(1e6), f, atol=1e-5)
    lasso = coding.fista(
        jnp.asarray(b), jnp.asarray(y), 0.3, steps=300
    )  # half the loss, half the strength
    np.testing.assert_allclose(solve(0.0), lasso, atol=1e-9)


def test_a_trained_encoder_is_a_warm_start():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(8, 12))
    true /= np.linalg.norm(true, axis=0)
    codes = rng.normal(size=(300, 12)) * (rng.random((300, 12)) < 0.15)
    y = jnp.asarray(codes @ true.T, jnp.float32)
    start = coding.unit_atoms(jnp.asarray(rng.normal(size=(8, 12)), jnp.float32))
    parameters = start, coding.psd_init(start)
    tx = optax.adam(3e-3)

    @jax.jit
    def train(parameters):
        def step(carry, _):
            (d, e), state = carry
            loss = lambda p: coding.psd_loss(p, y, 0.1, steps=30)
            updates, state = tx.update(jax.grad(loss)((d, e)), state, (d, e))
            d, e = optax.apply_updates((d, e), updates)
            return ((coding.unit_atoms(d), e), state), None

        return jax.lax.scan(step, (parameters, tx.init(parameters)), length=150)[0][0]

    d, encoder = train(parameters)
    np.testing.assert_allclose(jnp.linalg.norm(d, axis=0), 1, atol=1e-5)
    best = coding.psd_codes(d, y, jnp.zeros((300, 12)), 0.1, alpha=0.0, steps=500)
    gap = lambda z: float(jnp.linalg.norm(z - best))
    few = lambda z: coding.psd_codes(d, y, z, 0.1, alpha=0.0, steps=3)
    assert gap(encoder(y)) < 0.6 * gap(jnp.zeros_like(best))
    assert gap(few(encoder(y))) < gap(few(jnp.zeros_like(best)))


def test_no_gradient_reaches_the_encoder_through_the_codes():
    d = jnp.eye(2)
    encoder = coding.Encoder(jnp.eye(2), jnp.zeros(2), jnp.ones(2))
    y = jnp.array([[1.0, -2.0]])
    gradient = jax.grad(lambda e: coding.psd_loss((d, e), y, 0.2))(encoder)
    z = coding.psd_codes(d, y, encoder(y), 0.2)
    want = jax.grad(lambda e: ((z - e(y)) ** 2).sum())(encoder)
    for a, b in zip(gradient, want):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# ---- signatures -----------------------------------------------------------------------------------


def test_signatures_of_lines_their_shuffles_and_points_in_between(double):
    v = np.array([0.3, -1.0, 2.0])
    line = coding.signature(jnp.asarray(np.outer([0.0, 0.2, 1.0], v)), 3)
    for k, level in enumerate(line, 1):
        want = v if k == 1 else np.multiply.outer(v, v) if k == 2 else np.einsum("i,j,k", v, v, v)
        np.testing.assert_allclose(level, want / math.factorial(k), atol=1e-12)
    path = np.random.default_rng(0).normal(size=(7, 2))
    first, second, _ = coding.signature(jnp.asarray(path), 3)
    np.testing.assert_allclose(second + second.T, np.multiply.outer(first, first), atol=1e-12)
    fine = np.insert(path, 3, 0.3 * path[2] + 0.7 * path[3], axis=0)
    for a, b in zip(coding.signature(jnp.asarray(path), 3), coding.signature(jnp.asarray(fine), 3)):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_the_lasso_on_signatures_finds_what_drives_a_system(double):
    """y is 2 times the integral of x1 d x2: one entry of level 2."""
    rng = np.random.default_rng(0)
    paths = np.cumsum(rng.normal(size=(80, 12, 3)), 1)
    paths[:, :, 0] = np.linspace(0, 1, 12)
    paths -= paths[:, :1]
    features = jax.jit(jax.vmap(lambda p: coding.signature_features(p, 2)))(jnp.asarray(paths))
    x = np.asarray(features)
    variation = np.linalg.norm(np.diff(paths, axis=1), axis=2).sum(1)
    middle = (paths[:, 1:, 1] + paths[:, :-1, 1]) / 2
    y = 2 * (middle * np.diff(paths[:, :, 2], axis=1)).sum(1) / variation**2
    scale = x.std(0) + 1e-12
    w = coding.fista(jnp.asarray(x / scale), jnp.asarray(y), 0.01, steps=3000)
    place = 3 + 1 * 3 + 2
    assert int(np.abs(w).argmax()) == place
    assert abs(float(w[place]) / scale[place] - 2) < 0.2
    assert (np.abs(np.delete(np.asarray(w), place)) < 0.1 * abs(float(w[place]))).all()


def driven_paths(n, seed):
    """Paths of time and two walks, and 2 times the integral of x1 d x2, which is linear in one entry of level 2."""
    paths = np.cumsum(np.random.default_rng(seed).normal(size=(n, 10, 3)), 1)
    paths[:, :, 0] = np.linspace(0, 1, 10)
    paths -= paths[:, :1]
    paths /= np.linalg.norm(np.diff(paths, axis=1), axis=2).sum(1)[:, None, None]
    middle = (paths[:, 1:, 1] + paths[:, :-1, 1]) / 2
    return paths, 2 * np.cumsum(middle * np.diff(paths[:, :, 2], axis=1), 1)


@pytest.mark.parametrize("q", [1, 2])
def test_strengths_of_signatures_are_those_of_scikit_learns_cross_validation(double, q):
    paths, along = driven_paths(33, 0)
    targets = (
        along[:, -1:] * np.arange(1, q + 1) + np.random.default_rng(1).normal(size=(33, q)) / 100
    )
    alphas = np.logspace(-3, -5.5, 12)
    fit = jax.jit(lambda x, y: coding.fit_signatures(x, y, 2, alphas=alphas, steps=4000))(
        jnp.asarray(paths), jnp.asarray(targets if q > 1 else targets[:, 0])
    )
    x = np.concatenate([paths[:, -1], level_two(paths).reshape(33, -1)], 1)  # variations are 1
    kind = LassoCV if q == 1 else MultiTaskLassoCV
    model = kind(alphas=alphas, cv=5, tol=1e-9, max_iter=100_000)
    model.fit(x, targets if q > 1 else targets[:, 0])
    np.testing.assert_allclose(fit.alphas, model.alphas_)
    np.testing.assert_allclose(fit.errors, model.mse_path_.mean(1), rtol=1e-4)
    assert float(fit.alpha) == pytest.approx(model.alpha_)
    np.testing.assert_allclose(fit.weights, np.atleast_2d(model.coef_).T, atol=1e-5)
    np.testing.assert_allclose(fit.intercept, np.atleast_1d(model.intercept_), atol=1e-7)


def level_two(paths):
    """The second level of piecewise linear paths, as a double sum over segments."""
    v = np.diff(paths, axis=1)
    before = np.cumsum(v, 1) - v
    return np.einsum("bti,btj->bij", before + v / 2, v)


def test_a_system_is_predicted_at_every_point_of_paths_that_were_not_seen(double):
    paths, along = driven_paths(60, 0)
    fit = jax.jit(lambda x, y: coding.fit_signatures(x, y, 2, factorial=True, steps=1000))(
        jnp.asarray(paths), jnp.asarray(along[:, -1])
    )
    new, _ = driven_paths(20, 5)
    found = np.asarray(jax.jit(jax.vmap(fit.along))(jnp.asarray(new)))
    for t in (3, 9):  # as for the path that ends there, scaled by its own variation
        cut = new[:, : t + 1]
        alone = np.asarray(jax.jit(jax.vmap(fit))(jnp.asarray(cut)))
        np.testing.assert_allclose(found[:, t - 1], alone, atol=1e-12)
        scaled = cut / np.linalg.norm(np.diff(cut, axis=1), axis=2).sum(1)[:, None, None]
        truth = 2 * level_two(scaled)[:, 1, 2]
        assert ((alone - truth) ** 2).mean() < 0.02 * truth.var()
    place = 3 + 1 * 3 + 2
    weights = np.abs(np.asarray(fit.weights)[:, 0])
    assert weights.argmax() == place and np.delete(weights, place).max() < 0.1 * weights[place]


# ---- change points --------------------------------------------------------------------------------


def shifts(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(600, 40))
    x[200:400, :5] += 1
    x[400:, :5] += 3
    return x


@pytest.mark.parametrize("grid", [20, 30])
def test_changes_off_the_grid_are_refined(grid):
    cost = coding.mean_cost(shifts(), 0.1)
    found = coding.change_points(cost, 600, 200.0, grid=grid)
    assert coding.hausdorff(found, [200, 400]) <= 3
    assert coding.change_points(cost, 600, np.inf, grid=grid) == []


def test_the_finest_grid_is_brute_force():
    x = np.random.default_rng(3).normal(size=(12, 2)) + np.repeat([[0.0], [3.0], [-1.0]], 4, 0)
    cost = coding.mean_cost(x)
    splits = [s for r in range(12) for s in itertools.combinations(range(1, 12), r)]
    total = lambda s: sum(cost(a, b) + 4.0 for a, b in zip((0, *s), (*s, 12)))
    found = coding.change_points(cost, 12, 4.0, grid=11, buffer=12)  # nothing is moved
    assert tuple(found) == min(splits, key=total)
    mean = x[2:7].mean(0)
    assert cost(2, 7) == pytest.approx(((x[2:7] - mean) ** 2).sum())


# ---- coverage -------------------------------------------------------------------------------------


def test_greedy_and_one_pass_keep_their_bounds_in_any_order():
    rng = np.random.default_rng(0)
    run = jax.jit(lambda s: (coding.cover_greedily(s, 3), coding.cover_stream(s, 3, epsilon=0.05)))
    for _ in range(12):
        s = rng.random((12, 9)) ** 4
        best = max(s[list(c)].max(0).sum() for c in itertools.combinations(range(12), 3))
        greedy, taken = run(jnp.asarray(s, jnp.float32))
        assert s[np.asarray(greedy)].max(0).sum() >= (1 - 1 / math.e) * best
        assert len(set(greedy.tolist())) == 3 and int(taken.sum()) <= 3
        assert float(coding.coverage(jnp.asarray(s), taken)) >= (0.5 - 0.05) * best


# ---- low rank -------------------------------------------------------------------------------------


def test_singular_values_shrink_and_steps_shrink(double):
    a = np.random.default_rng(0).normal(size=(6, 4))
    after = np.linalg.svd(coding.singular_soft(jnp.asarray(a), 0.8), compute_uv=False)
    want = np.maximum(np.linalg.svd(a, compute_uv=False) - 0.8, 0)
    np.testing.assert_allclose(after, want, atol=1e-10)
    step = jnp.asarray(
        np.repeat([0.0, 4.0], [5, 3])
    )  # levels move by t / length towards each other
    found = coding.fused(step, 0.6, steps=2000)
    np.testing.assert_allclose(found, np.repeat([0.6 / 5, 4 - 0.6 / 3], [5, 3]), atol=1e-6)


def test_a_still_scene_and_a_moving_square_are_separated(double):
    rng = np.random.default_rng(0)
    still = np.outer(np.ones(40), rng.random(80))
    moving = np.zeros((40, 80))
    for t in range(40):
        moving[t, (2 * t) % 76 : (2 * t) % 76 + 4] = 3.0
    found = jax.jit(coding.separate)(jnp.asarray(still + moving))
    assert np.linalg.norm(found.low_rank - still) < 1e-2 * np.linalg.norm(still)
    assert np.linalg.matrix_rank(np.asarray(found.low_rank), tol=1e-2) == 1
    np.testing.assert_allclose(found.low_rank + found.sparse, still + moving, atol=1e-4)


def everything(shape):
    size = math.prod(shape)
    return coding.Operator(lambda x: x, lambda r: r, 1.0, size, size)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_nuclear_norm_or_one_variation_has_the_closed_form(double, axis):
    y = np.random.default_rng(0).normal(size=(3, 4, 5))
    low_rank = tuple(0.7 if a == axis else 0.0 for a in range(3))
    found, errors = coding.rdledm(everything(y.shape), jnp.asarray(y.ravel()), y.shape,
                                  space=0.0, time=0.0, low_rank=low_rank, error=None)  # fmt: skip
    u, s, vt = np.linalg.svd(
        np.moveaxis(y, axis, 0).reshape(y.shape[axis], -1), full_matrices=False
    )
    want = (u * np.maximum(s - 0.7, 0)) @ vt
    np.testing.assert_allclose(np.moveaxis(found, axis, 0).reshape(want.shape), want, atol=1e-8)
    assert not np.asarray(errors).any()
    step = np.moveaxis(np.zeros((6, 2, 2)) + np.repeat([0.0, 3.0], [2, 4])[:, None, None], 0, axis)
    found, _ = coding.rdledm(everything(step.shape), jnp.asarray(step.ravel()), step.shape,
                             space=float(axis > 0), time=float(axis == 0), low_rank=(0.0, 0.0, 0.0),
                             error=None, steps=2000)  # fmt: skip
    line = np.moveaxis(np.asarray(found), axis, 0)[
        :, 0, 0
    ]  # 1 moves over the jump, shared by each side
    np.testing.assert_allclose(line, np.repeat([1 / 2, 3 - 1 / 4], [2, 4]), atol=1e-6)


def test_all_terms_together_reach_the_least_objective(double):
    """Against a quasi-Newton method on the objective with every kink rounded off, of a map that is not square."""
    shape, rng = (3, 2, 3), np.random.default_rng(1)
    r = rng.normal(size=(12, 18))
    y = rng.normal(size=12) * 3
    op = coding.Operator(
        lambda x: x @ jnp.asarray(r.T), lambda z: z @ jnp.asarray(r), np.linalg.norm(r, 2), 12, 18
    )
    found = jax.jit(
        lambda y: coding.rdledm(
            op, y, shape, space=0.3, time=0.2, low_rank=(0.4, 0.1, 0.0), error=0.9, steps=20_000
        )  # fmt: skip
    )(jnp.asarray(y))

    def objective(z, round_=0.0):
        x, e = z.reshape(2, *shape)
        size = lambda v: np.sqrt(v**2 + round_**2).sum()
        singular = lambda axis: np.linalg.svd(
            np.moveaxis(x, axis, 0).reshape(shape[axis], -1), compute_uv=False
        )
        return (
            0.5 * ((r @ (x + e).ravel() - y) ** 2).sum()
            + 0.3 * (size(np.diff(x, axis=1)) + size(np.diff(x, axis=2)))
            + 0.2 * size(np.diff(x, axis=0))
            + 0.4 * size(singular(0)) + 0.1 * size(singular(1)) + 0.9 * size(e)
        )  # fmt: skip

    ours = np.stack([found.movie, found.errors]).ravel()
    z = np.zeros(36)
    for rounding in (1e-1, 1e-2, 1e-3, 1e-4):
        z = scipy.optimize.minimize(objective, z, (rounding,), "BFGS", options={"maxiter": 400}).x
    assert 0.5 < (np.asarray(found.errors) == 0).mean() < 1
    assert objective(ours) < objective(z) + 1e-6
    assert objective(ours) > objective(z, 1e-4) - 80 * 1e-4  # what rounding off adds at most


def test_gross_errors_of_a_movie_are_found_apart(double):
    frames, side = 8, 10
    movie = np.zeros((frames, side, side))
    movie[:, 2:8, 2:6] = 1
    movie[4:, 5:9, 5:9] += 0.5
    rng = np.random.default_rng(0)
    places = rng.choice(movie.size, 30, replace=False)
    gross = np.zeros(movie.size)
    gross[places] = rng.choice([-5, 5], 30)
    y = movie.ravel() + gross + 0.02 * rng.normal(size=movie.size)
    run = lambda error: jax.jit(
        lambda y: coding.rdledm(
            everything(movie.shape),
            y,
            movie.shape,
            space=0.1,
            time=0.1,
            low_rank=(0.1, 0.0, 0.0),
            error=error,
        )  # fmt: skip
    )(jnp.asarray(y))
    found, plain = run(0.3), run(None)
    off = lambda m: np.linalg.norm(np.asarray(m) - movie) / np.linalg.norm(movie)
    assert 3 * off(found.movie) < 0.6 < off(plain.movie)
    assert set(np.flatnonzero(np.abs(np.asarray(found.errors).ravel()) > 2)) == set(places)


def test_a_decomposition_grows_like_that_of_the_whole_matrix(double):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 50))
    svd = coding.truncated_svd(jnp.asarray(a), 8)
    whole = a
    for _ in range(3):
        columns = np.sort(rng.permutation(50)[:6])
        values = rng.normal(size=(5, 6))
        values[4] = values[3]  # a row that depends on another
        e = np.zeros((5, 50))
        e[:, columns] = values
        svd = svd.add_rows(jnp.asarray(columns), jnp.asarray(values))
        u, s, vt = np.linalg.svd(np.concatenate([whole, e]), full_matrices=False)
        whole = u[:, :8] * s[:8] @ vt[:8]
        np.testing.assert_allclose(svd.values, s[:8], rtol=1e-12)
        np.testing.assert_allclose((svd.u * svd.values) @ svd.v.T, whole, atol=1e-10)
        for q in (svd.u, svd.v):
            np.testing.assert_allclose(q.T @ q, np.eye(8), atol=1e-12)
    rows, values = np.array([3, 40]), rng.normal(size=(2, 2))
    wide = svd.add_columns(jnp.asarray(rows), jnp.asarray(values))
    new = np.zeros((75, 2))
    new[rows] = values.T
    u, s, vt = np.linalg.svd(np.concatenate([whole, new], 1), full_matrices=False)
    np.testing.assert_allclose(
        (wide.u * wide.values) @ wide.v.T, u[:, :8] * s[:8] @ vt[:8], atol=1e-10
    )
    assert float(wide.refresh().condition) == pytest.approx(1)
    np.testing.assert_allclose(wide.refresh().u, wide.u, atol=1e-12)


def test_a_maintained_projection_is_that_of_weights_within_the_factor(double):
    rng = np.random.default_rng(0)
    a, w = rng.normal(size=(6, 20)), rng.random(20) + 0.5
    state = coding.maintain(jnp.asarray(a), jnp.asarray(w))
    true = w.copy()
    for _ in range(4):
        true = true * np.exp(0.3 * rng.normal(size=20))
        state = coding.reweigh(state, jnp.asarray(true), factor=0.2)
        assert (np.abs(true / np.asarray(state.weights) - 1) <= 0.2).all()
        used = np.asarray(state.weights)
        np.testing.assert_allclose(state.inverse, np.linalg.inv(a * used @ a.T), atol=1e-12)
    p = np.asarray(state.project(jnp.eye(20)))
    np.testing.assert_allclose(p @ p, p, atol=1e-12)
    assert np.trace(p) == pytest.approx(6)
    exact = coding.reweigh(state, jnp.asarray(true), factor=0.0)
    np.testing.assert_allclose(exact.inverse, np.linalg.inv(a * true @ a.T), atol=1e-12)
    few = coding.reweigh(state, jnp.asarray(true * 2), factor=0.0, most=3)
    assert int((few.weights == true * 2).sum()) == 3


# ---- movies ---------------------------------------------------------------------------------------


def test_splines_are_natural_cubic_ones():
    y = np.random.default_rng(0).normal(size=6)
    spline = scipy.interpolate.CubicSpline(np.arange(6), y, bc_type="natural")
    found = coding.spline_matrix(6, 31) @ y
    np.testing.assert_allclose(found, spline(np.linspace(0, 5, 31)), atol=1e-12)


def test_a_movie_of_low_rank_is_recovered_and_tied_to_its_copy():
    rng = np.random.default_rng(0)
    images = rng.random((2, 30))
    curves = coding.spline_matrix(4, 16) @ rng.random((4, 2))
    movie = jnp.asarray(curves @ images, jnp.float32)
    see = coding.Operator(lambda x: x, lambda r: r, 1.0, 480, 480)
    options = dict(frames=16, rank=2, knots=4, learning_rate=0.03, steps=60)
    run = lambda **o: coding.red_psm(see, movie.ravel(), lambda f: f, **(options | o))
    found = jax.jit(run)()
    assert float(jnp.linalg.norm(found.movie - movie) / jnp.linalg.norm(movie)) < 0.02
    assert float(jnp.abs(found.movie - found.denoised).max()) < 0.1
    once = run(steps=1, strength=0.0)
    np.testing.assert_allclose(once.denoised, once.movie, atol=1e-5)  # no denoising, no dual yet


# ---- bad input ------------------------------------------------------------------------------------

ONES = jnp.ones(3)
REFUSED = [
    (lambda: coding.sinkhorn(jnp.ones((2, 3)), ONES, ONES, 1.0), r"rows \(3,\), columns \(3,\)"),
    (
        lambda: coding.sinkhorn(jnp.ones((3, 3)), ONES, 2 * ONES, 1.0),
        "rows sum to 3 and columns to 6",
    ),
    (lambda: coding.sinkhorn(jnp.ones((3, 3)), ONES, ONES, 0.0), "eta=0.0: use a positive"),
    (
        lambda: coding.sinkhorn_newton(jnp.ones((3, 3)), ONES, ONES, 1.0, density=2.0),
        "density=2.0: use a share",
    ),
    (lambda: coding.keep(0), "k=0: give an integer of at least 1"),
    (
        lambda: coding.factorize(jnp.eye(4), [coding.keep(2)], []),
        "factors, residuals and sizes: 1, 0 and 1",
    ),
    (
        lambda: coding.palm(jnp.eye(2), coding.Factors(jnp.ones(()), (jnp.eye(2),)), []),
        "0 of them for 1 factors",
    ),
    (
        lambda: coding.psd_codes(jnp.eye(2), jnp.ones((3, 2)), jnp.ones((2, 2)), 0.1),
        r"predicted has shape \(2, 2\): must be \(3, 2\)",
    ),
    (lambda: coding.signature(jnp.ones((1, 2)), 2), r"path has shape \(1, 2\)"),
    (lambda: coding.signature(jnp.ones((4, 2)), 0), "order=0"),
    (
        lambda: coding.rdledm(everything((2, 2, 2)), jnp.ones(8), (2, 2, 3)),
        r"shape=\(2, 2, 3\): give",
    ),
    (lambda: coding.rdledm(everything((2, 2, 2)), jnp.ones(8), (2, 2, 2), time=-1.0), "time=-1"),
    (lambda: coding.fit_signatures(jnp.ones((4, 2)), ONES, 2), r"paths have shape \(4, 2\)"),
    (lambda: coding.fit_signatures(jnp.ones((4, 3, 2)), ONES, 2), r"targets have shape \(3,\)"),
    (lambda: coding.fit_signatures(jnp.ones((3, 3, 2)), ONES, 2, folds=4), "folds=4: use 2 to 3"),
    (lambda: coding.change_points(coding.mean_cost(ONES), 3, 1.0, grid=3), "grid=3: use 1 to 2"),
    (lambda: coding.cover_greedily(-jnp.eye(3), 2), "similarity="),
    (lambda: coding.truncated_svd(jnp.eye(3), 4), "rank=4"),
    (
        lambda: coding.truncated_svd(jnp.eye(3), 2).add_rows(jnp.arange(2), jnp.ones((1, 3))),
        r"values have shape \(1, 3\) for \(2,\) columns",
    ),
    (lambda: coding.maintain(jnp.eye(3), -ONES), "weights="),
    (lambda: coding.separate(ONES), r"matrix has shape \(3,\)"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- what a fresh pair of eyes broke --------------------------------------------------------------


def test_a_new_direction_may_take_the_place_of_an_old_one():
    svd = coding.truncated_svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 2)
    grown = jax.jit(lambda s: s.add_rows(jnp.array([2]), jnp.array([[10.0]])))(svd)
    np.testing.assert_allclose(grown.values, [10, 3], rtol=1e-6)
    want = np.zeros((4, 3))
    want[3, 2], want[0, 0] = 10, 3
    np.testing.assert_allclose((grown.u * grown.values) @ grown.v.T, want, atol=1e-5)
    flat = coding.truncated_svd(jnp.outer(jnp.arange(1.0, 5), jnp.ones(3)), 2)  # of rank 1
    flat = flat.add_rows(jnp.array([0, 1]), jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(((flat.u * flat.values) @ flat.v.T)[-1], [1, 2, 0], atol=1e-4)


def test_the_code_of_an_atom_is_that_atom():
    assert coding.local_codes(jnp.eye(3), jnp.eye(3)[0], 1).tolist() == [1, 0, 0]
    twice = coding.local_codes(jnp.array([[1.0, 1, 0], [0, 0, 1]]), jnp.array([1.0, 0]), 2)
    np.testing.assert_allclose(twice, [0.5, 0.5, 0], atol=1e-6)
    with jax.enable_x64(True):
        one = coding.local_codes(jnp.eye(3, dtype="float32"), jnp.eye(3, dtype="float32")[1], 2)
        assert one.dtype == jnp.float32


@pytest.mark.parametrize("first, buffer", [(15, 0), (12, 10)])
def test_moving_a_change_never_makes_it_worse(first, buffer):
    cost = coding.mean_cost([0.0] * first + [5.0] * (100 - first))
    assert coding.change_points(cost, 100, 1.0, grid=99, buffer=buffer) == [first]


def test_types_of_paths_and_of_costs():
    with jax.enable_x64(True):
        first, _ = coding.signature(jnp.array([[0.0, 0], [1, 2]], jnp.float32), 2)
        assert first.dtype == jnp.float32
    assert coding.signature(jnp.ones((2, 2), jnp.bfloat16), 2)[1].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="path has dtype int32: give floats"):
        coding.signature(jnp.ones((2, 2), jnp.int32), 2)
    for cost in (jnp.array([[0, 1], [1, 0]]), jnp.array([[0, 1], [1, 0]], jnp.bfloat16)):
        for solve in (coding.sinkhorn, coding.sinkhorn_newton):
            assert float(solve(cost, jnp.ones(2), jnp.ones(2), 2.0).error) < 1e-5


def test_a_projection_is_given_as_many_weights_as_it_has():
    state = coding.maintain(jnp.eye(3), ONES)
    with pytest.raises(ValueError, match=r"weights have shape \(1,\): must be \(3,\)"):
        coding.reweigh(state, jnp.ones(1))
