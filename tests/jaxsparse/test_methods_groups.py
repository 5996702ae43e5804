"""Methods on groups of channels: the golden values of their papers' cards, and their hardest checks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import masks, start, stepper

import jaxsparse
from jaxsparse.engines.units import Units
from jaxsparse.leaves import find
from jaxsparse.methods.depgraph import grown_decay
from jaxsparse.methods.hesso import importance
from jaxsparse.methods.l0 import hard_concrete, present
from jaxsparse.methods.polarization import polarization_slopes
from jaxsparse.methods.turbo_vbi import chain_messages, support_update
from jaxsparse.methods.turbo_vbi import start as first_posterior
from jaxsparse.methods.wgsef import envelope, envelope_factors
from jaxsparse.structures import Channel, Coupled

SGD = optax.sgd(1.0)
ROOT = np.random.default_rng(0)
# A layer with the scale of a norm, and a group that holds both.
SCALED = Coupled([[("kernel", 1), ("scale", 0)]])


def run(tx, params, grads):
    """Parameters and masks after each step of given gradients."""
    params, state = start(tx, params)
    step, found = stepper(tx), []
    for g in grads:
        params, state = step(params, state, g)
        found.append((jax.tree.map(np.asarray, params), masks(state)))
    return found


def columns(*values):
    """A kernel [1, n] whose columns are the units."""
    return {"kernel": jnp.asarray([values], jnp.float32)}


# HSPG


@pytest.mark.parametrize("epsilon, zero", [(0.0, False), (0.1, True)])
def test_a_group_is_zeroed_where_its_next_step_leaves_the_half_space(epsilon, zero):
    """x = (1, 0) and the trial (0.05, 0.9): their product is 0.05."""
    params = {"kernel": jnp.asarray([[1.0, 5.0], [0.0, 5.0]])}
    grads = {"kernel": jnp.asarray([[0.95, 0.0], [-0.9, 0.0]])}
    tx = jaxsparse.hspg(
        SGD, 0.5, total_steps=9, strength=0.0, epsilon=epsilon, begin_step=0, end_step=8
    )
    ((after, kept),) = run(tx, params, [grads])
    assert (after["kernel"][:, 0] == 0).all() == zero and kept["kernel"][0, 0] != zero
    np.testing.assert_allclose(after["kernel"][:, 1], 5)
    if not zero:
        np.testing.assert_allclose(after["kernel"][:, 0], [0.05, 0.9], rtol=1e-6)


def test_a_zero_group_never_moves_and_no_more_become_zero_than_asked_for():
    params = columns(1.0, 1.0, 1.0, 9.0)
    against = {"kernel": jnp.asarray([[1.5, 1.2, 1.1, 0.0]])}
    back = {"kernel": jnp.full((1, 4), -3.0)}
    momentum = optax.sgd(1.0, momentum=0.9)
    tx = jaxsparse.hspg(momentum, 0.5, total_steps=9, strength=0.0, begin_step=0, end_step=8)
    found = run(tx, params, [against, back, back])
    for after, kept in found:
        assert kept["kernel"].tolist() == [[False, False, True, True]], "those the furthest out go"
        assert after["kernel"][0, :2].tolist() == [0, 0]


def test_the_half_space_step_gives_more_zero_groups_than_the_proximal_one_at_the_same_strength():
    goal = jnp.asarray(np.random.default_rng(1).normal(size=(3, 40)) * 0.6, jnp.float32)
    strength, rate = 0.5, 0.2
    prox = optax.chain(
        optax.sgd(rate), jaxsparse.engines.proximal(jaxsparse.engines.GroupLasso(strength), rate)
    )
    half = jaxsparse.hspg(
        optax.sgd(rate), 0.99, total_steps=1000, strength=strength, epsilon=0.9, begin_step=0
    )
    zeros = []
    for tx in (prox, half):
        params = {"kernel": jnp.ones((3, 40))}
        state, step = tx.init(params), stepper(tx)
        for _ in range(60):
            params, state = step(params, state, {"kernel": params["kernel"] - goal})
        zeros.append(int((np.asarray(params["kernel"]) == 0).all(0).sum()))
    assert zeros[1] > zeros[0] > 0


# HESSO


def test_chosen_groups_shrink_along_a_line_to_exactly_zero_at_the_end_of_their_period():
    tx = jaxsparse.hesso(SGD, 0.5, total_steps=12, periods=2, begin_step=1, end_step=8)
    still = {"kernel": jnp.zeros((1, 4))}
    found = run(tx, columns(1.0, 2.0, 3.0, 4.0), [still] * 10)
    first = [float(p["kernel"][0, 0]) for p, _ in found]
    np.testing.assert_allclose(first, [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0], atol=1e-6)
    assert first[4] == 0
    second = [float(p["kernel"][0, 1]) for p, _ in found]
    np.testing.assert_allclose(second, [2] * 5 + [1.5, 1, 0.5, 0, 0], atol=1e-6)
    assert found[-1][1]["kernel"].tolist() == [[False, False, True, True]]


def test_the_five_measures_of_importance_are_those_of_a_loop():
    x, v = ROOT.normal(size=(5, 3)), ROOT.normal(size=(5, 3))
    units = Units(find({"kernel": jnp.zeros((5, 3))}, None, Channel()).leaves)
    (found,) = importance(units, [jnp.asarray(x, jnp.float32)], [jnp.asarray(v, jnp.float32)])
    rows = []
    for a, b in zip(x.T, v.T):
        n, d = np.linalg.norm(a), a @ b
        rows.append([n, n / np.sqrt(5), 1 + d / n / np.linalg.norm(b), abs(d), d * d / 2])
    rows = np.array(rows)
    np.testing.assert_allclose(found, (rows / np.linalg.norm(rows, axis=0)).mean(1), rtol=1e-5)


# WGSEF


@pytest.mark.parametrize(
    "strength, k, want",
    [
        (1.0, 1, (4 / 3, 1 / 3, 0, 0)),
        (1.0, 2, (1.5, 1, 0, 0)),
        (5.0, 1, (0.5, 0, 0, 0)),
        (0.2, 2, (2.5, 1.5625, 0.5625, 0.0625)),
    ],
)
def test_the_proximal_step_of_the_envelope_has_its_golden_values(strength, k, want):
    v = jnp.asarray([3.0, 2.0, 1.0, 0.5])
    np.testing.assert_allclose(v * envelope_factors(v, k, strength), want, atol=1e-4)


def test_the_envelope_has_its_golden_values_and_its_prox_no_better_neighbour():
    assert [round(float(envelope(jnp.ones(4), k)), 3) for k in (1, 2, 4)] == [8, 4, 2]
    v = np.asarray([1.2, -0.7, 0.4, 0.3], np.float32)
    at = v * np.asarray(envelope_factors(jnp.abs(v), 2, 0.7))
    trials = at + np.random.default_rng(0).normal(size=(200, 4)) * 0.03
    value = jax.jit(jax.vmap(lambda w: 0.5 * jnp.sum((w - v) ** 2) + 0.7 * envelope(jnp.abs(w), 2)))
    found = value(jnp.asarray(np.vstack([at, trials]), jnp.float32))
    assert (found[0] <= found[1:] + 1e-5).all()
    for w, equal in (((2.0, -1.0, 0, 0), True), ((2.0, -1.0, 0.5, 0), False)):
        half = 0.5 * float(np.square(w).sum())
        assert (abs(float(envelope(jnp.abs(jnp.asarray(w)), 2)) - half) < 1e-4) == equal


# Network slimming, MaskSparsity, polarisation, group channel pruning


def scaled(scales, rows=2):
    n = len(scales)
    kernel = jnp.asarray(ROOT.normal(size=(rows, n)), jnp.float32)
    return {"kernel": kernel, "scale": jnp.asarray(scales, jnp.float32)}


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def test_slimming_adds_the_sign_of_scales_before_momentum_and_leaves_kernels_alone():
    params = scaled([0.5, -0.4, 0.3, 0.2])
    tx = jaxsparse.slimming(
        optax.sgd(1.0, momentum=0.5), 0.5, total_steps=8, strength=0.01, groups=SCALED
    )
    found = run(tx, params, [zeros(params)] * 2)
    np.testing.assert_array_equal(found[-1][0]["kernel"], params["kernel"])
    np.testing.assert_allclose(found[-1][0]["scale"], [0.475, -0.375, 0.275, 0.175], rtol=1e-5)


def test_slimming_cuts_the_smallest_scales_of_all_layers_but_leaves_each_a_channel():
    params = {k: jnp.ones((2, 3)) for k in ("a", "b")}
    params |= {"a/scale": jnp.asarray([0.1, 0.2, 0.3]), "b/scale": jnp.asarray([0.7, 0.8, 0.9])}
    groups = Coupled([[("a", 1), ("a/scale", 0)], [("b", 1), ("b/scale", 0)]])
    tx = jaxsparse.slimming(SGD, 0.5, total_steps=4, end_step=0, strength=0.0, groups=groups)
    ((after, kept),) = run(tx, params, [zeros(params)])
    assert kept["a"].tolist() == [[False, False, True]] * 2, "one is left"
    assert kept["b"].tolist() == [[False, True, True]] * 2
    assert after["a/scale"].tolist() == [0, 0, pytest.approx(0.3)]


def test_unmarked_scales_train_bit_for_bit_as_without_a_penalty_and_marked_ones_stay_near_zero():
    params = scaled([0.5, 0.02, 0.4, 0.013])
    rng = np.random.default_rng(5)
    grads = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 1e-3, x.dtype), params)
        for _ in range(40)
    ]
    still = [g | {"scale": g["scale"] * jnp.asarray([1, 0, 1, 0])} for g in grads]
    options = dict(
        total_steps=100, begin_step=0, end_step=99, groups=SCALED, strength=0.05, band=0.005
    )
    found = run(jaxsparse.mask_sparsity(optax.sgd(0.1), 0.5, **options), params, still)
    free = run(
        jaxsparse.mask_sparsity(optax.sgd(0.1), 0.5, **options | dict(strength=0.0)), params, still
    )
    for (p, _), (q, _) in zip(found, free):
        np.testing.assert_array_equal(p["scale"][[0, 2]], q["scale"][[0, 2]])
        np.testing.assert_array_equal(p["kernel"], q["kernel"])
    late = np.stack([p["scale"][[1, 3]] for p, _ in found[-10:]])
    assert (np.abs(late) < 0.005).all() and (np.diff(np.abs(late), axis=0) <= 0).all()
    flicker = run(
        jaxsparse.mask_sparsity(optax.sgd(0.1), 0.5, **options | dict(penalty="l1")), params, still
    )
    late = np.stack([p["scale"][[1, 3]] for p, _ in flicker[-10:]])
    assert (np.sign(late[1:]) != np.sign(late[:-1])).any()


@pytest.mark.parametrize("t, share", [(0.0, 0.5), (1.0, 0.25), (1.2, 0.2), (1.4, 0.15), (2.0, 0.0)])
def test_the_minimum_of_the_polarization_regulariser_has_the_fraction_of_its_law(t, share):
    n = 20
    value = lambda x: t * x.sum() - np.abs(x - x.mean()).sum()
    best = min(range(n + 1), key=lambda on: value(np.r_[np.ones(on), np.zeros(n - on)]))
    assert best / n == pytest.approx(share)
    x = np.r_[np.linspace(0.1, 0.29, 5), 0.8]
    (slopes,) = polarization_slopes([jnp.asarray(x, jnp.float32)], t)
    step = 1e-6 * np.eye(6)
    want = [(value(x + d) - value(x - d)) / 2e-6 for d in step]
    np.testing.assert_allclose(slopes, want, atol=1e-4)


def test_polarization_drives_some_scales_to_the_limit_and_the_others_down():
    params = scaled(np.linspace(0.3, 0.7, 10))
    tx = jaxsparse.polarization(
        optax.sgd(1.0), 0.5, total_steps=1000, strength=0.01, limit=1.0, groups=SCALED
    )
    found = run(tx, params, [zeros(params)] * 120)
    late = np.sort(np.abs(found[-1][0]["scale"]))
    assert (late[5:] > 0.99).all() and (late[5:] <= 1.0 + 1e-6).all() and (late[:5] < 0.02).all()


def test_survivors_see_a_hundredth_of_the_penalty_late_and_all_of_it_early():
    params = scaled([0.9, 0.8, 0.2, 0.1])
    tx = jaxsparse.group_slimming(
        SGD, 0.5, total_steps=20, groups=SCALED, strength=0.01, survivors=0.5, begin_step=2
    )
    found = run(tx, params, [zeros(params)] * 3)
    at = [np.asarray(params["scale"]), *(p["scale"] for p, _ in found)]
    np.testing.assert_allclose(at[0] - at[1], [0.01] * 4, rtol=1e-4)
    np.testing.assert_allclose(at[2] - at[3], [1e-4, 1e-4, 0.01, 0.01], rtol=1e-2)


def test_bunches_have_thresholds_of_their_own_and_every_group_keeps_its_largest():
    names = ["body1", "body2", "head"]
    params = {}
    for i, name in enumerate(names):
        params[name] = jnp.ones((1, 4))
        params[f"{name}/scale"] = jnp.asarray([1.0, 2.0, 3.0, 4.0]) * (10.0 if i == 1 else 1.0)
    groups = Coupled([[(n, 1), (f"{n}/scale", 0)] for n in names])
    tx = jaxsparse.group_slimming(
        SGD,
        0.5,
        total_steps=4,
        begin_step=0,
        end_step=0,
        strength=0.0,
        groups=groups,
        bunches={"body": 0.5, "head": 0.25},
    )
    ((_, kept),) = run(tx, params, [zeros(params)])
    assert [int(kept[n].sum()) for n in names] == [1, 3, 3]
    one = jaxsparse.group_slimming(
        SGD, 0.5, total_steps=4, begin_step=0, end_step=0, strength=0.0, groups=groups
    )
    slim = jaxsparse.slimming(SGD, 0.5, total_steps=4, end_step=0, strength=0.0, groups=groups)
    (a,), (b,) = (run(tx, params, [zeros(params)]) for tx in (one, slim))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    wrong = jaxsparse.group_slimming(SGD, 0.5, total_steps=4, groups=groups, bunches={"neck": 0.5})
    with pytest.raises(ValueError, match="bunches: no leaf matches 'neck'"):
        wrong.update(zeros(params), wrong.init(params), params)


# DepGraph, SSL


def test_the_decay_of_a_group_grows_from_one_to_the_spread_and_is_one_where_all_are_equal():
    assert grown_decay(jnp.asarray([1.0, 3.0, 2.0]), 16.0).tolist() == [16, 1, 4]
    assert grown_decay(jnp.asarray([2.0, 2.0]), 16.0).tolist() == [1, 1]


def test_all_members_of_a_coupled_channel_decay_by_its_importance():
    params = {"a": jnp.asarray([[3.0, 1.0]]), "b": jnp.asarray([[4.0], [1.0]])}
    groups = Coupled([[("a", 1), ("b", 0)]])
    tx = jaxsparse.depgraph(SGD, 0.5, total_steps=8, strength=0.01, groups=groups)
    ((after, _),) = run(tx, params, [zeros(params)])
    np.testing.assert_allclose(after["a"], [[3 * 0.99, 1 - 0.16]], rtol=1e-6)
    np.testing.assert_allclose(after["b"], [[4 * 0.99], [1 - 0.16]], rtol=1e-6)


def test_families_add_and_the_cut_freezes_the_zero_groups():
    w = jnp.asarray([[3.0, 0.1], [4.0, 0.1]])
    tx = jaxsparse.ssl(
        SGD, 0.5, total_steps=8, end_step=1, families={"filters": 0.5, "shapes": 0.25}
    )
    found = run(tx, {"kernel": w}, [{"kernel": jnp.zeros((2, 2))}] * 3)
    w = np.asarray(w)
    unit = lambda axis: w / np.linalg.norm(w, axis=axis, keepdims=True)
    np.testing.assert_allclose(found[0][0]["kernel"], w - 0.5 * unit(0) - 0.25 * unit(1), rtol=1e-5)
    assert found[1][1]["kernel"].tolist() == [[True, False]] * 2
    np.testing.assert_array_equal(found[1][0]["kernel"], found[2][0]["kernel"])


# L0


def test_hard_concrete_gates_have_their_golden_values():
    a = jnp.asarray([0.0, 2.0, -3.0])
    np.testing.assert_allclose(present(a), [0.83182, 0.97337, 0.19759], atol=1e-5)
    np.testing.assert_allclose(hard_concrete(a), [0.5, 0.95696, 0], atol=1e-5)
    edge = jnp.log(1 / 11)  # sigmoid of it is 1/12
    assert float(hard_concrete(edge - 1e-3)) == 0 < float(hard_concrete(edge + 1e-3))
    assert float(hard_concrete(1e-3 - edge)) == 1 > float(hard_concrete(-1e-3 - edge))


def test_gates_are_zero_as_often_as_their_probability_says_and_its_slope_is_that_of_a_sigmoid():
    u = jax.random.uniform(jax.random.key(0), (200_000,), minval=1e-6, maxval=1 - 1e-6)
    for a in (0.0, 2.0, -3.0):
        z = hard_concrete(jnp.float32(a), u)
        p = float(present(jnp.float32(a)))
        assert abs(float((z != 0).mean()) - p) < 3e-3
        assert abs(float(jax.grad(present)(a)) - p * (1 - p)) < 1e-6
    assert abs(float((hard_concrete(jnp.float32(0.0), u) == 1).mean()) - 0.168) < 3e-3


def test_gates_of_useless_inputs_close_and_the_others_stay_open():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 6)), jnp.float32)
    y = x[:, :2] @ jnp.asarray(rng.normal(size=(2, 3)) * 2, jnp.float32)
    groups = Coupled([[("kernel", 0)]])
    tx = jaxsparse.l0(
        optax.adam(0.02), total_steps=700, strength=2e-3, gates=optax.adam(0.05), groups=groups
    )
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 3)) * 0.3, jnp.float32)}
    state = tx.init(params)
    grad = jax.grad(lambda p: jnp.mean((x @ p["kernel"] - y) ** 2))

    @jax.jit
    def train(params, state):
        def step(carry, _):
            p, s = carry
            u, s = tx.update(grad(p), s, p)
            return (optax.apply_updates(p, u), s), None

        return jax.lax.scan(step, (params, state), length=700)[0]

    params, state = train(params, state)
    alive = (np.asarray(params["kernel"]) != 0).any(1)
    assert alive.tolist() == [True, True, False, False, False, False]
    assert bool(jaxsparse.check(params, state))


# Turbo-VBI


def brute_force(evidence, stay, density):
    """Log odds of every place of one chain from all others, over all 2^n supports."""
    n = len(evidence)
    leave = {1: (1 - stay) * 2 * (1 - density), 0: (1 - stay) * 2 * density}
    odds = []
    for i in range(n):
        total = {0: 0.0, 1: 0.0}
        for s in itertools.product((0, 1), repeat=n):
            p = density if s[0] else 1 - density
            for a, b in zip(s, s[1:]):
                p *= leave[a] if a != b else 1 - leave[a]
            p *= np.exp(sum(e for j, (e, x) in enumerate(zip(evidence, s)) if x and j != i))
            total[s[i]] += p
        odds.append(total[1] / (total[0] + total[1]))
    return np.array(odds)


@pytest.mark.parametrize("stay, density", [(0.9, 0.5), (0.8, 0.3), (0.5, 0.3)])
def test_messages_along_a_chain_are_those_of_enumeration(stay, density):
    evidence = np.random.default_rng(0).normal(size=8) * 2
    found = chain_messages(jnp.asarray(evidence, jnp.float32), stay, density)
    np.testing.assert_allclose(found, brute_force(evidence, stay, density), rtol=1e-4)


def test_without_a_chain_the_prior_of_every_weight_is_the_density():
    mu = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
    found = support_update(
        first_posterior(mu, 0.1, (1.0, 1.0), 0.5), mu, (1.0, 1.0), (1.0, 1e-3), 0.5, 0.5
    )
    np.testing.assert_allclose(found.extrinsic, 0.5, rtol=1e-5)
    # q(rho) with half of everything in the support: Gamma(1.5, (1 + 0.001)/2 + (mu^2 + sigma^2)/2)
    np.testing.assert_allclose(found.precision, 1.5 / (0.5005 + (mu**2 + 0.01) / 2), rtol=1e-5)


def test_a_clustered_prior_recovers_a_clustered_support_better_than_an_independent_one():
    rng = np.random.default_rng(2)
    support = np.zeros((24, 24), bool)
    support[4:14, 6:18] = True
    mu = jnp.asarray(
        np.where(support, rng.normal(size=(24, 24)) * 0.8, 0) + rng.normal(size=(24, 24)) * 0.1,
        jnp.float32,
    )

    @jax.jit
    def errors(stay):
        post = first_posterior(mu, 0.05, (1.0, 0.3), 0.15)
        infer = lambda _, p: support_update(p, mu, (1.0, 0.3), (1.0, 0.015), stay, 0.15)
        return jnp.sum((jax.lax.fori_loop(0, 6, infer, post).support >= 0.5) != support)

    assert int(errors(0.95)) < 0.6 * int(errors(0.5))


# Groups of every method


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(epsilon=1.0), "epsilon=1.0: must be in"),
        (dict(strength=-1.0), "strength=-1.0: a strength must not be negative"),
        (dict(groups=3), "groups=3: give what channels.find"),
        (dict(begin_step=9), "begin_step=9 is not within"),
        (dict(groups=Coupled([[("nothing", 0)]])), "no leaf matches"),
    ],
)
def test_bad_arguments_say_what_and_where(bad, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.hspg(SGD, 0.5, **dict(total_steps=8) | bad).init({"kernel": jnp.ones((2, 4))})


def test_other_methods_name_their_bad_arguments():
    for make, message in [
        (lambda: jaxsparse.hesso(SGD, 0.5, total_steps=8, periods=0), "periods=0"),
        (lambda: jaxsparse.hesso(SGD, 0.5, total_steps=8, periods=10), "periods=10: there are"),
        (lambda: jaxsparse.depgraph(SGD, 0.5, total_steps=8, spread=0.5), "spread=0.5"),
        (lambda: jaxsparse.mask_sparsity(SGD, 0.5, total_steps=8, penalty="l3"), "penalty='l3'"),
        (lambda: jaxsparse.polarization(SGD, 0.5, total_steps=8, t=3), "t=3"),
        (lambda: jaxsparse.l0(SGD, total_steps=8, drop_rate=1.0), "drop_rate=1.0"),
        (lambda: jaxsparse.turbo_vbi(SGD, total_steps=800, examples=0), "examples=0"),
        (lambda: jaxsparse.turbo_vbi(SGD, total_steps=800, examples=9, stay=0.1), "stay=0.1"),
        (lambda: jaxsparse.ssl(SGD, 0.5, total_steps=8, families={"rows": 1.0}), "family='rows'"),
        (
            lambda: jaxsparse.wgsef(SGD, 0.5, total_steps=8, allocation="global"),
            "allocation='global'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
