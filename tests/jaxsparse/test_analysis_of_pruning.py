"""What pruning does to classes and examples, constraints against it, populations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxsparse
from jaxsparse.analysis import constraints, impact, populations

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, 2000)


def population(k, accuracy=0.8, destroyed=None):
    right = RNG.random((k, 2000)) < accuracy
    found = np.where(right, LABELS, (LABELS + RNG.integers(1, 10, (k, 2000))) % 10)
    if destroyed is not None:
        found[:, destroyed == LABELS] = (destroyed + 1) % 10
    return found


def test_equal_populations_have_no_exemplars_and_modes_break_ties_by_the_lowest_label():
    one = population(9)
    assert not impact.identified_exemplars(one, one).any()
    for i in range(0, 2000, 97):
        counts = np.bincount(one[:, i], minlength=10)
        assert impact.modal_labels(one)[i] == np.flatnonzero(counts == counts.max())[0]
    with pytest.raises(ValueError, match="one test set"):
        impact.identified_exemplars(one, one[:, :5])
    with pytest.raises(ValueError, match="class numbers"):
        impact.modal_labels(one / 2)


def test_a_destroyed_class_is_flagged_and_chance_flags_one_of_twenty():
    found = impact.class_impact(population(10), population(10, destroyed=3), LABELS)
    assert found.change.argmin() == 3 and found.p[3] < 1e-8
    # The others gain as much on the mean as it loses.
    np.testing.assert_allclose(found.change[3], -0.8 + 0.8 * (LABELS == 3).mean(), atol=0.05)
    flags = [
        impact.class_impact(population(5), population(5), LABELS).significant().mean()
        for _ in range(60)
    ]
    assert 0.02 < np.mean(flags) < 0.09
    exemplars = impact.identified_exemplars(population(10), population(10, destroyed=3))
    assert exemplars[LABELS == 3].mean() > 0.95 > 0.05 > exemplars[LABELS != 3].mean()


def test_the_p_value_is_that_of_welch_written_out():
    a, b = population(6), population(7, 0.7)
    found = impact.class_impact(a, b, LABELS)
    x, y = ([np.mean(r[LABELS == 2] == 2) - np.mean(r == LABELS) for r in p] for p in (a, b))
    va, vb = np.var(x, ddof=1) / 6, np.var(y, ddof=1) / 7
    t = (np.mean(y) - np.mean(x)) / np.sqrt(va + vb)
    free = (va + vb) ** 2 / (va**2 / 5 + vb**2 / 6)
    np.testing.assert_allclose(found.p[2], 2 * scipy.stats.t.sf(abs(t), free), rtol=1e-6)
    np.testing.assert_allclose(found.change[2], np.mean(y) - np.mean(x), atol=1e-9)
    same = impact.class_impact(a[:1].repeat(2, 0), a[:1].repeat(2, 0), LABELS)
    assert (same.p == 1).all() and (same.change == 0).all()
    figure = impact.impact_bars(found, [f"class {i}" for i in range(10)])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][
        0
    ] == f"class {found.change.argmin()}"
    with pytest.raises(ValueError, match="two networks"):
        impact.class_impact(a[:1], b, LABELS)


def test_calibration_error_is_0_of_a_calibrated_predictor_and_exact_by_hand():
    p = RNG.uniform(0.5, 1, 400_000)
    y = (RNG.random(400_000) > p).astype(int)
    assert impact.calibration_error(np.stack([p, 1 - p], 1), y) < 0.005
    rows = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.35, 0.65]]
    found = impact.calibration_error(rows, [0, 1, 1, 1], bins=5)  # bins [0.6, 0.8), [0.8, 1]
    np.testing.assert_allclose(found, (abs(2 - 1.25) + abs(1 - 1.8)) / 4)
    with pytest.raises(ValueError, match="bins=0"):
        impact.calibration_error(rows, [0, 1, 1, 1], bins=0)


# -- Constraints

ascend = jax.jit(constraints.ascend, static_argnames=("tolerance", "rate"))


def reference(groups=3):
    g = jnp.arange(12) % groups
    return constraints.reference(jnp.linspace(0, 1, 12), jnp.arange(12) % 4 != 0, g, groups)


def test_the_dual_state_follows_its_formula_in_numpy():
    ref, dual = reference(), constraints.start(3, buffer=4)
    mine, everything, lam = [[] for _ in range(3)], [], np.zeros(3)
    for step in range(12):
        g, ok = RNG.integers(0, 3, 6), RNG.random(6) < (0.9 if step < 6 else 0.3)
        dual = ascend(
            dual, jnp.asarray(ok), jnp.asarray(g), ref, tolerance=0.05, rate=0.5, active=step > 2
        )
        for a, b in zip(g, ok):
            mine[a].append(float(b))
            everything.append(float(b))
        total = np.mean(everything[-12:])
        for c in range(3):
            if c in g and len(mine[c]) >= 4 and step > 2:
                psi = (float(ref.group_accuracy[c]) - np.mean(mine[c][-4:])) - (
                    float(ref.accuracy) - total
                )
                lam[c] = max(0, lam[c] + 0.5 * (psi - 0.05))
        np.testing.assert_allclose(dual.multipliers, lam, atol=1e-5)
    assert lam.max() > 0


def test_multipliers_of_kept_constraints_fall_to_0_and_those_of_broken_ones_rise():
    ref = constraints.reference(jnp.zeros(8), jnp.ones(8, bool), jnp.arange(8) % 2, 2)
    dual = constraints.start(2, buffer=2)._replace(multipliers=jnp.array([0.3, 0.0]))
    for _ in range(12):  # group 1 is always wrong
        dual = ascend(
            dual, jnp.array([True, False]), jnp.array([0, 1]), ref, tolerance=0.1, rate=0.2
        )
    assert float(dual.multipliers[0]) == 0 and float(dual.multipliers[1]) > 0.5
    assert (np.asarray(dual.multipliers) >= 0).all()
    with pytest.raises(ValueError, match="group: 1 has no example"):
        constraints.reference(jnp.zeros(2), jnp.ones(2, bool), jnp.zeros(2, jnp.int32), 2)
    with pytest.raises(ValueError, match="buffer=0"):
        constraints.start(2, buffer=0)


def test_without_multipliers_the_gradient_is_the_plain_one_bit_by_bit_and_with_them_the_formula():
    w, x, g = (
        jnp.asarray(RNG.normal(size=4)),
        jnp.asarray(RNG.normal(size=(9, 4))),
        jnp.arange(9) % 2,
    )
    ref, dual = reference(3), constraints.start(3)
    each = lambda w: (x @ w - 1) ** 2
    plain = jax.grad(lambda w: jnp.mean(each(w)))(w)
    held = jax.grad(lambda w: constraints.penalized_loss(each(w), g, dual, ref))(w)
    np.testing.assert_array_equal(plain, held)
    dual = dual._replace(multipliers=jnp.array([0.5, 2.0, 9.0]))  # group 2 is not in the batch
    value = constraints.penalized_loss(each(w), g, dual, ref)
    losses, mean = np.asarray(each(w)), float(jnp.mean(each(w)))
    want = mean
    for c, lam in ((0, 0.5), (1, 2.0)):
        want += lam * (
            (losses[np.asarray(g) == c].mean() - float(ref.group_loss[c]))
            - (mean - float(ref.loss))
        )
    np.testing.assert_allclose(value, want, rtol=1e-5)


# -- Populations


def test_a_pruned_population_is_each_network_pruned_by_itself():
    shapes = {"a": (6, 8), "b": (8, 3)}
    networks = [
        {
            n: {"kernel": jnp.asarray(RNG.normal(size=s), jnp.float32), "bias": jnp.ones(s[1])}
            for n, s in shapes.items()
        }
        for _ in range(4)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *networks)
    sparse, masks = populations.prune_population(stacked, 0.6, allocation="global")
    by_layer = populations.layer_sparsity(sparse)
    for i, p in enumerate(networks):
        alone, _ = jaxsparse.prune(p, 0.6, allocation="global")
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), sparse, alone)
        mean = (48 * by_layer["a/kernel"][i] + 24 * by_layer["b/kernel"][i]) / 72
        np.testing.assert_allclose(mean, int(0.6 * 72) / 72)
    with pytest.raises(ValueError, match="same leading axis"):
        populations.prune_population(networks[0], 0.5)


def test_a_network_agrees_with_itself_and_chance_agreement_shows_on_errors():
    one = population(5)
    same = populations.relation(one, one, LABELS)
    assert (same.agreement == 1).all() and (same.on_errors == 1).all()
    np.testing.assert_allclose(same.correlation, 1)
    other = populations.relation(one, population(5), LABELS)
    assert (other.agreement > 0.6).all() and (other.on_errors < 0.1).all()
    with pytest.raises(ValueError, match="labels"):
        populations.relation(one, one, LABELS[:5])
