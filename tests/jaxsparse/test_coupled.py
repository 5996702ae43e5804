"""Units that span leaves: chosen by their joint score, masked together in every leaf."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.structures import Coupled, Group, Part
from jaxsparse.targets import stacked

H = 8
EVERY = lambda *_: True


def mlp(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32)
    return {"first": {"kernel": draw(5, H), "bias": draw(H)}, "second": {"kernel": draw(H, 3)},
            "other": {"kernel": draw(4, 4)}}  # fmt: skip


HIDDEN = [("first/kernel", -1), ("first/bias", 0), ("second/kernel", 0)]


def sizes(p, combine="sum", bias=True):
    """The score of each hidden unit, by loops."""
    a, b, c = (np.abs(np.asarray(x)) for x in
               (p["first"]["kernel"], p["first"]["bias"], p["second"]["kernel"]))  # fmt: skip
    joint = {"sum": sum, "mean": np.mean, "max": max}[combine]
    return np.asarray([
        joint([a[:, j].sum(), *([b[j]] if bias else []), c[j].sum()]) for j in range(H)
    ])  # fmt: skip


@pytest.mark.parametrize("combine", ["sum", "mean", "max"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_hidden_neuron_lives_or_dies_in_all_its_leaves(combine, bias):
    p = mlp()
    pruned, masks = jaxsparse.prune(
        p, 0.5, structure=Coupled([HIDDEN], combine), targets=EVERY if bias else None
    )
    order = sorted(range(H), key=lambda j: (-sizes(p, combine, bias)[j], j))
    alive = np.isin(np.arange(H), order[: H // 2])
    assert np.array_equal(masks["first"]["kernel"], np.broadcast_to(alive, (5, H)))
    assert np.array_equal(masks["second"]["kernel"], np.broadcast_to(alive[:, None], (H, 3)))
    if bias:
        assert np.array_equal(masks["first"]["bias"], alive)
    else:
        assert masks["first"]["bias"] is None
    assert masks["other"]["kernel"] is None
    x = jnp.ones((2, 5))
    out = lambda q: (
        jax.nn.relu(x @ q["first"]["kernel"] + q["first"]["bias"]) @ q["second"]["kernel"]
    )
    small = {"first": {"kernel": p["first"]["kernel"][:, alive], "bias": p["first"]["bias"][alive]},
             "second": {"kernel": p["second"]["kernel"][alive]}}  # fmt: skip
    np.testing.assert_allclose(out(pruned), out(small), rtol=1e-5)


def test_a_leaf_in_two_groups_keeps_what_both_keep():
    rng = np.random.default_rng(1)
    p = {k: jnp.asarray(rng.normal(size=s), jnp.float32)
         for k, s in {"a": (3, 6), "b": (6, 4), "c": (4, 2)}.items()}  # fmt: skip
    kind = Coupled([[("a", 1), ("b", 0)], [("b", 1), ("c", 0)]])
    _, m = jaxsparse.prune(p, 0.5, structure=kind)
    rows, cols = np.asarray(m["a"])[0], np.asarray(m["c"])[:, 0]
    assert rows.sum() == 3 and cols.sum() == 2
    assert np.array_equal(m["b"], rows[:, None] & cols)


def test_an_index_says_which_positions_a_unit_holds():
    """Four channels of a convolution, flattened to [2, 2, 4] before a dense layer."""
    rng = np.random.default_rng(2)
    p = {"conv": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32),
         "dense": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)}  # fmt: skip
    index = np.arange(16).reshape(4, 4).T  # [channels, positions]
    kind = Coupled([[Part("conv", -1), Part("dense", 0, index)]])
    _, m = jaxsparse.prune(p, 0.5, structure=kind)
    worth = np.abs(p["conv"]).sum(axis=(0, 1, 2)) + np.abs(p["dense"])[index].sum(axis=(1, 2))
    alive = worth >= np.sort(worth)[2]
    assert np.array_equal(m["conv"], np.broadcast_to(alive, (3, 3, 2, 4)))
    assert np.array_equal(m["dense"], np.broadcast_to(np.tile(alive, 4)[:, None], (16, 5)))


def test_groups_have_budgets_by_name_or_are_ranked_together():
    p = {k: jnp.asarray(np.random.default_rng(i).normal(size=(4, 8)), jnp.float32)
         for i, k in enumerate("abc")}  # fmt: skip
    kind = Coupled([[("a", 1), ("b", 1)], [("c", 1)]])
    kept = lambda m: [int(np.asarray(m[k])[0].sum()) for k in "abc"]
    _, m = jaxsparse.prune(p, 0.5, structure=kind, allocation={r"a \+ b": 0.75})
    assert kept(m) == [2, 2, 4]
    _, m = jaxsparse.prune(p, 0.5, structure=kind, allocation="global")
    first = np.abs(p["a"]).sum(0) + np.abs(p["b"]).sum(0)
    both = np.concatenate([first, np.abs(p["c"]).sum(0)])
    best = np.argsort(-both, kind="stable")[:8]
    assert kept(m) == [(best < 8).sum(), (best < 8).sum(), (best >= 8).sum()]


def test_stacked_layers_choose_each_their_own_units():
    rng = np.random.default_rng(3)
    p = {"up": jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32),
         "down": jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)}  # fmt: skip
    kind = Coupled([[("up", -1), ("down", 0)]])
    _, m = jaxsparse.prune(p, 0.5, structure=kind, targets=[("up|down", stacked())])
    for i in range(3):
        layer = {k: x[i] for k, x in p.items()}
        _, alone = jaxsparse.prune(layer, 0.5, structure=kind)
        assert all(np.array_equal(m[k][i], alone[k]) for k in p)


def loss(p):
    x = jnp.linspace(-1, 1, 15).reshape(3, 5)
    hidden = jax.nn.relu(x @ p["first"]["kernel"] + p["first"]["bias"])
    return jnp.mean((hidden @ p["second"]["kernel"] - 1.0) ** 2) + jnp.sum(p["other"]["kernel"]) * 0


@pytest.mark.parametrize("name", ["static", "magnitude", "rigl", "set"])
def test_methods_train_whole_neurons(name):
    more = {} if name == "static" else {"total_steps": 12, "update_every": 3}
    more |= {} if name == "magnitude" else {"allocation": "uniform"}
    more |= {"drop_fraction": lambda step: 0.5} if name in ("rigl", "set") else {}
    tx = jaxsparse.make(
        name, optax.sgd(0.1, momentum=0.9), sparsity=0.5, structure=Coupled([HIDDEN]), targets=EVERY,
        **more,
    )  # fmt: skip
    p = mlp()
    state, update = tx.init(p), jax.jit(tx.update)
    seen = []
    for _ in range(12):
        u, state = update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, u)
        m = jaxsparse.get_masks(state)
        alive = np.asarray(m["first"]["bias"])
        assert np.array_equal(m["first"]["kernel"], np.broadcast_to(alive, (5, H)))
        assert np.array_equal(m["second"]["kernel"], np.broadcast_to(alive[:, None], (H, 3)))
        assert not np.any(np.asarray(p["first"]["kernel"])[:, ~alive])
        seen.append(alive)
    assert seen[-1].sum() == H // 2
    moved = any(not np.array_equal(a, b) for a, b in itertools.pairwise(seen))
    if name != "rigl":  # a dead neuron has no gradient: RigL takes back what it dropped
        assert moved == (name != "static")


@pytest.mark.parametrize(
    "groups, message",
    [
        ([[("first/kernl", -1)]], r"no leaf matches 'first/kernl'; paths look like 'first/kernel'"),
        ([[("first/kernel", 2)]], r"'first/kernel' has shape \(5, 8\), and no axis 2"),
        ([[("first/kernel", 0), ("second/kernel", 0)]], r"different numbers of \(layers, units\)"),
        ([[("first/kernel", 1, [[0], [9]])]], "goes up to 9; axis 1"),
    ],
)
def test_groups_that_do_not_fit_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.prune(mlp(), 0.5, structure=Coupled(groups))


def test_groups_that_make_no_sense_are_refused():
    for make, message in [
        (lambda: Coupled([]), "at least one group"),
        (lambda: Group([]), "at least one part"),
        (lambda: Coupled([HIDDEN], "median"), "combine='median': use 'sum'"),
        (lambda: Part("a", 0, [[0, 1], [1, 2]]), "a position belongs to one unit"),
        (lambda: Part("a", 0, [0, 1]), r"integers \[units, members\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_methods_that_rank_leaf_by_leaf_refuse_them_by_name():
    tx = jaxsparse.mest(
        optax.sgd(0.1), 0.5, total_steps=12, update_every=3, structure=Coupled([HIDDEN])
    )
    with pytest.raises(ValueError, match="structure=Coupled: a leaf has no units of its own"):
        state = tx.init(mlp())
        tx.update(mlp(), state, mlp())
