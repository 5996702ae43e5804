"""Posteriors of weights: SSVI, its layers, variational dropout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training import stepper

import jaxsparse
from jaxsparse.methods.ssvi import folded_normal
from jaxsparse.nn import BayesianLinear, VariationalDropoutLinear, dropout_kl


@pytest.mark.parametrize(
    "mu, sigma, mean, ratio",
    [
        (1, 1, 1.166631, 1.459461),
        (0.5, 1, 0.895593, 1.338178),
        (0, 1, 0.797885, 1.323608),
        (1, 0.1, 1.0, 10.0),
    ],
)
def test_the_size_of_a_normal_weight_has_the_moments_of_the_card(mu, sigma, mean, ratio):
    found = folded_normal(jnp.float32(mu), jnp.float32(sigma))
    np.testing.assert_allclose(found, (mean, ratio), rtol=2e-5)
    w = np.abs(np.random.default_rng(0).normal(mu, sigma, 400_000))
    np.testing.assert_allclose(found, (w.mean(), w.mean() / w.std()), rtol=0.01)


def posterior(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    draw = lambda k, s: jax.random.normal(k, s)
    return {
        "a": {
            "mu": draw(keys[0], (6, 10)),
            "rho": draw(keys[1], (6, 10)) - 2,
            "bias": jnp.zeros(10),
        },
        "b": {"mu": draw(keys[2], (10, 4)), "rho": draw(keys[3], (10, 4)) - 2},
    }


def test_ssvi_rewires_pairs_as_numpy_does_with_one_mask_and_a_constant_number():
    tx = jaxsparse.ssvi(optax.sgd(0.1, momentum=0.9), 0.5, total_steps=12, update_every=3)
    params = posterior()
    state = tx.init(params)
    params, step = jaxsparse.apply_masks(params, state), stepper(tx)
    erf = np.vectorize(__import__("math").erf)
    grown = 0
    for t in range(12):
        g = jax.tree.map(
            lambda x, t=t: jnp.asarray(np.random.default_rng(t).normal(size=x.shape), x.dtype),
            params,
        )
        old = jax.tree.map(np.asarray, jaxsparse.get_masks(state))
        before = jax.tree.map(np.asarray, params)
        params, state = step(params, state, g)
        new = jax.tree.map(np.asarray, jaxsparse.get_masks(state))
        for k, layer in params.items():
            m, m0 = new[k]["mu"], old[k]["mu"]
            np.testing.assert_array_equal(m, new[k]["rho"])
            assert m.sum() == m.size // 2
            for name in ("mu", "rho"):
                assert not np.asarray(layer[name])[~m].any()
            if t in (3, 6, 9):  # an update takes the place of a step
                mu, rho = before[k]["mu"], before[k]["rho"]
                sigma = np.log1p(np.exp(rho))
                mean = mu * erf(mu / sigma / 2**0.5) + sigma * (2 / np.pi) ** 0.5 * np.exp(
                    -((mu / sigma) ** 2) / 2
                )
                snr = np.where(m0, mean / np.sqrt(sigma**2 + mu**2 - mean**2), np.inf)
                n = int(0.15 * (1 + np.cos(np.pi * t / 9)) * m0.sum() + 1e-6)
                want = m0.copy()
                want.ravel()[np.argsort(snr.ravel())[:n]] = False
                free = np.where(want, -1, np.abs(np.asarray(g[k]["mu"])))
                want.ravel()[np.argsort(-free.ravel())[:n]] = True
                np.testing.assert_array_equal(m, want)
                fresh = want & ~m0
                grown += fresh.sum()
                assert not np.asarray(layer["mu"])[fresh].any()
                np.testing.assert_allclose(
                    np.asarray(layer["rho"])[fresh], rho[m0].mean(), rtol=1e-5
                )
                np.testing.assert_array_equal(np.asarray(layer["mu"])[want & m0], mu[want & m0])
            else:
                np.testing.assert_array_equal(m, m0)
    assert grown > 4
    assert bool(jaxsparse.check(params, state))


def test_ssvi_compiles_once_goes_on_from_host_memory_bit_by_bit_and_works_inside_wrappers():
    make = lambda s: jaxsparse.ssvi(optax.adam(0.01), s, total_steps=12, update_every=3)
    tx, traces = optax.MultiSteps(make(0.5), 1), []

    @jax.jit
    def step(params, state):
        traces.append(1)
        g = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = posterior()
    state: Any = tx.init(params)
    params = jaxsparse.apply_masks(params, state)
    for t in range(8):
        if t == 4:
            moved = jax.tree.map(jnp.asarray, jax.device_get((params, state)))
        params, state = step(params, state)
    again = moved
    for _ in range(4):
        again = step(*again)
    jax.tree.map(np.testing.assert_array_equal, (params, state), again)
    assert len(traces) == 1
    two = jax.vmap(lambda s: jaxsparse.get_masks(make(s).init(posterior()))["a"]["mu"].sum())(
        jnp.array([0.5, 0.75])
    )
    assert two.tolist() == [30, 15]


def test_a_mean_without_its_scale_and_unknown_scores_are_refused():
    tx = jaxsparse.ssvi(optax.sgd(0.1), 0.5, total_steps=10, update_every=2)
    with pytest.raises(ValueError, match=r"'a' has \['mu'\]"):
        tx.init({"a": {"mu": jnp.ones((8, 8))}})
    with pytest.raises(ValueError, match="score='size2'"):
        jaxsparse.ssvi(optax.sgd(0.1), 0.5, total_steps=10, score="size2")  # type: ignore
    small = jaxsparse.ssvi(optax.sgd(0.1), 0.5, total_steps=8, update_every=2, grown="small")
    params = posterior(1)
    state = small.init(params)
    params, step = jaxsparse.apply_masks(params, state), stepper(small)
    for _ in range(3):
        params, state = step(
            params, state, jax.tree.map(lambda x: jnp.cos(x) + 0.1 * x, posterior(2))
        )
    sigma = jax.nn.softplus(params["a"]["rho"][params["a"]["rho"] != 0])
    assert float(sigma.min()) < 1.1e-6


@pytest.mark.parametrize("kind", [BayesianLinear, VariationalDropoutLinear])
def test_noise_at_the_outputs_has_the_variance_of_noisy_weights(kind):
    layer = kind(5, 3, rngs=nnx.Rngs(0, noise=1))
    if kind is BayesianLinear:
        layer.rho[...] = jax.random.normal(jax.random.key(2), (5, 3))
        layer.rho[...] = layer.rho[...].at[0].set(0.0)
        mean, sigma = layer.mu[...], layer.sigma
        assert not bool(layer.sigma[0].any())
    else:
        layer.log_variance[...] = jax.random.normal(jax.random.key(2), (5, 3))
        mean, sigma = layer.kernel[...], jnp.exp(0.5 * layer.log_alpha) * jnp.abs(layer.kernel[...])
    x = jax.random.normal(jax.random.key(3), (5,))
    found = layer(jnp.broadcast_to(x, (40_000, 5)))
    w = mean + sigma * jax.random.normal(jax.random.key(4), (40_000, 5, 3))
    sampled = jnp.einsum("i,nio->no", x, w)
    np.testing.assert_allclose(found.std(axis=0), sampled.std(axis=0), rtol=0.03)
    np.testing.assert_allclose(found.mean(axis=0), x @ mean, atol=0.05)
    layer.eval()
    alive = mean if kind is BayesianLinear else jnp.where(layer.mask, mean, 0)
    np.testing.assert_allclose(layer(x[None])[0], x @ alive, rtol=1e-5)


def test_the_divergence_of_a_gaussian_is_that_of_an_integral_and_of_pruned_weights_0():
    layer = BayesianLinear(2, 1, rngs=nnx.Rngs(0))
    layer.mu[...], layer.rho[...] = jnp.array([[0.02], [0.0]]), jnp.array([[-4.0], [0.0]])
    sigma = float(layer.sigma[0, 0])
    w = np.linspace(0.02 - 10 * sigma, 0.02 + 10 * sigma, 200_001)
    log_q = -0.5 * ((w - 0.02) / sigma) ** 2 - np.log(sigma)
    log_p = -0.5 * (w / 0.01) ** 2 - np.log(0.01)
    q = np.exp(log_q) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(
        layer.kl(0.01), np.sum(q * (log_q - log_p)) * (w[1] - w[0]), rtol=1e-4
    )


def test_the_divergence_of_dropout_is_that_of_the_card_and_falls():
    golden = {-8.0: 4.6359, -4.0: 2.6342, 0.0: 0.43124, 3.0: 0.02542, 8.0: 0.000168}
    found = dropout_kl(jnp.array(list(golden)))
    np.testing.assert_allclose(found, list(golden.values()), rtol=2e-3, atol=5e-6)
    assert (np.diff(dropout_kl(jnp.linspace(-8, 8, 50))) < 0).all()


def test_an_input_of_noise_is_pruned_and_a_signal_is_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)).astype("f4")
    y = (2 * x[:, 0] + 0.1 * rng.normal(size=200)).astype("f4")
    basis = np.linalg.qr(np.stack([x[:, 0], y], axis=1))[0]
    x[:, 1] -= basis @ (basis.T @ x[:, 1])  # nothing of y is in it, not even by chance
    layer = VariationalDropoutLinear(2, 1, rngs=nnx.Rngs(0, noise=1))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    tx = optax.adam(optax.cosine_decay_schedule(0.05, 4000))

    @jax.jit
    def train(params, rest):
        def step(carry, _):
            params, rest, state = carry

            def loss(params):
                model = nnx.merge(graph, params, rest, copy=True)
                fit = 200 * jnp.mean((model(jnp.asarray(x))[:, 0] - y) ** 2) / (2 * 0.1**2)
                return fit / 200 + model.kl() / 200, nnx.split(model, nnx.Param, ...)[2]

            grads, rest = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), rest, state), None

        return jax.lax.scan(step, (params, rest, tx.init(params)), length=4000)[0]

    params, rest, _ = train(params, rest)
    alpha = nnx.merge(graph, params, rest).log_alpha[:, 0]
    assert float(alpha[0]) < 0 and float(alpha[1]) > 3
