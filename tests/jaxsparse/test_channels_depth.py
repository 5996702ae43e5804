"""Depth compression by dynamic programming, merged convolutions, losses on features, consensus gates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxsparse import channels
from jaxsparse.channels.losses import matched
from jaxsparse.nn import ConsensusGate, consensus_loss

RNG = np.random.default_rng(0)


def subsets(items):
    return itertools.chain.from_iterable(
        itertools.combinations(items, n) for n in range(len(items) + 1)
    )


def best_by_enumeration(time, value, budget):
    """Over all kept activations, all borders of merges that hold them, and all ways to add up values."""
    last, found = len(time) - 1, (-np.inf, np.inf)
    inner = range(1, last)
    for acts in subsets(inner):
        on = {0, last, *acts}
        worth = -np.inf
        for points in subsets(inner):
            if set(acts) <= set(points):
                path = [0, *points, last]
                worth = max(
                    worth,
                    sum(value[i, j, int(i in on), int(j in on)] for i, j in zip(path, path[1:])),
                )
        for points in subsets(inner):
            if set(acts) <= set(points):
                path = [0, *points, last]
                spent = sum(int(time[i, j]) for i, j in zip(path, path[1:]))
                if spent <= budget and (worth, -spent) > (found[0], -found[1]):
                    found = (worth, spent)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_the_best_of_all_subsets_of_activations_and_merges(seed):
    rng, layers = np.random.default_rng(seed), 5
    time = rng.integers(1, 9, (layers + 1, layers + 1)).astype(float)
    value = rng.normal(size=(layers + 1, layers + 1, 2, 2))
    for budget in (8, 14, 40):
        want = best_by_enumeration(time, value, budget)
        plan = channels.compress(time, value, budget, precision=1)
        assert plan.value == pytest.approx(want[0]) and plan.time == want[1] <= budget
        assert set(plan.activations) <= set(plan.borders)
        path = [0, *plan.borders, layers]
        assert sum(time[i, j] for i, j in zip(path, path[1:])) == plan.time


def test_a_budget_of_all_single_layers_gives_the_network_back():
    time = np.array([[0, 1, 3, 9], [0, 0, 1, 3], [0, 0, 0, 1], [0, 0, 0, 0]], float)
    value = np.full((4, 4, 2, 2), -1.0)
    for i in range(3):
        value[i, i + 1, 1, 1] = 0
    plan = channels.compress(time, value, 3)
    assert plan.activations == plan.borders == (1, 2) and plan.value == 0
    with pytest.raises(ValueError, match=r"budget=2: no plan is as fast; the fastest takes 3"):
        channels.compress(time, value, 2)
    with pytest.raises(ValueError, match="give .L . 1, L . 1"):
        channels.compress(time[:2], value, 2)


def conv(x, kernel, stride=(1, 1), padding="VALID", groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        stride,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision="highest",
    )


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
def test_merged_convolutions_are_one_after_the_other_without_padding(stride):
    a, b, p, q = normal(3, 2, 3, 4), normal(2, 3, 4, 5), normal(4), normal(5)
    x = normal(2, 13, 12, 3)
    kernel, bias = channels.merge_convolutions(a, b, p, q, stride=stride)
    want = conv(conv(x, a, stride) + p, b) + q
    found = conv(x, kernel, stride) + bias
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_padding_must_move_in_front_of_the_first():
    a, b, x = normal(3, 3, 2, 3), normal(3, 3, 3, 2), normal(1, 8, 8, 2)
    kernel, bias = channels.merge_convolutions(a, b)
    assert bias is None and kernel.shape == (5, 5, 2, 2)
    apart = conv(conv(x, a, padding="SAME"), b, padding="SAME")
    merged = conv(x, kernel, padding="SAME")
    assert float(jnp.abs(apart - merged).max()) > 1
    np.testing.assert_allclose(apart[:, 1:-1, 1:-1], merged[:, 1:-1, 1:-1], atol=1e-4)
    moved = conv(conv(jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))), a), b)
    np.testing.assert_allclose(moved, merged, atol=1e-4)


def test_identities_depthwise_kernels_and_batch_norms_fold_in():
    x, kernel = normal(1, 6, 6, 4), normal(3, 3, 4, 4)
    np.testing.assert_allclose(
        conv(x, channels.add_identity(kernel), padding="SAME"),
        x + conv(x, kernel, padding="SAME"),
        atol=1e-4,
    )
    depthwise = normal(3, 3, 1, 8)
    np.testing.assert_allclose(
        conv(x, channels.dense_kernel(depthwise, 4)), conv(x, depthwise, groups=4), atol=1e-4
    )
    scale, shift, mean, var = normal(4), normal(4), normal(4), normal(4) ** 2
    folded, bias = channels.fold_batch_norm(
        kernel, None, scale=scale, shift=shift, mean=mean, variance=var
    )
    want = (conv(x, kernel) - mean) / np.sqrt(var + 1e-5) * scale + shift
    np.testing.assert_allclose(conv(x, folded) + bias, want, rtol=1e-3, atol=1e-3)
    for call, message in [
        (lambda: channels.add_identity(normal(2, 2, 3, 3)), "an identity needs an odd window"),
        (lambda: channels.dense_kernel(normal(3, 1, 8), 3), "groups=3 does not divide 8"),
        (lambda: channels.merge_convolutions(kernel, normal(3, 3, 5, 2)), "makes 4 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_feature_flow_is_zero_of_an_identity_and_curvature_of_a_straight_line():
    h, v = normal(2, 4, 4, 3), normal(2, 4, 4, 3)
    assert float(channels.feature_flow([h] * 4, 1.0, 1.0)) == 0
    line = [h + i * v for i in range(4)]
    assert float(channels.feature_flow(line, 0.0, 1.0)) < 1e-3
    want = 3 * np.abs(np.asarray(v)).sum() / 2
    assert float(channels.feature_flow(line, 1.0, 0.0)) == pytest.approx(want, rel=1e-5)
    pooled = matched(h, (2, 2, 2, 5))
    np.testing.assert_allclose(pooled[..., :3], h.reshape(2, 2, 2, 2, 2, 3).mean((2, 4)), rtol=1e-5)
    assert not pooled[..., 3:].any()
    for bad, message in [
        ([h], "two or more"),
        ([h, h[:, :3]], "does not divide"),
        ([h, h[0]], "rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            channels.feature_flow(bad)


def test_strong_flow_penalties_remove_branches_of_a_task_that_the_stem_solves():
    x, answer = normal(32, 4), normal(4, 3)
    params = {"stem": 0.5 * answer, "branches": [0.3 * normal(3, 3), 0.3 * normal(3, 3)]}
    goal = x @ answer

    def features(p):
        found = [x @ p["stem"]]
        for w in p["branches"]:
            found.append(found[-1] + found[-1] @ w)
        return found

    def loss(p):
        found = features(p)
        return jnp.mean((found[-1] - goal) ** 2) + channels.feature_flow(found, 0.3, 0.0)

    @jax.jit
    def train(p):
        step = lambda t, p: jax.tree.map(
            lambda w, g: w - 0.05 / (1 + t / 100) * g, p, jax.grad(loss)(p)
        )
        return lax.fori_loop(0, 4000, step, p)

    trained = train(params)
    sizes = [float(jnp.abs(w).max()) for w in trained["branches"]]
    assert max(sizes) < 0.05, sizes
    assert float(jnp.mean((features(trained)[-1] - goal) ** 2)) < 0.05


def test_attention_maps_do_not_see_scale_and_order_of_channels():
    f = normal(2, 4, 4, 6)
    assert float(channels.attention_transfer(3 * f, f)) < 1e-12
    assert float(channels.attention_transfer(f[..., ::-1], f)) < 1e-12
    assert float(channels.attention_transfer(normal(2, 4, 4, 3), f)) > 1e-4
    with pytest.raises(ValueError, match="differ in batch or space"):
        channels.attention_transfer(f[:, :2], f)


def test_gates_agree_and_serve_as_the_static_mask():
    gate = ConsensusGate(4, rngs=nnx.Rngs(0), momentum=0.0)
    gate.head.kernel.set_value(jnp.zeros((4, 4)))
    gate.head.bias.set_value(jnp.asarray([1.0, -1.0, 2.0, -2.0]))
    x = normal(5, 3, 3, 4)
    trained = gate(x)
    gate.use_consensus = True
    np.testing.assert_array_equal(gate(x), trained)
    assert gate.mask.tolist() == [True, False, True, False]
    means = [jnp.asarray([1.0, 0.0, 1.0, 0.0])]
    assert float(consensus_loss(means, 0.5)) == 0
    open_ = jax.grad(lambda m: consensus_loss([m], 0.5, polarization=0.0))(means[0])
    assert not open_.any(), "no pull at the density asked for"
    slope = jax.grad(lambda b: consensus_loss([jax.nn.sigmoid(b)], 0.25))(jnp.zeros(4))
    assert (slope > 0).all()
    with pytest.raises(ValueError, match="kept=0"):
        consensus_loss(means, 0)
    with pytest.raises(ValueError, match="means: there are none"):
        consensus_loss([], 0.5)
