"""`channels.find`: the groups of models whose coupling was worked out by hand."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channel_models import MODELS, VECTORS
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxsparse import channels
from jaxsparse.channels.union import Expr, Labels, Reason

WIDTHS = {
    "norm_mlp": {"first/kernel:1": 8, "second/kernel:1": 6},
    "densenet": {"stem/kernel:3": 5, "convs/0/kernel:3": 4, "convs/1/kernel:3": 4},
    "shufflenet": {
        **{f"stem/kernel:3.{i}": 2 for i in range(4)},
        "blocks/0/0/kernel:3": 4,
        "blocks/1/0/kernel:3": 4,
    },
    "grouped_shuffle": {
        "first/kernel:3.0": 2,
        "first/kernel:3.1": 4,
        "grouped/kernel:3.1": 4,
        "again/kernel:3.1": 3,
    },
    "inception": {
        "narrow/kernel:3": 4,
        "reduce/kernel:3": 5,
        "wide/kernel:3": 6,
        "pooled/kernel:3": 3,
        "mix/kernel:3": 7,
    },
    "unet": {"enter/kernel:3": 4, "down/kernel:3": 6, "up/kernel:3": 5, "merge/kernel:3": 4},
    "mobilenet": {"stem/kernel:3": 4, "expand/kernel:3": 12, "squeeze/kernel:1": 3},
    "group_norm": {"stem/kernel:3.0": 2, "stem/kernel:3.1": 4, "conv/kernel:3": 6},
    "windows": {
        "patches/kernel:3": 8,
        "qkv/kernel:1.0": 2,
        "qkv/kernel:1.1": 4,
        "up/kernel:1": 12,
    },
    "gqa": {
        "embed/embedding:1": 8,
        "query/kernel:1.0": 2,
        "query/kernel:1.1": 2,
        "mlp/gate_up/kernel:1": 6,
    },
    "experts": {"enter/kernel:1": 6, "up:2": 5},
    "scanned": {"enter/kernel:1": 6, "layers/up/kernel:2": 9},
    "attention": {
        "enter/kernel:1": 8,
        "attention/query/kernel:1": 4,
        "attention/query/kernel:2": 3,
        "attention/value/kernel:2": 3,
    },
    "recurrent": {"rnn/cell/ii/kernel:1": 7},
    "mlp": {"layers/0/kernel:1": 7, "layers/1/kernel:1": 6},
    "cnn": {"convs/0/kernel:3": 5, "convs/1/kernel:3": 6},
    "resnet": {
        "stem/kernel:3": 4,
        "blocks/0/convs/0/kernel:3": 4,
        "blocks/1/convs/0/kernel:3": 8,
        "blocks/1/convs/1/kernel:3": 8,
        "blocks/2/convs/0/kernel:3": 16,
        "blocks/2/convs/1/kernel:3": 16,
    },
    "vit": {
        "patches/kernel:3": 12,
        "layers/0/attention/query/kernel:1.0": 3,
        "layers/0/attention/query/kernel:1.1": 4,
        "layers/0/attention/value/kernel:1.1": 4,
        "layers/0/up/kernel:1": 48,
    },
    "transformer": {
        "embed/embedding:1": 16,
        "layers/0/attention/query/kernel:1.0": 2,
        "layers/0/up/kernel:1": 64,
    },
    "transformer_scanned": {
        "embed/embedding:1": 16,
        "layers/attention/query/kernel:2.0": 2,
        "layers/up/kernel:2": 64,
    },
}


def places(group, side=None):
    """The leaves and axes of a group, of one side of it."""
    return {f"{m.path}:{m.axis}" for m in group.members if side in (None, m.side)}


def positions(group, path, axis, channel):
    """Where one channel lies in an axis of a leaf."""
    found = [m.channel == channel for m in group.members if (m.path, m.axis) == (path, axis)]
    return np.flatnonzero(np.logical_or.reduce(found)).tolist()


def why(groups, name):
    (fixed,) = {str(f.why) for f in groups.fixed if f.name == name}
    return fixed


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_of_hard_models_are_those_worked_out_by_hand(name):
    model, x = MODELS[name]()
    assert channels.find(model, x).widths == WIDTHS[name]


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm()(nn.Dense(8)(x)))
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(3)(x)


GOLDEN = {
    "params/Dense_0/kernel:1": {
        *("params/Dense_0/kernel:1", "params/Dense_0/bias:0", "params/Dense_1/kernel:0"),
        *("params/LayerNorm_0/scale:0", "params/LayerNorm_0/bias:0"),
    },
    "params/Dense_1/kernel:1": {
        "params/Dense_1/kernel:1",
        "params/Dense_1/bias:0",
        "params/Dense_2/kernel:0",
    },
}


def test_the_golden_groups_of_a_linen_mlp_with_layer_norm():
    net = LinenMLP()
    params = net.init(jax.random.key(0), VECTORS)
    for groups in (channels.find(net, params, VECTORS), channels.find(net.apply, params, VECTORS)):
        assert {name: places(group) for name, group in groups.items()} == GOLDEN
        norm, plain = groups.values()
        assert norm.summed and "LinenMLP.__call__" in norm.summed[0]
        assert plain.summed == ()
        assert why(groups, "params/Dense_2/kernel:1") == "an output of the model"
        assert why(groups, "params/Dense_0/kernel:0") == "an input of the model"


def test_the_golden_groups_of_attention_with_four_heads():
    model, x = MODELS["attention"]()
    groups = channels.find(model, x)
    at = lambda names: {f"attention/{name}" for name in names.split()}
    heads, size, values = (
        groups[f"attention/{n}"] for n in ("query/kernel:1", "query/kernel:2", "value/kernel:2")
    )
    assert places(heads, "out") == at("query/kernel:1 key/kernel:1 value/kernel:1")
    assert places(heads, "with") == at("query/bias:0 key/bias:0 value/bias:0")
    assert places(heads, "in") == at("out/kernel:0")
    assert places(size) == at("query/kernel:2 key/kernel:2 query/bias:1 key/bias:1")
    assert places(values) == at("value/kernel:2 value/bias:1 out/kernel:1")


def test_all_that_writes_a_residual_sum_is_one_group():
    model, x = MODELS["resnet"]()
    groups = channels.find(model, x)
    stream = groups["stem/kernel:3"]
    assert places(stream, "out") == {"stem/kernel:3", "blocks/0/convs/1/kernel:3"}
    assert places(stream, "in") == {
        *("blocks/0/convs/0/kernel:2", "blocks/1/convs/0/kernel:2", "blocks/1/shortcut/kernel:2")
    }
    assert "stem_norm/mean:0" in places(stream, "with")


def test_a_grouped_query_model_loses_whole_groups_of_heads():
    model, x = MODELS["gqa"]()
    kv = channels.find(model, x)["query/kernel:1.0"]
    assert places(kv, "out") == {"query/kernel:1", "key/kernel:1", "value/kernel:1"}
    assert positions(kv, "query/kernel", 1, 1) == list(range(8, 16))  # two heads of four
    assert positions(kv, "key/kernel", 1, 1) == list(range(4, 8))
    assert positions(kv, "out/kernel", 0, 1) == list(range(8, 16))
    (rotary,) = [f for f in channels.find(model, x).fixed if f.name == "query/kernel:1.2"]
    assert "iota" in rotary.why.what and "(GQA.rotate)" in rotary.why.source


def test_halves_of_one_product_that_are_multiplied_are_one_group():
    model, x = MODELS["gqa"]()
    gated = channels.find(model, x)["mlp/gate_up/kernel:1"]
    assert positions(gated, "mlp/gate_up/kernel", 1, 2) == [2, 8]
    assert positions(gated, "mlp/down/kernel", 0, 2) == [2]


def test_a_concatenation_keeps_the_places_of_its_parts():
    def net(p, x):
        return jax.nn.relu(jnp.concatenate([x @ p["a"], x @ p["b"]], -1)) @ p["out"]

    params = {"a": jnp.ones((5, 4)), "b": jnp.ones((5, 3)), "out": jnp.ones((7, 2))}
    groups = channels.find(net, params, VECTORS)
    assert groups.widths == {"a:1": 4, "b:1": 3}
    assert positions(groups["b:1"], "out", 0, 1) == [5]
    assert positions(groups["a:1"], "out", 0, 3) == [3]


def test_a_concatenation_of_an_array_with_itself_takes_both_places():
    def net(p, x):
        h = x @ p["a"]
        return jnp.concatenate([h, h], -1) @ p["out"]

    groups = channels.find(net, {"a": jnp.ones((5, 3)), "out": jnp.ones((6, 2))}, VECTORS)
    assert positions(groups["a:1"], "out", 0, 1) == [1, 4]


def test_arrays_that_are_stacked_lose_the_same_channels_and_none_of_their_own():
    def net(p, x):
        h = jnp.stack([x @ p["a"], x @ p["b"]], 1)  # [batch, 2, channels]
        first, second = jnp.unstack(jax.nn.relu(h), axis=1)
        return jnp.concatenate([(h.sum(1) + first) @ p["out"], second @ p["out"]], -1)

    params = {"a": jnp.ones((5, 4)), "b": jnp.ones((5, 4)), "out": jnp.ones((4, 2))}
    groups = channels.find(net, params, VECTORS)
    assert groups.widths == {"a:1": 4}
    assert places(groups["a:1"], "out") == {"a:1", "b:1"}
    assert places(groups["a:1"], "in") == {"out:0"}


def test_slices_after_a_concatenation_find_their_parts_again():
    model, x = MODELS["densenet"]()
    groups = channels.find(model, x)
    assert positions(groups["stem/kernel:3"], "head/kernel", 0, 2) == [2, 15]
    assert positions(groups["convs/1/kernel:3"], "head/kernel", 0, 0) == [9]


def test_a_channel_that_is_flattened_takes_all_its_flat_positions():
    model, x = MODELS["cnn"]()
    group = channels.find(model, x)["convs/1/kernel:3"]
    assert positions(group, "head/kernel", 0, 2) == [2, 8, 14, 20]  # 2 x 2 places of 6 channels

    def channels_first(p, x):
        h = jnp.einsum("bhwc,co->bohw", x, p["a"])
        return h.reshape(x.shape[0], -1) @ p["out"]

    params = {"a": jnp.ones((3, 4)), "out": jnp.ones((4 * 9, 2))}
    group = channels.find(channels_first, params, jnp.ones((2, 3, 3, 3)))["a:1"]
    assert positions(group, "out", 0, 2) == list(range(18, 27))


def test_a_convolution_with_one_output_is_not_depthwise():
    model, x = MODELS["mobilenet"]()
    groups = channels.find(model, x)
    assert "one/kernel:2" in places(groups["stem/kernel:3"], "in")
    assert not any(
        m.path == "one/kernel" and m.axis == 3 for g in groups.values() for m in g.members
    )
    assert "depthwise/kernel:3" in places(groups["expand/kernel:3"], "out")


def test_halves_that_a_model_cuts_keep_as_many_channels():
    model, x = MODELS["shufflenet"]()
    groups = channels.find(model, x)
    assert set(groups["stem/kernel:3.0"].tied) == {f"stem/kernel:3.{i}" for i in (1, 2, 3)}

    def net(p, x):
        a, b = jnp.split(x @ p["first"], 2, -1)
        return a @ p["left"] + b @ p["right"]

    shape = {"first": (5, 6), "left": (3, 2), "right": (3, 2)}
    groups = channels.find(net, {k: jnp.ones(s) for k, s in shape.items()}, VECTORS)
    assert {name: g.tied for name, g in groups.items()} == {
        "first:1.0": ("first:1.1",),
        "first:1.1": ("first:1.0",),
    }


def test_what_a_loop_a_branch_or_a_call_holds_is_seen():
    @jax.custom_vjp
    def own(x):
        return jnp.sin(x)

    own.defvjp(lambda x: (own(x), x), lambda x, g: (g,))

    def net(p, x):
        h = jax.jit(lambda x: x @ p["a"])(x)
        h = jax.checkpoint(jax.nn.silu)(jax.nn.relu(own(h)))
        h = jax.lax.cond(jnp.sum(x) > 0, lambda h: h * p["yes"], lambda h: h + p["no"], h)
        h = jax.lax.fori_loop(0, 3, lambda i, h: h * p["loop"], h)
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
        return jax.vmap(lambda row: row @ p["out"])(h)

    shapes = {"a": (5, 4), "yes": (4,), "no": (4,), "loop": (4,), "stack": (3, 4, 4), "out": (4, 2)}
    groups = channels.find(net, {k: jnp.ones(s) for k, s in shapes.items()}, VECTORS)
    assert groups.widths == {"a:1": 4}
    assert places(groups["a:1"]) == {
        "a:1",
        "yes:0",
        "no:0",
        "loop:0",
        "stack:1",
        "stack:2",
        "out:0",
    }


def test_a_vmapped_stack_of_layers_is_found_with_its_branches():
    def net(p, x):
        branch = lambda w, v: jax.nn.relu(x @ w) @ v
        return jnp.sum(jax.vmap(branch)(p["in"], p["out"]), 0)

    groups = channels.find(net, {"in": jnp.ones((6, 5, 4)), "out": jnp.ones((6, 4, 3))}, VECTORS)
    assert {name: places(g) for name, g in groups.items()} == {
        "in:0": {"in:0", "out:0"},
        "in:2": {"in:2", "out:1"},
    }


@pytest.mark.parametrize(
    "what, step",
    [
        ("fft", lambda h: jnp.fft.fft(h).real),
        ("cumsum", lambda h: jnp.cumsum(h, -1)),
        ("sort", lambda h: jnp.sort(h, -1)),
        ("argmax", lambda h: h * jnp.argmax(h, -1, keepdims=True)),
        ("iota", lambda h: h * jnp.arange(h.shape[-1])),
        ("rev", lambda h: h[..., ::-1]),
        ("constant", lambda h: h * np.linspace(0, 1, 4)),
        ("gather", lambda h: h[..., jnp.array([0, 2, 1, 3])]),
        ("pad", lambda h: jnp.pad(h, ((0, 0), (2, 0)))[..., 2:]),
        ("scatter", lambda h: h.at[:, 1].set(0.0)),
    ],
)
def test_channels_whose_number_means_something_stay_and_the_report_says_why(what, step):
    def net(p, x):
        return step(x @ p["a"]) @ p["out"]

    groups = channels.find(net, {"a": jnp.ones((5, 4)), "out": jnp.ones((4, 2))}, VECTORS)
    assert groups.widths == {}
    reason = why(groups, "a:1")
    assert what in reason
    assert what == "constant" or "test_channels_find.py" in reason
    assert reason in str(groups)


def test_tied_embeddings_hold_the_vocabulary_and_leave_the_width():
    model, x = MODELS["gqa"]()
    groups = channels.find(model, x)
    assert "gather" in why(groups, "embed/embedding:0")
    assert "mlp/down/kernel:1" in places(groups["embed/embedding:1"], "out")


def test_a_router_that_ranks_experts_keeps_all_of_them():
    model, x = MODELS["experts"]()
    groups = channels.find(model, x)
    assert "top_k" in why(groups, "router/kernel:1")
    assert places(groups["up:2"]) == {"up:2", "down:1"}


def test_a_leaf_that_the_trace_does_not_use_stays():
    params = {"a": jnp.ones((5, 4)), "out": jnp.ones((4, 2)), "idle": jnp.ones((4, 4))}
    groups = channels.find(lambda p, x: x @ p["a"] @ p["out"], params, VECTORS)
    assert groups.widths == {"a:1": 4}
    assert "does not use" in why(groups, "idle:0")


def test_equal_sizes_alone_unite_nothing():
    """Batch, inputs and all widths are 4."""
    params = {k: jnp.ones((4, 4)) for k in ("a", "b", "c")}
    net = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    groups = channels.find(net, params, jnp.ones((4, 4)))
    assert {n: places(g) for n, g in groups.items()} == {
        "a:1": {"a:1", "b:0"},
        "b:1": {"b:1", "c:0"},
    }


def test_equinox_models_are_found_as_functions_and_as_modules():
    mlp = eqx.nn.MLP(5, 3, width_size=7, depth=2, key=jax.random.key(0))
    x = VECTORS[0]
    expected = {"layers/0/weight:0": 7, "layers/1/weight:0": 7}
    assert channels.find(mlp, x).widths == expected
    assert channels.find(lambda m, x: jax.vmap(m)(x), mlp, VECTORS).widths == expected


def test_shapes_suffice_as_inputs_and_parameters():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    groups = channels.find(
        lambda p, x: x @ p["a"] @ p["b"], {"a": shape(5, 4), "b": shape(4, 2)}, shape(3, 5)
    )
    assert groups.widths == {"a:1": 4}


def test_training_mode_is_not_traced():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(5, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
            self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(self.norm(self.first(x))))

    group = channels.find(Net(nnx.Rngs(0)), VECTORS)["first/kernel:1"]
    assert {"norm/mean:0", "norm/var:0"} <= places(group, "with")
    assert group.summed == ()


def test_parameters_and_operations_are_counted_for_any_widths():
    model, x = MODELS["mlp"]()
    groups = channels.find(model, x)
    assert groups.parameters() == 12 * 7 + 7 + 7 * 6 + 6 + 6 * 10 + 10
    assert groups.flops() == 2 * 2 * (12 * 7 + 7 * 6 + 6 * 10)
    counts = {"layers/0/kernel:1": 3, "layers/1/kernel:1": 2}
    assert groups.parameters(counts) == 12 * 3 + 3 + 3 * 2 + 2 + 2 * 10 + 10
    assert groups.flops(counts) == 2 * 2 * (12 * 3 + 3 * 2 + 2 * 10)


def test_groups_can_be_chosen_by_name():
    model, x = MODELS["mlp"]()
    groups = channels.find(model, x)
    assert list(groups.matching("layers/0")) == ["layers/0/kernel:1"]
    assert list(groups.without("layers/0")) == ["layers/1/kernel:1"]
    assert why(groups.without("layers/0"), "layers/0/kernel:1") == "left out on request"
    with pytest.raises(ValueError, match="no group is called 'nosuch'"):
        groups.without("nosuch")
    with pytest.raises(ValueError, match="no group is called 'nosuch'"):
        groups.matching("nosuch")


def test_bad_models_and_inputs_are_refused():
    model, _ = MODELS["mlp"]()
    with pytest.raises(ValueError, match=r"does not run on the example inputs of shape \(2, 3\)"):
        channels.find(model, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="a tree of parameters needs its function"):
        channels.find({"a": jnp.ones(3)}, VECTORS)
    with pytest.raises(ValueError, match="str is no Flax module"):
        channels.find("model", VECTORS)
    with pytest.raises(ValueError, match="a function needs its parameters"):
        channels.find(lambda p: p)
    with pytest.raises(ValueError, match="it has no arrays"):
        channels.find(lambda p, x: x, {}, VECTORS)


WHY = Reason("test")


@given(st.data())
def test_any_two_shapes_of_one_size_have_a_common_form_or_stay(data):
    """Unified labels read the same, whatever was made of them before."""
    cut = lambda n: data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    labels = Labels()
    made = []
    for _ in range(2):
        label = labels.atom(24)
        for _ in range(data.draw(st.integers(0, 3))):
            if data.draw(st.booleans()):
                first = cut(24)
                found = labels.factor(label, [first, 24 // first], WHY)
            else:
                start = data.draw(st.integers(1, 23))
                found = labels.split(label, [start, 24 - start])
            del found
        made.append(label)
    labels.unify(made[0], made[1], WHY)
    one, two = map(labels.expr, made)
    sizes = {}
    stack = [one, two]
    while stack:
        form = stack.pop()
        stack += form.parts
        if form.kind == "atom":
            sizes[form.atom] = form.size
    rng = np.random.default_rng(0)
    free = {atom: size for atom, size in sizes.items() if not labels.pinned(atom)}
    masks = {atom: rng.random(size) < 0.6 for atom, size in free.items()}
    assert one.keep(masks).tolist() == two.keep(masks).tolist()
    for form in (one, two):
        kept = form.keep(masks)
        assert kept.shape == (24,)
        assert kept.sum() == form.width({a: int(m.sum()) for a, m in masks.items()})


def test_index_maps_of_products_and_concatenations():
    heads, size, other = Expr("atom", 2, 0), Expr("atom", 3, 1), Expr("atom", 2, 2)
    axis = Expr("concat", 8, parts=(Expr("product", 6, parts=(heads, size)), other))
    (owner,) = axis.owners(1)
    assert owner.tolist() == [0, 1, 2, 0, 1, 2, -1, -1]
    (owner,) = axis.owners(0)
    assert owner.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    (owner,) = axis.owners(2)
    assert owner.tolist() == [-1] * 6 + [0, 1]
