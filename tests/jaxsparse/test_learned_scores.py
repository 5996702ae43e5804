"""The parts of methods that train scores beside the weights: movement pruning and Edge-Popup."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training import masks, matrix, start, stepper

import jaxsparse
from jaxsparse.engines import keep_scored, score_learner, straight_through
from jaxsparse.engines.setup import setup


def largest(x, k):
    return np.argsort(-x.ravel(), kind="stable")[:k]


def test_movement_scores_are_the_sum_of_minus_g_z_and_pruned_weights_stand_still():
    sparse = setup(0.75)
    tx = straight_through(
        optax.adamw(0.1, weight_decay=0.1),
        sparse,
        keep_scored(sparse),
        pull_back=lambda v, _: jnp.where(v.m, v.g, 0.0),
        moves=lambda step: step.masks,
        learner=score_learner(optax.sgd(0.01)),
    )
    params, state = start(tx, {"kernel": matrix((8, 8)), "bias": jnp.ones(3)})
    scores, step = np.zeros((8, 8)), stepper(tx)
    for t in range(6):
        raw, held = np.asarray(state.raw["kernel"]), masks(state)["kernel"]
        g = matrix((8, 8), t + 1)
        params, state = step(params, state, {"kernel": g, "bias": jnp.ones(3)})
        scores -= 0.01 * np.asarray(g) * raw
        np.testing.assert_allclose(state.aux[0]["kernel"], scores, rtol=1e-5, atol=1e-7)
        new = masks(state)["kernel"]
        assert set(np.flatnonzero(new)) == set(largest(scores, 16))
        after = np.asarray(state.raw["kernel"])
        np.testing.assert_array_equal(after[~held], raw[~held])
        assert (after[held] != raw[held]).all()
        np.testing.assert_array_equal(params["kernel"], np.where(new, after, 0))
    assert state.aux[0]["bias"] is None and float(params["bias"][0]) < 1


def test_edge_popup_never_moves_a_weight_and_a_score_can_come_back():
    sparse = setup(0.5)
    uniform = lambda v: jax.random.uniform(jax.random.key(7), v.w.shape, minval=-1.0)
    tx = straight_through(
        optax.sgd(0.0),
        sparse,
        keep_scored(sparse, jnp.abs),
        learner=score_learner(optax.sgd(0.05), uniform, lambda d, s: d * jnp.sign(s)),
    )
    start_at = {"kernel": matrix((8, 8))}
    params, state = start(tx, start_at)
    scores = np.asarray(uniform(jaxsparse.engines.View(None, matrix((8, 8)))))
    seen, step = [masks(state)["kernel"]], stepper(tx)
    for t in range(8):
        g = np.asarray(matrix((8, 8), t + 1))
        params, state = step(params, state, {"kernel": jnp.asarray(g)})
        scores = scores - 0.05 * g * np.asarray(start_at["kernel"]) * np.sign(scores)
        seen.append(masks(state)["kernel"])
        assert set(np.flatnonzero(seen[-1])) == set(largest(np.abs(scores), 32))
        want = np.where(seen[-1], start_at["kernel"], 0)
        np.testing.assert_array_equal(params["kernel"], want)
    seen = np.stack(seen)
    back = (~seen[1:-1] & seen[2:] & np.logical_or.accumulate(seen, axis=0)[:-2]).any()
    assert back
