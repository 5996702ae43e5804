"""Sparse Bayesian learning, dictionaries and unrolled solvers, against NumPy, closed forms and ISTA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.decomposition import DictionaryLearning

from jaxsparse import coding


def planted(seed, m, n, k, samples, noise=0.0):
    """(unit-norm dictionary, k-sparse Gaussian codes, signals)."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(m, n))
    a /= np.linalg.norm(a, axis=0)
    x = np.zeros((samples, n))
    for row in x:
        row[rng.choice(n, k, replace=False)] = rng.normal(size=k)
    return a, x, x @ a.T + noise * rng.normal(size=(samples, m))


def float32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


# -- Sparse Bayesian learning ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("rule", "learn_noise"))
def run_sbl(a, y, noise, steps, rule="em", learn_noise=False):
    return coding.sbl(a, y, noise, steps=steps, rule=rule, learn_noise=learn_noise, prune=0.0)


def cost(a, y, gamma, noise):
    s = noise * np.eye(len(y)) + a @ np.diag(gamma) @ a.T
    return np.linalg.slogdet(s)[1] + y @ np.linalg.solve(s, y)


def test_em_is_its_loop_and_never_raises_the_cost():
    a, _, y = planted(0, 12, 24, 2, 2, noise=0.01)
    with jax.enable_x64(True):
        for signal in range(2):
            gamma, before = np.ones(24), np.inf
            for step in range(1, 31):
                s = 0.01 * np.eye(12) + a @ np.diag(gamma) @ a.T
                sigma = np.diag(gamma) - np.diag(gamma) @ a.T @ np.linalg.inv(s) @ a @ np.diag(
                    gamma
                )
                mean = gamma * (a.T @ np.linalg.solve(s, y[signal]))
                gamma = mean**2 + np.diag(sigma)
                if step in (1, 2, 5, 30):
                    found = run_sbl(a, jnp.asarray(y), 0.01, step)
                    np.testing.assert_allclose(found.gamma[signal], gamma, rtol=1e-7)
                    now = float(coding.sbl_cost(a, jnp.asarray(y), found.gamma, 0.01)[signal])
                    np.testing.assert_allclose(now, cost(a, y[signal], gamma, 0.01), rtol=1e-8)
                    assert now <= before + 1e-9
                    before = now


def test_the_fixed_point_finds_planted_codes():
    a, x, y = planted(1, 30, 60, 4, 3, noise=0.01)
    with jax.enable_x64(True):
        found = coding.sbl(a, jnp.asarray(y), 1e-4, steps=100, rule="fixed_point")
    strong = np.abs(x) > 0.1
    assert (np.asarray(found.mean)[strong] != 0).all()
    assert np.abs(np.asarray(found.mean) - x).max() < 0.06
    assert ((np.asarray(found.gamma) > 0).sum(-1) <= 10).all()


def test_noise_is_learned_where_signals_are_longer_than_codes():
    a, _, y = planted(7, 60, 6, 6, 3, noise=0.1)
    learned = coding.sbl(*float32(a, y), 1.0, steps=100, learn_noise=True)
    fit = [np.linalg.lstsq(a, row, rcond=None)[0] for row in y]
    expected = ((y - np.stack(fit) @ a.T) ** 2).sum(-1) / 54  # without bias
    np.testing.assert_allclose(learned.noise, expected, rtol=0.15)


def test_one_unit_has_the_fixed_point_of_its_closed_form():
    y = jnp.array([[2.0], [0.5], [0.1]])
    found = coding.sbl(jnp.eye(1), y, 0.09, steps=200, rule="fixed_point", prune=0.0)
    np.testing.assert_allclose(found.gamma, np.maximum(y**2 - 0.09, 0), atol=2e-3)


# -- Dictionaries ----------------------------------------------------------------------------------


def test_a_refit_of_atoms_never_raises_the_error_and_is_the_svd():
    a, _, y = planted(2, 8, 12, 2, 60)
    with jax.enable_x64(True):
        d = jnp.asarray(y[:12].T / np.linalg.norm(y[:12], axis=1))
        refit = jax.jit(lambda d, z: coding.refit_atoms(jnp.asarray(y), d, z, powers=200))
        z = coding.omp(d, jnp.asarray(y), 2)
        d, z, new, codes = (np.asarray(v) for v in (d, z, *refit(d, z)))
    expected, error = np.array(d), np.linalg.norm(y - z @ d.T)
    ze = np.array(z)
    for j in range(12):
        use = np.asarray(z)[:, j] != 0
        if not use.any():
            continue
        e = (y - ze @ expected.T)[use] + np.outer(ze[use, j], expected[:, j])
        _, s, vt = np.linalg.svd(e, full_matrices=False)
        sign = np.sign(vt[0] @ np.asarray(new)[:, j])
        expected[:, j], ze[use, j] = sign * vt[0], e @ vt[0] * sign
        after = np.linalg.norm(y - ze @ expected.T)
        assert after <= error + 1e-9
        error = after
    np.testing.assert_allclose(new, expected, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(y - codes @ new.T), error, rtol=1e-6)
    assert ((np.asarray(codes) != 0) <= (np.asarray(z) != 0)).all()


def test_ksvd_finds_planted_atoms_and_is_no_worse_than_scikit_learn():
    a, _, y = planted(3, 16, 24, 3, 600)
    learned = coding.ksvd(*float32(y, y[:24].T), 3, steps=30)
    d, z = np.asarray(learned.dictionary), np.asarray(learned.codes)
    np.testing.assert_allclose(np.linalg.norm(d, axis=0), 1, atol=1e-5)
    assert ((z != 0).sum(-1) <= 3).all()
    assert (np.abs(a.T @ d).max(1) > 0.99).mean() > 0.7
    other = DictionaryLearning(
        24,
        alpha=0.1,
        max_iter=20,
        transform_algorithm="omp",
        transform_n_nonzero_coefs=3,
        random_state=0,
        tol=1e-3,
    )
    codes = other.fit(y[:150]).transform(y)
    theirs = np.linalg.norm(y - codes @ other.components_)
    assert np.linalg.norm(y - z @ d.T) <= theirs


def test_an_atom_without_use_becomes_the_worst_signal():
    y = jnp.array([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 3.0]])
    start = jnp.array([[1.0, 0.99], [0.0, 0.01], [0.0, 0.0]])
    learned = coding.ksvd(y, start, 1, steps=2)
    assert float(jnp.max(jnp.abs(learned.dictionary[2]))) > 0.99


def test_masking_scores_what_the_codes_have_not_seen():
    a, _, y = planted(4, 12, 20, 2, 6, noise=0.1)
    kept = np.arange(12) < 10
    d, signals, mask = *float32(a, y), jnp.asarray(kept)
    value, slope = jax.value_and_grad(coding.masked_loss)(d, signals, 2, mask)
    total = 0.0
    for row in y:
        chosen, r = [], row[kept]
        for _ in range(2):
            sub = a[kept] / np.linalg.norm(a[kept], axis=0)
            chosen.append(int(np.abs(sub.T @ r).argmax()))
            w = np.linalg.lstsq(a[kept][:, chosen], row[kept], rcond=None)[0]
            r = row[kept] - a[kept][:, chosen] @ w
        total += ((row[~kept] - a[~kept][:, chosen] @ w) ** 2).sum()
    np.testing.assert_allclose(value, total / 6, rtol=1e-4)
    assert not np.asarray(slope)[kept].any() and np.asarray(slope)[~kept].any()


# -- Unrolled solvers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noiseless():
    """(A, W, codes, signals) of 100 x 200, five in a hundred entries not 0, float32."""
    a, x, y = planted(5, 100, 200, 10, 16)
    with jax.enable_x64(True):
        w = np.asarray(coding.analytic_weights(jnp.asarray(a)))
    return *float32(a, w, x, y), a, w


def test_lista_starts_as_ista(noiseless):
    a, _, _, y, *_ = noiseless
    expected = coding.ista(a, y, 0.05, steps=6)
    np.testing.assert_allclose(coding.lista(coding.lista_init(a, 0.05, 6), y), expected, atol=1e-4)
    coupled = coding.lista_cpss(coding.coupled_init(a, 0.05, 6), a, y, p=0.0)
    np.testing.assert_allclose(coupled, expected, atol=1e-4)


def test_analytic_weights_have_a_unit_diagonal_and_less_coherence(noiseless):
    *_, a, w = noiseless
    product = w.T @ a
    np.testing.assert_allclose(np.diag(product), 1, atol=1e-12)
    off = lambda g: np.sum((g - np.diag(np.diag(g))) ** 2)
    assert off(product) < 0.6 * off(a.T @ a)
    rng = np.random.default_rng(0)  # no other W of unit diagonal has a smaller product
    for _ in range(20):
        other = w + 0.01 * rng.normal(size=w.shape)
        other = other + a * (1 - (other * a).sum(0)) / (a * a).sum(0)
        assert np.linalg.norm(other.T @ a) >= np.linalg.norm(product)


def test_untrained_alista_is_far_ahead_of_ista_and_fista(noiseless):
    a, w, x, y, *_ = noiseless
    found = float(coding.nmse(coding.alista(coding.alista_init(16), a, w, y), x))
    for solve in (coding.ista, coding.fista):
        others = [float(coding.nmse(solve(a, y, s, steps=16), x)) for s in (0.02, 0.1)]
        assert found < min(others) - 20


def test_hyperlista_finds_the_codes_and_commutes_with_scalings(noiseless):
    a, w, x, y, *_ = noiseless
    solve = jax.jit(lambda y: coding.hyperlista(coding.Hyper(0.02, 0.01, 0.02), a, w, y))
    found = solve(y)
    assert float(coding.nmse(found, x)) < -50
    np.testing.assert_allclose(solve(8 * y), 8 * found, atol=1e-3)
    assert not np.asarray(solve(0 * y)).any()


def test_training_makes_lista_better_than_ista():
    a, x, y = planted(6, 10, 20, 2, 256)
    a, x, y = float32(a, x, y)
    params, tx = coding.lista_init(a, 0.1, 4), optax.adam(3e-3)
    loss = lambda p: jnp.mean(jnp.sum((coding.lista(p, y) - x) ** 2, -1))

    @jax.jit
    def train(params):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    assert float(loss(train(params))) < 0.6 * float(loss(params))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: coding.sbl(a, jnp.ones(3), 0.0), "noise=0.0"),
        (lambda a: coding.sbl(a, jnp.ones(3), 1.0, rule="best"), "em, fixed_point"),
        (lambda a: coding.ksvd(jnp.ones(3), a, 1), "give a matrix"),
        (lambda a: coding.ksvd(jnp.ones((5, 3)), a, 4), "k=4: give an integer from 1 to 3"),
        (lambda a: coding.lista_init(a, 0.1, 0), "layers=0"),
        (lambda a: coding.analytic_weights(a[:, :2]), "as many atoms as rows"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.eye(3))
