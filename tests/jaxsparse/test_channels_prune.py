"""`channels.prune` and `channels.importance`: scores, allocations, budgets; groups as a structure of methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from channel_models import MODELS, VECTORS
from flax import nnx

import jaxsparse
from jaxsparse import channels


def net(p, x):
    h = jax.nn.relu(x @ p["a"] + p["bias"])
    return jax.nn.relu(h @ p["b"]) @ p["c"]


def params(seed=0, widths=(5, 12, 20, 3)):
    keys = jax.random.split(jax.random.key(seed), 3)
    draw = lambda key, i, o: jax.random.normal(key, (i, o))
    made = {name: draw(k, i, o) for name, k, i, o in zip("abc", keys, widths, widths[1:])}
    return made | {"bias": 100.0 * jnp.arange(widths[1])}


GROUPS = channels.find(net, params(), VECTORS)


def test_importance_is_the_mean_over_members_of_sums_of_squares_over_their_mean():
    p = params()
    worth = channels.importance(net, GROUPS, params=p)
    by_hand = (np.square(p["a"]).sum(0) + np.square(p["b"]).sum(1)) / 2  # biases do not count
    np.testing.assert_allclose(worth["a:1"], by_hand / by_hand.mean(), rtol=1e-5)
    for reduction, reduce in (("sum", np.sum), ("max", np.max)):
        rows = [np.square(p["a"]).sum(0), np.square(p["b"]).sum(1)]
        got = channels.importance(net, GROUPS, params=p, reduction=reduction, normalization="none")
        np.testing.assert_allclose(got["a:1"], reduce(rows, 0), rtol=1e-5)


def test_taylor_fisher_and_scores_of_ones_own_read_gradients():
    p = params()
    g = jax.grad(lambda p: jnp.sum(net(p, VECTORS) ** 2))(p)
    options = dict(params=p, grads=g, reduction="sum", normalization="none")
    a, b = (np.asarray(p[k] * g[k], float) for k in "ab")
    expected = {
        "taylor": np.abs(a.sum(0)) + np.abs(b.sum(1)),
        "fisher": np.square(a).sum(0) + np.square(b).sum(1),
    }
    for score, by_hand in expected.items():
        got = channels.importance(net, GROUPS, score=score, **options)["a:1"]
        np.testing.assert_allclose(got, by_hand, rtol=1e-4)
    got = channels.importance(net, GROUPS, score=lambda w, g: np.abs(g), **options)["a:1"]
    np.testing.assert_allclose(got, np.abs(g["a"]).sum(0) + np.abs(g["b"]).sum(1), rtol=1e-4)


def test_lamp_divides_by_what_is_no_smaller():
    worth = channels.importance(net, GROUPS, normalization="none")["b:1"]
    lamp = channels.importance(net, GROUPS, normalization="lamp")["b:1"]
    for x, y in zip(worth, lamp):
        assert y == pytest.approx(x / worth[worth >= x].sum())
    assert lamp.max() == pytest.approx(1.0)


def test_the_scales_of_batch_norms_rank_their_channels():
    model, x = MODELS["resnet"]()
    groups = channels.find(model, x).matching("blocks/0/convs/0")
    model.blocks[0].norms[0].scale[...] = jnp.array([0.1, -3.0, 0.0, 2.0])
    worth = channels.importance(model, groups, score="batch_norm", normalization="none")
    np.testing.assert_allclose(worth["blocks/0/convs/0/kernel:3"], [0.1, 3.0, 0.0, 2.0], rtol=1e-6)
    with pytest.raises(ValueError, match="no scale of a norm belongs to group 'a:1'"):
        channels.importance(net, GROUPS, score="batch_norm")


def test_uniform_takes_the_same_share_of_every_group_and_the_least_of_each():
    small = channels.prune(net, VECTORS, 0.5, params=params())
    assert {n: len(k) for n, k in small.kept.items()} == {"a:1": 6, "b:1": 10}
    worth = channels.importance(net, GROUPS)
    for name, kept in small.kept.items():
        order = np.argsort(-worth[name], kind="stable")
        assert kept.tolist() == sorted(order[: len(kept)].tolist())
    assert small.params["b"].shape == (6, 10)


def test_global_ranks_all_channels_together_and_leaves_one_of_each():
    p = params()
    p["b"] = p["b"] * jnp.geomspace(1.0, 30.0, 20)
    small = channels.prune(net, VECTORS, 0.75, params=p, allocation="global", normalization="none")
    worth = channels.importance(net, GROUPS, params=p, normalization="none")
    every = np.concatenate([worth["a:1"], worth["b:1"]])
    border = np.sort(every)[-8]
    expected = {n: max(1, int((w >= border).sum())) for n, w in worth.items()}
    assert {n: len(k) for n, k in small.kept.items()} == expected
    p = {k: v * (1e-3 if k == "a" else 1.0) for k, v in params().items()}
    p["b"] = p["b"].at[:, 5:].multiply(1e-4)
    small = channels.prune(net, VECTORS, 0.9, params=p, allocation="global", normalization="none")
    assert min(len(k) for k in small.kept.values()) >= 1


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("target", ["params", "flops"])
def test_budgets_are_met_within_one_percent(target, allocation):
    model, x = MODELS["resnet"]()
    model = type(model)((8, 8, 3), 10, rngs=nnx.Rngs(0), depth=8, width=8)
    for sparsity in (0.3, 0.7):
        small = channels.prune(model, x, sparsity, target=target, allocation=allocation)
        before, after = small.report.parameters if target == "params" else small.report.flops
        assert abs(after - (1 - sparsity) * before) <= 0.01 * before
        found = channels.find(small.model, x)
        assert after == (found.parameters() if target == "params" else found.flops())


def test_a_budget_that_widths_cannot_meet_is_refused():
    with pytest.raises(
        ValueError, match=r"a budget of .* flops was asked for; widths in multiples of 8"
    ):
        channels.prune(net, VECTORS, 0.9, params=params(), target="flops", round_to=8)
    small = channels.prune(net, VECTORS, 0.5, params=params(), target="channels", round_to=4)
    assert {len(k) % 4 for k in small.kept.values()} == {0}


def test_several_steps_reach_the_same_budget_and_keep_the_old_numbers():
    p = params(widths=(5, 40, 60, 3))
    groups = channels.find(net, p, VECTORS)
    small = channels.prune(net, VECTORS, 0.3, params=p, groups=groups, steps=6)
    assert abs(sum(map(len, small.kept.values())) - 70) <= 1
    a, b = (small.kept[n] for n in ("a:1", "b:1"))
    np.testing.assert_array_equal(small.params["b"], p["b"][np.ix_(a, b)])
    assert small.report.before == groups.widths


def test_the_optimizer_is_cut_with_the_model():
    model, x = MODELS["mlp"]()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    small = channels.prune(model, x, 0.5, opt_state=optimizer, steps=2)
    loss = lambda m: jnp.mean(m(x) ** 2)
    small.opt_state.update(small.model, nnx.grad(loss)(small.model))
    assert small.model.layers[0].out_features == 4


@pytest.mark.parametrize("name", ["shufflenet", "gqa", "scanned", "densenet"])
def test_hard_models_are_pruned_in_one_call(name):
    model, x = MODELS[name]()
    small = channels.prune(model, x, 0.4, tolerance=0.2)
    assert small.model(x).shape == model(x).shape
    assert small.report.parameters[1] < small.report.parameters[0]


def test_random_channels_come_from_the_seed():
    kept = lambda seed: (
        channels.prune(net, VECTORS, 0.5, params=params(), score="random", seed=seed)
        .kept["b:1"]
        .tolist()
    )
    assert kept(0) == kept(0) != kept(1)


def test_groups_are_a_structure_that_methods_train_and_shrink_cuts_exactly():
    model, x = MODELS["mlp"]()
    groups = channels.find(model, x)
    params = nnx.state(model, nnx.Param)
    at_once = [jaxsparse.prune(params, 0.5, structure=s)[1] for s in (groups, groups.structure())]
    jax.tree.map(np.testing.assert_array_equal, *at_once)
    tx = jaxsparse.magnitude(
        optax.sgd(0.05), sparsity=0.5, total_steps=6, end_step=3, structure=groups
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(6):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model))
    small = channels.shrink(model, groups, optimizer)
    assert {n: len(k) for n, k in small.kept.items()} == {
        "layers/0/kernel:1": 4,
        "layers/1/kernel:1": 3,
    }
    np.testing.assert_allclose(small.model(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sparsity=1.0), r"sparsity=1.0: must be in \[0, 1\)"),
        (dict(allocation="erk"), "allocation='erk': use 'uniform' or 'global'"),
        (dict(target="bytes"), "target='bytes': use"),
        (dict(steps=0), "steps=0: give an integer of at least 1"),
        (dict(tolerance=-1), "tolerance=-1: must not be negative"),
        (dict(score="wanda"), "score='wanda': use one of magnitude, taylor"),
        (dict(score="taylor"), "score='taylor' needs gradients"),
        (dict(reduction="product"), "reduction='product': use one of mean, sum, max"),
        (dict(normalization="l2"), "normalization='l2': use one of mean, lamp, none"),
        (dict(score="taylor", grads={"a": jnp.ones((5, 12))}), "no gradient of the shape of"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    options = dict(sparsity=0.5, params=params()) | options
    with pytest.raises(ValueError, match=message):
        channels.prune(net, VECTORS, **options)
