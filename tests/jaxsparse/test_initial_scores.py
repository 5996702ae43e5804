"""SNIP, GraSP and SynFlow: scores before training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.initial_scores import flow, given, grasp, snip, synflow

RNG = np.random.default_rng(0)
X, Y, W = (RNG.normal(size=shape).astype("f4") for shape in ((12, 5), (12,), (5,)))


def squared(params, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ params["w"] - y) ** 2)


def test_snip_of_a_regression_is_its_closed_form_and_batches_add_up_before_the_magnitude():
    want = np.abs(W * np.mean((X @ W - Y)[:, None] * X, axis=0))
    for batches in ([(X, Y)], [(X[:6], Y[:6]), (X[6:], Y[6:])]):
        np.testing.assert_allclose(snip(squared, {"w": W}, batches)["w"], want, rtol=1e-5)


def test_grasp_of_a_quadratic_is_w_a_a_w_and_the_change_of_the_gradients_norm():
    a = RNG.normal(size=(5, 5))
    a = a @ a.T
    quadratic = lambda p, a: 0.5 * p["w"] @ a @ p["w"]
    found = grasp(quadratic, {"w": W}, iter([a.astype("f4")]))["w"]
    np.testing.assert_allclose(found, W * (a @ a @ W), rtol=1e-4)
    norm, w = lambda w: 0.5 * np.sum((a @ w) ** 2), W.astype("f8")
    for q in range(5):
        step = 1e-6 * w * (np.arange(5) == q)
        change = (norm(w - step) - norm(w + step)) / 2e-6
        np.testing.assert_allclose(-found[q], change, rtol=1e-3, atol=1e-3)


def test_scores_without_a_batch_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        snip(squared, {"w": W}, [])


SIZES = (6, 40, 2, 40, 3)


def net(params, x):
    for i in range(len(SIZES) - 1):
        x = jax.nn.relu(x) @ params[f"layer_{i}"]["kernel"]
    return x


def network(seed=0):
    rng = np.random.default_rng(seed)
    pairs = zip(SIZES, SIZES[1:])
    return {f"layer_{i}": {"kernel": rng.normal(size=s).astype("f4")} for i, s in enumerate(pairs)}


def test_every_layer_carries_the_same_flow_whatever_the_signs_and_the_scales():
    params, x = network(), jnp.ones((1, 6))
    scores = flow(net, params, x)
    sums = [float(jnp.sum(s)) for s in jax.tree.leaves(scores)]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-4)
    # The oracle: products of matrices of magnitudes, in float64.
    sizes = [np.abs(p["kernel"]).astype("f8") for p in params.values()]
    left = np.ones(6) @ sizes[0]
    right = sizes[2] @ sizes[3] @ np.ones(3)
    want = left[:, None] * sizes[1] * right
    found = np.asarray(scores["layer_1"]["kernel"])
    np.testing.assert_allclose(found / found.sum(), want / want.sum(), rtol=1e-4)
    deep = jax.tree.map(lambda w: -1e12 * w, params)  # R would be 1e48 times as large
    again = np.asarray(flow(net, deep, x)["layer_1"]["kernel"])
    np.testing.assert_allclose(again / again.sum(), want / want.sum(), rtol=1e-4)


def test_a_thin_layer_survives_in_rounds_and_not_at_once_and_counts_are_exact():
    params, x = network(), jnp.ones((1, 6))
    total = sum(w.size for w in jax.tree.leaves(params))
    left = {}
    for rounds in (1, 30):
        masks = synflow(net, params, x, 0.98, rounds=rounds)
        left[rounds] = [int(m.sum()) for m in jax.tree.leaves(masks)]
        assert sum(left[rounds]) == total - int(0.98 * total)
    assert min(left[30]) > 0 and min(left[1]) == 0
    with pytest.raises(ValueError, match="rounds=0"):
        synflow(net, params, x, 0.5, rounds=0)


def test_masks_of_given_scores_train_on():
    params = network()
    loss = lambda p, x: jnp.mean(net(p, x) ** 2)
    scores = snip(loss, params, [X[:, :5] @ np.ones((5, 6), "f4")])
    _, masks = jaxsparse.prune(params, 0.5, score=given, stats=scores, allocation="global")
    kept = np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(masks)])
    worth = np.concatenate([np.asarray(s).ravel() for s in jax.tree.leaves(scores)])
    assert worth[kept].min() >= worth[~kept].max()
    state = jaxsparse.static(optax.sgd(0.1), masks=masks).init(params)
    assert jaxsparse.summarize(params, state).sparse.masked == kept.size - kept.sum()
