"""Every method computes what its paper says: values worked out by hand or by an independent rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import QUICK

import jaxsparse
from jaxsparse import allocations, schedules, structures
from jaxsparse.choose import unit_budgets
from jaxsparse.leaves import find
from jaxsparse.state import get_masks
from jaxsparse.testing import by_path


def one_leaf(values):
    """A tree whose only leaf is a kernel with these values, [inputs, 1]."""
    return {"kernel": jnp.asarray(values, jnp.float32).reshape(-1, 1)}


def flat(tree):
    return np.asarray(jax.tree.leaves(tree)[0]).ravel()


def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, params, grads, steps):
    """Parameters and masks after each of `steps` steps with the same gradient, flat."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        state = tx.init(params)

        def one(carry, _):
            p, s = step(tx, *carry, grads)
            return (p, s), (p, jaxsparse.get_masks(s))

        start = (jaxsparse.apply_masks(params, state), state)
        return jax.lax.scan(one, start, None, length=steps)[1]

    return tuple(np.asarray(jax.tree.leaves(x)[0]).reshape(steps, -1) for x in run(params))


def leaves_of(shapes):
    tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return find(tree, lambda *_: True).leaves


# -- Allocations -----------------------------------------------------------------------------------

CNN = {"c1": (3, 3, 3, 16), "c2": (3, 3, 16, 64), "fc": (64, 10), "fc2": (100, 100)}
MLP = {"a": (784, 300), "b": (300, 100), "c": (100, 10)}


@pytest.mark.parametrize(
    "shapes, sparsity, expected, epsilon",
    [
        (CNN, 0.9, [0.694865, 0.950797, 0.390341, 0.894545], 5.272727),
        (CNN, 0.8, [0.363798, 0.897412, 0.0, 0.780129], 10.993569),
        (CNN, 0.5, [0.0, 0.703999, 0.0, 0.365594], 31.720280),
        (MLP, 0.9, [0.920432, 0.769811, 0.0], 17.264151),
        (MLP, 0.98, [0.984606, 0.955466, 0.632597], None),
    ],
)
def test_erk_gives_the_published_sparsities(shapes, sparsity, expected, epsilon):
    leaves = leaves_of(shapes)
    found = allocations.ErdosRenyi().sparsities(leaves, sparsity)
    assert found == pytest.approx(expected, abs=1e-6)
    if epsilon is not None:
        raw = {leaf.path: sum(leaf.shape) / leaf.size for leaf in leaves}
        implied = [(1 - s) / raw[leaf.path] for leaf, s in zip(leaves, found) if s > 0]
        assert implied == pytest.approx([epsilon] * len(implied), abs=1e-5)


def test_erk_at_one_half_keeps_exactly_10144_weights():
    leaves = leaves_of(CNN)
    found = allocations.ErdosRenyi().sparsities(leaves, 0.5)
    assert round(sum((1 - s) * leaf.size for leaf, s in zip(leaves, found)), 6) == 10144
    kept = sum(unit_budgets(leaves, allocations.ErdosRenyi(), 0.5))
    assert 10144 <= kept < 10144 + len(leaves)  # each layer rounds its zeros down


def test_lamp_scores_of_1_2_3_are_1_14_4_13_1():
    expected = [1 / 14, 4 / 13, 1.0]
    assert allocations.lamp_scores(jnp.array([1.0, 2.0, 3.0])).tolist() == pytest.approx(expected)
    assert allocations.lamp_scores(jnp.array([3.0, 1.0, 2.0])).tolist() == pytest.approx(
        [1.0, 1 / 14, 4 / 13]
    )


def test_lamp_scores_do_not_depend_on_the_scale_of_a_layer_and_keep_its_order():
    w = jnp.abs(jax.random.normal(jax.random.key(0), (64,)))
    scores = allocations.lamp_scores(w)
    np.testing.assert_allclose(scores, allocations.lamp_scores(1e-3 * w), rtol=1e-5)
    assert np.array_equal(np.argsort(scores, kind="stable"), np.argsort(w, kind="stable"))


def test_lamp_keeps_a_weight_of_every_layer_and_splits_equal_layers_equally():
    w = jax.random.normal(jax.random.key(0), (8, 8))
    tree = {"a": {"kernel": w}, "b": {"kernel": w}, "tiny": {"kernel": 1e-6 * w[:2]}}
    _, masks = jaxsparse.prune(tree, 0.9, allocation="lamp")
    kept = {p: int(m.sum()) for p, m in by_path(masks).items()}
    assert abs(kept["a/kernel"] - kept["b/kernel"]) <= 1  # one budget, shared by position at a tie
    assert kept["tiny/kernel"] >= 1 and sum(kept.values()) == 144 - 129


def test_global_pruning_is_the_argsort_of_all_magnitudes_together():
    k = jax.random.split(jax.random.key(0), 3)
    tree = {n: {"kernel": jax.random.normal(k[i], (5, 7))} for i, n in enumerate("abc")}
    _, masks = jaxsparse.prune(tree, 0.7, allocation="global")
    every = np.concatenate([np.abs(x).ravel() for x in by_path(tree).values()])
    best = np.zeros(105, bool)
    best[np.argsort(-every, kind="stable")[: 105 - 73]] = True
    assert np.array_equal(np.concatenate([m.ravel() for m in by_path(masks).values()]), best)


def test_global_pruning_takes_a_small_layer_whole_and_a_minimum_saves_exactly_that_much_of_it():
    w = jax.random.uniform(jax.random.key(0), (20, 20), minval=0.5, maxval=1.0)
    tree = {"large": {"kernel": w}, "small": {"kernel": 0.01 * w[:5]}}
    _, masks = jaxsparse.prune(tree, 0.5, allocation="global")
    assert {p: int(m.sum()) for p, m in by_path(masks).items()} == {
        "large/kernel": 250, "small/kernel": 0
    }  # fmt: skip
    _, masks = jaxsparse.prune(tree, 0.5, allocation=allocations.Global(minimum=0.02))
    assert {p: int(m.sum()) for p, m in by_path(masks).items()} == {
        "large/kernel": 240, "small/kernel": 10
    }  # fmt: skip


# -- RigL and SET ----------------------------------------------------------------------------------


def rigl_example():
    """The update of the card: one weight is dropped for good, one dropped and grown again, one
    grown."""
    w = one_leaf([0.5, -0.1, 0.2, 0, 0, 0])
    g = one_leaf([0.1, 0.9, 0.05, 0.3, -0.8, 0.2])
    m = one_leaf([1, 1, 1, 0, 0, 0])["kernel"].astype(bool)
    tx = jaxsparse.rigl(
        optax.sgd(0.1, momentum=0.9), 0.5, total_steps=10, update_every=1,
        drop_fraction=lambda step: 0.7, allocation="uniform",
    )  # fmt: skip
    state = tx.init(w)
    slots = jax.tree.map(lambda x: jnp.where(m, 7.0, 0.0), state.inner[0].trace)
    inner = (state.inner[0]._replace(trace=slots), *state.inner[1:])
    return tx, w, g, state._replace(count=jnp.int32(1), masks={"kernel": m}, inner=inner)


def test_rigl_drops_and_grows_the_weights_of_the_worked_example():
    tx, w, g, state = rigl_example()
    new, state = step(tx, w, state, g)
    assert flat(jaxsparse.get_masks(state)).tolist() == [True, True, False, False, True, False]
    assert flat(new).tolist() == pytest.approx([0.5, -0.1, 0, 0, 0, 0])


def test_rigl_keeps_the_slots_of_a_weight_dropped_and_grown_at_once_and_clears_the_grown_one():
    tx, w, g, state = rigl_example()
    _, state = step(tx, w, state, g)
    slots = flat(state.inner[0].trace)
    assert slots[:2].tolist() == [7.0, 7.0] and slots[4] == 0.0


def test_an_update_of_rigl_takes_the_place_of_the_step_and_schedules_go_on():
    """Adam's moments and the count of their bias correction belong together; the learning rate
    belongs to the step of the run, which the authors' code counts at updates too."""
    rate = optax.linear_schedule(1.0, 0.0, 10)
    tx = jaxsparse.rigl(
        optax.inject_hyperparams(optax.adamw)(rate), 0.5, total_steps=10, update_every=2,
        allocation="uniform",
    )  # fmt: skip
    w = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2), "bias": jnp.ones(2)}
    g = jax.tree.map(lambda x: 1.0 / x, w)
    state = tx.init(w)
    w = jaxsparse.apply_masks(w, state)
    adam, seen = [], []
    for _ in range(3):  # step 2 is an update
        before = w
        w, state = step(tx, w, state, g)
        (found,) = [x for x in jax.tree.leaves(state.inner, is_leaf=is_adam) if is_adam(x)]
        adam.append(found)
        seen.append(float(state.inner.hyperparams["learning_rate"]))
    assert [int(a.count) for a in adam] == [1, 2, 2]
    assert seen == pytest.approx([1.0, 0.9, 0.8])
    assert np.array_equal(before["bias"], w["bias"])
    assert np.array_equal(adam[1].mu["bias"], adam[2].mu["bias"])


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def test_rigl_between_updates_moves_kept_weights_only():
    tx, w, g, state = rigl_example()
    new, after = step(tx, w, state._replace(count=jnp.int32(0)), g)
    np.testing.assert_allclose(
        flat(new), [0.5 - 0.1 * 6.4, -0.1 - 0.1 * 7.2, 0.2 - 0.1 * 6.35, 0, 0, 0], rtol=1e-6
    )
    assert np.array_equal(flat(jaxsparse.get_masks(after)), flat(jaxsparse.get_masks(state)))


def test_set_takes_the_gradient_step_at_an_update_too():
    tx = jaxsparse.set_(optax.sgd(0.1), 0.5, total_steps=10, update_every=1,
                        drop_fraction=lambda step: 0.5, allocation="uniform")  # fmt: skip
    w = one_leaf([0.5, -0.1, 0.2, 0, 0, 0])
    m = one_leaf([1, 1, 1, 0, 0, 0])["kernel"].astype(bool)
    state = tx.init(w)._replace(count=jnp.int32(1), masks={"kernel": m})
    new, state = step(tx, w, state, one_leaf([1.0] * 6))
    assert flat(new)[[0, 2]].tolist() == pytest.approx([0.4, 0.1])  # the largest two stay, and move
    grown = flat(jaxsparse.get_masks(state)) & ~np.array([1, 0, 1, 0, 0, 0], bool)
    assert grown.sum() == 1 and not flat(new)[grown][0] < -0.15


def test_set_grows_uniformly_over_the_empty_positions():
    """Chi-square over 2000 seeds; the 99.9 % point with 11 degrees of freedom is 31.3."""
    from jaxsparse.engines.drop_and_grow import swap

    (leaf,) = leaves_of({"w": (16, 1)})
    mask = (jnp.arange(16) < 4).reshape(16, 1)
    w = jnp.where(mask, 1.0 + jnp.arange(16.0).reshape(16, 1), 0.0)

    def grown(seed):
        (new,) = swap([leaf], [mask], [w], [jnp.zeros_like(w)], 0.25, salts=[leaf.salt(seed, 3)])
        return new[:, 0]

    masks = np.asarray(jax.jit(jax.vmap(grown))(jnp.arange(2000)))
    assert masks.sum(1).tolist() == [4] * 2000
    empty = masks[:, 4:].sum(0)  # the dropped position 0 may be drawn as well
    expected = masks[:, [0, *range(4, 16)]].sum() / 13
    chi2 = (((empty - expected) ** 2) / expected).sum()
    assert chi2 < 31.3
    assert abs(masks[:, 0].sum() - expected) < 4 * np.sqrt(expected)


def test_rigls_drop_fraction_starts_at_alpha_and_ends_at_zero():
    f = schedules.cosine(0.3, 100)
    assert [float(f(t)) for t in (0, 50, 100)] == pytest.approx([0.3, 0.15, 0.0], abs=1e-7)


def regression(method, **options):
    """How much of the planted support of a linear regression a method's mask finds."""
    inputs, outputs, fan_in = 64, 4, 6
    k = jax.random.split(jax.random.key(0), 3)
    support = jax.vmap(lambda key: jax.random.permutation(key, inputs) < fan_in)(
        jax.random.split(k[0], outputs)
    ).T
    truth = jnp.where(support, 1.0 + jax.random.uniform(k[1], support.shape), 0.0)
    x = jax.random.normal(k[2], (256, inputs))
    tx = method(optax.sgd(0.1), 1 - fan_in / inputs, allocation="uniform", **options)

    def one(carry, _):
        p, s = carry
        g = {"kernel": x.T @ (x @ (p["kernel"] - truth)) / 256}
        return step(tx, p, s, g), None

    start = {"kernel": jnp.zeros((inputs, outputs))}
    (_, state), _ = jax.lax.scan(one, (start, tx.init(start)), None, length=300)
    return float((get_masks(state)["kernel"] & support).sum() / support.sum())


def test_rigl_finds_a_planted_support_and_fixed_masks_do_not():
    found = regression(jaxsparse.rigl, total_steps=300, update_every=10, drop_fraction=0.3)
    assert found == 1.0
    assert regression(jaxsparse.static) < 0.4


# -- Pruning ---------------------------------------------------------------------------------------


def test_the_cubic_curve_has_its_ends_and_its_midpoint():
    s = schedules.cubic(10, 110, initial=0.2, final=0.9)
    assert float(s(0)) == float(s(10)) == np.float32(0.2)
    assert float(s(60)) == pytest.approx(0.2 + 0.875 * 0.7, abs=1e-6)
    assert float(s(110)) == float(s(10_000)) == np.float32(0.9)
    values = [float(s(t)) for t in range(120)]
    assert values == sorted(values)


def pruning_run(recovery):
    """A weight that is pruned early while its gradient would make it the largest of all."""
    tx = jaxsparse.magnitude(
        optax.sgd(0.1), 0.5, total_steps=10, begin_step=0, end_step=8, update_every=1,
        recovery=recovery,
    )  # fmt: skip
    p = one_leaf(jnp.linspace(0.1, 1.6, 16))
    g = one_leaf([0.0] * 8 + [1.0] * 8)  # the large half shrinks
    return train(tx, p, g, 10)[1]


def test_hard_pruning_has_nested_masks_and_ends_exactly_at_its_sparsity():
    masks = pruning_run(recovery=False)
    assert np.all(masks[1:] <= masks[:-1])
    assert masks[-1].sum() == 8


def test_soft_pruning_lets_a_weight_return_with_the_value_it_had():
    masks = pruning_run(recovery=True)
    assert masks[-1].sum() == 8
    assert np.any(masks[1:] > masks[:-1])


def test_saliency_prunes_the_smallest_products_of_weight_and_gradient():
    tx = jaxsparse.one_shot(optax.sgd(0.0), 0.5, score="saliency")
    p = one_leaf([4.0, 3.0, 2.0, 1.0])
    _, state = step(tx, p, tx.init(p), one_leaf([0.1, 1.0, -3.0, 0.2]))
    assert flat(jaxsparse.get_masks(state)).tolist() == [False, True, True, False]


def test_equal_saliencies_are_pruned_all_over_the_matrix_not_row_by_row():
    tx = jaxsparse.one_shot(optax.sgd(0.0), 0.5, score="saliency")
    p = {"kernel": jnp.ones((8, 64))}
    _, state = step(tx, p, tx.init(p), jax.tree.map(jnp.zeros_like, p))
    rows = np.asarray(state.masks["kernel"].sum(1))
    assert rows.sum() == 256 and rows.min() > 16 and rows.max() < 48


# -- Straight-through ------------------------------------------------------------------------------


def ste_pair(tx):
    """z = (1, 0.9), one of two kept; the gradient lifts the second. Its mask and value over time."""
    return train(tx, one_leaf([1.0, 0.9]), one_leaf([0.0, -1.0]), 6)[0]


def test_ste_flips_at_the_step_where_the_raw_weight_passes_and_returns_with_its_raw_value():
    seen = ste_pair(jaxsparse.magnitude_ste(optax.sgd(0.03), 0.5))
    expected = [[1, 0]] * 3 + [[0, 1.02], [0, 1.05], [0, 1.08]]  # 0.9 + 0.03 t passes 1 at t = 4
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_with_the_gradient_masked_it_never_flips():
    tx = jaxsparse.magnitude(optax.sgd(0.03), 0.5, total_steps=10, end_step=0, update_every=1,
                             recovery=True)  # fmt: skip
    assert np.array_equal(ste_pair(tx), [[1, 0]] * 6)


def test_weight_decay_of_the_inner_optimizer_acts_on_raw_weights():
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    tx = jaxsparse.magnitude_ste(inner, 0.5)
    p = one_leaf([1.0, 0.5])
    _, state = step(tx, p, tx.init(p), one_leaf([0.0, 0.0]))
    assert flat(state.raw).tolist() == pytest.approx([0.9, 0.45])


def test_sr_ste_decays_pruned_raw_weights_and_leaves_kept_ones():
    tx = jaxsparse.sr_ste(optax.sgd(0.5), decay=0.1, structure=structures.NM(2, 4))
    z = one_leaf([4.0, -3.0, 2.0, -1.0])
    state = tx.init(z)
    for t in range(1, 4):
        _, state = step(tx, jaxsparse.apply_masks(z, state), state, one_leaf([0.0] * 4))
        shrunk = (1 - 0.5 * 0.1) ** t
        assert flat(state.raw).tolist() == pytest.approx([4, -3, 2 * shrunk, -shrunk])


def test_sr_ste_flips_masks_less_often_than_plain_straight_through():
    """The sum of absolute mask differences on a noisy quadratic, over 200 steps."""

    def flips(decay):
        tx = jaxsparse.sr_ste(optax.sgd(0.05), decay=decay, structure=structures.NM(2, 4))
        z = {"kernel": jax.random.normal(jax.random.key(0), (32, 8))}

        def one(carry, key):
            p, s = carry
            noise = jax.random.normal(key, p["kernel"].shape)
            p, new = step(tx, p, s, {"kernel": p["kernel"] - 0.1 + noise})
            before, after = (jaxsparse.get_masks(x)["kernel"] for x in (s, new))
            return (p, new), (after != before).sum()

        keys = jax.random.split(jax.random.key(1), 200)
        start = tx.init(z)
        return int(jax.lax.scan(one, (jaxsparse.apply_masks(z, start), start), keys)[1].sum())

    assert flips(2.0) < 0.85 * flips(0.0)


# -- ST-3 ------------------------------------------------------------------------------------------


def st3_of(values, sparsity=0.5, **options):
    tx = jaxsparse.st3(
        optax.sgd(0.1), sparsity, total_steps=10, begin_step=0, end_step=0, **options
    )
    z = one_leaf(values)
    state = tx.init(z)
    return tx, state, jaxsparse.apply_masks(z, state)


def test_st3_thresholds_and_rescales_the_worked_example():
    _, state, p = st3_of([4.0, -3.0, 2.0, -1.0])
    assert flat(p).tolist() == pytest.approx([2.133803, -0.711268, 0, 0], abs=1e-6)
    assert float(state.aux) == 2.5
    assert flat(state.scale).tolist() == pytest.approx([1.422535], abs=1e-6)


def test_st3_applies_the_gradient_to_raw_weights_unchanged():
    tx, state, p = st3_of([4.0, -3.0, 2.0, -1.0])
    _, new = step(tx, p, state, one_leaf([1.0, 1.0, 1.0, 1.0]))
    assert flat(new.raw).tolist() == pytest.approx([3.9, -3.1, 1.9, -1.1])


def test_st3_is_continuous_where_a_weight_crosses_the_threshold_and_hard_thresholding_is_not():
    inside, outside = [5.0, 4.0, 3.999, 2.0, 1.0], [5.0, 4.0, 4.001, 2.0, 1.0]
    soft = [flat(st3_of(z)[2])[2] for z in (inside, outside)]
    hard = [flat(st3_of(z, soft=False, rescale=False)[2])[2] for z in (inside, outside)]
    assert soft[0] == 0 and 0 < soft[1] < 0.01
    assert hard[0] == 0 and hard[1] > 4


def test_st3_is_the_identity_where_nothing_is_pruned_and_finite_where_all_of_a_channel_is():
    _, _, p = st3_of([4.0, -3.0, 2.0, -1.0], sparsity=0.0)
    assert flat(p).tolist() == pytest.approx([4, -3, 2, -1], rel=1e-6)
    tx = jaxsparse.st3(optax.sgd(0.1), 0.5, total_steps=10, begin_step=0, end_step=0)
    z = {"kernel": jnp.array([[4.0, 0.1], [-3.0, 0.2]])}
    p = jaxsparse.apply_masks(z, tx.init(z))["kernel"]
    assert np.all(np.isfinite(p)) and p[:, 1].tolist() == [0, 0] and np.all(p[:, 0] != 0)


def test_st3_sigma_measures_a_layer_in_units_of_its_initial_spread():
    k = jax.random.split(jax.random.key(0))
    z = {
        "a": {"kernel": jax.random.normal(k[0], (4, 8))},
        "b": {"kernel": jax.random.normal(k[1], (40, 8))},
    }
    tx = jaxsparse.st3_sigma(optax.sgd(0.1), 0.5, total_steps=10, begin_step=0, end_step=0)
    masks = by_path(tx.init(z).masks)
    roots = {"a/kernel": np.sqrt(12), "b/kernel": np.sqrt(48)}
    scaled = {p: np.abs(x) * roots[p] for p, x in by_path(z).items()}
    th = np.quantile(np.concatenate([x.ravel() for x in scaled.values()]), 0.5)
    for path, x in scaled.items():
        assert np.array_equal(masks[path], x > th)


# -- Learned thresholds ----------------------------------------------------------------------------

Z = np.array([0.9, -0.7, 0.31, -0.2, 0.05, 1.3])
GOAL = np.array([0.5, -1.0, 0.3, 0.4, -0.6, 0.0])


def numeric_gradients(s, h=1e-6):
    """Central differences of 0.5 |S(z) - GOAL|^2 in float64."""

    def loss(z, s):
        p = np.sign(z) * np.maximum(np.abs(z) - 1 / (1 + np.exp(-s)), 0)
        return 0.5 * ((p - GOAL) ** 2).sum()

    eye = np.eye(len(Z)) * h
    dz = [(loss(Z + e, s) - loss(Z - e, s)) / (2 * h) for e in eye]
    return np.array(dz), (loss(Z, s + h) - loss(Z, s - h)) / (2 * h)


def threshold_step(tx):
    """The gradients of z and s that a method takes, read off one step of SGD with rate 1."""
    z = one_leaf(Z)
    state = tx.init(z)
    p = jaxsparse.apply_masks(z, state)
    _, new = step(tx, p, state, {"kernel": p["kernel"] - one_leaf(GOAL)["kernel"]})
    s = [float(jax.tree.leaves(x.aux[0])[0]) for x in (state, new)]
    return flat(state.raw) - flat(new.raw), s[0] - s[1], flat(p)


def test_strs_gradients_are_those_of_finite_differences():
    dz, ds, _ = threshold_step(jaxsparse.str_(optax.sgd(1.0), threshold_init=-1.0))
    expected = numeric_gradients(-1.0)
    np.testing.assert_allclose(dz, expected[0], atol=1e-5)
    np.testing.assert_allclose(ds, expected[1], atol=1e-5)
    assert np.count_nonzero(dz) == 4  # dead weights have none


def test_autosparses_gradients_carry_alpha_where_the_weight_is_pruned():
    alpha = 0.5
    tx = jaxsparse.autosparse(
        optax.sgd(1.0), total_steps=100, alpha=lambda t: alpha, threshold_init=-1.0
    )
    dz, ds, p = threshold_step(tx)
    g = p - GOAL
    c = np.where(p != 0, 1.0, alpha)
    sigma = 1 / (1 + np.exp(1.0))
    np.testing.assert_allclose(dz, g * c, rtol=1e-5)
    np.testing.assert_allclose(ds, -sigma * (1 - sigma) * (np.sign(Z) * g * c).sum(), rtol=1e-4)


def test_a_threshold_rises_where_smaller_weights_would_lower_the_loss():
    tx = jaxsparse.str_(optax.sgd(1.0), threshold_init=-1.0)
    z = one_leaf([1.0, -2.0, 3.0])
    state = tx.init(z)
    p = jaxsparse.apply_masks(z, state)
    _, new = step(tx, p, state, p)  # the gradient of |p|^2 / 2
    assert jax.tree.leaves(new.aux[0])[0] > jax.tree.leaves(state.aux[0])[0]


def test_thresholds_without_a_loss_decay_as_weight_decay_says():
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))
    tx = jaxsparse.str_(inner, threshold_init=-200.0)
    p = one_leaf([1.0, 2.0])
    state = tx.init(p)
    for t in range(1, 4):
        p, state = step(tx, p, state, jax.tree.map(jnp.zeros_like, p))
        assert float(jax.tree.leaves(state.aux[0])[0]) == pytest.approx(-200 * 0.95**t)


def test_autosparse_without_alpha_is_str_and_with_all_of_it_and_no_threshold_is_dense():
    def trained(tx):
        p = one_leaf(Z)
        state = tx.init(p)
        p = jaxsparse.apply_masks(p, state)
        for _ in range(5):
            p, state = step(tx, p, state, {"kernel": p["kernel"] - one_leaf(GOAL)["kernel"]})
        return flat(p)

    sgd = optax.sgd(0.1, momentum=0.9)
    zero = jaxsparse.autosparse(sgd, total_steps=100, alpha=0.0, threshold_init=-1.0)
    assert np.array_equal(trained(zero), trained(jaxsparse.str_(sgd, threshold_init=-1.0)))
    full = jaxsparse.autosparse(sgd, total_steps=100, alpha=lambda t: 1.0, threshold_init=-3200.0)

    dense = one_leaf(Z)
    state = sgd.init(dense)
    for _ in range(5):
        dense, state = step(
            sgd, dense, state, {"kernel": dense["kernel"] - one_leaf(GOAL)["kernel"]}
        )
    np.testing.assert_allclose(trained(full), flat(dense), rtol=1e-5, atol=1e-6)


def test_gradient_annealing_is_the_maximum_of_cosine_and_sigmoid_and_ends_at_its_reset():
    curve = schedules.gradient_annealing(1.0, 100)
    found = [float(curve(t)) for t in (0, 25, 50, 75, 100)]
    assert found == pytest.approx([1, 0.952574, 0.5, 0.146447, 0.002473], abs=1e-6)
    reset = schedules.gradient_annealing(0.4, 100, reset=90)
    assert float(reset(89)) > 0 and float(reset(90)) == 0.0
    assert float(reset(50)) == pytest.approx(0.2)
