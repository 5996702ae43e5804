"""Solvers of sparse coding against scikit-learn, closed forms and their bounds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, OrthogonalMatchingPursuit

from jaxsparse import coding

M, N, B = 60, 80, 5


@pytest.fixture(scope="module")
def problem():
    """(unit-norm dictionary, signals of 3 atoms each, their codes), in NumPy."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(M, N))
    a /= np.linalg.norm(a, axis=0)
    x = np.zeros((B, N))
    for row in x:
        row[rng.choice(N, 3, replace=False)] = rng.choice([-1, 1], 3) * rng.uniform(1, 2, 3)
    return a, x @ a.T + 0.01 * rng.normal(size=(B, M)), x


@pytest.fixture(scope="module")
def lasso(problem):
    """(strength, solutions of scikit-learn, their objective)."""
    a, y, _ = problem
    model = Lasso(alpha=0.1 / M, fit_intercept=False, tol=1e-13, max_iter=100_000)
    x = model.fit(a, y.T).coef_
    return 0.1, x, objective(a, y, x, 0.1)


def objective(a, y, x, strength):
    return 0.5 * ((y - x @ a.T) ** 2).sum(-1) + strength * np.abs(x).sum(-1)


# One compilation of each solver for all tests: the number of steps is traced.
ISTA = jax.jit(lambda a, y, s, steps: coding.ista(a, y, s, steps=steps))
FISTA = jax.jit(lambda a, y, s, steps: coding.fista(a, y, s, steps=steps, restart=False))
RESTARTED = jax.jit(lambda a, y, s, steps: coding.fista(a, y, s, steps=steps))
ADMM = jax.jit(lambda a, y, s, rho, steps: coding.admm(a, y, s, rho=rho, steps=steps))
SETS = jax.jit(
    lambda a, y, s, rounds: coding.working_set(a, y, s, size=16, rounds=rounds, sweeps=40)
)


@pytest.mark.parametrize("name", ["ista", "fista", "restarted", "admm", "sets"])
def test_lasso_is_that_of_scikit_learn(problem, lasso, name):
    a, y, _ = problem
    strength, expected, best = lasso
    with jax.enable_x64(True):
        solve = {
            "ista": lambda: ISTA(a, y, strength, 20000),
            "fista": lambda: FISTA(a, y, strength, 5000),
            "restarted": lambda: RESTARTED(a, y, strength, 1000),
            "admm": lambda: ADMM(a, y, strength, 1.0, 2000),
            "sets": lambda: SETS(a, y, strength, 6).codes,
        }[name]
        x = np.asarray(solve())
        gap = np.asarray(coding.duality_gap(a, jnp.asarray(y), jnp.asarray(x), strength))
    assert x.dtype == np.float64
    np.testing.assert_allclose(objective(a, y, x, strength), best, rtol=1e-8)
    np.testing.assert_allclose(x, expected, atol=1e-4)
    assert (gap < 1e-7).all()
    slope = (y - x @ a.T) @ a  # the conditions of optimality, entry by entry
    np.testing.assert_allclose(slope[x != 0], strength * np.sign(x[x != 0]), atol=1e-6)
    assert (np.abs(slope) <= strength + 1e-6).all() and (x == 0).mean() > 0.5


def by_all_supports(a, y, strength):
    """The least objective: for every support with signs, where the gradient vanishes and signs agree."""
    best = 0.5 * (y**2).sum()
    for signs in itertools.product((-1, 0, 1), repeat=a.shape[1]):
        signs = np.array(signs)
        on = signs != 0
        x = np.zeros(a.shape[1])
        if on.any():
            x[on] = np.linalg.lstsq(a[:, on].T @ a[:, on], a[:, on].T @ y - strength * signs[on])[0]
        best = min(best, objective(a, y, x, strength))
    return best


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), strength=st.floats(0.05, 3.0), size=st.sampled_from((1, 2, 5)))
def test_the_gap_of_working_sets_is_a_certificate_whatever_the_size(seed, strength, size):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(4, 5)) * rng.choice([0.0, 0.3, 1.0, 4.0], 5)  # of all lengths, zero too
    a[:, 1] = a[:, 0] if seed % 3 == 0 else a[:, 1]
    y = rng.normal(size=4)
    with jax.enable_x64(True):
        codes, gap = map(np.asarray, SMALL(a, y, strength, size))
    excess = objective(a, y, codes, strength) - by_all_supports(a, y, strength)
    assert -1e-9 <= excess <= gap + 1e-9
    assert (codes != 0).sum() <= size
    if size == 5:  # all atoms: coordinate descent converges
        assert excess < 1e-6


SMALL = jax.jit(
    lambda a, y, s, size: coding.working_set(a, y, s, size=size, rounds=8, sweeps=60),
    static_argnums=3,
)


def test_a_set_that_is_too_small_is_reported_and_fista_goes_on_from_it(problem, lasso):
    a, y, _ = (jnp.asarray(v, jnp.float32) for v in problem)
    needed = (lasso[1] != 0).sum(-1)
    assert needed.min() > 2
    found = coding.working_set(a, y, lasso[0], size=2)
    excess = objective(a, y, found.codes, lasso[0]) - lasso[2]
    assert (found.gap >= excess).all() and (excess > 0.1).all()
    after = coding.fista(a, y, lasso[0], steps=300, init=found.codes)
    np.testing.assert_allclose(objective(a, y, after, lasso[0]), lasso[2], rtol=1e-5)


def test_working_sets_take_a_strength_for_each_signal_and_map(problem):
    a, y, _ = (jnp.asarray(v, jnp.float32) for v in problem)
    strengths = jnp.linspace(0.05, 0.5, B)[:, None]
    together = coding.working_set(a, y, strengths, size=16)
    apart = jax.vmap(lambda y, s: coding.working_set(a, y, s, size=16))(y, strengths)
    assert together.gap.shape == (B,)
    np.testing.assert_allclose(together.codes, apart.codes, atol=1e-5)
    np.testing.assert_allclose(together.gap, apart.gap, atol=1e-4)
    for one, signal, strength in zip(together.codes, y, strengths):
        alone = coding.fista(a, signal, strength, steps=500)
        np.testing.assert_allclose(one, alone, atol=2e-4)
    with pytest.raises(ValueError, match="type Operator: give a matrix"):
        coding.working_set(coding.Operator(lambda x: x, lambda r: r, 1.0, M, M), y, 0.1)  # pyright: ignore
    with pytest.raises(ValueError, match="size=0"):
        coding.working_set(a, y, 0.1, size=0)
    with pytest.raises(ValueError, match="strength=0"):
        coding.working_set(a, y, 0.0)


def test_ista_falls_at_every_step_and_both_keep_their_bounds(problem, lasso):
    a, y, _ = problem
    strength, solution, best = lasso
    lipschitz = (1.001 * np.linalg.norm(a, 2)) ** 2
    radius = (solution**2).sum(-1)
    before = objective(a, y, np.zeros((B, N)), strength)
    with jax.enable_x64(True):
        for k in (1, 2, 3, 5, 8, 13, 40, 100):
            plain = objective(a, y, np.asarray(ISTA(a, y, strength, k)), strength)
            fast = objective(a, y, np.asarray(FISTA(a, y, strength, k)), strength)
            assert (plain <= before + 1e-12).all()
            assert (plain - best <= lipschitz * radius / (2 * k)).all()
            assert (fast - best <= 2 * lipschitz * radius / (k + 1) ** 2).all()
            before = plain


def test_a_strength_above_every_correlation_gives_exact_zeros(problem):
    a, y, _ = problem
    with jax.enable_x64(True):
        x = RESTARTED(a, y, float(np.abs(y @ a).max()), 50)
    assert not np.asarray(x).any()


def test_an_orthonormal_dictionary_takes_one_step(problem):
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    op = coding.Dense(jnp.asarray(q, jnp.float32), jnp.ones(()))
    y = jnp.asarray(np.random.default_rng(2).normal(size=(3, 6)), jnp.float32)
    v = np.asarray(y) @ q
    expected = np.sign(v) * np.maximum(np.abs(v) - 0.3, 0)
    np.testing.assert_allclose(coding.ista(op, y, 0.3, steps=1), expected, atol=1e-6)


def test_the_solution_of_admm_does_not_depend_on_rho(problem, lasso):
    a, y, _ = problem
    with jax.enable_x64(True):
        for rho in (0.3, 3.0):
            np.testing.assert_allclose(ADMM(a, y, lasso[0], rho, 4000), lasso[1], atol=1e-5)


def test_functions_do_as_matrices_do(problem):
    a, y, _ = (jnp.asarray(v, jnp.float32) for v in problem)
    op = coding.Operator(
        lambda x: x @ a.T, lambda r: r @ a, 1.001 * float(np.linalg.norm(a, 2)), M, N
    )
    np.testing.assert_allclose(
        coding.fista(op, y, 0.1, steps=50), coding.fista(a, y, 0.1, steps=50), atol=1e-4
    )
    np.testing.assert_allclose(coding.omp(op, y, 3), coding.omp(a, y, 3), atol=1e-5)
    bound = coding.norm_bound(op.forward, op.adjoint, N)
    assert np.linalg.norm(a, 2) <= bound <= 1.06 * np.linalg.norm(a, 2)


def test_hard_thresholding_keeps_k_and_lowers_the_residual(problem):
    a, y, truth = problem
    with jax.enable_x64(True):
        solve = jax.jit(lambda steps: coding.iht(a, jnp.asarray(y), 3, steps=steps))
        found = [np.asarray(solve(k)) for k in (1, 5, 20, 500)]
    errors = np.stack([np.linalg.norm(y - x @ a.T, axis=-1) for x in found])
    assert (np.diff(errors, axis=0) <= 1e-12).all()
    assert all(((x != 0).sum(-1) <= 3).all() for x in found)
    assert ((found[-1] != 0) == (truth != 0)).all()


def test_admm_projects_on_k_atoms(problem):
    a, y, truth = problem
    project = lambda v, t: coding.keep_largest(v, 3)
    x = coding.admm(
        jnp.asarray(a, jnp.float32), jnp.asarray(y, jnp.float32), prox=project, steps=300
    )
    assert ((x != 0).sum(-1) == 3).all()
    assert ((np.asarray(x) != 0) == (truth != 0)).all()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_omp_is_that_of_scikit_learn(problem, k):
    a, y, _ = problem
    model = OrthogonalMatchingPursuit(n_nonzero_coefs=k, fit_intercept=False)
    expected = model.fit(a, y.T).coef_
    with jax.enable_x64(True):
        x = np.asarray(coding.omp(jnp.asarray(a), jnp.asarray(y), k))
    np.testing.assert_allclose(x, expected, atol=1e-9)
    rest = y - x @ a.T
    for signal, row in zip(rest, x):
        assert np.abs(signal @ a[:, row != 0]).max() < 1e-8


def test_omp_finds_planted_atoms_and_stops_when_nothing_is_left(problem):
    a, _, truth = problem
    y = truth @ a.T
    with jax.enable_x64(True):
        scaled = a * np.linspace(0.1, 5, N)  # the norms of atoms do not matter
        x = np.asarray(coding.omp(jnp.asarray(scaled), jnp.asarray(y), 8))
    np.testing.assert_allclose(x * np.linspace(0.1, 5, N), truth, atol=1e-10)
    assert ((x != 0) == (truth != 0)).all()


def test_omp_never_takes_an_atom_twice():
    a = jnp.array(
        [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    )  # two equal, none for the last
    x = coding.omp(a, jnp.array([[2.0, 1.0, 5.0]]), 3)
    assert x.tolist() == [[2.0, 0.0, 1.0]]
    assert coding.omp(a, jnp.zeros(3), 2).tolist() == [0.0, 0.0, 0.0]
    assert coding.omp(a, jnp.array([2.0, 1.0, 0.0]), 2, tolerance=1.5).tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("nonnegative", [False, True])
def test_gradient_pursuit_is_its_loop(problem, nonnegative):
    a, y, _ = problem
    found = coding.gradient_pursuit(
        jnp.asarray(a, jnp.float32), jnp.asarray(y, jnp.float32), 4, nonnegative=nonnegative
    )
    for signal, row in zip(y, np.asarray(found)):
        x, chosen = np.zeros(N), []
        for _ in range(4):
            r = signal - a @ x
            slope = a.T @ r
            score = slope.copy() if nonnegative else np.abs(slope)
            score[chosen] = -np.inf
            chosen.append(int(score.argmax()))
            g = np.zeros(N)
            g[chosen] = slope[chosen]
            c = a @ g
            x = x + (c @ r) / (c @ c) * g
            x = np.maximum(x, 0) if nonnegative else x
        np.testing.assert_allclose(row, x, atol=1e-4)


def test_proximal_operators_minimise_what_they_say():
    rng = np.random.default_rng(3)
    v = rng.normal(size=6)
    cases = {
        "soft": (coding.soft, lambda x: np.abs(x).sum()),
        "soft_nonnegative": (
            coding.soft_nonnegative,
            lambda x: np.abs(x).sum() + (np.inf if (x < 0).any() else 0),
        ),
        "hard": (coding.hard, lambda x: (x != 0).sum()),
        "group": (
            lambda v, t: coding.group_soft(v, t, 2),
            lambda x: np.linalg.norm(x.reshape(-1, 2), axis=1).sum(),
        ),
        "fused": (coding.fused, lambda x: np.abs(np.diff(x)).sum()),
    }
    for name, (prox, penalty) in cases.items():
        cost = lambda x, penalty=penalty: 0.5 * ((x - v) ** 2).sum() + 0.4 * penalty(x)
        best = np.asarray(prox(jnp.asarray(v, jnp.float32), 0.4), np.float64)
        others = best + rng.normal(size=(500, 6)) * rng.choice([1e-3, 0.1, 1.0], (500, 1))
        others = np.concatenate([others, best * (rng.random((200, 6)) > 0.3)])
        assert cost(best) <= min(cost(x) for x in others) + 1e-5, name


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, y: coding.omp(a, y, 61), "k=61: give an integer from 1 to 60"),
        (lambda a, y: coding.iht(a, y, 81), "k=81: give an integer from 1 to 80"),
        (lambda a, y: coding.fista(a, y[:, :-1], 0.1), "the dictionary 60 rows"),
        (lambda a, y: coding.fista(a, y * np.nan, 0.1), "signals have NaN"),
        (lambda a, y: coding.fista(a[:, :0], y, 0.1), "at least one atom"),
        (lambda a, y: coding.ista(a, y, -1.0), "strength=-1.0"),
        (lambda a, y: coding.admm(a, y, 1.0, rho=0.0), "rho=0.0"),
        (lambda a, y: coding.ista(a, y, 1.0, init=y), "init has shape"),
        (lambda a, y: coding.group_soft(y, 1.0, 7), "size=7 does not divide"),
    ],
)
def test_bad_input_is_named(problem, call, message):
    a, y, _ = (jnp.asarray(v, jnp.float32) for v in problem)
    with pytest.raises(ValueError, match=message):
        call(a, y)
