"""Transfer of tickets, federated pruning, trimmed graphs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.applications import feddip, teddy
from experiments.tickets import transfer
from jaxsparse import masking, tickets

RNG = np.random.default_rng(0)


# -- Transfer


def test_the_greedy_map_takes_the_largest_first_and_is_injective():
    for _ in range(20):
        counts = RNG.permutation(12).reshape(4, 3)
        found = transfer.greedy_label_map(counts)
        left, want = (
            {(i, j): counts[i, j] for i, j in itertools.product(range(4), range(3))},
            [0] * 3,
        )
        while left:
            (i, j) = max(left, key=lambda at: left[at])
            want[j] = i
            left = {at: v for at, v in left.items() if at[0] != i and at[1] != j}
        assert found.tolist() == want and len(set(want)) == 3
    with pytest.raises(ValueError, match="at least as many source"):
        transfer.greedy_label_map(np.ones((2, 3)))


def test_a_prompt_and_a_probe_learn_a_task_of_a_frozen_network():
    w = jnp.asarray(RNG.normal(size=(36, 5)), jnp.float32)
    forward = lambda x: x.reshape(x.shape[0], -1) @ w + jnp.array([0.0, -20.0, 0.0, -20.0, 0.0])
    x = RNG.normal(size=(200, 4, 4, 1)).astype("f4")
    inner = np.asarray(w).reshape(6, 6, 5)[1:5, 1:5].reshape(16, 5)
    y = (x.reshape(200, 16) @ inner)[:, [4, 2, 0]].argmax(axis=1)
    data = transfer.Few(jnp.asarray(x), jnp.asarray(y))
    few = transfer.few_shot(data, 20, 3)
    assert np.bincount(np.asarray(few.y)).tolist() == [20, 20, 20]
    found = transfer.reprogram(
        forward, few, data, size=(6, 6, 1), classes=3, epochs=40, learning_rate=0.05
    )
    program, mapping = found.trained
    assert mapping.tolist() == [4, 2, 0] and found.accuracy > 0.85 and 0 <= found.calibration < 1
    assert not program[1:5, 1:5].any() and program[0].any()
    probe = transfer.linear_probe(lambda x: x.reshape(x.shape[0], -1), few, data, classes=3)
    assert probe.accuracy > 0.75
    with pytest.raises(ValueError, match="larger than the program"):
        transfer.prompted(jnp.zeros((3, 3, 1)), few.x)
    with pytest.raises(ValueError, match="shots=200"):
        transfer.few_shot(data, 200, 3)


# -- FedDIP


def test_stairs_and_sparsities_are_those_of_the_formulas():
    run = feddip.FedDIP(rounds=43, initial=0.5, final=0.9)
    steps = [run.stair(t) for t in range(43)]
    want = (
        [0.0] * 2
        + [5e-4 + (i - 1) * 5e-4 / 19 for i in range(1, 20) for _ in range(2)]
        + [5e-4 + 18 * 5e-4 / 19] * 3
    )
    np.testing.assert_allclose(steps, want, rtol=1e-6)
    assert run.sparsity(0) == 0.5 and abs(run.sparsity(43) - 0.9) < 1e-12
    with pytest.raises(ValueError, match="rounds=5"):
        feddip.FedDIP(rounds=5)
    with pytest.raises(ValueError, match="final=0.4"):
        feddip.FedDIP(rounds=30, final=0.4)


def problem():
    x, y = RNG.normal(size=(64, 6)).astype("f4"), RNG.integers(0, 3, 64)
    params = feddip.mlp(jax.random.key(0), (6, 8, 3))

    def loss(p, batch):
        found = jax.nn.log_softmax(feddip.logits(p, batch[0]))
        return -jnp.mean(jnp.take_along_axis(found, batch[1][:, None], axis=1))

    def data(c, t):
        at = np.random.default_rng((c, t)).choice(64, (3, 8))
        return jnp.asarray(x[at]), jnp.asarray(y[at])

    return params, loss, data


def test_a_clients_round_is_straight_through_pruning_with_a_fixed_mask():
    params, loss, data = problem()
    masks = feddip.prune_globally(params, 0.6)
    sent = masking.apply(params, masks)
    raw = feddip.client(loss, sent, masks, data(0, 0), 0.1, 0.01, 5e-4)
    want: Any = sent
    for i in range(3):
        batch = jax.tree.map(lambda v, i=i: v[i], data(0, 0))
        at = masking.apply(want, masks)
        g = jax.grad(loss)(at, batch)
        for n in g:
            k = at[n]["kernel"]
            g[n]["kernel"] += 0.01 * k / jnp.linalg.norm(k)
        want = jax.tree.map(lambda w, g: w - 0.1 * (g + 5e-4 * w), want, g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), raw, want)
    off = ~np.asarray(masks["layer_0"]["kernel"])
    assert not np.asarray(sent["layer_0"]["kernel"])[off].any()
    assert np.asarray(raw["layer_0"]["kernel"])[off].any()
    assert bool(jnp.all(jax.grad(feddip.norm)(jnp.zeros(3)) == 0))


def test_server_masks_are_nested_exact_and_hold_after_every_round():
    params, loss, data = problem()
    run, seen = feddip.FedDIP(rounds=20, every=5, initial=0.3, final=0.8), []
    feddip.train(
        run,
        loss,
        params,
        data,
        np.array([10, 30, 20, 40]),
        chosen=2,
        on_round=lambda t, r: seen.append(r),
    )
    total = 6 * 8 + 8 * 3
    for t, now in enumerate(seen):
        kept = [np.asarray(m) for m in jax.tree.leaves(now.masks)]
        assert sum(m.sum() for m in kept) == total - int(run.sparsity(t - t % 5) * total + 1e-6)
        weights = [np.asarray(now.params[n]["kernel"]) for n in ("layer_0", "layer_1")]
        assert not any(w[~m].any() for w, m in zip(weights, kept))
        if t:
            assert not any(
                (m & ~np.asarray(o)).any() for m, o in zip(kept, jax.tree.leaves(seen[t - 1].masks))
            )


# -- TEDDY


def test_the_projection_is_exact_over_all_leaves_and_pruned_weights_may_return():
    params = {"a": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32), "b": jnp.ones(3) * 1e-3}
    tx = optax.chain(optax.adam(0.3), teddy.sparsest(0.5))
    state, p, masks = tx.init(params), params, []
    for i in range(8):
        g = jax.tree.map(
            lambda x, i=i: jnp.asarray(np.random.default_rng(i).normal(size=x.shape), x.dtype), p
        )
        before, (updates, state) = p, tx.update(g, state, p)
        p = optax.apply_updates(before, updates)
        flat = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(p)])
        assert (flat == 0).sum() == int(np.ceil(0.5 * 23))
        masks.append(flat != 0)
    assert (~masks[0] & np.logical_or.reduce(masks)).any()
    zero = jax.tree.map(jnp.zeros_like, p)
    again, _ = teddy.sparsest(0.5).update(zero, optax.EmptyState(), p)
    assert not any(x.any() for x in jax.tree.leaves(again))
    with pytest.raises(ValueError, match="sparsity=1"):
        teddy.sparsest(1)


def test_nothing_pruned_is_plain_training_and_a_trimmed_graph_is_learnt():
    graph = teddy.communities(200, 3, inside=0.15, across=0.02)
    start = teddy.init(jax.random.key(0), 16, graph.x.shape[1], 3)
    plain = teddy.train(graph, graph.edges, start, steps=60)
    all_edges = graph.edges[:, tickets.keep_edges(graph.edges, 200, 0.0)]
    same = teddy.train(graph, all_edges, start, steps=60)
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    teacher = teddy.gcn(plain, teddy.propagation(graph.edges, 200), graph.x)
    kept = graph.edges[:, tickets.keep_edges(graph.edges, 200, 0.1)]
    sparse = teddy.train(graph, kept, start, sparsity=0.5, teacher=teacher, steps=60)
    dense, trimmed = teddy.accuracy(graph, graph.edges, plain), teddy.accuracy(graph, kept, sparse)
    assert dense > 0.5 and trimmed > dense - 0.1
    zeros = sum(int((x == 0).sum()) for x in jax.tree.leaves(sparse))
    assert zeros >= 0.5 * sum(x.size for x in jax.tree.leaves(sparse))
