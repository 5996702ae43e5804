"""Sparsity that depends on the input, activations to choose from, units that are linear, the pixelated butterfly."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.tickets.activation_search import late_acceptance
from jaxsparse import nn
from jaxsparse.nn import delta, spatial_mask, unit_choice
from jaxsparse.nn.pixelfly import butterfly_blocks, flat_butterfly

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# -- Fire together, wire together


@pytest.mark.parametrize("keep, number", [(0.3, 1), (0.4, 1), (0.7, 2), (0.9, 3), (1.0, 4)])
def test_the_mass_rule_keeps_the_strongest_until_their_share_is_full(keep, number):
    a = jnp.array([[4.0, 3.0, 2.0, 1.0]])[:, ::-1]
    found = nn.strong_filters(a[:, None] * jnp.array([[[1.0], [-0.5]]]), keep)
    assert found.tolist() == [[False] * (4 - number) + [True] * number]


def test_filters_that_are_0_never_fire_and_the_uniform_rule_counts():
    a = jnp.array([[0.0, 5.0, 5.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert nn.strong_filters(a, 1.0).tolist() == [[False, True, True, True], [False] * 4]
    assert nn.strong_filters(a, 0.5, rule="uniform").tolist() == [
        [False, True, True, False],
        [False] * 4,
    ]
    assert not nn.strong_filters(a[1:], 0.9).any()
    with pytest.raises(ValueError, match="keep=0"):
        nn.strong_filters(a, 0)
    with pytest.raises(ValueError, match="rule='top'"):
        nn.strong_filters(a, 0.5, rule="top")  # type: ignore


def test_heads_learn_from_their_own_loss_only_and_gates_are_binary():
    for decoupled in (True, False):
        gate = nn.FiringGate(3, 6, keep=0.8, decoupled=decoupled, bias=0.0, rngs=nnx.Rngs(0))
        x, out = normal(4, 5, 5, 3), jax.nn.relu(normal(4, 5, 5, 6))
        got = gate(x, out)
        ratio = np.asarray(got)[np.asarray(out) > 0] / np.asarray(out)[np.asarray(out) > 0]
        assert set(np.round(ratio, 6)) == {0.0, 1.0}
        task = nnx.grad(lambda g, x=x, out=out: jnp.sum(g(x, out) ** 2))(gate)
        head = lambda grads: float(optax.global_norm(jax.tree.leaves(grads["head"])))
        assert (head(task) == 0) == decoupled

        def own(g, x=x, out=out):
            g(x, out)
            return nn.firing_loss([g])

        assert head(nnx.grad(own)(gate)) > 0
        through = jax.grad(lambda x, g=gate, out=out: nnx.clone(g)(x, out).sum())(x)
        assert bool((through == 0).all()) == decoupled
    # A perfect head at r = 1 leaves the output as it is.
    gate.keep = 1.0
    head_bias: Any = gate.head.bias
    head_bias[...] = jnp.full(6, 50.0)
    np.testing.assert_array_equal(gate(x, out), out)
    with pytest.raises(ValueError, match="there are none"):
        nn.firing_loss([])


# -- Positions of a feature map


def test_position_masks_are_exact_shared_and_the_same_for_layers_of_one_size():
    positions = nn.Positions(jax.random.uniform(jax.random.key(0), (12, 12)))
    layer = nn.SpatialSparsity(positions)
    for level in (0.0, 0.25, 0.7):
        layer.level[...] = jnp.float32(level)
        x = jax.random.uniform(jax.random.key(1), (3, 6, 6, 5), minval=1.0)
        kept = np.asarray(layer(x)) != 0
        assert (kept == kept[:1, :, :, :1]).all() and kept[0, :, :, 0].sum() == 36 - round(
            level * 36
        )
    pools = np.asarray(positions[...]).reshape(6, 2, 6, 2).mean(axis=(1, 3))
    want = np.argsort(pools.ravel())[: round(0.7 * 36)]
    assert set(np.flatnonzero(~np.asarray(layer.mask((6, 6))))) == set(want)
    odd = spatial_mask.pooled(positions[...][:, :11], (5, 5))
    np.testing.assert_allclose(
        odd, np.asarray(positions[...])[:10, :10].reshape(5, 2, 5, 2).mean(axis=(1, 3)), rtol=1e-6
    )
    spatial_mask.new_map(positions, jax.random.key(5))
    assert set(np.flatnonzero(~np.asarray(layer.mask((6, 6))))) != set(want)
    with pytest.raises(ValueError, match="larger than the map"):
        layer.mask((24, 24))


def test_a_convolution_at_some_positions_is_the_dense_one_there():
    x, k, b = normal(2, 7, 6, 3), normal(3, 5, 3, 4), normal(4)
    mask = RNG.random((7, 6)) < 0.4
    dense = jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = np.where(mask[None, :, :, None], dense + b, 0)
    np.testing.assert_allclose(nn.conv_at(x, k, mask, bias=b), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be those of x"):
        nn.conv_at(x, k, mask[:5])


# -- Deltas


def test_deltas_through_a_linear_layer_add_up_to_the_layer_on_values():
    x, w = normal(2, 30, 4, 6), normal(6, 3)
    layer = nn.DeltaActivation(6, first=0.25, output="delta")
    deltas = layer(x)
    value = nn.DeltaActivation(6, first=0.25)
    np.testing.assert_allclose(delta.running_sum(deltas @ w), value(x) @ w, atol=1e-5)
    still = jnp.broadcast_to(x[:, :1], x.shape)
    assert not layer(still)[:, 1:].any() and float(layer.loss.get_value()) == 0
    changes = [
        int((nn.DeltaActivation(6, first=s, output="delta")(x) != 0).sum()) for s in (0.1, 0.5, 2.0)
    ]
    assert changes[0] > changes[1] > changes[2]
    with pytest.raises(ValueError, match="first=0"):
        nn.DeltaActivation(6, first=0)


def test_gradients_of_the_step_are_the_authors_and_those_of_the_straight_through_estimator():
    x, step = normal(5, 7, 3), jnp.array([0.3, 0.5, 0.2])
    g = normal(5, 7, 3)
    ratio = np.maximum(np.asarray(x), 0) / np.asarray(step)
    for rule, per in (
        (delta.quantize, -np.round(ratio)),
        (delta.quantize_exact, np.round(ratio) - ratio),
    ):
        value, back = jax.vjp(rule, x, step)
        np.testing.assert_allclose(value, np.round(ratio) * np.asarray(step), rtol=1e-6)
        to_x, to_step = back(g)
        np.testing.assert_allclose(to_x, np.where(np.asarray(x) > 0, g, 0), rtol=1e-5)
        np.testing.assert_allclose(
            to_step, (per * np.asarray(g)).sum(axis=(0, 1)), rtol=1e-4, atol=1e-5
        )
    # With the authors' gradient the penalty makes the step larger.
    layer = nn.DeltaActivation(3, first=0.2)

    def loss(layer):
        layer(jnp.abs(x))
        return layer.loss.get_value()

    assert (np.asarray(nnx.grad(loss)(layer)["threshold"][...]) < 0).all()


# -- Activations


def test_activations_are_their_formulas_and_symlog_and_symexp_are_inverse():
    x = jnp.linspace(-4, 4, 33)
    f = {name: np.asarray(c(x)) for name, c in nn.CANDIDATES.items()}
    z = np.asarray(x, np.float64)
    soft = np.log1p(np.exp(z))
    want = {
        "symlog": np.sign(z) * np.log(np.abs(z) + 1),
        "symexp": np.sign(z) * (np.exp(np.abs(z)) - 1),
        "acon": 1.5 * z / (1 + np.exp(-1.5 * z)) - 0.25 * z,
        "tanh_soft_1": np.tanh(z) * soft,
        "tanh_soft_2": z * np.tanh(np.exp(z)),
        "srs": z / (z / 2 + np.exp(-z / 3)),
    }
    for name, value in want.items():
        np.testing.assert_allclose(f[name], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        nn.CANDIDATES["symexp"](jnp.asarray(f["symlog"])), x, rtol=1e-4, atol=1e-5
    )
    assert all(np.isfinite(c(jnp.array([-1e4, 1e4]))).all() for c in nn.CANDIDATES.values())
    scaled = nn.ScaledActivation("tanh")
    scaled.outer[...], scaled.inner[...] = jnp.float32(2.0), jnp.float32(3.0)
    np.testing.assert_allclose(scaled(x), 2 * np.tanh(3 * z), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="name='mish'"):
        nn.ScaledActivation("mish")


def test_the_climber_never_ends_below_its_start_and_finds_what_is_separable():
    table = {n: RNG.normal() for n in nn.CANDIDATES}
    score = lambda names: sum(table[n] * (i + 1) for i, n in enumerate(names))
    found = late_acceptance(score, ["relu"] * 3, list(nn.CANDIDATES), steps=400, seed=1)
    assert found.score >= score(("relu",) * 3) and found.history == sorted(found.history)
    assert set(found.names) == {max(table, key=lambda n: table[n])}
    worst = late_acceptance(lambda n: -float(n != ("relu",)), ["relu"], ["relu", "elu"], steps=9)
    assert worst.names == ("relu",)
    with pytest.raises(ValueError, match="too few"):
        late_acceptance(score, [], ["relu", "elu"], steps=3)


# -- Units that are linear


def network(kinds):
    sizes = [3, 6, 5, 2]
    return [
        (RNG.normal(size=(a, b)), RNG.normal(size=b), np.asarray(k))
        for a, b, k in zip(sizes, sizes[1:], kinds)
    ]


def test_a_network_without_relus_is_one_linear_map_and_others_collapse_where_they_can():
    linear = [RNG.integers(1, 3, n) for n in (6, 5, 2)]
    x = RNG.normal(size=(20, 3))
    layers = network(linear)
    one = unit_choice.collapse(layers)
    assert len(one) == 1
    np.testing.assert_allclose(
        unit_choice.evaluate(one, x), unit_choice.evaluate(layers, x), atol=1e-10
    )
    mixed = network([np.zeros(6, int), linear[1], np.ones(2, int)])
    short = unit_choice.collapse(mixed)
    assert len(short) == 2
    np.testing.assert_allclose(
        unit_choice.evaluate(short, x), unit_choice.evaluate(mixed, x), atol=1e-10
    )


def test_bounds_hold_and_the_program_allows_the_relu_and_nothing_else():
    layers = network([RNG.integers(0, 3, n) for n in (6, 5, 2)])
    low, high = np.array([-1.0, 0.0, -2.0]), np.array([1.0, 3.0, 2.0])
    bounds = unit_choice.interval_bounds(layers, low, high)
    x = RNG.uniform(low, high, size=(500, 3))
    for (w, b, kinds), bound in zip(layers, bounds):
        a = x @ w + b
        assert (a >= bound.low - 1e-9).all() and (a <= bound.high + 1e-9).all()
        x = unit_choice.evaluate([(w, b, kinds)], x)
    rows = unit_choice.relu_constraints(-1.5, 2.0)
    for a in np.linspace(-1.5, 2.0, 15):
        allowed = [
            z for z, b in itertools.product(np.linspace(-1, 3, 161), (0, 1))
            if all(p * z + q * a + r * b <= s + 1e-9 for p, q, r, s in rows)
        ]  # fmt: skip
        assert allowed and max(abs(z - max(a, 0)) for z in allowed) < 0.026
    with pytest.raises(ValueError, match="cannot switch"):
        unit_choice.relu_constraints(0.5, 2.0)


def test_units_are_drawn_by_their_logits_and_stages_leave_the_asked_number_of_relus():
    choices = [nn.UnitChoice(n, rngs=nnx.Rngs(n, noise=1)) for n in (6, 4)]
    for c in choices:
        c.logits[...] = normal(*c.logits[...].shape)
    a = jnp.full((1, 6), -2.0)
    p = np.asarray(jax.nn.softmax(choices[0].logits[...], axis=1))
    drawn = np.concatenate([np.asarray(choices[0](a)) for _ in range(200)])
    np.testing.assert_allclose((drawn == -2).mean(axis=0), p[:, unit_choice.IDENTITY], atol=0.13)
    np.testing.assert_allclose(choices[0].relus(), p[:, 0].sum(), rtol=1e-5)
    for count in (7, 3, 0):
        unit_choice.keep_relus(choices, count)
        assert sum(int((c.kinds == unit_choice.RELU).sum()) for c in choices) == count
    for c in choices:
        c.eval()
    kinds = choices[0].kinds
    np.testing.assert_array_equal(
        choices[0](a)[0], jnp.where(kinds == unit_choice.IDENTITY, -2.0, 0.0)
    )
    with pytest.raises(ValueError, match="count=11"):
        unit_choice.keep_relus(choices, 11)


# -- The pixelated butterfly


def factor(size, i):
    """The i-th butterfly factor without its diagonal: r and c differ in bit i alone, by blocks of 2^(i+1)."""
    half = 2**i
    block = np.zeros((2 * half, 2 * half), bool)
    block[np.arange(half), np.arange(half) + half] = block[
        np.arange(half) + half, np.arange(half)
    ] = True
    return np.kron(np.eye(size // (2 * half), dtype=bool), block)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_the_pattern_is_the_sum_of_the_factors_and_their_product_is_full(size):
    levels = int(np.log2(size))
    for k in range(1, levels + 1):
        want = functools.reduce(
            np.logical_or, [factor(size, i) for i in range(k)], np.eye(size, dtype=bool)
        )
        found = flat_butterfly(size, k)
        np.testing.assert_array_equal(found, want)
        assert (found.sum(axis=0) == k + 1).all() and (found == found.T).all()
    product = functools.reduce(np.matmul, [(np.eye(size) + factor(size, i)) for i in range(levels)])
    assert (product > 0).all()


def test_the_layer_is_its_masked_product_and_has_the_variance_of_a_dense_one():
    layer = nn.PixelflyLinear(64, 128, size=8, factors=2, block=8, rank=4, rngs=nnx.Rngs(0))
    x = normal(400, 64)
    s = layer.sparse.weight.to_dense() if hasattr(layer.sparse.weight, "to_dense") else None
    mask = np.kron(butterfly_blocks((64, 128), 8, 2, 8), np.ones((8, 8), bool))
    assert s is not None and ((np.asarray(s) != 0) <= mask).all()
    low = np.asarray(x @ layer.down[...] @ layer.up[...])
    gate: Any = layer.gate
    g = np.asarray(jax.nn.sigmoid(gate(x)))
    want = (1 - g) * np.asarray(x @ s) + g * low
    np.testing.assert_allclose(layer(x), want, rtol=1e-3, atol=1e-4)
    dense = jax.random.uniform(jax.random.key(0), (64, 128), minval=-1) / 8
    ratio = float(jnp.var(layer.sparse(x)) / jnp.var(x @ dense))
    assert 0.8 < ratio < 1.25
    plain = nn.PixelflyLinear(
        64, 32, size=4, factors=1, block=8, rank=2, gated=False, rngs=nnx.Rngs(1)
    )
    half = 0.5 * (plain.sparse(x) + x @ plain.down[...] @ plain.up[...])
    np.testing.assert_allclose(plain(x), half, rtol=1e-4, atol=1e-5)
    assert butterfly_blocks((64, 64), 16, 2, 32).mean() > (3 / 16)  # blocks straddle cells
    assert butterfly_blocks((64, 64), 8, 1, 8, whole=8)[0].all()
    for options, message in (
        (dict(size=6, factors=1), "size=6"),
        (dict(size=8, factors=4), "factors=4"),
    ):
        with pytest.raises(ValueError, match=message):
            flat_butterfly(**options)
    with pytest.raises(ValueError, match="must divide both sides"):
        butterfly_blocks((60, 64), 8, 1, 8)
