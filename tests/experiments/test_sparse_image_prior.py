"""Sparse maps of a generator, held to NumPy and to what a penalty must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import sparse_image_prior as study


def correlate(x, d):
    """The layer by its definition: a wrapped correlation."""
    out = np.zeros((*x.shape[:2], d.shape[3]))
    for i in range(d.shape[0]):
        for j in range(d.shape[1]):
            moved = np.roll(x, (d.shape[0] // 2 - i, d.shape[1] // 2 - j), (0, 1))
            out += moved @ d[i, j]
    return out


def test_an_image_is_painted_by_unit_filters_and_shifts_with_its_input():
    layers = study.init(jax.random.key(0), (2, 3, 1), size=3)
    layers = [study.Layer(5 * layer.filters, layer.bias + 0.1) for layer in layers]
    noise = np.asarray(jax.random.normal(jax.random.key(1), (6, 6, 2)))
    image, (gamma,) = study.generate(layers, jnp.asarray(noise))
    first = np.maximum(correlate(noise, np.asarray(layers[0].filters)) + 0.1, 0)
    np.testing.assert_allclose(gamma, first, rtol=1e-4, atol=1e-5)
    d = np.asarray(layers[1].filters)
    d = d / np.linalg.norm(d.transpose(2, 0, 1, 3).reshape(3, -1), axis=1)[:, None]
    np.testing.assert_allclose(image, correlate(first, d), rtol=1e-4, atol=1e-5)
    moved, (gamma_moved,) = study.generate(layers, jnp.roll(jnp.asarray(noise), (2, 1), (0, 1)))
    np.testing.assert_allclose(moved, np.roll(image, (2, 1), (0, 1)), rtol=1e-4, atol=1e-5)
    assert float(study.penalty([gamma_moved], [0])) == pytest.approx(
        float(study.penalty([gamma], [0])), rel=1e-5
    )
    assert int(study.local_count(gamma_moved, 3)) == int(study.local_count(gamma, 3))


def test_scaled_filters_cheat_no_penalty():
    layers = study.init(jax.random.key(0), (2, 3, 1), size=3)
    louder = [layers[0], study.Layer(100 * layers[1].filters, layers[1].bias)]
    noise = jax.random.normal(jax.random.key(1), (6, 6, 2))
    np.testing.assert_allclose(
        study.generate(louder, noise)[0], study.generate(layers, noise)[0], rtol=1e-4, atol=1e-6
    )


def test_the_most_nonzeros_in_any_window_by_trying_all():
    gamma = np.random.default_rng(0).random((5, 6, 2)) < 0.3
    wide = np.pad(gamma, ((0, 2), (0, 2), (0, 0)), mode="wrap")
    brute = max(wide[i : i + 3, j : j + 3].sum() for i in range(5) for j in range(6))
    assert int(study.local_count(jnp.asarray(gamma, jnp.float32), 3)) == brute


def test_a_penalty_leaves_fewer_and_smaller_entries_and_no_larger_error():
    keys = jax.random.split(jax.random.key(0), 4)
    clean = study.planted(keys[0], size=12, share=0.02)
    noisy = clean + jax.random.normal(keys[1], clean.shape)
    layers, noise = study.init(keys[2], (4, 6, 1)), jax.random.normal(keys[3], (12, 12, 4))
    fit = jax.jit(study.fit, static_argnames=("steps", "chosen"))
    base, sparse = (
        fit(layers, noise, noisy, clean, mu, chosen=(0,), steps=400) for mu in (0.0, 0.3)
    )
    assert study.penalty(sparse.maps, [0]) < study.penalty(base.maps, [0])
    assert jnp.sum(sparse.maps[0] != 0) < jnp.sum(base.maps[0] != 0)
    assert sparse.errors[-1] <= base.errors[-1]
