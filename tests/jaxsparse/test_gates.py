"""Gates: gradients against an exact oracle, hard concrete, bit planes; nested masks; selective decay."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false, reportOperatorIssue=false

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import nn, tickets
from jaxsparse.engines import selective_decay
from jaxsparse.methods.l0 import hard_concrete, present

RNG = np.random.default_rng(0)
X, W, Y = RNG.normal(size=(30, 8)), RNG.normal(size=8), RNG.normal(size=30)


def loss(m):
    return jnp.sum((jnp.asarray(Y, jnp.float32) - jnp.asarray(X * W, jnp.float32) @ m) ** 2)


# -- The oracle


def test_the_enumerated_gradient_is_that_of_all_masks_in_numpy():
    a = RNG.normal(size=8)
    p = 1 / (1 + np.exp(-a))
    want = np.zeros(8)
    for bits in itertools.product((0.0, 1.0), repeat=8):
        m = np.array(bits)
        value = np.sum((Y - (X * W) @ m) ** 2)
        want += np.prod(np.where(m == 1, p, 1 - p)) * value * (m - p)
    found = nn.enumerated_gradient(loss, jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="17 gates"):
        nn.enumerated_gradient(loss, jnp.zeros(17))


def test_score_functions_are_unbiased_a_baseline_lowers_variance_and_straight_through_is_biased():
    a = jnp.asarray(RNG.normal(size=8), jnp.float32)
    exact = np.asarray(nn.enumerated_gradient(loss, a))
    keys = jax.random.split(jax.random.key(0), 1500)
    variance = {}
    for name in ("none", "leave_one_out", "straight_through"):
        if name == "straight_through":
            one = lambda k: nn.straight_through_gradient(loss, a, k, 8)
        else:
            one = lambda k, name=name: nn.score_function_gradient(loss, a, k, 8, baseline=name)
        found = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
        error = np.abs(found.mean(axis=0) - exact) / (found.std(axis=0) / 1500**0.5)
        variance[name] = found.var(axis=0).sum()
        assert (error.max() < 4.5) == (name != "straight_through"), (name, error)
    assert variance["leave_one_out"] < 0.5 * variance["none"]
    with pytest.raises(ValueError, match="samples=1"):
        nn.score_function_gradient(loss, a, keys[0], 1)


def test_hard_concrete_gates_have_the_gradient_of_an_integral():
    """Of a quadratic loss of independent gates the means and variances of each gate are all that counts: both are
    integrals over one uniform number."""
    a = RNG.normal(size=8)
    u = (np.arange(200_000) + 0.5) / 200_000

    def moments(a):
        s = 1 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + a) * 1.5))
        z = np.clip(1.2 * s - 0.1, 0, 1)
        return z.mean(), z.var()

    def expected(a):
        m, v = np.array([moments(x) for x in a]).T
        return np.sum((Y - (X * W) @ m) ** 2) + np.sum(np.sum((X * W) ** 2, axis=0) * v)

    exact = np.array([(expected(a + d) - expected(a - d)) / 2e-3 for d in 1e-3 * np.eye(8)])
    gate = nn.HardConcreteGate(8, rngs=nnx.Rngs(0, noise=1))

    @jax.jit
    @jax.vmap
    def one(key):
        def sampled(a):
            z = hard_concrete(a, jax.random.uniform(key, (8,), minval=1e-6, maxval=1 - 1e-6))
            return loss(z)

        return jax.grad(sampled)(jnp.asarray(a, jnp.float32))

    found = np.asarray(one(jax.random.split(jax.random.key(1), 20_000)), np.float64)
    error = np.abs(found.mean(axis=0) - exact) / (found.std(axis=0) / 20_000**0.5)
    assert error.max() < 4.5
    # What the module draws is what the oracle integrates.
    gate.logits[...] = jnp.asarray(a, jnp.float32)
    ones = jnp.ones((1, 8))
    drawn = np.stack([np.asarray(gate(ones))[0] for _ in range(400)])
    want = np.array([moments(x) for x in a])
    assert (np.abs(drawn.mean(axis=0) - want[:, 0]) < 5 * (want[:, 1] / 400) ** 0.5 + 1e-3).all()


def test_the_penalty_of_a_gate_is_its_chance_to_be_open_and_evaluation_has_no_noise():
    gate = nn.HardConcreteGate(3, rngs=nnx.Rngs(0))
    gate.logits[...] = jnp.array([0.0, 2.0, -3.0])
    np.testing.assert_allclose(gate.penalty(), 0.83182 + 0.97337 + 0.19759, rtol=1e-4)
    slope = jax.grad(lambda a: jnp.sum(present(a)))(gate.logits[...])
    p = np.asarray(present(gate.logits[...]))
    np.testing.assert_allclose(slope, p * (1 - p), rtol=1e-5)
    norms = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        gate.penalty(2.0, decay=0.5, norms=norms),
        np.sum(p * (2 + 0.25 * np.asarray(norms))),
        rtol=1e-5,
    )
    u = jax.random.uniform(jax.random.key(0), (200_000, 1), minval=1e-6, maxval=1 - 1e-6)
    np.testing.assert_allclose(
        jnp.mean(hard_concrete(gate.logits[...], u) > 0, axis=0), p, atol=3e-3
    )
    gate.eval()
    np.testing.assert_allclose(gate(jnp.ones((1, 3)))[0], [0.5, 0.95696, 0.0], atol=1e-5)
    assert gate.mask.tolist() == [True, True, False]
    gate.logits[...] = jnp.array([90.0, -90.0, 0.0])
    gate.clamp()
    np.testing.assert_allclose(gate.logits[...], [math.log(100), math.log(0.01), 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="drop_rate=1"):
        nn.HardConcreteGate(3, drop_rate=1, rngs=nnx.Rngs(0))


# -- Bit planes


def test_hard_bits_with_all_planes_are_uniform_rounding_and_hot_ones_lie_on_its_grid():
    linear = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    w = np.asarray(linear.kernel[...])
    for bits in (2, 3, 8):
        layer = nn.BitPlaneLinear(linear, bits=bits)
        layer.planes[...] = jnp.ones(bits)
        layer.hard_planes = layer.hard_bits = True
        scale, levels = np.abs(w).max(), 2**bits - 1
        want = np.round(np.abs(w) / scale * levels) * np.sign(w) * scale / levels
        np.testing.assert_allclose(layer.weight, want, atol=1e-6)
        layer.hard_planes = layer.hard_bits = False
        layer.temperature[...] = jnp.float32(1e4)
        steps = np.asarray(layer.weight) / scale * levels
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def test_the_loss_of_planes_lowers_gates_above_the_target_and_raises_them_below():
    layers = [nn.BitPlaneLinear(nnx.Linear(3, n, rngs=nnx.Rngs(n)), bits=8) for n in (2, 5)]
    graph, params, rest = nnx.split(nnx.List(layers), nnx.Param, ...)
    loss = lambda p, target: nn.csq_loss(list(nnx.merge(graph, p, rest)), target)
    for target, sign in ((3.0, -1), (8.0, 0), (9.0, 1)):  # a target of 9 bits: more than there are
        slopes: Any = jax.grad(loss)(params, target)
        for i in range(2):
            assert (np.sign(-np.asarray(slopes[i]["planes"][...])) == sign).all()
    layers[0].planes[...] = layers[1].planes[...] = -jnp.ones(8)
    assert float(nn.csq_loss(layers, 3.0)) < 0  # gates below the target: growing lowers the loss
    assert layers[0].bits_kept == 0
    layers[0].temperature[...] = jnp.float32(3.0)
    layers[0].planes[...] = jnp.array([2.0, -1.0] * 4)
    layers[0].next_round()
    assert (
        layers[0].planes[...].tolist() == [0.0, -3.0] * 4 and float(layers[0].temperature[...]) == 1
    )
    with pytest.raises(ValueError, match="there are none"):
        nn.csq_loss([], 3.0)
    with pytest.raises(ValueError, match="not an nnx.Linear"):
        nn.BitPlaneLinear(jnp.ones(3))  # type: ignore


def test_the_gradient_of_a_bit_is_that_of_the_formula():
    layer = nn.BitPlaneLinear(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), bits=3)
    layer.temperature[...] = jnp.float32(2.0)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    x = jnp.array([[0.7, -1.3]])
    grads = jax.grad(lambda p: nnx.merge(graph, p, rest)(x).sum())(params)
    f = lambda u: 1 / (1 + np.exp(-2 * np.asarray(u)))
    p, e = np.asarray(layer.positive[...]), np.array([4, 2, 1]) / 7
    want = (
        np.asarray(x)[0][:, None, None]
        * float(layer.scale[...])
        * e
        * f(layer.planes[...])
        * 2
        * f(p)
        * (1 - f(p))
    )
    np.testing.assert_allclose(grads["positive"][...], want, rtol=1e-5)


# -- Nested masks


def test_masks_are_nested_balanced_and_prefixes_are_the_masked_kernels():
    z = {
        "conv": {"kernel": jnp.asarray(RNG.normal(size=(3, 3, 4, 6)), jnp.float32)},
        "bias": jnp.zeros(6),
    }
    densities = (0.1, 0.25, 0.5, 1.0)
    masks = [np.asarray(m["conv"]["kernel"]) for m in tickets.nested_masks(z, densities)]
    stored = tickets.to_prefixes(z["conv"]["kernel"], 0.5)
    for d, m, wider in zip(densities, masks, [*masks[1:], masks[-1]]):
        assert (m.reshape(36, 6).sum(axis=0) == int(d * 36)).all() and not (m & ~wider).any()
        if d <= 0.5:
            want = np.where(m, np.asarray(z["conv"]["kernel"]), 0)
            np.testing.assert_array_equal(tickets.from_prefixes(stored, d), want)
    with pytest.raises(ValueError, match="density=1"):
        tickets.from_prefixes(stored, 1.0)
    with pytest.raises(ValueError, match="increasing"):
        tickets.nested_masks(z, (0.5, 0.25))
    with pytest.raises(ValueError, match="less than one"):
        tickets.nested_masks(z, (0.01,))


def test_one_subnet_is_straight_through_top_k_and_several_add_up():
    z = {"kernel": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)
    loss = lambda p: jnp.mean((x @ p["kernel"] - 1) ** 2)
    tx = jaxsparse.magnitude_ste(optax.sgd(0.1), 0.5, structure="fan_in")
    state = tx.init(z)
    params = jaxsparse.apply_masks(z, state)
    _, own = tickets.subnet_gradient(loss, jaxsparse.get_raw_params(state), (0.5,))
    np.testing.assert_array_equal(own["kernel"], jax.grad(loss)(params)["kernel"])
    updates, state = tx.update(own, state, params)
    np.testing.assert_allclose(
        jaxsparse.get_raw_params(state)["kernel"], z["kernel"] - 0.1 * own["kernel"], rtol=1e-6
    )
    value, both = tickets.subnet_gradient(loss, z, (0.25, 0.5), weights=(2.0, 1.0))
    parts = [tickets.subnet_gradient(loss, z, (d,)) for d in (0.25, 0.5)]
    np.testing.assert_allclose(value, 2 * parts[0][0] + parts[1][0], rtol=1e-6)
    want = 2 * parts[0][1]["kernel"] + parts[1][1]["kernel"]
    np.testing.assert_allclose(both["kernel"], want, rtol=1e-5)


def test_dense_leaves_are_shared_by_all_subnets_and_train_with_them():
    params: Any = {"kernel": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), "bias": jnp.ones(3)}
    x = jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)
    loss = lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)
    tx = jaxsparse.magnitude_ste(optax.sgd(0.1), 0.25, structure="fan_in")
    state: Any = tx.init(params)
    params = jaxsparse.apply_masks(params, state)
    first = [float(loss(jaxsparse.masking.apply({**params, **_raw(state)}, m)))
             for m in tickets.nested_masks({**params, **_raw(state)}, (0.25, 0.75))]  # fmt: skip
    for _ in range(20):
        _, grads = tickets.subnet_gradient(
            loss, jaxsparse.get_raw_params(state), (0.25, 0.75), params=params
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    whole = {**params, **_raw(state)}
    last = [
        float(loss(jaxsparse.masking.apply(whole, m)))
        for m in tickets.nested_masks(whole, (0.25, 0.75))
    ]
    assert all(b < a for a, b in zip(first, last)) and (np.asarray(params["bias"]) != 1).all()


def _raw(state):
    return {"kernel": jaxsparse.get_raw_params(state)["kernel"]}


# -- Selective decay


def test_an_irrelevant_weight_decays_geometrically_and_a_relevant_one_is_not_biased():
    goal = jnp.array([[2.0, 5.0]])
    bowl = lambda p: 0.5 * jnp.sum(((p["kernel"] - goal) * jnp.array([[3.0, 0.0]])) ** 2)
    step = lambda g: (g < 0.02).astype(jnp.float32)
    tx = optax.chain(
        optax.sgd(0.1), selective_decay(0.5, 0.1, irrelevance=step, smoothing=0.0, relative=False)
    )
    params = {"kernel": jnp.array([[1.0, 4.0]])}
    state = tx.init(params)
    for _ in range(60):
        g = jax.grad(bowl)(params)
        updates, state = tx.update(g, state, params, grad=g)
        params = optax.apply_updates(params, updates)
    assert abs(float(params["kernel"][0, 0]) - 2) < 0.01  # ordinary decay would end at 2 * 9 / 9.5
    np.testing.assert_allclose(params["kernel"][0, 1], 4 * 0.95**60, rtol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_constant_irrelevance_is_ordinary_decay_or_none(constant):
    params = {"a": {"kernel": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)}}
    g = jax.tree.map(jnp.cos, params)
    same = lambda s: jnp.full_like(s, constant)
    tx = optax.chain(optax.sgd(0.5), selective_decay(0.25, 0.5, irrelevance=same))
    want = optax.chain(optax.sgd(0.5), optax.add_decayed_weights(-0.125 * constant))
    found, _ = tx.update(g, tx.init(params), params, grad=g)
    other, _ = want.update(g, want.init(params), params)
    np.testing.assert_array_equal(found["a"]["kernel"], other["a"]["kernel"])


def test_decay_inside_a_method_reads_the_running_mean_and_bad_input_is_refused():
    params = {"kernel": jnp.ones((4, 4))}
    inner = optax.chain(optax.sgd(0.1), selective_decay(0.1, 0.1))
    tx = jaxsparse.static(inner, 0.5, allocation="uniform")
    state, p = tx.init(params), jaxsparse.apply_masks(params, tx.init(params))
    for _ in range(2):
        updates, state = tx.update(params, state, p, grad=params)
        p = optax.apply_updates(p, updates)
    assert int((p["kernel"] != 0).sum()) == 8
    with pytest.raises(ValueError, match="grad=grads"):
        inner.update(params, inner.init(params), params)
    with pytest.raises(ValueError, match="smoothing=1"):
        selective_decay(0.1, 0.1, smoothing=1)
    with pytest.raises(ValueError, match="decay=-1"):
        selective_decay(-1.0, 0.1)


def test_the_largest_threshold_within_a_tolerance_is_found():
    w = {"kernel": jnp.asarray(RNG.normal(size=(9, 7)), jnp.float32), "bias": jnp.ones(7)}
    ones = {"kernel": jnp.ones((9, 7), bool), "bias": None}
    energy = lambda p: float(jnp.sum(p["kernel"] ** 2))
    masks = tickets.prune_within(energy, w, ones, tolerance=3.0)
    sizes = np.sort(np.asarray(w["kernel"]).ravel() ** 2)
    want = int((np.cumsum(sizes) <= 3.0).sum())
    assert int((~masks["kernel"]).sum()) == want and masks["bias"] is None
    again = tickets.prune_within(energy, w, masks, tolerance=0.0)
    assert int((~again["kernel"]).sum()) == want
    with pytest.raises(ValueError, match="tolerance=-1"):
        tickets.prune_within(energy, w, ones, tolerance=-1)
