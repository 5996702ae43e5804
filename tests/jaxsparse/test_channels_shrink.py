"""`channels.shrink`: the narrower model computes what the wide one does with zeros in place of its channels."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from channel_models import MODELS, VECTORS, NormMLP
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import channels
from jaxsparse.targets import named_leaves

# Groups whose zeros count in a statistic, or whose number scales the logits: removed is not zeroed.
NOT_INVARIANT = {
    "norm_mlp": {"first/kernel:1"},
    "group_norm": {"stem/kernel:3.1"},
    "windows": {"patches/kernel:3", "qkv/kernel:1.1"},
    "gqa": {"embed/embedding:1"},
    "attention": {"attention/query/kernel:2", "attention/value/kernel:2"},
    "vit": {
        *("patches/kernel:3", "layers/0/attention/query/kernel:1.1"),
        "layers/0/attention/value/kernel:1.1",
    },
    "transformer": {"embed/embedding:1"},
    "transformer_scanned": {"embed/embedding:1"},
}
# The model writes the number of groups as a number.
WRITTEN = {"grouped_shuffle": {"first/kernel:3.0"}}


def chosen(groups, seed=0, leave=()):
    """Random channels to keep of every group but those to leave, as many where groups are tied."""
    rng, keep = np.random.default_rng(seed), {}
    for name, group in groups.items():
        if name in keep or name in leave:
            continue
        count = int(rng.integers(1, group.width))
        for tied in (name, *group.tied):
            keep[tied] = rng.permutation(group.width)[:count].tolist()
    return keep


def zeroed(groups, tree, keep):
    """Zeros wherever a parameter belongs to a channel that goes."""
    leaves = dict(named_leaves(tree))
    for name, indices in keep.items():
        for member in groups[name].members:
            if member.path in groups.trained:
                gone = (member.channel >= 0) & ~np.isin(member.channel, indices)
                value = np.moveaxis(np.array(leaves[member.path]), member.axis, 0)
                value[gone] = 0
                leaves[member.path] = jnp.asarray(np.moveaxis(value, 0, member.axis))
    return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))


def serve(model, x):
    model = nnx.clone(model)
    model.eval()
    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state)(x))(state)


def zeroed_model(model, groups, keep):
    model = nnx.clone(model)
    nnx.update(model, zeroed(groups, nnx.state(model), keep))
    return model


def vectors(model):
    """Gives biases and statistics values that are not those of the start."""
    for i, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if path[-1] in ("bias", "scale", "mean", "var"):
            noise = jax.random.normal(jax.random.key(i), variable.shape)
            variable[...] = (
                0.3 * noise if path[-1] in ("bias", "mean") else 1 + 0.3 * jnp.abs(noise)
            )
    return model


@pytest.mark.parametrize("name", MODELS)
def test_removed_equals_zeroed_on_every_hard_model(name):
    model, x = MODELS[name]()
    model = vectors(model)
    groups = channels.find(model, x)
    leave = NOT_INVARIANT.get(name, set()) | WRITTEN.get(name, set())
    keep = chosen(groups, leave=leave)
    small = channels.shrink(model, groups, keep=keep, exact=False)
    assert type(small.model) is type(model)
    expected = serve(zeroed_model(model, groups, keep), x)
    np.testing.assert_allclose(serve(small.model, x), expected, atol=1e-5)
    assert small.report.zeroed < 1e-5
    again = channels.find(small.model, x)
    counts = {n: len(keep.get(n, range(g.width))) for n, g in groups.items()}
    assert again.parameters() == groups.parameters(counts) == small.report.parameters[1]
    assert again.flops() == groups.flops(counts) == small.report.flops[1]


@pytest.mark.parametrize("name", NOT_INVARIANT)
def test_what_is_not_zero_invariant_is_measured_and_refused(name):
    model, x = MODELS[name]()
    model = vectors(model)
    groups = channels.find(model, x)
    for group in NOT_INVARIANT[name]:
        half = np.arange(groups[group].width) % 2 == 0
        keep = {n: half for n in (group, *groups[group].tied)}
        small = channels.shrink(model, groups, keep=keep, exact=False)
        assert small.report.zeroed > 1e-5, group
        empty = zeroed_model(model, groups, {n: np.flatnonzero(half) for n in keep})
        with pytest.raises(ValueError, match="removing these channels changes the outputs by"):
            channels.shrink(empty, groups, keep=keep)


def test_the_difference_of_every_group_can_be_asked_for():
    model, x = MODELS["norm_mlp"]()
    found = channels.zero_invariance(vectors(model), channels.find(model, x))
    assert found["first/kernel:1"] > 1e-3
    assert found["second/kernel:1"] < 1e-6


def test_a_layer_norm_over_fewer_channels_is_that_of_a_model_built_narrow():
    model = vectors(NormMLP(nnx.Rngs(3)))
    groups = channels.find(model, VECTORS)
    at, then = np.array([0, 2, 3, 7]), np.array([1, 4])
    keep = {"first/kernel:1": at, "second/kernel:1": then}
    small = channels.shrink(model, groups, keep=keep, exact=False).model

    def by_hand(x):
        h = x @ model.first.kernel[:, at] + model.first.bias[at]
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
        h = nnx.relu(h * model.norm.scale[at] + model.norm.bias[at])
        h = nnx.relu(h @ model.second.kernel[np.ix_(at, then)] + model.second.bias[then])
        return h @ model.last.kernel[then] + model.last.bias

    np.testing.assert_allclose(small(VECTORS), by_hand(VECTORS), atol=1e-5)


def test_the_attributes_of_layers_follow():
    model, x = MODELS["attention"]()
    groups = channels.find(model, x)
    keep = {
        "enter/kernel:1": range(5),
        "attention/query/kernel:1": [0, 3],
        "attention/query/kernel:2": [1, 2],
        "attention/value/kernel:2": [0, 1],
    }
    small = channels.shrink(model, groups, keep=keep, exact=False).model
    got = small.attention
    assert (got.num_heads, got.head_dim, got.qkv_features) == (2, 2, 4)
    assert (got.in_features, got.out_features) == (5, 5)
    assert (got.query.out_features, got.out.in_features) == ((2, 2), (2, 2))
    assert model.attention.num_heads == 4 and model.enter.out_features == 8

    model, x = MODELS["mobilenet"]()
    small = channels.shrink(
        model, channels.find(model, x), keep={"expand/kernel:3": range(7)}, exact=False
    ).model
    depthwise = small.depthwise
    assert (depthwise.in_features, depthwise.out_features, depthwise.feature_group_count) == (
        7,
        7,
        7,
    )
    assert depthwise.kernel_shape == (3, 3, 1, 7)
    assert small.norm.num_features == 7 and small.norm.mean.shape == (7,)
    small.train()
    assert small(x).shape == (2, 3)  # batch statistics of the narrow model are its own


def test_attributes_of_ones_own_modules_are_found():
    model, x = MODELS["gqa"]()
    groups = channels.find(model, x)
    keep = {"query/kernel:1.0": [1], "query/kernel:1.1": [0]}
    small = channels.shrink(model, groups, keep=keep, exact=False)
    assert (small.model.heads, small.model.kv, small.model.size) == (1, 1, 4)
    assert {"GQA.heads = 1", "GQA.kv = 1"} <= set(small.report.edits)
    model, x = MODELS["vit"]()
    groups = channels.find(model, x)
    small = channels.shrink(
        model, groups, keep={"layers/0/attention/query/kernel:1.0": [2]}, exact=False
    )
    assert small.model.layers[0].attention.heads == 1


class Written(nnx.Module):
    """The number of heads is written where it is used."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.options = {"heads": 2}

    def __call__(self, x):
        h = self.up(x).reshape(x.shape[0], self.options["heads"], -1)
        return self.down(nnx.relu(h).reshape(x.shape[0], -1))


def test_a_number_that_cannot_be_found_is_told_with_the_remedy():
    model = Written(nnx.Rngs(0))
    groups = channels.find(model, VECTORS)
    assert groups.widths == {"up/kernel:1.0": 2, "up/kernel:1.1": 3}
    keep = {"up/kernel:1.0": [1]}
    with pytest.raises(ValueError, match=r"does not run .*cannot reshape .*edit=.*without"):
        channels.shrink(model, groups, keep=keep, exact=False)

    def edit(m):
        m.options = {"heads": 1}

    small = channels.shrink(model, groups, keep=keep, exact=False, edit=edit)
    assert small.model(VECTORS).shape == (4, 3)


def test_a_border_written_as_a_number_is_noticed():
    def net(p, x):
        h = x @ p["a"]
        return h[:, :2] @ p["left"] + h[:, 2:] @ p["right"]

    shapes = {"a": (5, 6), "left": (2, 3), "right": (4, 3)}
    params = {k: jnp.ones(s) for k, s in shapes.items()}
    groups = channels.find(net, params, VECTORS)
    small = channels.shrink(net, groups, keep={"a:1.0": [1]}, exact=False)
    assert small.report.difference is None and small.sizes == {"a": (5, 5), "left": (1, 3)}


def step(model, x, optimizer):
    loss = lambda m: jnp.mean((m(x) - 1.0) ** 2)
    optimizer.update(model, nnx.grad(loss)(model))


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        optax.MultiSteps(optax.adam(1e-2), 2),
        jaxsparse.static(optax.adam(1e-2), sparsity=0.5),
    ],
)
def test_an_optimizer_goes_on_as_the_masked_network_would(tx):
    """Narrow and wide with zeros take the same step, moments and all."""
    model, x = MODELS["mlp"]()
    groups = channels.find(model, x)
    wide = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        step(model, x, wide)
    keep = chosen(groups)
    small = channels.shrink(model, groups, wide, keep=keep, exact=False)
    assert isinstance(small.opt_state, nnx.Optimizer)
    zero = zeroed_model(model, groups, keep)
    before, after = (dict(named_leaves(nnx.state(o))) for o in (wide, small.opt_state))
    assert before.keys() == after.keys()
    for path, slot in after.items():
        owner = next((p for p in small.sizes if path.endswith(p)), None)
        assert slot.shape == (small.sizes[owner] if owner and slot.ndim else before[path].shape)
    step(zero, x, wide)
    step(small.model, x, small.opt_state)
    for name, indices in small.kept.items():
        for m in (m for m in groups[name].members if m.side == "out"):
            got = dict(named_leaves(nnx.state(small.model)))[m.path]
            want = jnp.take(dict(named_leaves(nnx.state(zero)))[m.path], indices, axis=m.axis)
            if m.path == "layers/0/kernel":
                np.testing.assert_allclose(got, want, atol=1e-6)


def test_packed_masks_and_factored_moments_are_cut():
    params = {"a": jnp.ones((5, 16)), "b": jnp.ones((16, 3))}
    net = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    groups = channels.find(net, params, VECTORS)
    tx = jaxsparse.static(optax.adam(0.1), sparsity=0.5, pack_masks=True)
    state = tx.init(params)
    masks = jaxsparse.get_masks(state)
    small = channels.shrink(net, groups, state, keep={"a:1": [3, 4, 9]}, exact=False)
    assert (
        jaxsparse.get_masks(small.opt_state)["b"].tolist()
        == masks["b"][np.array([3, 4, 9])].tolist()
    )
    tx.update(small.params, small.opt_state, small.params)

    state = optax.adafactor(0.1, min_dim_size_to_factor=2).init(params)
    small = channels.shrink(net, groups, state, keep={"a:1": [3, 4, 9]}, exact=False)
    rows = {
        x.shape
        for path, x in named_leaves(small.opt_state)
        if path.endswith("v_row/a") or path.endswith("v_col/a")
    }
    assert rows == {(5,), (3,)}
    square = {"a": jnp.ones((5, 5)), "b": jnp.ones((5, 3))}
    groups = channels.find(net, square, VECTORS)
    state = optax.adafactor(0.1, min_dim_size_to_factor=2).init(square)
    with pytest.raises(
        ValueError,
        match=r"slot '.*a' of shape \(5,\).*could be either axis.*tx.init\(small.params\)",
    ):
        channels.shrink(net, groups, state, keep={"a:1": [3]}, exact=False)


def test_what_masks_removed_is_removed():
    model, x = MODELS["mlp"]()
    groups = channels.find(model, x)
    tx = jaxsparse.magnitude(
        optax.sgd(0.1), sparsity=0.5, total_steps=4, end_step=1, structure="channel",
        targets="layers/[01]/kernel",
    )  # fmt: skip
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(4):
        step(model, x, optimizer)
    masks = jaxsparse.get_masks(optimizer)
    alive = {i: np.asarray(masks["layers"][i]["kernel"]).any(0) for i in (0, 1)}
    assert not all(m.all() for m in alive.values())
    for layer in model.layers[:-1]:
        layer.bias[...] = jnp.zeros_like(layer.bias[...])
    small = channels.shrink(model, groups, optimizer)
    for i in (0, 1):
        assert small.kept[f"layers/{i}/kernel:1"].tolist() == np.flatnonzero(alive[i]).tolist()
    assert small.report.difference < 1e-5
    np.testing.assert_allclose(small.model(x), model(x), atol=1e-5)
    model.layers[0].bias[...] = jnp.ones_like(model.layers[0].bias[...])
    with pytest.raises(ValueError, match="exact: removing these channels changes the outputs"):
        channels.shrink(model, groups, optimizer)


def test_without_masks_zeros_are_removed_and_nothing_else():
    model, x = MODELS["resnet"]()
    groups = channels.find(model, x)
    assert channels.shrink(model, groups).sizes == {}
    keep = chosen(groups)
    small = channels.shrink(channels.zero(model, groups, keep), groups)
    assert {n: v.tolist() for n, v in small.kept.items()} == {n: sorted(v) for n, v in keep.items()}
    # A channel that nothing reads is gone, too, whatever makes it.
    model, x = MODELS["mlp"]()
    model.layers[1].kernel[...] = model.layers[1].kernel[...].at[2].set(0.0)
    groups = channels.find(model, x)
    small = channels.shrink(model, groups)
    assert small.kept["layers/0/kernel:1"].tolist() == [0, 1, 3, 4, 5, 6]


def test_widths_are_multiples_and_at_least_one_channel_stays():
    params = {"a": jnp.ones((5, 20)), "b": jnp.ones((20, 3))}
    net = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    groups = channels.find(net, params, VECTORS)
    params["a"] = params["a"].at[:, 7].set(5.0)
    width = lambda keep, r: channels.shrink(
        net, groups, params=params, keep={"a:1": keep}, exact=False, round_to=r
    )
    assert width([0, 1, 2], 8).sizes["a"] == (5, 8)
    assert 7 in width([0, 1, 2], 8).kept["a:1"]  # of those that come back, the largest first
    assert width(range(17), 8).sizes == {}  # 24 are more than there are
    nothing = jax.tree.map(jnp.zeros_like, params)
    assert channels.shrink(net, groups, params=nothing).sizes["a"] == (5, 1)
    assert channels.shrink(net, groups, params=nothing, round_to=4).sizes["a"] == (5, 4)
    with pytest.raises(ValueError, match="round_to=0: give an integer of at least 1"):
        width([0], 0)


def test_halves_that_must_be_equal_are_kept_equal():
    model, x = MODELS["shufflenet"]()
    groups = channels.find(model, x)
    small = channels.shrink(model, groups, keep={"stem/kernel:3.0": [0]}, exact=False)
    assert small.sizes == {}  # its partners stay whole, and so it does
    small = channels.shrink(
        model, groups, keep={f"stem/kernel:3.{i}": [1] for i in range(4)}, exact=False
    )
    assert small.model.stem.out_features == 4


class Net(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(width)(x)))
        return nn.Dense(3)(x)


def test_linen_modules_are_built_again_with_the_sizes_of_the_report():
    net = Net((8, 6))
    variables = net.init(jax.random.key(0), VECTORS)
    groups = channels.find(net, variables, VECTORS)
    state = optax.adam(0.1).init(variables["params"])
    keep = chosen(groups)
    small = channels.shrink(net, groups, state, keep=keep, exact=False)
    assert small.report.difference is None and "build the module again" in str(small.report)
    widths = [small.sizes[f"params/Dense_{i}/kernel"][1] for i in (0, 1)]
    narrow = Net(tuple(widths))
    np.testing.assert_allclose(
        narrow.apply(small.params, VECTORS),
        net.apply(zeroed(groups, variables, keep), VECTORS),
        atol=1e-5,
    )
    assert jax.tree.map(jnp.shape, small.opt_state[0].mu) == jax.tree.map(
        jnp.shape, small.params["params"]
    )


def test_equinox_modules_and_functions_run_narrower():
    mlp = eqx.nn.MLP(5, 3, width_size=7, depth=2, key=jax.random.key(0))
    groups = channels.find(mlp, VECTORS[0])
    keep = chosen(groups)
    small = channels.shrink(mlp, groups, keep=keep, exact=False)
    assert isinstance(small.model, eqx.nn.MLP)
    assert small.model.layers[1].in_features == len(keep["layers/0/weight:0"])
    assert mlp.layers[1].in_features == 7
    expected = jax.vmap(zeroed_tree(groups, mlp, keep))(VECTORS)
    np.testing.assert_allclose(jax.vmap(small.model)(VECTORS), expected, atol=1e-5)


def zeroed_tree(groups, module, keep):
    arrays, rest = eqx.partition(module, eqx.is_array)
    return eqx.combine(zeroed(groups, arrays, keep), rest)


def test_the_report_says_what_changed():
    model, x = MODELS["mlp"]()
    groups = channels.find(model, x)
    small = channels.shrink(model, groups, keep={"layers/0/kernel:1": [6, 0]}, exact=False)
    assert small.kept["layers/0/kernel:1"].tolist() == [0, 6]
    text = str(small.report)
    assert (
        f"parameters {groups.parameters()} -> {channels.find(small.model, x).parameters()}" in text
    )
    assert "layers/0/kernel:1: 7 -> 2" in text and "Linear.out_features = 2" in text
    assert "layers/2/kernel:1 (10): an output of the model" in text
    assert small.sizes == {
        "layers/0/kernel": (12, 2),
        "layers/0/bias": (2,),
        "layers/1/kernel": (2, 6),
    }


def test_steps_do_not_compound():
    """Six steps of one channel each leave six fewer, since each names what it keeps."""
    model, x = MODELS["mlp"]()
    for left in (6, 5, 4, 3, 2, 1):
        groups = channels.find(model, x)
        model = channels.shrink(
            model, groups, keep={"layers/0/kernel:1": range(left)}, exact=False
        ).model
        assert model.layers[0].out_features == left


def test_bad_arguments_are_refused():
    model, x = MODELS["mlp"]()
    groups = channels.find(model, x)
    other = MODELS["mlp"]()[0]
    other.layers[0] = nnx.Linear(12, 9, rngs=nnx.Rngs(0))
    shrink = lambda model=model, *args, **options: channels.shrink(model, groups, *args, **options)
    with pytest.raises(
        ValueError, match=r"changed since find: 'layers/0/bias' had shape \(7,\) and has \(9,\)"
    ):
        shrink(other)
    with pytest.raises(ValueError, match="no group is called 'nosuch'; the groups are layers/0"):
        shrink(keep={"nosuch": [0]})
    with pytest.raises(ValueError, match="leaves no channel; keep at least one"):
        shrink(keep={"layers/0/kernel:1": []})
    with pytest.raises(ValueError, match=r"a mask of shape \(3,\) for 7 channels"):
        shrink(keep={"layers/0/kernel:1": [True, False, True]})
    with pytest.raises(ValueError, match=r"indices must lie in 0..6, got \[7\]"):
        shrink(keep={"layers/0/kernel:1": [7]})
    with pytest.raises(ValueError, match="give a mask or a list of indices"):
        shrink(keep={"layers/0/kernel:1": [0.5]})
    with pytest.raises(ValueError, match="give masks or indices by the name of the group"):
        shrink(keep=[0, 1])
    with pytest.raises(ValueError, match="give what channels.find returned, not dict"):
        channels.shrink(model, {})
    state = optax.adam(0.1).init({"w": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="holds no slot of the model's parameters"):
        shrink(model, state)
    state = optax.adam(0.1).init(nnx.state(other, nnx.Param))
    with pytest.raises(
        ValueError, match=r"belongs to a parameter of shape \(7,\), and is of another model"
    ):
        shrink(model, state)


def program(draw):
    """A random network of images, its parameters, and as many parts as drawn; widths come from parameters."""
    params, steps, widths = {}, [], [3]

    def weights(*shape):
        name = f"w{len(params)}"
        params[name] = 0.5 * jax.random.normal(jax.random.key(len(params)), shape)
        return name

    def conv(x, w, groups=1):
        spec = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
        )

    values = [0]  # places of arrays in the list that a run makes, with their widths

    def push(step, width):
        steps.append(step)
        widths.append(width)
        values.append(len(steps))

    w, width = weights(1, 1, 3, 6), 6
    push(lambda p, v, w=w: conv(v[0], p[w]), width)
    for _ in range(draw(st.integers(2, 6))):
        i = draw(st.sampled_from(values[1:]))
        n = widths[i]
        kind = draw(
            st.sampled_from(
                ["conv", "depthwise", "norm", "add", "concat", "glu", "shuffle", "gate", "dense"]
            )
        )
        if kind == "conv":
            width = draw(st.sampled_from([4, 6]))
            w, b = weights(3, 3, n, width), weights(width)
            push(lambda p, v, i=i, w=w, b=b: jax.nn.sigmoid(conv(v[i], p[w]) + p[b]), width)
        elif kind == "depthwise":
            w = weights(3, 3, 1, n)
            push(lambda p, v, i=i, w=w: jnp.tanh(conv(v[i], p[w], v[i].shape[-1])), n)
        elif kind == "norm":
            s, b = weights(n), weights(n)
            push(lambda p, v, i=i, s=s, b=b: jax.nn.relu(v[i] * p[s] + p[b]), n)
        elif kind == "add":
            j = draw(st.sampled_from([k for k in values[1:] if widths[k] == n]))
            push(lambda p, v, i=i, j=j: v[i] + v[j], n)
        elif kind == "concat":
            j = draw(st.sampled_from(values[1:]))
            push(lambda p, v, i=i, j=j: jnp.concatenate([v[i], v[j]], -1), n + widths[j])
        elif kind == "glu" and n % 2 == 0:
            push(lambda p, v, i=i: jnp.multiply(*jnp.split(v[i], 2, -1)), n // 2)
        elif kind == "shuffle" and n % 2 == 0:

            def shuffle(p, v, i=i):
                x = v[i]
                halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
                return jnp.swapaxes(halves, -1, -2).reshape(x.shape)

            push(shuffle, n)
        elif kind == "gate":
            a, b = weights(n, 3), weights(3, n)

            def gate(p, v, i=i, a=a, b=b):
                pooled = v[i].mean((1, 2))
                return v[i] * jax.nn.sigmoid(jax.nn.relu(pooled @ p[a]) @ p[b])[:, None, None]

            push(gate, n)
        elif kind == "dense":
            w = weights(n, 5)
            push(lambda p, v, i=i, w=w: jax.nn.relu(v[i] @ p[w]), 5)
    last = len(steps)
    flat = draw(st.booleans())
    w = weights(widths[last] * (9 if flat else 1), 2)

    def net(p, x):
        v = [x]
        for step in steps:
            v.append(step(p, v))
        y = v[-1].reshape(x.shape[0], -1) if flat else v[-1].mean((1, 2))
        return y @ p[w]

    return net, params


@settings(max_examples=8)
@given(st.data())
def test_removed_equals_zeroed_on_random_graphs(data):
    net, params = program(data.draw)
    x = jax.random.normal(jax.random.key(9), (2, 3, 3, 3))
    groups = channels.find(net, params, x)
    # Factors that the graph writes as the number two stay.
    whole = {n for n, g in groups.items() if g.width == 2}
    whole |= {n for n, g in groups.items() if set(g.tied) & whole}
    keep = chosen(groups, data.draw(st.integers(0, 99)), leave=whole)
    small = channels.shrink(net, groups, keep=keep, exact=False)
    assert small.report.difference is not None
    np.testing.assert_allclose(
        net(small.params, x), net(zeroed(groups, params, keep), x), atol=1e-5
    )
