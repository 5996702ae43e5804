"""Essential sparsity: the one-shot sweep and its knee; overlap and exploration of masks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse
from jaxsparse.analysis import dynamics, essential

GRID = [i / 20 for i in range(20)]


@given(st.integers(2, 17), st.floats(0.0, 0.2), st.floats(1.0, 5.0))
def test_the_knee_of_a_piecewise_linear_curve_is_its_breakpoint(i, before, after):
    s = np.array(GRID)
    curve = -before * s - after * np.maximum(s - GRID[i], 0)
    assert essential.knee(GRID, curve) == GRID[i]


def test_the_knee_with_a_tolerance_is_the_last_point_within_it():
    curve = [1.0, 0.999, 0.995, 0.98, 0.9]
    assert essential.knee([0, 1, 2, 3, 4], curve, tolerance=0.01) == 2
    assert essential.knee([0, 1, 2, 3, 4], curve, tolerance=0.5) == 4


def network():
    keys = jax.random.split(jax.random.key(0), 3)
    scale = [1.0, 0.1, 1.0]
    return {
        name: {"kernel": s * jax.random.normal(k, (16, 16)), "bias": jnp.ones(16)}
        for name, s, k in zip("abc", scale, keys)
    }


def test_the_sweep_prunes_globally_from_the_dense_weights_each_time():
    seen = []
    essential.sweep(lambda p: seen.append(p) or 0.0, network(), [0.0, 0.5, 0.9])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), seen[0], network()))
    tx = jaxsparse.methods.one_shot(optax.sgd(0.1), 0.9, allocation="global")
    expected = jaxsparse.apply_masks(network(), tx.init(network()))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), seen[2], expected))
    zeros = sum(int((seen[1][n]["kernel"] == 0).sum()) for n in "abc")
    assert zeros == 3 * 16 * 16 // 2
    assert all((seen[2][n]["bias"] == 1).all() for n in "abc")


def test_the_sweep_finds_where_a_planted_sparse_network_breaks():
    key = jax.random.key(1)
    big = jax.random.bernoulli(key, 0.3, (32, 32))
    params = {"kernel": jnp.where(big, 1.0, 0.01) * jax.random.normal(key, (32, 32))}
    x = jax.random.normal(jax.random.key(2), (64, 32))
    dense = x @ params["kernel"]
    fit = lambda p: 1 - jnp.mean((x @ p["kernel"] - dense) ** 2) / jnp.mean(dense**2)
    result = essential.sweep(fit, params, GRID, tolerance=0.01)
    assert 0.65 <= result.knee <= 0.85
    assert result.metric[0] == 1.0 and (np.diff(result.metric) < 1e-3).all()


def test_near_zero_counts_sparsifiable_weights_only():
    params = {"a": {"kernel": jnp.array([[0.0, 5e-4, 1.0, -1e-3]]), "bias": jnp.zeros(4)}}
    assert essential.near_zero(params, 1e-3) == 0.5


masks = st.lists(st.booleans(), min_size=8, max_size=8).map(lambda m: {"w": np.array(m), "b": None})


@given(masks, masks)
def test_overlap_is_symmetric_and_that_of_sets(a, b):
    x, y = (set(np.flatnonzero(m["w"])) for m in (a, b))
    assert dynamics.hamming(a, b) == len(x ^ y) == dynamics.hamming(b, a)
    assert dynamics.iou(a, b) == (len(x & y) / len(x | y) if x | y else 1.0) == dynamics.iou(b, a)
    assert dynamics.layer_iou(a, b) == {"w": dynamics.iou(a, b)}
    assert dynamics.exploration([a, b]) == len(x | y) / 8


def test_a_static_mask_explores_its_density_and_set_explores_more_and_more():
    def run(tx, steps=6):
        params = {"kernel": jax.random.normal(jax.random.key(0), (20, 20))}
        state = jax.jit(tx.init)(params)
        update, trees = jax.jit(tx.update), [jaxsparse.get_masks(state)]
        params = jaxsparse.apply_masks(params, state)
        for _ in range(steps):
            updates, state = update(params, state, params)
            params = optax.apply_updates(params, updates)
            trees.append(jaxsparse.get_masks(state))
        return trees

    assert dynamics.exploration(run(jaxsparse.static(optax.sgd(0.1), 0.75))) == 0.25
    moving = run(
        jaxsparse.set_(optax.sgd(0.1), 0.75, total_steps=100, update_every=1, begin_step=1)
    )
    rates = [dynamics.exploration(moving[: i + 1]) for i in range(len(moving))]
    assert all(a <= b for a, b in itertools.pairwise(rates)) and rates[-1] > 0.35
    assert 0 < dynamics.iou(moving[0], moving[-1]) < 1


def test_packed_masks_are_compared_like_others():
    m = np.array([True, False, True])
    assert dynamics.hamming({"w": jaxsparse.masking.pack(jnp.asarray(m))}, {"w": m}) == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="increasing, the first 0"):
        essential.sweep(lambda p: 0.0, network(), [0.1, 0.5, 0.9])
    with pytest.raises(ValueError, match="2 sparsities, 3 values"):
        essential.knee([0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="tolerance=-1"):
        essential.knee([0, 1, 2], [1, 2, 3], tolerance=-1)
    with pytest.raises(ValueError, match="epsilon=0"):
        essential.near_zero(network(), 0)
    with pytest.raises(ValueError, match=r"'w' has the shapes \(2,\) and \(3,\)"):
        dynamics.iou({"w": np.ones(2, bool)}, {"w": np.ones(3, bool)})
    with pytest.raises(ValueError, match="sequence is empty"):
        dynamics.exploration([])
