"""Random masks: wider networks come closer to dense ones, by a log-width law; longer runs give sparse
networks more than dense ones. On handwritten digits, which the dense networks saturate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import QUICK
from sklearn.datasets import load_digits

import jaxsparse

SEEDS = 2


@functools.cache
def digits():
    """Pixels and labels of 1,197 training and 600 test examples."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = (data.data[order] / 16).astype(np.float32), data.target[order]
    # NumPy arrays: the first call is traced, and JAX arrays made there must not be kept.
    return x[600:], y[600:], x[:600], y[:600]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICK)
def accuracies(width, sparsity, steps):
    """The test accuracy of a network of three matrices, of each seed."""
    x, y, x_test, y_test = map(jnp.asarray, digits())
    he = jax.nn.initializers.he_normal()
    inner = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def logits(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]

    def loss(p, rows):
        found = optax.softmax_cross_entropy_with_integer_labels(logits(p, x[rows]), y[rows])
        return found.mean()

    def one(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = {"a": (64, width), "b": (width, width), "c": (width, 10)}
        p = {k: he(key, s) for key, (k, s) in zip(keys, shapes.items())}
        tx = jaxsparse.static(inner, sparsity, seed=seed) if sparsity else inner
        state = tx.init(p)
        p = jaxsparse.apply_masks(p, state) if sparsity else p

        def step(carry, t):
            p, state = carry
            rows = jax.random.randint(jax.random.fold_in(keys[3], t), (64,), 0, len(y))
            updates, state = tx.update(jax.grad(loss)(p, rows), state, p)
            return (optax.apply_updates(p, updates), state), None

        (p, state), _ = jax.lax.scan(step, (p, state), jnp.arange(steps))
        return jnp.mean(logits(p, x_test).argmax(-1) == y_test)

    return jax.vmap(one)(jnp.arange(SEEDS))


def accuracy(*setting):
    return float(np.mean(accuracies(*setting)))


@pytest.mark.slow
def test_the_gap_of_a_random_mask_to_the_dense_network_shrinks_with_the_width():
    gaps = [accuracy(n, 0.0, 200) - accuracy(n, 0.9, 200) for n in (32, 64, 128)]
    assert gaps[0] > gaps[1] + 0.05 > gaps[2] + 0.1, gaps


@pytest.mark.slow
def test_four_times_the_steps_give_a_sparse_network_more_than_a_saturated_dense_one():
    gain = lambda sparsity: accuracy(64, sparsity, 1200) - accuracy(64, sparsity, 300)
    dense, sparse = gain(0.0), gain(0.9)
    assert abs(dense) < 0.03 and sparse > dense + 0.05, (dense, sparse)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("missing", [0.1, 0.01])
def test_a_random_network_as_wide_as_the_log_law_says_holds_every_edge(sparsity, missing):
    """An edge of a target is there if one of n copies kept it: all but S^n of them, so that
    n = log(1/missing) / log(1/S) copies do, and half as many leave the root of that."""
    width = int(np.ceil(np.log(1 / missing) / np.log(1 / sparsity)))
    for n in (width, width // 2):
        tx = jaxsparse.static(optax.sgd(0.1), sparsity, allocation="uniform")
        mask = np.asarray(jaxsparse.get_masks(tx.init({"kernel": jnp.ones((20_000, n))}))["kernel"])
        absent = 1 - mask.any(axis=1).mean()
        expected = sparsity**n
        assert abs(absent - expected) < 5 * np.sqrt(expected / 20_000) + 1e-3
    assert sparsity**width <= missing


def subset_sum_error(width, sparsity, targets=60):
    """The geometric mean of the error with which sums of kept random weights meet a target."""
    rng = np.random.default_rng(width)
    w, goal = rng.uniform(-1, 1, (width, targets)), rng.uniform(-0.5, 0.5, targets)
    tx = jaxsparse.static(optax.sgd(0.1), sparsity, allocation="uniform", seed=width)
    masks = jaxsparse.get_masks(tx.init({"kernel": jnp.asarray(w, jnp.float32)}))
    kept, errors = np.asarray(masks["kernel"]), []
    for j in range(targets):
        sums = np.zeros(1)
        for value in w[kept[:, j], j]:
            sums = np.concatenate([sums, sums + value])
        errors.append(np.abs(sums - goal[j]).min())
    return float(np.exp(np.mean(np.log(np.array(errors) + 1e-12))))


def test_the_error_of_the_best_subset_falls_exponentially_in_the_width_over_the_log_law():
    slope = {}
    for sparsity in (0.5, 0.75):
        errors = [subset_sum_error(n, sparsity) for n in (4, 12, 20)]
        assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
        slope[sparsity] = np.log(errors[0] / errors[-1]) / 16
    wider = slope[0.5] / slope[0.75]  # how much wider the sparser network must be
    assert wider == pytest.approx(np.log(1 / 0.5) / np.log(1 / 0.75), rel=0.35)
