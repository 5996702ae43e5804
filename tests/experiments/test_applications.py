"""The applications: what their papers' rules say, on the smallest cases; and that each one runs."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from experiments import optimizer, task
from experiments.applications import continual, eau_de_qn, quick_selection, recommender
from experiments.studies import teacher
from jaxsparse.leaves import find

# --- EauDeQN --------------------------------------------------------------------------------------


def population(losses, sparsity=0.5, hidden=8):
    """Online networks at `sparsity`, with these accumulated losses."""
    params = eau_de_qn.init_network(jax.random.key(0), hidden)
    plan = find(params)
    sparse, masks = jaxsparse.prune(params, sparsity)
    count = len(losses)
    repeat = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * count), tree)
    state = eau_de_qn.Population(
        sparse,
        repeat(sparse),
        repeat(plan.masks(masks)),
        repeat({"slot": jnp.arange(2.0)}),
        jnp.full(count, sparsity),
        jnp.array(losses),
    )
    return state, plan


select = jax.jit(eau_de_qn.select, static_argnums=2)


def descend(generations, pick):
    """Target updates in which the network at position `pick(sparsities)` always wins."""
    state, plan = population([0.0] * 4)
    sparsities, masks = [0.5], [[m[0] for m in state.masks]]
    for generation in range(generations):
        winner = pick(np.asarray(state.sparsity))
        state = state._replace(loss=jnp.ones(4).at[winner].set(0.0))
        sparsities.append(float(state.sparsity[winner]))
        masks.append([m[winner] for m in state.masks])
        state = select(jax.random.key(generation), state, plan, 0.2)
    return sparsities, masks


def test_sparsity_never_rises_while_the_unpruned_copy_wins():
    sparsities, _ = descend(4, lambda s: 0)
    assert sparsities == [0.5] * 5


def test_sparsity_rises_while_the_sparsest_wins_and_masks_are_nested():
    sparsities, masks = descend(4, lambda s: int(np.argmax(s)))
    assert all(a < b for a, b in zip(sparsities[1:], sparsities[2:]))
    for older, newer in zip(masks, masks[1:]):
        assert all(not bool((n & ~o).any()) for o, n in zip(older, newer))


def test_the_winner_becomes_the_target_and_its_optimizer_goes_with_it():
    state, plan = population([3.0, 1.0, 2.0, 4.0])
    state = state._replace(
        params=jax.tree.map(
            lambda x: x * jnp.arange(1.0, 5.0).reshape(4, *[1] * (x.ndim - 1)), state.params
        ),
        opt={"slot": jnp.arange(8.0).reshape(4, 2)},
    )
    new = select(jax.random.key(0), state, plan, 0.2)
    second = jax.tree.map(lambda x: x[1], state.params)
    jax.tree.map(np.testing.assert_array_equal, new.target, second)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), new.params, second)
    np.testing.assert_array_equal(new.opt["slot"], [[2.0, 3.0]] * 4)
    assert not new.loss.any()
    kept = sum(m.sum((1, 2)) for m in new.masks) / sum(m[0].size for m in new.masks)
    np.testing.assert_allclose(1 - kept, new.sparsity, atol=5e-3)


@pytest.mark.slow
def test_a_population_of_one_is_a_dense_q_network_that_learns():
    one, sparsity = eau_de_qn.train(networks=1, steps=150, hidden=16, target_every=50)
    assert not np.any(sparsity) and len(sparsity) == 3
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), one.target, one.params)


def test_no_move_enters_a_wall_and_the_goal_ends_an_episode():
    cell = jnp.array([1, 1])
    for key in jax.random.split(jax.random.key(0), 20):
        there, reward, done = eau_de_qn.move(key, cell, jnp.int32(0))
        assert not eau_de_qn.WALLS[tuple(there)] and reward == 0 and not done
    above = jnp.array(eau_de_qn.GOAL) - jnp.array([1, 0])
    ends = [eau_de_qn.move(k, above, jnp.int32(1)) for k in jax.random.split(jax.random.key(1), 8)]
    assert sum(bool(done) for _, _, done in ends) >= 6
    assert all(bool(done) == (reward == 1) for _, reward, done in ends)


# --- Continual learning ---------------------------------------------------------------------------


def test_importance_without_gradients_is_magnitude():
    w, g = jnp.array([1.0, -2.0]), jnp.array([5.0, -1.0])
    np.testing.assert_array_equal(continual.importance(w, g, g, 0.0, 0.0), [1.0, 2.0])
    np.testing.assert_array_equal(continual.importance(w, g, 2 * g, 0.5, 0.25), [6.0, 3.0])


def test_an_update_has_at_most_its_share_of_entries_and_stays_inside_the_mask():
    g = jax.random.normal(jax.random.key(0), (20, 10))
    mask = jax.random.bernoulli(jax.random.key(1), 0.25, (20, 10))
    allowed = continual.gradient_mask(g, mask, 0.8)
    assert int(allowed.sum()) == 40 and not bool((allowed & ~mask).any())
    # All entries count, the masked zeros too: with fewer inside the mask than the share, all of them.
    few = mask & (jnp.arange(200).reshape(20, 10) < 60)
    np.testing.assert_array_equal(continual.gradient_mask(g, few, 0.5), few)


def test_the_easiest_examples_are_the_least_forgotten_active_ones():
    forgotten = np.array([3, 0, 1, 0, 5, 0])
    active = np.array([True, False, True, True, True, True])
    assert continual.easiest(forgotten, active, 2).tolist() == [3, 5]
    assert continual.easiest(forgotten, active, 3).tolist() == [2, 3, 5]


def test_rewiring_keeps_the_most_important_and_grows_to_the_upper_count():
    mask = jnp.arange(100) < 40
    score = jnp.arange(100.0)
    new = continual.rewire(mask, score, 30, 40, jax.random.key(0))
    assert int(new.sum()) == 40 and bool(new[10:40].all())


@pytest.mark.parametrize("size, sparsity, want", [(8192, 0.9, (779, 820, 861)), (64 * 128, 0.75, (1946, 2048, 2150)), (10, 0.0, (10, 10, 10))])  # fmt: skip
def test_the_counts_of_a_layer_are_exact(size, sparsity, want):
    """Oracle in fractions: n - floor(S n), and a twentieth of it less or more."""
    exact = Fraction(str(sparsity))
    kept = size - int(exact * size)
    more = int(Fraction("0.05") * kept) if sparsity else 0
    assert continual.counts(size, sparsity, 0.05 if sparsity else 0.0) == want
    assert want == (kept - more, kept, min(kept + more, size))
    g = jax.random.normal(jax.random.key(0), (size,))
    assert int(continual.gradient_mask(g, jnp.ones(size, bool), sparsity).sum()) == kept


def test_nothing_is_forgotten_with_one_mask_per_task():
    train, test = continual.digits()
    result = continual.task_incremental(train, test, steps=20, update_every=5)
    assert result["changed"] == 0
    assert 0.2 < result["capacity"] <= 1
    assert np.mean(result["accuracies"]) > 0.7


@pytest.mark.slow
def test_replay_and_sparse_training_spend_what_was_asked():
    train, test = continual.digits()
    method = continual.Replay("sparcl", sparsity=0.75, gradient_sparsity=0.8, removed=40)
    train = continual.Data(train.x[:400], train.y[:400])
    spent = continual.class_incremental(method, train, test, epochs=4, batch=32)
    assert spent["density"] == pytest.approx(0.25, abs=1e-3)
    assert spent["update"] <= 0.2 + 1e-3
    assert spent["examples"] < 4 * len(train.y)
    assert spent["removed"] == 40 * continual.TASKS
    # A new task starts at a density that is a twentieth higher, and returns.
    sizes = [64 * 128, 128 * 128, 128 * 10]
    raised = sum(continual.counts(n, 0.75, 0.05)[2] for n in sizes) / sum(sizes)
    assert spent["raised"] == pytest.approx(raised) and raised > 0.26


# --- Recommender ----------------------------------------------------------------------------------


def test_embeddings_keep_their_budget_and_popular_rows_get_more_of_it():
    data, held_out = recommender.synthetic(60, 40, 6000)
    options = dict(dim=16, density=0.25, steps=500, update_every=50, batch=128)
    sparse = recommender.train(data, held_out, (60, 40), growth="window", **options)
    assert [int(m.sum()) for m in sparse.masks] == [40 * 16 // 4, 60 * 16 // 4]
    popular, rare = recommender.row_counts(sparse)
    assert popular > 1.5 * rare
    for w, m in zip((sparse.params["items"], sparse.params["users"]), sparse.masks):
        assert not np.any(np.asarray(w)[~np.asarray(m)])
    fixed = recommender.train(data, held_out, (60, 40), growth=None, **options)
    assert sparse.rmse < fixed.rmse


def test_a_row_without_ratings_never_grows():
    data, held_out = recommender.synthetic(40, 30, 3000)
    absent = data.pairs[:, 1] == 20
    data = recommender.Ratings(data.pairs[~absent], data.values[~absent])
    options = dict(dim=8, density=0.25, steps=200, update_every=20, batch=128)
    first = recommender.train(data, held_out, (40, 30), growth=None, **options).masks[0][20]
    last = recommender.train(data, held_out, (40, 30), **options).masks[0][20]
    assert not bool((last & ~first).any())


def test_an_unknown_growth_is_named():
    data, held_out = recommender.synthetic(10, 10, 100)
    with pytest.raises(ValueError, match="growth='always'"):
        recommender.train(data, held_out, (10, 10), growth="always")


# --- QuickSelection -------------------------------------------------------------------------------


def test_strength_is_the_row_sum_of_magnitudes():
    assert quick_selection.strength(jnp.array([[1.0, -2.0], [0.0, 0.5]])).tolist() == [3.0, 0.5]


@pytest.mark.slow
def test_the_strongest_ten_inputs_recover_at_least_eight_informative_ones():
    problem = quick_selection.synthetic()
    assert problem.informative.sum() == 10 and problem.x.shape == (500, 100)
    found = quick_selection.hits("3 factors", [0, 1, 2], [quick_selection.CHOSEN])
    assert found.shape == (1, 3, quick_selection.CHOSEN.epochs)
    assert found[0, :, -1].min() >= 8


def test_a_shorter_run_is_the_beginning_of_a_longer_one():
    x = jnp.asarray(quick_selection.synthetic(4, 12, 100).x)
    setting = quick_selection.CHOSEN._replace(epochs=3, hidden=8, epsilon=3.0)
    short, long = (quick_selection.train(x, setting._replace(epochs=n)) for n in (2, 3))
    np.testing.assert_allclose(short, long[:2], rtol=1e-5)


def test_random_weights_rank_features_at_chance():
    problem = quick_selection.synthetic()
    hits = [
        quick_selection.recovered(
            jax.random.uniform(jax.random.key(i), (100,)), problem.informative
        )
        for i in range(30)
    ]
    assert 0.3 < np.mean(hits) < 2.0


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="name='iris2'"):
        quick_selection.planted("iris2")


# --- The planted teacher --------------------------------------------------------------------------


def test_the_teacher_has_exactly_the_weights_that_were_asked_for():
    params = teacher.make_teacher(jax.random.key(0), 50, 0.02)
    assert [int((p != 0).sum()) for p in jax.tree.leaves(params)] == [50, 50]


@pytest.mark.slow
def test_rigl_finds_the_support_of_the_teacher_and_static_masks_do_not(tmp_path):
    facts = {"seeds": 1, "width": 40, "density": 0.05, "steps": 1000}
    saved = []
    rows = teacher.study(["static", "rigl", "sdgf"], save=saved.append, **facts)
    assert len(saved) == 3
    assert teacher.study(["static", "rigl", "sdgf"], done=rows, **facts) == rows
    by_name = {row["method"]: row for row in rows}
    assert rows[0]["method"] == "rigl"
    assert min(by_name["rigl"]["f1"]) > 0.4 and max(by_name["static"]["f1"]) < 0.2
    np.testing.assert_allclose(by_name["rigl"]["sparsity"], 0.95, atol=1e-6)
    rows = [row | {"command": f"with {row['method']}"} for row in rows]
    teacher.write(rows, tmp_path, facts)
    page = (tmp_path / "teacher.md").read_text()
    assert "| rigl |" in page and all(f"with {row['method']}\n" in page for row in rows)
    assert (tmp_path / "teacher.png").stat().st_size > 10_000


# --- Recipes for sparse optimization --------------------------------------------------------------


def test_the_entropy_of_a_uniform_prediction_is_the_log_of_the_classes():
    np.testing.assert_allclose(task.prediction_entropy(jnp.full((3, 7), 2.0)), np.log(7), rtol=1e-6)
    sure = jnp.array([[100.0, 0.0, 0.0]])
    assert float(task.prediction_entropy(sure)[0]) == pytest.approx(0.0, abs=1e-6)


def test_the_learning_rate_decays_linearly_or_as_a_cosine_to_zero():
    for decay, quarter in (("linear", 0.75), ("cosine", (1 + np.cos(np.pi / 4)) / 2)):
        rate = optimizer.learning_rate_schedule(1.0, 110, warmup_steps=10, decay=decay)
        found = [float(rate(t)) for t in (0, 5, 10, 35, 110)]
        np.testing.assert_allclose(found, [0, 0.5, 1, quarter, 0], atol=1e-6)
    # Two cycles of 55 steps, 10 of them to the peak.
    rate = optimizer.learning_rate_schedule(1.0, 110, warmup_steps=10, cycles=2)
    np.testing.assert_allclose([float(rate(t)) for t in (10, 54, 55, 65)], [1, 0, 0, 1], atol=2e-3)
