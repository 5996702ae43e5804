"""Budgets and initial networks, LAMP, SAP and APP, transposable masks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import masks, matrix, start, stepper

import jaxsparse
from jaxsparse import allocations, schedules
from jaxsparse.leaves import find
from jaxsparse.structures.transposable import _greedy, transposable_nm_mask

SGD = optax.sgd(0.1)
SHAPES = {"l1": (784, 300), "l2": (300, 100), "l3": (100, 10)}
MLP = {k: jnp.zeros(s) for k, s in SHAPES.items()}
SIZES = np.array([a * b for a, b in SHAPES.values()])


def densities(rule, sparsity):
    return 1 - np.array([float(s) for s in rule.sparsities(find(MLP).leaves, sparsity)])


RULES = [
    allocations.ErdosRenyi(last_dense=True),
    allocations.UniformPlus(),
    allocations.Balanced(),
    allocations.Pyramidal(),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_budgets_meet_the_total_also_where_the_sparsity_is_traced(rule):
    traced = jax.jit(lambda s: jnp.stack(list(map(jnp.asarray, rule.sparsities(find(MLP).leaves, s)))))  # fmt: skip
    floor = 0.0 if not isinstance(rule, allocations.UniformPlus) else SIZES[0] / SIZES.sum()
    for sparsity in (0.05, 0.08, 0.1) if floor else (0.5, 0.9, 0.98):
        found = densities(rule, sparsity)
        assert (found >= 0).all() and (found <= 1).all()
        assert abs((found * SIZES).sum() / SIZES.sum() - (1 - sparsity)) < 1e-5
        np.testing.assert_allclose(1 - traced(sparsity), found, atol=2e-5)


def test_erk_plus_pays_for_its_dense_last_layer():
    plus, plain = densities(RULES[0], 0.98), densities(allocations.ErdosRenyi(), 0.98)
    assert plus[2] == 1.0 and plain[2] == pytest.approx(1 - 0.632597, abs=1e-6)
    assert (plus[:2] < plain[:2]).all()
    with pytest.raises(ValueError, match="the layers that stay dense have more weights"):
        densities(RULES[0], 0.999)


def test_uniform_plus_keeps_the_first_layer_dense_and_a_fifth_of_the_last():
    params = {"l1": jnp.zeros((10, 10)), "l2": jnp.zeros((100, 100)), "l3": jnp.zeros((100, 10))}
    leaves = find(params).leaves
    found = 1 - np.array(allocations.UniformPlus().sparsities(leaves, 0.9))
    assert found[0] == 1.0 and found[2] == pytest.approx(0.2)
    assert found[1] == pytest.approx((1110 - 100 - 200) / 10_000)
    with pytest.raises(ValueError, match="sparsity=0.999"):
        allocations.UniformPlus().sparsities(leaves, 0.999)


def test_balanced_layers_have_equally_many_weights_unless_they_are_full():
    found = densities(allocations.Balanced(), 0.98) * SIZES
    assert found[2] == pytest.approx(1000)
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    without = densities(allocations.Balanced(redistribute=False), 0.98) * SIZES
    assert without[0] == pytest.approx(0.02 * SIZES.sum() / 3) and without[2] == 1000
    assert without.sum() < found.sum()


def test_pyramidal_densities_are_powers_of_a_root():
    found = densities(allocations.Pyramidal(), 0.9)
    r = found[0]
    np.testing.assert_allclose(found, [r, r**2, r**3], rtol=1e-9)
    assert (r ** np.array([1, 2, 3]) * SIZES).sum() == pytest.approx(0.1 * SIZES.sum(), rel=1e-6)


@pytest.mark.slow
def test_score_ratios_keep_the_budgets_of_snip_and_draw_positions_anew():
    params = {"a": matrix((10, 10)), "b": matrix((20, 10), 1)}
    grads = {"a": matrix((10, 10), 2), "b": 0.5 * matrix((20, 10), 3)}
    ratios = jaxsparse.score_ratios(params, 0.9, grads=grads)
    _, snip = jaxsparse.prune(params, 0.9, score="saliency", grads=grads, allocation="global")
    tx = jaxsparse.static(SGD, 0.9, allocation=ratios, seed=3)
    drawn = masks(tx.init(params))
    for key, m in drawn.items():
        assert m.sum() == snip[key].sum() and (m != snip[key]).any()


def test_a_minimum_threshold_saves_a_layer_that_a_global_threshold_removes():
    params = {
        "weak": 0.01 * matrix((20, 10)),
        "b": matrix((40, 20), 1),
        "c": 1.2 * matrix((30, 30), 2),
    }
    total, least = 1900, int(1900 * 0.02)
    _, plain = jaxsparse.prune(params, 0.8, allocation="global")
    assert plain["weak"].sum() == 0
    rule = jaxsparse.minimum_threshold(params, 0.8, minimum=0.02)
    _, found = jaxsparse.prune(params, 0.8, allocation=rule)
    kept = {k: int(m.sum()) for k, m in found.items()}
    assert kept["weak"] == least and abs(sum(kept.values()) - total // 5) <= 1
    # the others give in proportion to their sparsities, not from one ranking
    sparsity = lambda k, m: 1 - int(m[k].sum()) / m[k].size
    factors = [sparsity(k, found) / sparsity(k, plain) for k in ("b", "c")]
    assert factors[0] == pytest.approx(factors[1], rel=3e-3)
    small = {**params, "tiny": jnp.ones((2, 2))}
    rule = jaxsparse.minimum_threshold(small, 0.5, minimum=0.02)
    assert rule.by_path["^tiny$"] == 0.0
    with pytest.raises(ValueError, match="minimum=0.3: 570 weights in each of 3 layers"):
        jaxsparse.minimum_threshold(params, 0.9, minimum=0.3)


def test_weights_rescaled_to_their_fan_in_keep_the_variance_of_activations():
    w = {"kernel": matrix((400, 50)) / 20}
    m = {"kernel": jax.random.uniform(jax.random.key(1), (400, 50)) < 0.1}
    x = matrix((300, 400), 2)
    for per in ("output", "layer"):
        y = x @ jaxsparse.rescale_fan_in(w, m, per=per)["kernel"]
        assert float(y.std()) == pytest.approx(float((x @ w["kernel"]).std()), rel=0.1)
    with pytest.raises(ValueError, match="per='input'"):
        jaxsparse.rescale_fan_in(w, m, per="input")


def test_flow_is_preserved_by_as_few_connections_as_are_missing():
    alone = jnp.zeros((3, 4), bool).at[0, 0].set(True).at[0, 1].set(True)
    conv = jnp.zeros((3, 3, 2, 5), bool).at[1, 1, 0, :4].set(True)
    whole = jnp.eye(4, dtype=bool)
    given = {"a": alone, "b": None, "conv": conv, "whole": whole, "bias": jnp.zeros(3, bool)}
    new = jax.jit(lambda masks: jaxsparse.preserve_flow(masks, seed=1))(given)
    assert new["b"] is None and not new["bias"].any() and (new["whole"] == whole).all()
    for key in ("a", "conv"):
        m, old = np.asarray(new[key]), np.asarray(given[key])
        assert (m | old == m).all(), "nothing is removed"
        flat = m.reshape(-1, *m.shape[-2:]).any(axis=0)
        assert flat.any(axis=0).all() and flat.any(axis=1).all()
    # a: outputs 2 and 3 get an input each, and these or two more serve the inputs 1 and 2
    assert 4 <= new["a"].sum() <= 6 and 5 <= new["conv"].sum() <= 6
    one = lambda seed: jaxsparse.preserve_flow({"a": alone}, seed=seed)["a"] & ~alone
    added = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(30)))
    assert added.any(axis=0).sum() >= 8, "anywhere, not at the first free position"
    tx = jaxsparse.static(SGD, masks=new)
    params = {"a": matrix((3, 4)), "b": jnp.ones(2), "conv": matrix((3, 3, 2, 5)),
              "whole": matrix((4, 4)), "bias": jnp.ones(3)}  # fmt: skip
    assert (masks(tx.init(params))["a"] == np.asarray(new["a"])).all()


def test_pruning_inside_a_fixed_random_mask_is_a_composition():
    fixed = jaxsparse.static(optax.sgd(0.1), 0.5, allocation="uniform")
    tx = jaxsparse.magnitude(fixed, 0.9, total_steps=10, update_every=2, end_step=6)
    inside = masks(fixed.init({"kernel": matrix()}))["kernel"]
    params, state = start(tx, {"kernel": matrix()})
    step = stepper(tx)
    for t in range(8):
        params, state = step(params, state, {"kernel": matrix(seed=t)})
        assert not np.any(np.asarray(params["kernel"])[~inside])
    assert int((params["kernel"] != 0).sum()) == 10


OUTER = {
    "rigl": {},
    "granet": dict(initial_sparsity=0.5),
    "random_pruning": {},
    "magnitude_ste": {},
    "deep_r": dict(l1=0.5),
}
MORE = {
    "set": dict(removal="signwise"),
    "mest": {},
    "mest_soft": {},
    "dst_ee": {},
    "set_itop": dict(growth="unfired"),
    "rigl_itop": {},
    "dsr": dict(threshold=0.3),
    "snfs": {},
    "magnitude": {},
    "saliency": {},
    "static": {},
    "one_shot": dict(score="random"),
    "gsm": {},
}


@pytest.mark.parametrize("name", [*OUTER, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_a_method_around_a_fixed_mask_spends_its_budget_inside_of_it(name):
    """20 x 20, half of it fixed at 0, and 40 weights asked for: all 40 are inside, whoever grows."""
    fixed = jaxsparse.static(optax.sgd(0.05, momentum=0.9), 0.5, allocation="uniform", seed=3)
    options = (
        dict(total_steps=16, update_every=2, end_step=8, allocation="uniform")
        | (OUTER | MORE)[name]
    )
    known = jaxsparse.METHODS[name].options
    tx = jaxsparse.make(
        name, fixed, sparsity=0.9, **{k: v for k, v in options.items() if k in known}
    )
    params, state = start(tx, {"kernel": matrix((20, 20))})
    inside = masks(fixed.init({"kernel": matrix((20, 20))}))["kernel"]
    step = stepper(tx)
    for t in range(14):
        params, state = step(params, state, {"kernel": matrix((20, 20), t + 1)})
        found, p = masks(state)["kernel"], np.asarray(params["kernel"])
        assert (found <= inside).all() and not p[~found].any(), t
    assert found.sum() == 40 and jaxsparse.summarize(params, state).sparse.masked == 360


def test_a_method_around_one_that_rewires_makes_up_for_what_that_drops():
    inner = jaxsparse.set_(SGD, 0.5, total_steps=99, update_every=1, allocation="uniform")
    tx = jaxsparse.rigl(inner, 0.9, total_steps=99, update_every=4, allocation="uniform")
    params, state = start(tx, {"kernel": matrix((20, 20))})
    step, before = stepper(tx), None
    for t in range(9):
        params, state = step(params, state, {"kernel": matrix((20, 20), t + 1)})
        kept = [np.asarray(s.masks["kernel"]) for s in (state, state.inner)]
        np.testing.assert_array_equal(masks(state)["kernel"], kept[0] & kept[1])
        if t in (4, 8):  # chosen among what the inner method kept before this step
            assert (kept[0] <= before).all() and kept[0].sum() == 40
        before = kept[1]


def test_masks_of_a_method_inside_another_are_reported_as_far_as_both_keep():
    inner = jaxsparse.rigl(SGD, 0.9, total_steps=20, update_every=2, allocation="uniform")
    tx = jaxsparse.static(inner, 0.5, allocation="uniform", pack_masks=True)
    params, state = start(tx, {"kernel": matrix((20, 20)), "bias": jnp.ones(3)})
    step = stepper(tx)
    for t in range(12):
        grads = {"kernel": matrix((20, 20), t + 1), "bias": jnp.zeros(3)}
        params, state = step(params, state, grads)
        found = np.asarray(jaxsparse.get_masks(state)["kernel"])
        assert found.sum() <= 40 and not np.asarray(params["kernel"])[~found].any()
    assert jaxsparse.get_masks(state)["bias"] is None


def test_a_method_that_cannot_stay_inside_another_names_the_right_order():
    tx = jaxsparse.srigl(jaxsparse.static(SGD, 0.5), 0.9, total_steps=200)
    with pytest.raises(ValueError, match="wrap that one around it"):
        tx.init({"kernel": matrix((20, 20))})


# LAMP, SAP, APP


def test_lamp_in_rounds_leaves_the_same_fraction_each_time_and_one_weight_per_layer():
    params = {"a": matrix((10, 10)), "b": 1e-4 * matrix((10, 10), 1)}
    tx = jaxsparse.lamp(
        optax.sgd(0.0), 0.9375, total_steps=10, rounds=4, end_step=6, update_every=1
    )
    params, state = start(tx, params)
    step, kept, last = stepper(tx), [], None
    for _ in range(8):
        params, state = step(params, state, params)
        now = masks(state)
        kept.append(sum(int(m.sum()) for m in now.values()))
        assert last is None or all((now[k] <= last[k]).all() for k in now)
        last = now
    assert kept == [100, 100, 50, 50, 25, 25, 13, 13]
    assert abs(int(now["a"].sum()) - int(now["b"].sum())) <= 4, "scale does not matter"
    with pytest.raises(ValueError, match="rounds=0"):
        jaxsparse.lamp(SGD, 0.5, total_steps=9, rounds=0)


@pytest.mark.parametrize("k, n", [(1, 4), (2, 4), (1, 100), (7, 7)])
def test_gini_and_pq_index_of_k_equal_weights_among_n_are_the_part_that_is_zero(k, n):
    w = jnp.where(jnp.arange(n) < k, -3.0, 0.0)
    np.testing.assert_allclose(jaxsparse.gini_index(w), 1 - k / n, atol=1e-12)
    np.testing.assert_allclose(jaxsparse.pq_index(w), 1 - k / n, atol=1e-6)


def test_gini_index_is_the_mean_difference_over_twice_the_mean():
    w = np.asarray(matrix((9, 7)), np.float64)
    size = np.abs(w).ravel()
    pairs = np.abs(size[:, None] - size[None, :]).mean()
    np.testing.assert_allclose(jaxsparse.gini_index(w), pairs / (2 * size.mean()), rtol=1e-12)
    np.testing.assert_allclose(jaxsparse.gini_index(5 * w), jaxsparse.gini_index([w, w]))
    assert jaxsparse.gini_index(jnp.zeros(3)) == 0.0


def test_the_anytime_metric_of_app_is_the_sum_of_errors():
    assert jaxsparse.cumulative_error(e / 8 for e in (4, 2, 2, 1)) == 9 / 8


def test_pq_index_goldens():
    pq = lambda *x: float(jaxsparse.pq_index(jnp.array(x)))
    assert pq(1, 0, 0, 0) == 0.75 and pq(1, 1, 0, 0) == 0.5 and pq(2, 2, 2) == 0.0
    assert pq(*[3] + [0] * 99) == pytest.approx(0.99)
    assert pq(1, 2, 3, 4) == pytest.approx(0.0555859, abs=1e-6)
    assert pq(0, 0) == 0.0
    w = matrix()
    kept = np.abs(w) > 0.5
    inside = jaxsparse.pq_index(w, where=kept)
    assert float(inside) == pytest.approx(pq(*np.asarray(w)[kept]), rel=1e-5)
    with pytest.raises(ValueError, match="p=1, q=0.5"):
        jaxsparse.pq_index(w, p=1, q=0.5)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=2), st.sampled_from([1e-20, 1.0, 1e20]))
def test_pq_index_ignores_scale_and_repetition(w, c):
    x = jnp.array(w)
    index = float(jaxsparse.pq_index(x))
    assert 0 <= index < 1
    assert float(jaxsparse.pq_index(c * x)) == pytest.approx(index, abs=1e-5)
    assert float(jaxsparse.pq_index(jnp.tile(x, 3))) == pytest.approx(index, abs=1e-5)


def sap_cut(w, masks, p, q, eta=0.0, gamma=1.0, beta=0.9):
    """Oracle of the card: how many of the kept weights of these arrays one round leaves."""
    x = np.concatenate([np.abs(np.asarray(a, np.float64))[m] for a, m in zip(w, masks)])
    d = x.size
    index = 1 - d ** (1 / q - 1 / p) * (x**p).sum() ** (1 / p) / (x**q).sum() ** (1 / q)
    m = np.ceil(d * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p)) - 1e-6)
    return d - int(np.floor(d * min(gamma * (1 - m / d), beta) + 1e-9))


def test_sap_prunes_what_is_zero_rewinds_and_starts_the_optimizer_anew():
    """A gradient of 5 at the cut, 0 afterwards: SGD with momentum must not go on from the 5."""
    w = jnp.where(jnp.arange(100).reshape(10, 10) % 4 == 0, 1.0, 0.0)
    tx = jaxsparse.sap(optax.sgd(0.1, momentum=0.9), total_steps=10, update_every=3, end_step=5)
    params, state = start(tx, {"kernel": w})
    step = stepper(tx)
    for _ in range(3):
        params, state = step(params, state, {"kernel": jnp.zeros((10, 10))})
    params = {"kernel": jnp.where(w == 1, 0.7, params["kernel"])}  # trained for a while
    params, state = step(params, state, {"kernel": jnp.full((10, 10), 5.0)})
    m = masks(state)["kernel"]
    np.testing.assert_array_equal(m, w == 1)
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(params["kernel"])[m], 1.0)
        np.testing.assert_array_equal(state.inner[0].trace["kernel"], 0.0)
        params, state = step(params, state, {"kernel": jnp.zeros((10, 10))})


def test_a_round_of_sap_begins_with_the_moments_and_the_count_of_adam_at_zero():
    inner = optax.adam(optax.linear_schedule(0.1, 0.0, 20))
    tx = jaxsparse.sap(inner, total_steps=20, update_every=4)
    w = {"kernel": matrix(), "bias": jnp.ones(3)}
    params, state = start(tx, w)
    step = stepper(tx)
    for t in range(5):
        grads = {"kernel": matrix(seed=t + 1), "bias": jnp.ones(3)}
        params, state = step(params, state, grads)
    adam, rate = state.inner
    assert int(adam.count) == 0 and int(rate.count) == 5, "the learning rate goes on"
    for x in jax.tree.leaves((adam.mu, adam.nu)):
        np.testing.assert_array_equal(x, 0.0)
    m = masks(state)["kernel"]
    before = np.asarray(params["kernel"])
    params, state = step(params, state, {"kernel": jnp.ones((10, 10)), "bias": jnp.ones(3)})
    moved = np.asarray(params["kernel"])[m] - before[m]
    np.testing.assert_allclose(moved, -0.1 * (1 - 5 / 20), rtol=1e-4)  # one learning rate


@pytest.mark.parametrize("rewind", [True, "all"])
def test_w0_comes_back_exactly_however_far_a_weight_went(rewind):
    """p + (w0 - p) alone is 0 for w0 = 1e-6 and p = 400."""
    w = {"kernel": jnp.array([[1e-6, 0.0], [1e-3, 0.0]]), "bias": jnp.array([1e-6])}
    tx = jaxsparse.sap(optax.sgd(1.0), total_steps=20, update_every=3, gamma=0.5, rewind=rewind)
    params, state = start(tx, w)
    step = stepper(tx)
    far = jax.tree.map(lambda x: jnp.where(x != 0, -400.0, 0.0), w)
    params, state = step(params, state, far)
    zeros = jax.tree.map(jnp.zeros_like, w)
    for _ in range(4):
        params, state = step(params, state, zeros)
    assert not masks(state)["kernel"].all()
    np.testing.assert_array_equal(params["kernel"], w["kernel"])
    bias = float(params["bias"][0])
    assert bias == float(np.float32(1e-6)) if rewind == "all" else bias == 400.0


@pytest.mark.parametrize("options", [{}, dict(eta=0.1), dict(gamma=1.2), dict(beta=0.1)])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sap_prunes_as_many_as_the_card_says(scope, options):
    params = {"a": matrix((30, 20)) ** 3, "b": 5 * matrix((10, 40), 1) ** 3}
    tx = jaxsparse.sap(SGD, total_steps=20, update_every=1, scope=scope, rewind=False, **options)
    params, state = start(tx, params)
    step, zeros = stepper(tx), jax.tree.map(jnp.zeros_like, params)
    params, state = step(params, state, zeros)
    for _ in range(3):
        before = masks(state)
        groups = [["a", "b"]] if scope == "global" else [["a"], ["b"]]
        want = [
            sap_cut([params[k] for k in ks], [before[k] for k in ks], 0.5, 1.0, **options)
            for ks in groups
        ]
        params, state = step(params, state, zeros)
        after = masks(state)
        assert [sum(int(after[k].sum()) for k in ks) for ks in groups] == want


def test_the_rounds_of_sap_make_no_array_of_all_weights():
    params = {"a": jnp.ones((37, 41)), "b": jnp.ones((23, 29))}
    tx = jaxsparse.sap(SGD, total_steps=20, update_every=2)
    state = jax.eval_shape(tx.init, params)
    jaxpr = str(jax.make_jaxpr(tx.update)(params, state, params))
    assert f"[{37 * 41 + 23 * 29}]" not in jaxpr


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.2, 3.0])
def test_sap_over_all_layers_keeps_what_the_index_of_all_weights_says(gamma):
    rng = np.random.default_rng(0)
    w = {
        name: rng.standard_normal(s).astype(np.float32) ** 5
        for name, s in (("a", (9, 20)), ("b", (7, 11)))
    }
    tx = jaxsparse.sap(
        SGD, total_steps=10, update_every=1, end_step=1, gamma=gamma, beta=0.8, rewind=False
    )
    params, state = start(tx, {k: jnp.asarray(v) for k, v in w.items()})
    step = stepper(tx)
    for _ in range(2):
        params, state = step(params, state, jax.tree.map(jnp.zeros_like, params))
    size = np.abs(np.concatenate([v.ravel() for v in w.values()])).astype(np.float64)
    d = size.size
    ratio = np.sum(size**0.5) ** 2 / (d * np.sum(size))  # ((mean of powers p)^(1/p) / mean)
    kept = d - int(d * min(gamma * (1 - np.ceil(d * ratio) / d), 0.8) + 1e-9)
    threshold = np.sort(size)[d - kept]
    found = masks(state)
    for name, v in w.items():
        np.testing.assert_array_equal(found[name], np.abs(v) >= threshold)


@pytest.mark.parametrize("scope", ["layer", "neuron"])
def test_sap_in_layers_and_neurons(scope):
    w = jnp.zeros((8, 4)).at[:2].set(1.0).at[2, 0].set(1.0)
    tx = jaxsparse.sap(SGD, total_steps=10, update_every=1, end_step=1, scope=scope, rewind=False)
    params, state = start(tx, {"kernel": w})
    step = stepper(tx)
    for _ in range(2):
        params, state = step(params, state, {"kernel": jnp.zeros((8, 4))})
    assert masks(state)["kernel"].sum(axis=0).tolist() == [3, 2, 2, 2]


def test_sap_errors():
    with pytest.raises(ValueError, match="scope='net'"):
        jaxsparse.sap(SGD, total_steps=9, scope="net")
    with pytest.raises(ValueError, match="beta=1"):
        jaxsparse.sap(SGD, total_steps=9, beta=1)
    with pytest.raises(ValueError, match="rewind='dense'"):
        jaxsparse.sap(SGD, total_steps=9, rewind="dense")


def test_app_prunes_before_each_megabatch_along_its_densities():
    sparsity = 1 - 0.8**4.5
    want = [0.8, 0.7155, 0.64, 0.5724, 0.512, 0.4579, 0.4096, 0.3664]
    np.testing.assert_allclose(schedules.anytime_densities(sparsity, 8), want, atol=5e-5)
    tx = jaxsparse.app(SGD, sparsity, total_steps=16)
    params, state = start(tx, {"kernel": matrix((50, 40))})
    step, kept = stepper(tx), []
    for t in range(16):
        params, state = step(params, state, {"kernel": matrix((50, 40), t)})
        kept.append(int(masks(state)["kernel"].sum()))
    assert kept[0::2] == kept[1::2]
    np.testing.assert_allclose(np.array(kept[0::2]) / 2000, want, atol=6e-4)
    with pytest.raises(ValueError, match="stages=20"):
        jaxsparse.app(SGD, 0.5, total_steps=10, stages=20)


@pytest.mark.parametrize("score, dense", [("saliency", True), ("magnitude", False)])
def test_the_first_forward_pass_of_app_is_dense_only_where_the_score_needs_its_gradient(
    score, dense
):
    assert jaxsparse.METHODS["app"].starts_dense and jaxsparse.METHODS["app"].dense_phase
    tx = jaxsparse.app(SGD, 1 - 0.8**4.5, total_steps=16, score=score)
    params, state = start(tx, {"kernel": matrix((50, 40))})
    assert int((params["kernel"] != 0).sum()) == (2000 if dense else 1600)
    params, _ = stepper(tx)(params, state, {"kernel": matrix((50, 40), 1)})
    assert int((params["kernel"] != 0).sum()) == 1600


# Transposable masks


def brute_force(scores, n):
    m = len(scores)
    rows = [np.isin(np.arange(m), c) for c in itertools.combinations(range(m), n)]
    full = [np.stack(p) for p in itertools.product(rows, repeat=m)]
    return max((p * scores).sum() for p in full if (p.sum(axis=0) == n).all())


@pytest.mark.parametrize("n, m", [(1, 2), (1, 4), (2, 4), (3, 4)])
def test_small_transposable_masks_are_the_best_and_exactly_n_in_both_directions(n, m):
    scores = np.abs(np.asarray(matrix((2 * m, 3 * m), n)))
    mask = np.asarray(transposable_nm_mask(scores, n, m))
    tiles = mask.reshape(2, m, 3, m)
    assert (tiles.sum(axis=1) == n).all() and (tiles.sum(axis=3) == n).all()
    for i, j in itertools.product(range(2), range(3)):
        block = scores.reshape(2, m, 3, m)[i, :, j]
        assert (block * tiles[i, :, j]).sum() == pytest.approx(brute_force(block, n), rel=1e-5)


@pytest.mark.slow
def test_large_transposable_masks_hold_the_pattern_and_at_least_half_of_the_best_sum():
    scores = jnp.abs(matrix((2, 16, 16)))
    mask = np.asarray(transposable_nm_mask(scores, 2, 8)).reshape(2, 2, 8, 2, 8)
    assert (mask.sum(axis=2) <= 2).all() and (mask.sum(axis=4) <= 2).all()
    assert mask.sum() >= 0.9 * mask.size / 4
    blocks = jnp.abs(matrix((20, 4, 4), 5))
    greedy = np.asarray((blocks * _greedy(blocks, 2, 4)).sum(axis=(1, 2)))
    best = np.asarray((blocks * transposable_nm_mask(blocks, 2, 4)).sum(axis=(1, 2)))
    assert (greedy >= best / 2).all()
    with pytest.raises(ValueError, match="m=8 must divide"):
        transposable_nm_mask(jnp.ones((12, 8)), 2, 8)
    with pytest.raises(ValueError, match="n=5, m=4"):
        transposable_nm_mask(jnp.ones((4, 4)), 5, 4)


@pytest.mark.parametrize("to", [0, 2, 3])
def test_weights_return_to_those_before_the_step_that_is_asked_for(to):
    """Late rewinding: SGD with a gradient of 1 walks in known steps, so the weights of step `to` are known."""
    from jaxsparse import schedules, scores
    from jaxsparse.engines import all_kept, hold_masks, keep_best, rewind
    from jaxsparse.engines.setup import setup

    plan, cut, inner = setup(0.5), schedules.At((4,)), optax.sgd(0.25, momentum=0.5)
    tx = hold_masks(inner, plan, init=all_kept, rule=keep_best(scores.magnitude, plan), at=cut)
    tx = rewind(tx, inner, plan, cut, to=to)
    start = params = {"kernel": 8.0 + jnp.arange(8.0).reshape(4, 2)}
    state, seen = tx.init(params), []
    for _ in range(6):
        seen.append(np.asarray(params["kernel"]))
        updates, state = tx.update({"kernel": jnp.ones((4, 2))}, state, params)
        params = optax.apply_updates(params, updates)
    after_cut = np.where(np.arange(8).reshape(4, 2) >= 4, seen[to], 0)
    np.testing.assert_array_equal(seen[5], after_cut)
    # The momentum starts anew: the first step afterwards is that of a fresh optimizer.
    np.testing.assert_array_equal(params["kernel"], np.where(after_cut != 0, after_cut - 0.25, 0))
    np.testing.assert_array_equal(start["kernel"], seen[0])
