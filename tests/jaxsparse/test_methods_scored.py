"""Edge-Popup, movement pruning, lottery jackpots: what is their own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import masks, matrix, start, stepper

import jaxsparse

SGD = optax.sgd


def largest(x, k):
    return np.argsort(-x.ravel(), kind="stable")[:k]


def run(tx, params, steps, seed=1) -> list[Any]:
    """States after each step, under gradients that depend on the step alone."""
    params, state = start(tx, params)
    step = stepper(tx)
    rows: list[Any] = [(params, state, None)]
    for t in range(steps):
        g = {k: matrix(p.shape, seed + t) for k, p in params.items()}
        params, state = step(params, state, g)
        rows.append((params, state, g))
    return rows


# -- Movement pruning


def test_of_two_equal_weights_the_one_that_is_pushed_outward_stays():
    tx = jaxsparse.movement(
        SGD(0.0), 0.5, total_steps=10, begin_step=0, end_step=4, scores=SGD(0.1)
    )
    state: Any
    params, state = start(tx, {"kernel": jnp.array([[1.0, 1.0, -1.0, -1.0]])})
    step = stepper(tx)
    for _ in range(6):
        params, state = step(params, state, {"kernel": jnp.array([[1.0, -1.0, 1.0, -1.0]])})
    assert params["kernel"].tolist() == [[0, 1, -1, 0]]  # -g w > 0
    np.testing.assert_allclose(state.aux[0]["kernel"], [[-0.6, 0.6, 0.6, -0.6]], rtol=1e-6)


def test_movement_is_dense_until_it_begins_and_cubic_after():
    tx = jaxsparse.movement(SGD(0.1), 0.75, total_steps=20)
    rows = run(tx, {"kernel": matrix((16, 16))}, 20)
    left = [int(masks(s)["kernel"].sum()) for _, s, _ in rows[1:]]
    progress = np.clip((np.arange(20) - 2) / 14, 0, 1)
    want = [256 - int(256 * 0.75 * (1 - (1 - p) ** 3) + 1e-4) for p in progress]
    assert left == want
    for (_, state, _), (_, before, _) in zip(rows[1:], rows):
        raw, old, held = state.raw["kernel"], before.raw["kernel"], masks(before)["kernel"]
        np.testing.assert_array_equal(np.asarray(raw)[~held], np.asarray(old)[~held])


def test_the_scores_of_a_block_are_sums_over_it():
    tx = jaxsparse.movement(
        SGD(0.0),
        0.5,
        total_steps=4,
        begin_step=0,
        end_step=0,
        structure="block:2x2",
        scores=SGD(1.0),
    )
    w = matrix((4, 8), 3)
    (_, state, g) = run(tx, {"kernel": w}, 1)[-1]
    sums = -(np.asarray(w) * np.asarray(g["kernel"])).reshape(2, 2, 4, 2).sum(axis=(1, 3))
    kept = masks(state)["kernel"].reshape(2, 2, 4, 2).all(axis=(1, 3))
    assert set(np.flatnonzero(kept)) == set(largest(sums, 4))


def test_soft_movement_is_its_formula_in_numpy():
    tx = jaxsparse.soft_movement(
        SGD(0.1),
        total_steps=10,
        begin_step=0,
        end_step=4,
        strength=50.0,
        threshold=0.4,
        scores=SGD(0.2),
    )
    z, s, m = np.asarray(matrix((6, 6))), np.zeros((6, 6)), np.ones((6, 6), bool)
    sigma = lambda s: 1 / (1 + np.exp(-s))
    for t, (p, state, g) in enumerate(run(tx, {"kernel": jnp.asarray(z)}, 8)[1:]):
        ramp = 1 - (1 - min(t / 4, 1)) ** 3
        g = np.asarray(g["kernel"])
        s = s - 0.2 * (g * z + 50 * ramp / 36 * sigma(s) * (1 - sigma(s)))
        z = np.where(m, z - 0.1 * g, z)
        m = sigma(s) > 0.4 * ramp
        m.ravel()[largest(s, 1)] = True
        np.testing.assert_array_equal(masks(state)["kernel"], m)
        np.testing.assert_allclose(p["kernel"], np.where(m, z, 0), rtol=1e-4, atol=1e-6)
    assert 1 <= m.sum() < 30
    for options in ({"threshold": 1.0}, {"minimum": 0.0}, {"strength": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            jaxsparse.soft_movement(SGD(0.1), total_steps=10, **options)  # type: ignore


# -- Edge-Popup


def test_edge_popup_follows_the_gradient_of_a_soft_choice_and_weights_are_0_or_as_they_were():
    """The oracle: autodiff through sum |S| w, whose gradient is that of the straight-through estimator."""
    w = jax.random.normal(jax.random.key(0), (8, 8))
    tx = jaxsparse.edge_popup(SGD(0.1), 0.5, scores=SGD(0.5, momentum=0.9), seed=3)
    rows = run(tx, {"kernel": w, "bias": jnp.ones(2)}, 8)
    s = np.asarray(rows[0][1].aux[0]["kernel"])
    assert np.abs(s).max() <= 8**-0.5 and s.min() < 0 < s.max()
    velocity = np.zeros_like(s)
    for p, state, g in rows[1:]:
        slope = jax.grad(lambda s, g=g: jnp.sum(jnp.abs(s) * w * g["kernel"]))(jnp.asarray(s))
        velocity = 0.9 * velocity + np.asarray(slope)
        s = s - 0.5 * velocity
        np.testing.assert_allclose(state.aux[0]["kernel"], s, rtol=1e-4, atol=1e-6)
        m = masks(state)["kernel"]
        assert set(np.flatnonzero(m)) == set(largest(np.abs(s), 32))
        np.testing.assert_array_equal(p["kernel"], np.where(m, w, 0))
    assert (np.asarray(rows[-1][0]["bias"]) != 1).all()
    frozen = jaxsparse.edge_popup(optax.set_to_zero(), 0.5, scores=SGD(0.5))
    assert run(frozen, {"kernel": w, "bias": jnp.ones(2)}, 2)[-1][0]["bias"].tolist() == [1, 1]


def test_scores_that_start_from_weights_keep_the_largest_magnitudes_at_first():
    w = matrix((8, 8), 4)
    tx = jaxsparse.edge_popup(SGD(0.1), 0.5, first_scores="weights")
    assert set(np.flatnonzero(masks(tx.init({"kernel": w}))["kernel"])) == set(
        largest(np.abs(np.asarray(w)), 32)
    )
    with pytest.raises(ValueError, match="first_scores='zero'"):
        jaxsparse.edge_popup(SGD(0.1), 0.5, first_scores="zero")  # type: ignore


def test_signed_constants_have_the_variance_of_he_and_of_the_part_that_is_kept():
    for density in (1.0, 0.25):
        w = jaxsparse.signed_constant(density)(jax.random.key(0), (3, 3, 4, 50))
        np.testing.assert_allclose(jnp.abs(w), (2 / (36 * density)) ** 0.5, rtol=1e-6)
        assert abs(float(jnp.mean(w > 0)) - 0.5) < 0.05
    with pytest.raises(ValueError, match="density=0"):
        jaxsparse.signed_constant(0)


# -- Lottery jackpots


def jackpots(rate, steps=6):
    tx = jaxsparse.lottery_jackpots(
        optax.set_to_zero(), 0.75, total_steps=steps, scores=SGD(0.05), rate=rate
    )
    params = {"a": matrix((8, 8)), "b": 2 * matrix((8, 6), 9)}
    return params, run(tx, params, steps)


@pytest.mark.parametrize("rate", [0.0, 1.0, None])
def test_jackpots_exchange_the_best_swaps_and_so_many_only(rate):
    params, rows = jackpots(rate)
    flat = np.concatenate([np.abs(np.asarray(p)).ravel() for p in params.values()])
    old = masks(rows[0][1])
    both = np.concatenate([old[k].ravel() for k in params])
    assert set(np.flatnonzero(both)) == set(largest(flat, 28))
    s = {k: np.where(old[k], np.float32(1), np.float32(0.99)) for k in params}
    for t, (p, state, g) in enumerate(rows[1:]):
        r = (1 - t / 6) ** 4 if rate is None else rate
        new = masks(state)
        for k, w in params.items():
            s[k] = s[k] - np.float32(0.05) * (np.asarray(g[k]) * np.asarray(w))
            np.testing.assert_allclose(state.aux[0][k], s[k], rtol=1e-5)
            best = np.zeros(w.size, bool)
            best[largest(s[k], old[k].sum())] = True
            best = best.reshape(w.shape)
            enter, leave = best & ~old[k], old[k] & ~best
            n = int(np.ceil(r * enter.sum() - 1e-6))
            want = old[k].copy()
            places = np.flatnonzero(enter)
            want.ravel()[places[np.argsort(-s[k].ravel()[places])][:n]] = True
            places = np.flatnonzero(leave)
            want.ravel()[places[np.argsort(s[k].ravel()[places])][:n]] = False
            np.testing.assert_array_equal(new[k], want)
            np.testing.assert_array_equal(p[k], np.where(want, w, 0))
            if rate == 1.0:
                np.testing.assert_array_equal(want, best)
            if rate == 0.0:
                np.testing.assert_array_equal(want, masks(rows[0][1])[k])
        old = new
