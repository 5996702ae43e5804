"""Rounds, averages, tickets without gradients, planted tickets, random search."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tickets import averages, dass, evolution, folder, plant, random_search
from experiments.tickets.folder import load_tree, save_tree
from experiments.tickets.problem import make_problem
from experiments.tickets.rounds import by_magnitude, rounds
from jaxsparse import masking

RNG = np.random.default_rng(0)


# -- Planted tickets


@pytest.mark.parametrize("task", ["relu", "circle", "helix"])
def test_the_planted_network_is_the_target_up_to_its_scale(task):
    layers = plant.target(task, 5)
    made = plant.plant(layers, 100, seed=1)
    h, y = plant.sample(task, 500, 3)
    masked = jax.tree.map(lambda w, m: np.where(m, w, 0), made.params, made.masks)
    found = np.asarray(plant.forward(masked, jnp.asarray(h))) / made.scale
    for i, (w, b) in enumerate(layers):
        h = h @ w + b
        h = np.maximum(h, 0) if i < len(layers) - 1 else h
    np.testing.assert_allclose(found, h, atol=1e-3 * np.abs(h).max())
    if task == "circle":
        assert (found.argmax(axis=1) == y).mean() > 0.95
    else:
        assert np.mean((found - y) ** 2) < 3e-4
    for n, layer in made.params.items():
        kernel, kept = layer["kernel"], made.masks[n]["kernel"]
        assert np.median(np.abs(kernel[kept])) < 5 * (2 / kernel.shape[0]) ** 0.5
        assert kept.sum() == (layers[int(n[-1])][0] != 0).sum()


def test_a_random_mask_recalls_its_density_and_tasks_have_bounds():
    truth = {"w": RNG.random((300, 300)) < 0.02}
    found = {"w": RNG.random((300, 300)) < 0.3}
    assert abs(float(plant.recall(found, truth)) - 0.3) < 0.05
    with pytest.raises(ValueError, match="task='square'"):
        plant.target("square", 3)  # type: ignore
    with pytest.raises(ValueError, match="depth=2"):
        plant.target("circle", 2)
    with pytest.raises(ValueError, match="width=10"):
        plant.plant(plant.target("circle", 3), 10)


# -- Rounds

TINY: Any = plant.PlantedProblem("relu", width=10, depth=3, steps=30, plants=2)
ROUNDS: Any = dict(seeds=[0, 1], rewind_to=5, prune=by_magnitude(0.3))


def test_a_run_that_is_put_back_to_an_early_step_is_the_same_run():
    whole = TINY.train(TINY.init(1), 7, 0, 30).state
    parts = TINY.train(TINY.train(TINY.init(1), 7, 0, 5).state, 7, 5, 30).state
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)


def test_masks_are_nested_counts_exact_and_a_stopped_run_goes_on_bit_by_bit(tmp_path):
    seen, sizes = [], 10 * 1 + 10 * 10 + 10 * 1 + 21
    keep = lambda level, state: seen.append((level, TINY.masks(state), state.params))
    whole = rounds(TINY, levels=3, on_level=keep, **ROUNDS)
    alive = sizes
    for (level, masks, params), (_, before, _) in zip(seen[1:], seen):
        alive -= int(np.ceil(0.3 * alive))
        for m, m0, p in zip(*map(jax.tree.leaves, (masks, before, params))):
            assert not (np.asarray(m) & ~np.asarray(m0)).any()
            assert not np.asarray(p)[~np.asarray(m)].any()
        per_seed: Any = sum(
            np.asarray(m).reshape(2, -1).sum(axis=1) for m in jax.tree.leaves(masks)
        )
        assert per_seed.tolist() == [alive, alive] and abs(level.density - alive / sizes) < 1e-6
    place = tmp_path / "run"
    rounds(TINY, levels=1, folder=place, **ROUNDS)
    again = rounds(TINY, levels=3, folder=place, **ROUNDS)
    assert again.levels == whole.levels
    jax.tree.map(np.testing.assert_array_equal, again.final.params, whole.final.params)
    assert [f.name for f in sorted(place.iterdir())] == ["level_3.npz", "rounds.json"]
    with pytest.raises(ValueError, match="give another folder"):
        rounds(TINY, levels=1, folder=place, seeds=[0], rewind_to=5)
    for options, message in (
        (dict(rewind_to=30), "rewind_to=30"),
        (dict(restart="no"), "restart='no'"),
    ):
        with pytest.raises(ValueError, match=message):
            rounds(TINY, **{"levels": 1, "seeds": [0], **options})


@pytest.mark.slow
def test_controls_change_weights_or_masks_and_nothing_else():
    states = {}
    for restart in ("weights", "learning_rate", "reinit"):
        states[restart] = rounds(TINY, levels=1, restart=restart, **ROUNDS)
    first = [s.levels[0] for s in states.values()]
    assert first[0] == first[1] == first[2]
    masks = [TINY.masks(s.final) for s in states.values()]
    for other in masks[1:]:
        jax.tree.map(np.testing.assert_array_equal, masks[0], other)
    losses = [s.levels[1].loss for s in states.values()]
    assert losses[0] != losses[1] != losses[2]
    flipped = rounds(
        TINY, levels=1, control=lambda m, n: jax.tree.map(lambda x: x[..., ::-1], m), **ROUNDS
    )
    assert flipped.levels[1].density == states["weights"].levels[1].density
    assert flipped.levels[1].loss != losses[0]


def test_a_saved_tree_of_another_model_is_refused(tmp_path):
    save_tree(tmp_path / "x.npz", {"a": np.ones(3)})
    with pytest.raises(ValueError, match="another model"):
        load_tree(tmp_path / "x.npz", {"a": np.ones(4)})


# -- Averages


@pytest.mark.slow
def test_soups_and_swamp_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    soups: Any = dict(sparsity=0.75, members=2, seeds=[0, 1], retrain_from=5)
    swamp: Any = dict(particles=2, seeds=[0], rewind_to=5, average_from=None)
    whole = averages.sparse_soups(TINY, phases=2, **soups)

    def stop(*arguments):
        folder.save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(averages, "save", stop)
        averages.sparse_soups(TINY, phases=2, folder=tmp_path / "soup", **soups)
    assert averages.sparse_soups(TINY, phases=2, folder=tmp_path / "soup", **soups) == whole
    long = averages.swamp(TINY, levels=2, **swamp)
    averages.swamp(TINY, levels=1, folder=tmp_path / "swamp", **swamp)
    assert averages.swamp(TINY, levels=2, folder=tmp_path / "swamp", **swamp) == long
    with pytest.raises(ValueError, match="give another folder"):
        averages.swamp(TINY, levels=2, folder=tmp_path / "soup", **swamp)


@pytest.mark.slow
def test_one_particle_without_averages_over_time_is_iterative_magnitude_pruning():
    whole = rounds(TINY, levels=2, **ROUNDS)
    phases = averages.swamp(
        TINY, levels=2, particles=1, seeds=[0, 1], rewind_to=5, average_from=None, fraction=0.3
    )
    assert [p.soup for p in phases] == [level.accuracy for level in whole.levels]


@pytest.mark.slow
def test_soups_share_a_mask_and_members_differ_by_the_order_of_data_only():
    found = averages.sparse_soups(
        TINY, sparsity=0.75, phases=2, members=3, seeds=[0, 1], retrain_from=5
    )
    np.testing.assert_allclose([p.density for p in found], [0.5, 0.25], atol=0.02)
    assert np.shape(found[0].members) == (2, 3) and len(set(found[0].members[0])) == 3
    one = averages.sparse_soups(TINY, sparsity=0.5, phases=1, members=1, seeds=[0], retrain_from=5)
    assert one[0].soup == one[0].members[0]


@pytest.mark.slow
def test_averages_over_time_are_means_of_the_last_weights_and_norms_are_estimated_anew():
    problem = make_problem(
        "digits", "mlp", steps=8, warmup_steps=2, model_options={"hidden": (8,)}, constant_from=4
    )
    state, mean = problem.init(0), None
    found = problem.train(state, 3, 0, 8, average_from=5)
    rows = [problem.train(state, 3, 0, n).state.params for n in (6, 7, 8)]
    mean = jax.tree.map(lambda *x: sum(x) / 3, *rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.mean, mean)
    search = random_search.compare(problem, 0.5, number=5, seeds=[0, 1])
    assert (search.first_loss[0] <= search.first_loss[1]).all() and search.accuracy.shape == (2, 2)


# -- Without gradients


def test_the_vector_of_kept_weights_comes_back_and_counts_what_masks_keep():
    params = {"a": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32), "b": jnp.arange(3.0)}
    masks = {"a": jnp.asarray(RNG.random((4, 5)) < 0.4), "b": None}
    to = evolution.mapper(params, masks)
    assert to.size == int(masks["a"].sum()) + 3
    again = to.tree(to.flat(params))
    np.testing.assert_array_equal(again["a"], masking.apply(params, masks)["a"])
    np.testing.assert_array_equal(again["b"], params["b"])


def test_the_strategy_narrows_where_the_bowl_is_steep_and_those_weights_are_kept():
    steep = jnp.where(jnp.arange(20) % 2 == 0, 20.0, 0.5)
    bowl = lambda x, key: -jnp.sum(steep * (x - 1) ** 2)
    end = jax.jit(lambda m: evolution.snes(bowl, m, sigma=0.3, population=40, generations=150))(
        jnp.zeros(20)
    )
    assert float(end.fitness[-1]) > -0.5 and float(end.fitness[0]) < -50
    assert float(end.sigma[::2].max()) < float(end.sigma[1::2].min())
    tree = lambda v: {"w": v}
    masks = evolution.prune_search(tree(jnp.ones(20, bool)), tree(end.mean), tree(end.sigma), 0.5)
    assert masks["w"].tolist() == [True, False] * 10
    # With one spread for all it is a ranking by size.
    mean = jnp.asarray(RNG.normal(size=20), jnp.float32)
    one = evolution.prune_search(tree(jnp.ones(20, bool)), tree(mean), tree(jnp.ones(20)), 0.3)
    by_size = evolution.prune_search(
        tree(jnp.ones(20, bool)), tree(mean), tree(end.sigma), 0.3, by="size"
    )
    assert one["w"].tolist() == by_size["w"].tolist() and int(one["w"].sum()) == 14


def test_levels_without_gradients_search_what_is_left_from_the_first_weights():
    fitness = lambda p, key: -jnp.sum((p["w"] - 1) ** 2) - jnp.sum(p["b"] ** 2)
    params = {"w": jnp.zeros(10), "b": jnp.ones(2)}
    levels, masks = evolution.tickets_without_gradients(
        fitness, params, {"w": jnp.ones(10, bool), "b": None},
        levels=1, fraction=0.2, sigma=0.3, population=30, generations=60,
    )  # fmt: skip
    assert [round(x.density, 6) for x in levels] == [1.0, 0.8] and int(masks["w"].sum()) == 8
    assert levels[0].fitness > -0.5 and levels[1].fitness < -1.8  # each pruned weight costs 1


# -- Random search


def test_the_best_of_r_beats_a_fresh_draw_with_chance_r_by_r_plus_1():
    params = {"a": {"kernel": jnp.ones((1, 12))}, "b": {"kernel": jnp.ones((12, 1))}}
    weights = jnp.asarray(RNG.normal(size=12), jnp.float32)
    score = lambda p: jnp.sum(p["a"]["kernel"][0] * weights)

    @jax.jit
    @jax.vmap
    def trial(seed):
        found = random_search.random_search(score, params, 0.5, number=9, seed=seed)
        fresh = random_search.random_search(score, params, 0.5, number=1, seed=seed + 50_000)
        return jnp.min(found.scores), fresh.scores[0], jnp.sum(found.best["a"]["kernel"])

    best, fresh, kept = map(np.asarray, trial(jnp.arange(600)))
    assert (kept == 6).all()
    assert abs((best < fresh).mean() - 0.9) < 0.05


# -- Search among sparse operations


def operations(d):
    linear = dass.Operation(
        lambda key: {"kernel": jax.random.normal(key, (d, d)) / d**0.5},
        lambda w, x: x @ w["kernel"],
    )
    noise = dass.Operation(
        lambda key: {}, lambda w, x: jnp.roll(x, 1, axis=0)
    )  # other examples' inputs
    return {"others": noise, "linear": linear}


@pytest.mark.parametrize("kept", [pytest.param(1.0, marks=pytest.mark.slow), 0.25])
def test_the_useful_operation_is_chosen_through_the_masked_network(kept):
    w = np.where(RNG.random((8, 8)) < 0.2, RNG.normal(size=(8, 8)), 0)
    x = RNG.normal(size=(256, 8)).astype("f4")
    data = jnp.asarray(x), jnp.asarray(x @ w, jnp.float32)
    half = lambda a: jax.tree.map(lambda v: v[a::2], data)
    loss = lambda y, target: jnp.mean((y - target) ** 2)
    found = dass.search(
        operations(8), loss, half(0), half(1), edges=1, kept=kept, steps=150, key=jax.random.key(0)
    )
    assert found.chosen == ("linear",)
    scores = found.state.scores[0]["linear"]["kernel"]
    held = dass.sparse_weight(found.state.weights[0]["linear"]["kernel"], scores, kept)
    assert int((held != 0).sum()) == int(64 * kept)
    share = float(jax.nn.softmax(found.state.alpha[0])[1])
    assert share > 0.7
    with pytest.raises(ValueError, match="kept=0"):
        dass.search(
            operations(8), loss, data, data, edges=1, kept=0, steps=1, key=jax.random.key(0)
        )


def test_hydra_ends_at_its_sparsity_and_below_the_loss_of_a_magnitude_cut():
    w = RNG.normal(size=(10, 4)).astype("f4")
    x = RNG.normal(size=(512, 10)).astype("f4") * np.linspace(0.1, 2, 10, dtype="f4")
    batches = lambda i: (jnp.asarray(x), jnp.asarray(x @ w))
    loss = lambda p, b: jnp.mean((b[0] @ p["kernel"] - b[1]) ** 2)
    params = {"kernel": jax.random.normal(jax.random.key(0), (10, 4)) * 0.1}
    end = dass.hydra(loss, params, batches, 0.5, steps=(200, 100, 200), learning_rate=0.02)
    assert int((end["kernel"] != 0).sum()) == 20
    cut = np.where(np.abs(w) >= np.sort(np.abs(w).ravel())[20], w, 0)
    assert float(loss(end, batches(0))) < float(loss({"kernel": jnp.asarray(cut)}, batches(0)))
