"""What users give `jaxsparse.channels` by mistake: each is told what is wrong, where, and what would be right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from channel_models import VECTORS
from flax import nnx

import jaxsparse
from jaxsparse import channels

SHAPES = {"a": (5, 6), "b": (6, 3)}
PARAMS = {k: jnp.ones(s) for k, s in SHAPES.items()}


def net(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def quantized(p, x):
    return x @ p["a"].astype(jnp.float32) @ p["b"].astype(jnp.float32)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(7)(x)))


class MLP(nnx.Module):
    def __init__(self, rngs, hidden=7):
        self.first = nnx.Linear(5, hidden, rngs=rngs)
        self.last = nnx.Linear(hidden, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


class Otherwise(MLP):
    """The same arrays, another computation."""

    def __call__(self, x):
        return self.last(self.first(x)) * 2


@pytest.fixture(scope="module")
def mlp():
    model = MLP(nnx.Rngs(0))
    return model, channels.find(model, VECTORS)


@pytest.fixture(scope="module")
def plain():
    return channels.find(net, PARAMS, VECTORS)


def refused(message, call, *args, **options):
    with pytest.raises(ValueError, match=message):
        call(*args, **options)


def test_channels_that_reach_the_output_are_named_with_the_reason(mlp, plain):
    model, groups = mlp
    stays = r"channels that stay: last/kernel:1 \(3\): an output of the model"
    refused(stays, channels.shrink, model, groups, keep={"last/kernel:1": [0]})
    refused(f"pattern: no group is called '\\^last'; {stays}", groups.matching, "^last")
    refused(f"patterns: .*{stays}", groups.without, "^last")
    with pytest.raises(KeyError, match=stays):
        groups["last/kernel:1"]
    with pytest.raises(KeyError, match="no group is called 'zz'; the groups are first/kernel:1"):
        groups["zz"]
    refused(r"b:1 \(3\): an output", channels.zero, net, plain, {"b:1": [0]})


def test_a_model_without_channels_that_may_go_says_what_stays():
    one = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    groups = channels.find(one, VECTORS)
    why = r"there are no channels that may go. What stays: kernel:1 \(3\): an output of the model"
    refused(f"sparsity=0.5: {why}", channels.prune, one, VECTORS, 0.5)
    refused(why, groups.structure)
    refused(why, jaxsparse.hspg, optax.sgd(0.1), 0.5, total_steps=9, groups=groups)
    assert channels.shrink(one, groups).sizes == {}


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "0.5", None, True, [0.5]])
def test_a_sparsity_is_a_number_that_leaves_something(sparsity, mlp):
    model, groups = mlp
    refused("sparsity=.*: must be in", channels.prune, model, VECTORS, sparsity, groups=groups)


def test_a_ratio_that_leaves_nothing_is_told_what_could_be_left(mlp):
    model, groups = mlp
    refused(
        "a budget of .* flops was asked for; .* at least one each, come to 64 at best. Change sparsity",
        channels.prune, model, VECTORS, 0.999, groups=groups, target="flops",
    )  # fmt: skip


def test_parameters_and_models_that_are_missing_or_swapped():
    variables = Dense().init(jax.random.key(0), VECTORS)
    needs = "params: a function or a Linen module needs its parameters; give params="
    refused(needs, channels.prune, net, VECTORS, 0.5)
    refused(needs, channels.prune, Dense(), VECTORS, 0.5)
    linen = "params: Dense is a Linen module and needs its variables, as init returns them"
    refused(linen, channels.find, Dense(), VECTORS)
    refused(linen, channels.find, Dense(), VECTORS, variables)
    refused("model: MLP is a class; give an instance", channels.find, MLP, VECTORS)
    refused("it does not run on the example inputs of shape", channels.find, net, VECTORS, PARAMS)
    refused(
        "steps=2: a Linen module must be built again",
        channels.prune, Dense(), VECTORS, 0.5, params=variables, steps=2,
    )  # fmt: skip


def test_groups_of_another_model_or_of_none(mlp, plain):
    model, groups = mlp
    refused("groups: .*in a model of kind 'nnx', and this one is of kind 'function'",
            channels.shrink, net, groups)  # fmt: skip
    refused("groups: .*in a model of kind 'function', and this one is of kind 'nnx'",
            channels.shrink, model, plain)  # fmt: skip
    refused("groups: give what channels.find returned, not str",
            channels.prune, model, VECTORS, 0.5, groups="first")  # fmt: skip
    refused(r"'first/bias' had shape \(7,\) and has \(9,\); call find again",
            channels.shrink, MLP(nnx.Rngs(0), 9), groups)  # fmt: skip
    refused("it computes something else", channels.shrink, Otherwise(nnx.Rngs(0)), groups,
            keep={"first/kernel:1": [0]}, exact=False)  # fmt: skip


def test_what_is_no_optimizer_state(plain):
    keep = dict(keep={"a:1": [0]}, exact=False)
    given = r"opt_state: it holds .*, as an optimizer does .*; give what tx.init\(params\)"
    refused(given, channels.shrink, net, plain, optax.adam(0.1), **keep)
    refused(given, channels.shrink, net, plain, "adam", **keep)
    masked = optax.masked(optax.adam(0.1), {"a": True, "b": False}).init(PARAMS)
    small = channels.shrink(net, plain, masked, **keep)
    assert {x.shape for x in jax.tree.leaves(small.opt_state)} == {(), (5, 1)}


def test_integer_leaves_are_cut_and_named_where_they_cannot_be_ranked():
    params = {k: jnp.ones(s, jnp.int8) for k, s in SHAPES.items()}
    groups = channels.find(quantized, params, VECTORS)
    small = channels.shrink(quantized, groups, keep={"a:1": [0, 3]}, exact=False)
    assert {k: (v.shape, v.dtype) for k, v in small.params.items()} == {
        "a": ((5, 2), jnp.int8),
        "b": ((2, 3), jnp.int8),
    }
    named = (
        r"no floating-point parameter belongs to group 'a:1', which has 'a' \(int8\), 'b' \(int8\)"
    )
    refused(named, channels.prune, quantized, VECTORS, 0.5, params=params)
    refused(f"{named}; train before", groups.structure)
    scaled = {"a": params["a"], "scale": jnp.arange(6.0), "b": PARAMS["b"]}
    dequantized = lambda p, x: (x @ p["a"].astype(jnp.float32) * p["scale"]) @ p["b"]
    small = channels.prune(dequantized, VECTORS, 0.5, params=scaled)
    assert small.params["a"].dtype == jnp.int8 and small.kept["a:1"].tolist() == [3, 4, 5]


def test_outputs_that_are_not_numbers_and_traced_arrays_are_refused(plain):
    broken = PARAMS | {"a": PARAMS["a"] * jnp.nan}
    refused("exact: removing these channels changes the outputs by nan",
            channels.shrink, net, plain, params=broken, keep={"a:1": [0]})  # fmt: skip
    with pytest.raises(ValueError, match="its arrays are traced; call it outside of jit"):
        jax.jit(lambda p: channels.shrink(net, plain, params=p).params)(PARAMS)


def test_a_function_that_holds_a_width_is_measured_with_zeros():
    def parts(p, x):
        h = x @ p["a"]
        return h[:, :2] @ p["b"][:2] + h[:, 2:] @ p["b"][2:]

    groups = channels.find(parts, PARAMS, VECTORS)
    keep = {"a:1.0": [1]}
    refused("zeros in place of these channels change the outputs", channels.shrink, parts, groups,
            keep=keep)  # fmt: skip
    empty = jax.tree.map(np.array, PARAMS)
    empty["a"][:, 0] = 0
    small = channels.shrink(parts, groups, params=jax.tree.map(jnp.asarray, empty), keep=keep)
    assert small.report.difference is None and "the function holds a width" in str(small.report)
