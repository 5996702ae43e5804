"""Kronecker-structured learning, clipped and incomplete sound, incomplete matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.coding import audio, completion, kronecker


def test_kronecker_learning_is_that_of_the_large_matrix():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 6)), rng.normal(size=(4, 7))
    y = rng.normal(size=(5, 4))
    big, g, h = np.kron(a, b), np.ones(6), np.ones(7)
    with jax.enable_x64(True):
        solve = lambda steps: kronecker.kronecker_sbl(
            [jnp.asarray(a), jnp.asarray(b)], jnp.asarray(y), 0.1, steps=steps, prune=0.0
        )
        found = jax.jit(solve)(3)
    for step in range(4):
        gamma = np.kron(g, h)
        s = 0.1 * np.eye(20) + big @ np.diag(gamma) @ big.T
        mean = gamma * (big.T @ np.linalg.solve(s, y.ravel()))
        leverage = np.diag(big.T @ np.linalg.inv(s) @ big)
        if step == 3:
            break
        moments = (mean**2 + gamma - gamma**2 * leverage).reshape(6, 7)
        for _ in range(5):
            g = (moments / h).mean(1)
            h = (moments / g[:, None]).mean(0)
            g, h = g / np.linalg.norm(g), h * np.linalg.norm(g)
    np.testing.assert_allclose(found.mean, mean.reshape(6, 7), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.outer(*found.gammas), np.outer(g, h), rtol=1e-6)


def test_tied_variances_lower_their_objective_to_a_scale_optimum():
    moments = np.random.default_rng(1).uniform(0.1, 2, (6, 6))
    with jax.enable_x64(True):
        solve = jax.jit(
            lambda n: kronecker.tie(jnp.asarray(moments), [jnp.ones(6), jnp.ones(6)], inner=n)
        )
        gammas = [np.outer(*solve(n)) for n in (1, 2, 3, 50)]
    costs = [(np.log(g) + moments / g).sum() for g in gammas]
    assert all(after <= before + 1e-12 for before, after in zip(costs, costs[1:]))
    np.testing.assert_allclose((moments / gammas[-1]).sum(), 36)


def test_kronecker_support_is_found():
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=(8, 12)) / np.sqrt(8) for _ in range(2))
    x = np.zeros((12, 12))
    x[np.ix_([1, 7], [3, 9])] = rng.uniform(1, 2, (2, 2))
    y = a @ x @ b.T
    found = kronecker.kronecker_sbl(
        [jnp.asarray(v, jnp.float32) for v in (a, b)], jnp.asarray(y, jnp.float32), 1e-4, steps=100
    )
    np.testing.assert_allclose(found.mean, x, atol=0.1)


# -- Sound -----------------------------------------------------------------------------------------


def tones():
    t = np.arange(256)
    return np.sin(2 * np.pi * 9 * t / 256) + 0.6 * np.sin(2 * np.pi * 31 * t / 256 + 1)


def decibels(truth, found):
    return 10 * np.log10((truth**2).sum() / ((truth - found) ** 2).sum())


def test_a_clipped_sound_is_restored_and_stays_consistent():
    truth = tones()
    y = np.clip(truth, -0.6, 0.6).astype(np.float32)
    high, low = y >= np.float32(0.6), y <= -np.float32(0.6)
    assert (high | low).mean() > 0.4
    for variant in ("analysis", "synthesis"):
        found = np.asarray(
            audio.declip(
                jnp.asarray(y), high, low, variant=variant, every=1, tolerance=1e-3, steps=300
            )
        )
        assert (found[~(high | low)] == y[~(high | low)]).all()
        assert (found[high] >= y[high]).all() and (found[low] <= y[low]).all()
        assert decibels(truth, found) > 45, variant


def test_a_gap_is_filled_and_frames_are_apart():
    truth = tones()
    known = np.ones((2, 256), bool)
    known[0, 100:120] = False
    y = jnp.asarray(np.where(known, truth, 0), jnp.float32)
    for variant in ("analysis", "synthesis"):
        found = np.asarray(
            audio.inpaint(y, jnp.asarray(known), variant=variant, tolerance=1e-3, steps=300)
        )
        assert (found[known] == np.asarray(y)[known]).all()
        assert decibels(truth[100:120], found[0, 100:120]) > 55, variant


# -- Matrices --------------------------------------------------------------------------------------


def test_a_matrix_of_rank_two_is_completed():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 60))
    known = rng.random((60, 60)) < 0.35
    with jax.enable_x64(True):
        solve = jax.jit(
            lambda steps: completion.complete(
                jnp.asarray(np.where(known, truth, np.nan)), jnp.asarray(known), 2, steps=steps
            )
        )
        found = [np.asarray(u) @ np.asarray(v).T for u, v in map(solve, (1, 2, 3, 5, 8, 60))]
    errors = [np.linalg.norm((f - truth)[known]) for f in found]
    assert all(after <= before + 1e-9 for before, after in zip(errors, errors[1:]))
    assert np.linalg.norm(found[-1] - truth) < 1e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: audio.inpaint(jnp.ones(4), jnp.ones(3, bool)), "known has shape"),
        (lambda: audio.inpaint(jnp.ones(4), jnp.ones(4, bool), variant="x"), "variant='x'"),
        (lambda: completion.complete(jnp.ones((3, 3)), jnp.ones((3, 3), bool), 4), "rank=4"),
        (lambda: kronecker.kronecker_sbl([jnp.eye(2)], jnp.ones(3), 1.0), "signal has shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
