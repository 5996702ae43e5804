"""Weights that stay where they were: anchored masks, FISH, FreezeNet, three-valued masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsparse
from jaxsparse import tickets
from jaxsparse.engines import anchored, changes, restore, restore_seeded, save_seeded
from jaxsparse.initial_scores import snip

RNG = np.random.default_rng(0)
SHAPES = {"a": (6, 8), "b": (8, 3)}


def init(key):
    keys = jax.random.split(key, 2)
    return {
        n: {"kernel": jax.random.normal(k, s), "bias": jnp.zeros(s[1])}
        for k, (n, s) in zip(keys, SHAPES.items())
    }


def loss(p, batch):
    x, y = batch
    h = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
    return jnp.mean((h @ p["b"]["kernel"] + p["b"]["bias"] - y) ** 2)


BATCH = jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32), jnp.ones((16, 3))
MASKS = {n: {"kernel": jnp.asarray(RNG.random(s) < 0.3), "bias": None} for n, s in SHAPES.items()}
ADAM = lambda: optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(optax.cosine_decay_schedule(0.1, 12), weight_decay=0.1),
)


def train(tx, params, steps=6) -> tuple[Any, Any]:
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, BATCH), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view("u4"),
                                                            np.asarray(y).view("u4")), a, b)  # fmt: skip


def test_frozen_weights_keep_their_bits_and_trained_ones_are_those_of_masked_training():
    start = init(jax.random.key(0))
    start["a"]["kernel"] = start["a"]["kernel"].at[0].set(-0.0)
    after, _ = train(anchored(ADAM(), MASKS), start)
    for n in SHAPES:
        m, w0, w = np.asarray(MASKS[n]["kernel"]), start[n]["kernel"], after[n]["kernel"]
        same_bits(np.asarray(w)[~m], np.asarray(w0)[~m])
        assert (np.asarray(w)[m] != np.asarray(w0)[m]).all()
        assert (np.asarray(after[n]["bias"]) != 0).all()


def test_compact_slots_train_the_same_weights_in_a_fraction_of_the_memory():
    start = init(jax.random.key(1))
    one, state = train(anchored(ADAM(), MASKS), start)
    two, small = train(anchored(ADAM(), MASKS, compact=True), start)
    # The norm of the gradient is summed in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), one, two)
    for n in SHAPES:
        m = np.asarray(MASKS[n]["kernel"])
        same_bits(np.asarray(two[n]["kernel"])[~m], np.asarray(start[n]["kernel"])[~m])
    trained = sum(int(MASKS[n]["kernel"].sum()) + SHAPES[n][1] for n in SHAPES)
    sizes = [x.size for x in jax.tree.leaves(small.inner) if x.ndim]
    assert sum(sizes) == 2 * trained
    with pytest.raises(ValueError, match="known at init"):
        jax.jit(lambda m: anchored(ADAM(), m, compact=True).init(start))(MASKS)


def test_three_kinds_reduce_to_pruning_and_freezing_bit_by_bit_and_to_the_inner_optimizer():
    start = init(jax.random.key(2))
    kinds = lambda low: {
        n: {"kernel": jnp.where(MASKS[n]["kernel"], 2, low).astype(jnp.int8), "bias": None}
        for n in SHAPES
    }
    pruned, state = train(tickets.three_valued(ADAM(), kinds(0)), start)
    same_bits(pruned, train(jaxsparse.static(ADAM(), masks=MASKS), start)[0])
    assert bool(jaxsparse.check(pruned, state))
    same_bits(
        train(tickets.three_valued(ADAM(), kinds(1)), start)[0],
        train(anchored(ADAM(), MASKS), start)[0],
    )
    whole = jax.tree.map(lambda k: jnp.full_like(k, 2), kinds(0))
    # Another program: the compiler may sum the norm of the gradient in another order on some CPUs.
    rows = (train(tx, start)[0] for tx in (tickets.three_valued(ADAM(), whole), ADAM()))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *rows)
    mixed = kinds(1)
    mixed["a"]["kernel"] = mixed["a"]["kernel"].at[:2].set(0)
    after, _ = train(tickets.three_valued(ADAM(), mixed), start)
    assert not np.asarray(after["a"]["kernel"])[:2].any()
    frozen = np.asarray(mixed["a"]["kernel"]) == 1
    same_bits(np.asarray(after["a"]["kernel"])[frozen], np.asarray(start["a"]["kernel"])[frozen])
    with pytest.raises(ValueError, match="'kernel' must hold"):
        tickets.three_valued(ADAM(), {"kernel": jnp.array([3])})


def test_freezenet_is_stored_as_a_seed_and_what_has_changed_and_comes_back_bit_by_bit():
    key = jax.random.key(5, impl="rbg")
    start = init(key)
    masks = tickets.keep(snip(loss, start, [BATCH]), start, 0.9)
    after, _ = train(anchored(optax.sgd(0.1, momentum=0.9), masks), start)
    stored = save_seeded(init, key, after)
    assert stored.generator == "rbg"
    number = sum(v.size for v in stored.changes.values.values())
    assert number == sum(int(m.sum()) for m in jax.tree.leaves(masks)) + 8 + 3
    same_bits(restore_seeded(init, stored), after)
    with pytest.raises(ValueError, match="typed key"):
        save_seeded(init, jnp.zeros(2, jnp.uint32), after)


def test_the_gradient_of_a_frozen_network_is_larger_than_that_of_a_pruned_one():
    start = init(jax.random.key(3))
    masks = tickets.keep(snip(loss, start, [BATCH]), start, 0.9)
    pruned = jaxsparse.masking.apply(start, masks)

    def outputs(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]

    signal = lambda p: float(
        optax.global_norm(jax.grad(lambda x: jnp.sum(outputs(p, x)))(BATCH[0]))
    )
    assert signal(start) > 1.2 * signal(pruned)


def test_what_differs_is_found_by_bits_and_only_that():
    before = {
        "x": jnp.array([0.0, jnp.nan, 1.0], jnp.bfloat16),
        "y": jnp.arange(3),
        "z": jnp.ones(2),
    }
    after = {
        "x": jnp.array([-0.0, jnp.nan, 1.0], jnp.bfloat16),
        "y": jnp.arange(3),
        "z": jnp.zeros(2),
    }
    found: Any = changes(after, before)
    assert (
        found.places["x"].tolist() == [0] and found.places["z"] is None and "y" not in found.values
    )
    again = restore(before, found)
    assert np.signbit(np.float32(again["x"][0])) and again["z"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"'z' is float32\[3\]"):
        changes({"z": jnp.ones(2)}, {"z": jnp.ones(3)})
    with pytest.raises(ValueError, match="'z' is no leaf"):
        restore({"x": jnp.ones(1)}, found)


def test_fish_masks_have_the_count_of_the_authors_with_the_head_in_it():
    scores = jax.tree.map(
        lambda x: jnp.abs(jnp.asarray(RNG.normal(size=x.shape))), init(jax.random.key(0))
    )
    masks = tickets.fish_mask(scores, scores, 0.5, head="^b/")
    flat = lambda t: np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(t)])
    total = flat(scores).size
    assert flat(masks).sum() == total // 2 and flat(masks["b"]).all()
    body, kept = flat(scores["a"]), flat(masks["a"]).astype(bool)
    assert body[kept].min() >= body[~kept].max()
    with pytest.raises(ValueError, match="less than the head"):
        tickets.fish_mask(scores, scores, 0.01, head="^b/")
    with pytest.raises(ValueError, match="head: no leaf matches"):
        tickets.fish_mask(scores, scores, 0.5, head="tail")
    parts = tickets.interleaved_masks(scores, 3, 10)
    sums: Any = sum(flat(p).astype(int) for p in parts)
    assert sums.max() == 1 and [int(flat(p).sum()) for p in parts] == [10, 10, 10]
    assert set(np.flatnonzero(sums)) == set(np.argsort(-flat(scores), kind="stable")[:30])


def test_anchored_masks_work_in_wrappers_sharded_and_with_bad_input_refused():
    start = init(jax.random.key(4))
    tx = optax.MultiSteps(anchored(optax.adam(0.1), lambda p: MASKS), 2)
    after, _ = train(tx, start, 4)
    m = np.asarray(MASKS["a"]["kernel"])
    same_bits(np.asarray(after["a"]["kernel"])[~m], np.asarray(start["a"]["kernel"])[~m])
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    spread = start | {
        "a": {"kernel": jax.device_put(start["a"]["kernel"], rows), "bias": start["a"]["bias"]}
    }
    sharded, state = train(anchored(optax.sgd(0.1), MASKS), spread)
    same_bits(np.asarray(sharded["a"]["kernel"])[~m], np.asarray(start["a"]["kernel"])[~m])
    tx = anchored(optax.adam(0.1), MASKS)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, tx.init(start))
    assert jax.tree.structure(doubled) == jax.tree.structure(tx.init(start))
    with pytest.raises(ValueError, match=r"bool\[6, 8\]"):
        anchored(optax.sgd(0.1), {**MASKS, "a": {"kernel": jnp.ones(2, bool), "bias": None}}).init(
            start
        )
    with pytest.raises(ValueError, match="trained: not a tree like the parameters"):
        anchored(optax.sgd(0.1), {"a": None}).init(start)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(start, tx.init(start))


def test_changes_are_restored_into_references_of_any_memory_order():
    reference, new = {"w": np.zeros((2, 3), np.float32).T}, {"w": jnp.ones((3, 2)).at[0, 1].set(0)}
    np.testing.assert_array_equal(restore(reference, changes(new, reference))["w"], new["w"])


def test_the_masks_of_the_caller_are_not_given_away():
    masks = {"w": jnp.array([True, False])}
    params = {"w": jnp.ones(2)}
    tx = anchored(optax.adam(1.0), masks)
    state = tx.init(params)
    jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=1)(params, state)
    assert masks["w"].tolist() == [True, False]


def test_a_fisher_tree_of_another_network_is_refused():
    with pytest.raises(ValueError, match="fisher: must be a tree like the parameters"):
        tickets.fish_mask({"v": jnp.ones(4)}, {"w": jnp.ones(4)}, 0.5)
