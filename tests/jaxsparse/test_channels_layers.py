"""Whole layers that go, held to models that were built without them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import channels
from jaxsparse.targets import stacked

X = jnp.linspace(-1, 1, 12).reshape(4, 3)


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.inside = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.inside(x))


class Deep(nnx.Module):
    def __init__(self, n, rngs):
        self.blocks = nnx.List([Residual(rngs) for _ in range(n)])
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(model, tx):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: (m(X) ** 2).sum())(model)
    optimizer.update(model, grads)
    return optimizer


def test_a_list_of_layers_and_the_optimizers_slots():
    model = Deep(4, nnx.Rngs(0))
    optimizer = trained(model, jaxsparse.static(optax.sgd(0.1, momentum=0.9), sparsity=0.5))
    small = channels.drop_layers(model, "blocks", [-1, 1], optimizer)
    assert small.kept == (0, 2) and len(model.blocks) == 4 and len(small.model.blocks) == 2
    expected = model.head(model.blocks[2](model.blocks[0](X)))
    np.testing.assert_allclose(small.model(X), expected, rtol=1e-6)
    sizes = [sum(x.size for x in jax.tree.leaves(nnx.state(m))) for m in (model, small.model)]
    assert small.parameters == tuple(sizes) == (4 * 12 + 8, 2 * 12 + 8)
    # The optimizer goes on, and each layer meets the slots and masks that it had.
    old = jax.tree.leaves(nnx.state(optimizer.opt_state))
    new = jax.tree.leaves(nnx.state(small.opt_state.opt_state))
    assert sum(x.size for x in new) < sum(x.size for x in old)
    masks = jaxsparse.get_masks(small.opt_state.opt_state)["blocks"]
    before = jaxsparse.get_masks(optimizer.opt_state)["blocks"]
    for now, then in enumerate(small.kept):
        mask, was = masks[now]["inside"]["kernel"], before[then]["inside"]["kernel"]
        np.testing.assert_array_equal(mask, was)
        kernel = small.model.blocks[now].inside.kernel[...]
        np.testing.assert_array_equal(kernel, model.blocks[then].inside.kernel[...])
    small.opt_state.update(small.model, nnx.grad(lambda m: (m(X) ** 2).sum())(small.model))
    assert np.isfinite(small.model(X)).all() and float(jnp.mean(kernel == 0)) > 0.4


def test_layers_stacked_by_vmap():
    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Residual(rngs)

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    model = Scanned(nnx.Rngs(0))
    tx = jaxsparse.static(
        optax.adam(1e-3), sparsity=0.5, pack_masks=True, targets=[("kernel", stacked(1))]
    )
    state = tx.init(nnx.state(model, nnx.Param))
    small = channels.drop_layers(model, "layers", [0, 3], state)
    kernels, biases = model.layers.inside.kernel[...], model.layers.inside.bias[...]
    x = X
    for i in (1, 2, 4):
        x = x + nnx.relu(x @ kernels[i] + biases[i])
    np.testing.assert_allclose(small.model(X), x, rtol=1e-5)
    inner = small.opt_state.inner[0]
    assert inner.mu["layers"]["inside"]["kernel"][...].shape == (3, 3, 3)
    assert inner.count.shape == ()
    masks = [jaxsparse.get_masks(s)["layers"]["inside"]["kernel"] for s in (state, small.opt_state)]
    np.testing.assert_array_equal(masks[1], np.asarray(masks[0])[[1, 2, 4]])


def test_numbered_layers_of_linen_are_renumbered():
    class Net(nn.Module):
        n: int

        @nn.compact
        def __call__(self, x):
            for i in range(self.n):
                x = x + nn.Dense(3, name=f"layers_{i}")(x)
            return nn.Dense(2)(x)

    params = Net(3).init(jax.random.key(0), X)
    small = channels.drop_layers(params, "params/layers", [1], optax.sgd(0.1, 0.9).init(params))
    assert sorted(small.model["params"]) == ["Dense_0", "layers_0", "layers_1"]
    kernels = [params["params"][f"layers_{i}"]["kernel"] for i in (0, 2)]
    x = X
    for kernel in kernels:  # biases are 0 at the start
        x = x + x @ kernel
    expected = x @ params["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(Net(2).apply(small.model, X), expected, rtol=1e-5)
    assert jax.tree.structure(small.opt_state[0].trace) == jax.tree.structure(small.model)


@pytest.mark.parametrize(
    "where, drop, state, message",
    [
        ("blocs", [0], None, r"where='blocs': no layers there .* there are 'blocks'"),
        ("head", [0], None, "where='head': no layers there"),
        ("blocks", [4], None, r"drop=\[4\]: must be different numbers of the 4 layers at 'blocks'"),
        ("blocks", [1, -3], None, r"drop=\[1, -3\]: must be different"),
        ("blocks", [], None, "one at least and not all"),
        ("blocks", [0, 1, 2, 3], None, "one at least and not all"),
        (
            "blocks",
            [0],
            {"mu": jnp.ones(3)},
            "opt_state: it holds no slots of 4 layers at 'blocks'",
        ),
    ],
)
def test_what_cannot_go_is_named(where, drop, state, message):
    with pytest.raises(ValueError, match=message):
        channels.drop_layers(Deep(4, nnx.Rngs(0)), where, drop, state)


def test_layers_at_two_places_need_a_longer_path():
    tree = {side: {"blocks": [jnp.ones(2), jnp.ones(3)]} for side in ("encoder", "decoder")}
    with pytest.raises(ValueError, match="layers are at 2 places; give a longer path"):
        channels.drop_layers(tree, "blocks", [0])
    small = channels.drop_layers(tree, "decoder/blocks", [0])
    assert [x.shape for x in jax.tree.leaves(small.model)] == [(3,), (2,), (3,)]


# What looks like layers and is none, and layers that are hard to see.


class Square(nnx.Module):
    """Kernels whose first axis is as long as those of their biases."""

    def __init__(self, rngs):
        self.dense, self.bare = (
            nnx.Linear(3, 3, rngs=rngs),
            nnx.Linear(3, 3, use_bias=False, rngs=rngs),
        )
        self.window = nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=rngs)
        self.embed, self.norm = nnx.Embed(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 3, 3, rngs=rngs)


@pytest.mark.parametrize("where", ["dense", "bare", "window", "embed", "norm", "attention"])
def test_one_square_layer_is_no_stack_of_its_rows(where):
    with pytest.raises(ValueError, match=f"where='{where}': no layers there"):
        channels.drop_layers(Square(nnx.Rngs(0)), where, [0])


def test_layers_between_functions_and_dropout_keep_their_slots():
    """Items that hold no arrays count as layers, whose numbers in a state then have gaps."""
    parts = [nnx.Linear(3, 3, rngs=nnx.Rngs(i)) if i % 2 == 0 else nnx.relu for i in range(6)]
    model = nnx.Sequential(*parts)
    optimizer = trained(model, jaxsparse.static(optax.sgd(0.1, momentum=0.9), sparsity=0.5))
    small = channels.drop_layers(model, "layers", [2, 3], optimizer)
    expected = parts[5](parts[4](parts[1](parts[0](X))))
    np.testing.assert_allclose(small.model(X), expected, rtol=1e-6)
    assert small.parameters == (36, 24)
    new = jaxsparse.get_masks(small.opt_state.opt_state)["layers"]
    old = jaxsparse.get_masks(optimizer.opt_state)["layers"]
    np.testing.assert_array_equal(new[2]["kernel"], old[4]["kernel"])
    small.opt_state.update(small.model, nnx.grad(lambda m: (m(X) ** 2).sum())(small.model))


def test_the_shortest_path_is_meant_where_another_ends_with_it():
    leaf = lambda i: {"w": jnp.full(2, float(i))}
    tree = {"blocks": [leaf(i) for i in range(3)], "encoder": {"blocks": [leaf(5), leaf(6)]}}
    state = optax.adam(0.1).init(tree)
    small = channels.drop_layers(tree, "blocks", [1], state)
    assert [x["w"][0] for x in small.model["blocks"]] == [0, 2]
    assert len(small.model["encoder"]["blocks"]) == 2
    assert jax.tree.structure(small.opt_state[0].mu) == jax.tree.structure(small.model)


class Normed(nn.Module):
    """Numbered layers with statistics beside their parameters."""

    n: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.n):
            x = x + nn.BatchNorm(use_running_average=True, name=f"norms_{i}")(x)
        return x


def test_statistics_of_linen_go_with_their_layers():
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), v.dtype),
        Normed(3).init(jax.random.key(0), X),
    )
    state = optax.adam(0.1).init(variables["params"])
    small = channels.drop_layers(variables, "params/norms", [0], state)
    for part in ("params", "batch_stats"):
        kept = [variables[part][f"norms_{i}"] for i in (1, 2)]
        found = [small.model[part][f"norms_{i}"] for i in (0, 1)]
        jax.tree.map(np.testing.assert_array_equal, found, kept)
    assert Normed(2).apply(small.model, X).shape == X.shape
    assert jax.tree.structure(small.opt_state[0].mu) == jax.tree.structure(small.model["params"])


def test_factored_moments_of_stacked_layers():
    params = {"layers": {"kernel": jnp.ones((3, 8, 6)), "bias": jnp.ones((3, 6))}}
    tx = optax.adafactor(0.1, min_dim_size_to_factor=5)
    small = channels.drop_layers(params, "layers", [1], tx.init(params))
    grads = jax.tree.map(jnp.ones_like, small.model)
    updates, _ = tx.update(grads, small.opt_state, small.model)
    assert updates["layers"]["kernel"].shape == (2, 8, 6)
    # Here the axis of the layers is one of the two that are factored.
    params = {"layers": {"kernel": jnp.ones((8, 3, 6)), "bias": jnp.ones((8, 6))}}
    with pytest.raises(ValueError, match=r"a slot of shape .*does not have the 8 layers"):
        channels.drop_layers(params, "layers", [1], tx.init(params))


def test_a_part_of_stacked_layers_is_not_cut_alone():
    tree = {
        "layers": {"up": {"kernel": jnp.ones((4, 3, 5))}, "down": {"kernel": jnp.ones((4, 5, 3))}}
    }
    with pytest.raises(ValueError, match="where='layers/up': no layers there.* there are 'layers'"):
        channels.drop_layers(tree, "layers/up", [0])
    assert channels.drop_layers(tree, "layers", [0]).parameters == (120, 90)


def test_layers_that_cannot_be_dropped_from_a_module_say_why():
    class Named(nnx.Module):
        def __init__(self, rngs):
            self.layer_0, self.layer_1 = (nnx.Linear(3, 3, rngs=rngs) for _ in range(2))

    with pytest.raises(ValueError, match="attributes of a module.* hold them in an nnx.List"):
        channels.drop_layers(Named(nnx.Rngs(0)), "layer", [0])
    twice = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no layers there"):
        channels.drop_layers(
            nnx.Sequential(twice, nnx.Linear(3, 3, rngs=nnx.Rngs(1)), twice), "layers", [0]
        )
    for drop in (1, [1.5], "1"):
        with pytest.raises(ValueError, match=r"drop=.*give the numbers of layers, as in \[2, 3\]"):
            channels.drop_layers(Deep(3, nnx.Rngs(0)), "blocks", drop)
    other = optax.adam(0.1).init(nnx.state(Deep(5, nnx.Rngs(0)), nnx.Param))
    with pytest.raises(
        ValueError, match="opt_state: it holds 5 layers at 'blocks' and the model 4"
    ):
        channels.drop_layers(Deep(4, nnx.Rngs(0)), "blocks", [0], other)
