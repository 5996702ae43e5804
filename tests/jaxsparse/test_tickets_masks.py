"""Masks at initialisation and between rounds, initial variances, graphs."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import nn, tickets
from jaxsparse.initial_scores import fisher, snip
from jaxsparse.tickets import signal

RNG = np.random.default_rng(0)
CRELU = nn.clipped_relu
CST = nn.clipped_soft_threshold


# -- Sketching


def test_a_sketch_of_a_linear_map_has_the_error_of_its_formula_and_least_where_chances_are_sizes():
    w, k = np.array([4.0, 2.0, 1.0, 1.0]), 3
    chances = {"uniform": np.full(4, 0.25), "size": w / w.sum(), "square": w**2 / (w**2).sum()}
    found = {}
    for name, p in chances.items():
        formula = (np.sum(w**2 / p) - w.sum() ** 2) / k
        draws = RNG.choice(4, size=(100_000, k), p=p)
        estimates = (w[draws] / p[draws]).mean(axis=1)
        assert abs(estimates.mean() - w.sum()) < 4 * estimates.std() / 300 + 1e-9
        np.testing.assert_allclose(estimates.var(), formula, rtol=0.03, atol=1e-9)
        found[name] = formula * k
    assert found == {"uniform": 24.0, "size": 0.0, "square": 24.0}


def test_a_sketch_keeps_exactly_so_many_by_chance_and_higher_scores_more_often():
    params = {"kernel": jnp.ones((2, 4))}
    scores = {"kernel": jnp.array([[1.0, 2.0, 4.0, 8.0], [0.0, 1.0, 2.0, 4.0]])}
    draw = jax.jit(lambda seed: tickets.sketch(scores, params, 0.625, seed=seed)["kernel"])
    masks = np.asarray(jax.vmap(draw)(jnp.arange(4000)))
    assert (masks.sum(axis=(1, 2)) == 3).all() and not masks[:, 1, 0].any()
    often = masks.mean(axis=0).ravel()
    order = np.argsort(np.asarray(scores["kernel"]).ravel(), kind="stable")
    assert (np.diff(often[order]) > -0.03).all() and often[3] > 0.7 > 0.3 > often[0]
    # Draws without replacement: the first of them is in proportion; all, by enumeration.
    c = np.asarray(scores["kernel"]).ravel().astype("f8")
    want = np.zeros(8)
    for order in itertools.permutations(np.flatnonzero(c), 3):
        left, chance = c.sum(), 1.0
        for i in order:
            chance, left = chance * c[i] / left, left - c[i]
        want[list(order)] += chance
    np.testing.assert_allclose(often, want, atol=0.03)
    with pytest.raises(ValueError, match="7 of the 8 weights"):
        tickets.sketch(scores, params, 0.0)
    with pytest.raises(ValueError, match="'kernel' must not be negative"):
        tickets.sketch({"kernel": -jnp.ones((2, 4))}, params, 0.5)


# -- Spectrum


def test_top_k_has_the_least_frobenius_error_and_a_sample_less_of_the_spectral_one():
    w = RNG.normal(size=(3, 3)).astype("f4")
    best = min(np.linalg.norm(w * (1 - np.isin(np.arange(9), s).reshape(3, 3)))
               for s in itertools.combinations(range(9), 4))  # fmt: skip
    top = tickets.sample_spectrum(jnp.asarray(w), 4, top=1.0)
    np.testing.assert_allclose(np.linalg.norm(w - np.asarray(top.weights)), best, rtol=1e-6)
    # Rank one with equal entries, and noise: a threshold keeps the noise's sign, a sample the direction.
    u = np.ones((60, 1)) * np.linspace(0.5, 1.5, 60)
    matrix = jnp.asarray(u + 0.02 * RNG.normal(size=(60, 60)), jnp.float32)
    thresholded = tickets.sample_spectrum(matrix, 1200, top=1.0).weights
    sampled = tickets.sample_spectrum(matrix, 1200, top=0.0, unbiased=True).weights
    frobenius = lambda x: float(jnp.linalg.norm(matrix - x))
    assert frobenius(thresholded) < frobenius(sampled)
    assert float(tickets.spectral_error(matrix, sampled)) < float(
        tickets.spectral_error(matrix, thresholded)
    )


def test_a_sample_is_unbiased_and_its_expected_number_is_the_budget():
    w = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
    draw = lambda seed: tickets.sample_spectrum(
        w, 12, top=0.25, unbiased=True, largest=1e6, seed=seed
    )
    found = jax.jit(jax.vmap(draw))(jnp.arange(6000))
    counts = np.asarray(found.mask).sum(axis=(1, 2))
    assert abs(counts.mean() - 12) < 4 * counts.std() / 6000**0.5 + 1e-3
    each = np.asarray(found.weights, np.float64)
    error = np.abs(each.mean(axis=0) - np.asarray(w)) / (each.std(axis=0) / 6000**0.5 + 1e-5)
    assert error.max() < 5
    for arguments, message in (((0,), "kept=0"), ((31,), "kept=31")):
        with pytest.raises(ValueError, match=message):
            tickets.sample_spectrum(w, *arguments)
    with pytest.raises(ValueError, match="top=2"):
        tickets.sample_spectrum(w, 3, top=2)


# -- Rounds


def rounded(w, mask, start, p, q):
    """A round of AP in NumPy, on one vector."""
    n = mask.sum()
    gone, by_move = int(np.ceil(p * n - 1e-9)), int(q * n + 1e-9)
    alive = np.flatnonzero(mask)
    first = alive[np.argsort(np.abs(w[alive]), kind="stable")[: gone - by_move]]
    new = mask.copy()
    new[first] = False
    negative = np.flatnonzero(new & (w < 0))
    new[negative[np.argsort(np.abs(w - start)[negative], kind="stable")[:by_move]]] = False
    return new


@pytest.mark.parametrize("q", [0.0, 0.05, 0.2])
def test_a_round_removes_what_numpy_does_and_masks_are_nested(q):
    shapes = {"a": (7, 9), "b": (9, 11)}
    tree = lambda: {k: {"kernel": RNG.normal(size=s).astype("f4"), "bias": np.zeros(3, "f4")}
                    for k, s in shapes.items()}  # fmt: skip
    masks = {k: {"kernel": jnp.ones(s, bool), "bias": None} for k, s in shapes.items()}
    start = tree()
    flat = lambda t: np.concatenate([np.asarray(t[k]["kernel"]).ravel() for k in shapes])
    for _ in range(3):
        params = tree()
        new = tickets.prune_round(params, masks, 0.2, start=start, activate=q)
        np.testing.assert_array_equal(
            flat(new), rounded(flat(params), flat(masks), flat(start), 0.2, q)
        )
        assert new["a"]["bias"] is None and not (flat(new) & ~flat(masks)).any()
        masks = new


def test_without_negative_weights_fewer_units_are_dead_and_without_positive_ones_more():
    x = RNG.uniform(size=(200, 12))
    for _ in range(20):
        w = RNG.normal(size=(12, 16)) - 0.15
        dead = lambda w: int((np.maximum(x @ w, 0) == 0).all(axis=0).sum())
        for sign, compare in ((-1, np.less_equal), (1, np.greater_equal)):
            cut = w.copy()
            places = np.flatnonzero(np.sign(w.ravel()) == sign)
            cut.ravel()[RNG.permutation(places)[:30]] = 0
            assert compare(dead(cut), dead(w))


def test_bad_rounds_are_refused():
    w, m = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 2), bool)}
    with pytest.raises(ValueError, match="fraction=1"):
        tickets.prune_round(w, m, 1)
    with pytest.raises(ValueError, match="activate=0.5"):
        tickets.prune_round(w, m, 0.2, activate=0.5, start=w)
    with pytest.raises(ValueError, match="start is missing"):
        tickets.prune_round(w, m, 0.2, activate=0.1)


def test_shuffled_masks_have_the_counts_of_the_layers_and_other_places():
    masks = {"a": jnp.arange(60).reshape(6, 10) < 20, "b": None, "c": jnp.arange(50) < 5}
    one, two = (tickets.shuffle_within_layers(masks, s) for s in (0, 1))
    for m in (one, two):
        assert m["b"] is None and int(m["a"].sum()) == 20 and int(m["c"].sum()) == 5
    assert (one["a"] != masks["a"]).any() and (one["a"] != two["a"]).any()


# -- One line


def test_scores_become_a_method_in_one_line():
    params = {
        "a": {"kernel": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), "bias": jnp.zeros(5)}
    }
    loss = lambda p, x: jnp.mean((x @ p["a"]["kernel"]) ** 2)
    scores = snip(loss, params, [jnp.ones((3, 6))])
    masks = tickets.keep(scores, params, 0.5)
    assert int(masks["a"]["kernel"].sum()) == 15 and masks["a"]["bias"] is None
    worth, kept = np.asarray(scores["a"]["kernel"]), np.asarray(masks["a"]["kernel"])
    assert worth[kept].min() >= worth[~kept].max()


# -- Fisher


def test_the_fisher_information_of_a_logistic_regression_is_its_closed_form():
    x, w = RNG.normal(size=(20, 3)).astype("f4"), RNG.normal(size=3).astype("f4")
    y = RNG.integers(0, 2, 20)
    logits = lambda p, x: jnp.stack([jnp.zeros(x.shape[0]), x @ p["w"]], axis=1)
    s = 1 / (1 + np.exp(-(x @ w)))
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    given = fisher(logits, {"w": jnp.asarray(w)}, batches)["w"]
    np.testing.assert_allclose(given, np.mean((s - y)[:, None] ** 2 * x**2, axis=0), rtol=1e-4)
    expected = fisher(logits, {"w": jnp.asarray(w)}, batches, labels="expected")["w"]
    np.testing.assert_allclose(expected, np.mean((s * (1 - s))[:, None] * x**2, axis=0), rtol=1e-4)
    with pytest.raises(ValueError, match="labels='no'"):
        fisher(logits, {"w": w}, batches, labels="no")  # type: ignore


# -- Initial variances

TABLE = [  # activation, sparsity, m: tau, sw2, sb2, V', V''
    (CRELU, 0.85, np.inf, 1.0364, 6.6667, 0.5368, 1.0, 0.8055),
    (CRELU, 0.85, 1.5, 1.0364, 6.9252, 0.5634, 0.8339, 0.245),
    (CRELU, 0.85, 1.0, 1.0364, 7.7431, 0.6213, 0.6116, -0.071),
    (CRELU, 0.85, 0.5, 1.0364, 11.3916, 0.7526, 0.3020, -0.171),
    (CRELU, 0.7, 1.0, 0.5244, 4.232, 0.4783, 0.4717, -0.3665),
    (CST, 0.85, 1.0, 1.4395, 7.3913, 0.6991, 0.6991, 0.3944),
    (CST, 0.5, 1.0, 0.6745, 2.4633, 0.5268, 0.5163, -0.3133),
]


@pytest.mark.parametrize("kind, sparsity, m, tau, sw2, sb2, first, second", TABLE)
def test_critical_variances_and_stability_are_those_of_the_table(
    kind, sparsity, m, tau, sw2, sb2, first, second
):
    activation = kind(sparsity, m)
    assert abs(activation.tau - tau) < 1e-4
    found = signal.critical_variances(activation)
    np.testing.assert_allclose(found, (sw2, sb2), rtol=2e-4)
    slopes = signal.stability(activation, found)
    np.testing.assert_allclose(slopes, (first, second), atol=3e-3)
    assert abs(signal.variance_map(activation, found, 1.0) - 1) < 1e-4


def test_deep_sparse_networks_are_stable_where_activations_are_clipped_only():
    x = jax.random.normal(jax.random.key(0), (16, 300))

    def through(activation):
        variances = signal.critical_variances(activation)
        kernel, bias = signal.initializers(variances)

        @jax.jit
        def run(h):
            def layer(h, key):
                a, b = jax.random.split(key)
                h = activation(h) @ kernel(a, (300, 300)) + bias(b, (300,))
                return h, (jnp.mean(h**2), jnp.mean(activation(h) == 0))

            return jax.lax.scan(layer, h, jax.random.split(jax.random.key(1), 60))[1]

        return [np.asarray(v) for v in run(x)]

    energy, zeros = through(CRELU(0.85, 1.0))
    assert energy.min() > 0.5 and energy.max() < 1.6 and abs(zeros[-1] - 0.85) < 0.05
    energy, zeros = through(CRELU(0.85))
    assert energy[-1] > 100 or energy[-1] < 0.6  # any deviation grows
    with pytest.raises(ValueError, match="bias variance of"):
        signal.critical_variances(lambda x: x + 1.0)


def test_a_rescaled_layer_has_the_second_moment_of_the_dense_one():
    w = {"kernel": jnp.asarray(RNG.normal(size=(400, 300)) * (2 / 400) ** 0.5, jnp.float32)}
    m = {"kernel": jnp.asarray(RNG.random((400, 300)) < 0.1)}
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (500, 400))) * 2**0.5
    energy = lambda k: float(jnp.mean((x @ k) ** 2))
    dense, masked = energy(w["kernel"]), energy(w["kernel"] * m["kernel"])
    again = tickets.rescale_energy(w, m)["kernel"]
    assert masked < 0.15 * dense and abs(energy(again) / dense - 1) < 0.02
    assert bool((again[~m["kernel"]] == 0).all())
    whole = tickets.rescale_energy(w, {"kernel": jnp.ones((400, 300), bool)})
    np.testing.assert_allclose(whole["kernel"], w["kernel"], rtol=1e-6)


def test_snip_empties_layers_of_a_deep_network_off_the_edge_of_chaos_only():
    """30 layers of 100: the smallest density of a layer at 90 % is 0.075 where variances are critical and 0.001 where
    gradients explode (figures of the card, by another program)."""
    x = jax.random.normal(jax.random.key(0), (32, 100))
    y = jax.random.normal(jax.random.key(1), (32, 100))

    def network(w, x):
        return (
            jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, w["kernel"][:-1])[0]
            @ w["kernel"][-1]
        )

    loss = lambda w, batch: jnp.mean((network(w, batch[0]) - batch[1]) ** 2)
    smallest = {}
    for variance in (signal.critical_variances(jnp.tanh, 1e-3).weights, 2.5):
        w = {
            "kernel": jax.random.normal(jax.random.key(2), (30, 100, 100)) * (variance / 100) ** 0.5
        }
        worth = snip(loss, w, [(x, y)])["kernel"]
        mask = np.asarray(tickets.keep({"kernel": worth}, w, 0.9)["kernel"])
        smallest[round(variance)] = mask.mean(axis=(1, 2)).min()
    assert smallest[1] > 0.05 and smallest[2] < 0.01


# -- Allocation by spread


def test_class_distribution_is_one_threshold_in_units_of_each_layers_spread():
    params = {
        f"l{i}": {"kernel": jnp.asarray(s * RNG.normal(size=(40, n)), jnp.float32)}
        for i, (s, n) in enumerate(((1.0, 50), (5.0, 30), (0.1, 20)))
    }
    counts = {}
    for name in ("global", "uniform", "global_rms"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the layer that the one threshold empties
            _, masks = jaxsparse.prune(params, 0.8, allocation=name)
        counts[name] = [int(m.sum()) for m in jax.tree.leaves(masks)]
    assert {sum(c) for c in counts.values()} == {800}
    assert counts["global"][1] > 600 and counts["global"][2] == 0
    # Equal shapes of distributions: the same part of each layer, up to chance.
    np.testing.assert_allclose(counts["global_rms"], counts["uniform"], atol=40)
    _, masks = jaxsparse.prune(params, 0.8, allocation="global_rms")
    edges = []
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks)):
        w = np.asarray(p) / np.sqrt(np.mean(np.square(p)))
        edges.append((np.abs(w)[~m].max(), np.abs(w)[m].min()))
    assert max(a for a, _ in edges) <= min(b for _, b in edges)


# -- Graphs


def test_layers_of_a_graph_hold_every_edge_once_and_a_network_of_it_computes_it():
    edges = tickets.small_world(12, 4, 0.4, seed=3)
    found = tickets.layered(edges)
    again = np.zeros_like(edges)
    for (i, j), mask in found.masks.items():
        again[np.ix_(found.nodes[i], found.nodes[j])] |= mask
    np.testing.assert_array_equal(again, edges)
    assert sorted(np.concatenate(found.nodes).tolist()) == list(range(12))
    model = nn.GraphNetwork(5, 3, found, rngs=nnx.Rngs(0))
    x = RNG.normal(size=(4, 5)).astype("f4")
    # Node by node, in the order of the graph: from the kernels put back to their places.
    w, place = np.zeros((12, 12)), np.concatenate(found.nodes)
    for n, (i, j) in enumerate(sorted(found.masks)):
        w[np.ix_(found.nodes[i], found.nodes[j])] = np.asarray(model.kernels[n][...])
    assert (w[~edges] == 0).all() and (w[edges] != 0).all()
    h = np.zeros((4, 12))
    for v in place:
        entry = (
            np.asarray(model.entry(jnp.asarray(x)))[:, found.nodes[0].tolist().index(v)]
            if v in found.nodes[0]
            else 0
        )
        h[:, v] = np.maximum(h @ w[:, v] + entry, 0)
    ends = ~edges.any(axis=1)
    want = np.where(ends, h, 0)[:, place] @ np.asarray(model.exit.kernel[...])
    np.testing.assert_allclose(model(jnp.asarray(x)), want, rtol=1e-4, atol=1e-5)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.asarray(x)) ** 2))(model)
    for n, pair in enumerate(sorted(found.masks)):
        assert not np.asarray(grads["kernels"][n][...])[~found.masks[pair]].any()
    with pytest.raises(ValueError, match="cycle"):
        tickets.layered(edges | edges.T)
    with pytest.raises(ValueError, match=r"\[n, n\]"):
        tickets.layered(edges[:3])


def test_teddy_scores_are_those_of_the_card_and_both_directions_go_together():
    hub = np.array([[0, 0, 0, 3], [1, 2, 3, 4]])
    both = np.concatenate([hub, hub[::-1]], axis=1)
    scores = tickets.edge_scores(both, 5)
    np.testing.assert_allclose(scores[:4], [0.17366, 0.17366, 0.11861, 0.27884], atol=1e-5)
    np.testing.assert_array_equal(scores[:4], scores[4:])
    loops = np.concatenate([both, np.arange(5) * np.ones((2, 1), int)], axis=1).astype(int)
    assert (tickets.edge_scores(loops, 5)[8:] > scores.max()).all()
    kept = tickets.keep_edges(loops, 5, 0.5)
    assert kept[8:].all() and kept[:4].sum() == 2 and (kept[:4] == kept[4:8]).all() and not kept[2]
    with pytest.raises(ValueError, match="without its other direction"):
        tickets.edge_scores(hub, 5)


def test_a_spectrum_is_drawn_apart_from_weights_of_the_same_seed():
    w = jax.random.normal(jax.random.key(0), (64, 64))
    found = tickets.sample_spectrum(w, 800, top=0.0)
    negative = float((found.weights < 0).sum() / found.mask.sum())
    assert abs(int(found.mask.sum()) - 800) < 100 and abs(negative - 0.5) < 0.1


def test_pruning_within_no_mask_is_refused():
    with pytest.raises(ValueError, match="masks: no leaf has one"):
        tickets.prune_within(lambda p: 0.0, {"b": jnp.ones(3)}, {"b": None}, tolerance=0.1)
