"""`channels.shrink` of Linen modules: built again with the new sizes they compute what the wide one does with zeros
in place of its channels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_channels_shrink import chosen, zeroed

from jaxsparse import channels

IMAGES = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
TOKENS = jnp.arange(12).reshape(2, 6) % 10
SEQUENCES = jax.random.normal(jax.random.key(2), (2, 6, 8))


class Images(nn.Module):
    """Convolutions with batch norms, a depthwise one, a flattened head."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x)))
        x = nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1])(x)
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    """Attention and an MLP on a residual stream with layer norms."""

    width: int
    heads: int
    size: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(self.heads, qkv_features=self.heads * self.size)
        x = nn.Dense(self.width)(x)
        x = x + attention(nn.LayerNorm()(x))
        x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))
        return nn.Dense(3)(x)


class Tied(nn.Module):
    """An embedding that also makes the logits."""

    width: int
    hidden: int

    def setup(self):
        self.embed = nn.Embed(10, self.width)
        self.up, self.down = nn.Dense(self.hidden), nn.Dense(self.width)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.embed.attend(x + self.down(nn.relu(self.up(x))))


class Step(nn.Module):
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(self.width, name="down")(
            nn.relu(nn.Dense(self.hidden, name="up")(x))
        ), None


class Scanned(nn.Module):
    """Layers whose parameters are stacked."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(self.width, self.hidden, name="layers")(
            nn.Dense(self.width, name="enter")(x), None
        )
        return nn.Dense(3)(x)


class General(nn.Module):
    """Two axes of features at once, and a recurrent layer."""

    features: tuple[int, int]
    width: int
    state: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.DenseGeneral(self.features)(x))
        x = nn.DenseGeneral(self.width, axis=(-2, -1))(x)
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(self.state))(x))


def attention_of(p):
    heads, size = p["MultiHeadDotProductAttention_0"]["query"]["kernel"].shape[1:]
    return Block(p["Dense_0"]["bias"].size, heads, size, p["Dense_2"]["bias"].size)


# A module, its input, the same module for narrower parameters, and groups that a norm takes statistics over or
# that scale the logits.
CASES = {
    "convolutions, batch norms": (
        Images((8, 6)),
        IMAGES,
        lambda p: Images(tuple(p[f"Conv_{i}"]["bias"].size for i in (0, 1))),
        (),
    ),
    "attention, layer norms": (
        Block(8, 4, 3, 12),
        SEQUENCES,
        attention_of,
        (
            "params/Dense_0/kernel:1",
            "params/MultiHeadDotProductAttention_0/query/kernel:2",
            "params/MultiHeadDotProductAttention_0/value/kernel:2",
        ),
    ),
    "tied embedding": (
        Tied(8, 12),
        TOKENS,
        lambda p: Tied(p["embed"]["embedding"].shape[1], p["up"]["bias"].size),
        (),
    ),
    "scan": (
        Scanned(8, 12),
        SEQUENCES,
        lambda p: Scanned(p["enter"]["bias"].size, p["layers"]["up"]["bias"].shape[1]),
        (),
    ),
    "general, recurrent": (
        General((6, 4), 5, 7),
        SEQUENCES,
        lambda p: General(
            p["DenseGeneral_0"]["bias"].shape,
            p["DenseGeneral_1"]["bias"].size,
            p["LSTMCell_0"]["hi"]["bias"].size,
        ),
        (),
    ),
}


def start(net, x):
    """Variables none of which is 0 or that of the start."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)

    def value(v):
        signs = rng.choice([-1, 1], v.shape) if v.ndim > 1 else 1  # variances are positive
        return jnp.asarray(signs * rng.uniform(0.1, 0.6, v.shape), v.dtype)

    return jax.tree.map(value, shapes)


@pytest.mark.parametrize("name", CASES)
def test_built_again_a_module_computes_what_zeros_do(name):
    net, x, build, leave = CASES[name]
    variables = start(net, x)
    groups = channels.find(net, variables, x)
    keep = chosen(groups, leave=leave)
    assert set(keep) | set(leave) == set(groups) and len(keep) >= 2
    small = channels.shrink(net, groups, keep=keep, exact=False)
    narrow = build(small.params["params"])
    fresh = jax.eval_shape(narrow.init, jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small.params)
    want = jax.jit(net.apply)(zeroed(groups, variables, keep), x)
    np.testing.assert_allclose(jax.jit(narrow.apply)(small.params, x), want, atol=2e-5, rtol=1e-5)
    # Given to shrink, it is run and measured, and comes back.
    again = channels.shrink(net, groups, keep=keep, exact=False, edit=lambda _: narrow)
    assert again.model is narrow and again.report.zeroed < 1e-5 < again.report.difference
    with pytest.raises(ValueError, match=r"is not what is left of it: .*Change its attributes"):
        channels.shrink(net, groups, keep=keep, exact=False, edit=lambda net: net)


def test_the_optimizers_slots_go_with_the_parameters_and_train_on():
    net, x, build, _ = CASES["scan"]
    variables = start(net, x)
    groups = channels.find(net, variables, x)
    tx = optax.adam(1e-2)
    state = tx.init(variables)
    small = channels.shrink(net, groups, state, keep=chosen(groups), exact=False)
    narrow = build(small.params["params"])
    grads = jax.jit(jax.grad(lambda v: jnp.sum(narrow.apply(v, x) ** 2)))(small.params)
    updates, _ = tx.update(grads, small.opt_state, small.params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, small.params)


def test_what_a_norm_makes_of_fewer_channels_is_measured_when_the_module_is_given():
    net, x, build, (stream, *_) = CASES["attention, layer norms"]
    variables = start(net, x)
    groups = channels.find(net, variables, x)
    keep = {stream: range(5)}
    empty = zeroed(groups, variables, keep)
    with pytest.raises(ValueError, match=r"zeros in place of these channels change the outputs by"):
        channels.shrink(net, groups, keep=keep)
    with pytest.raises(
        ValueError,
        match=r"statistics are taken over params/Dense_0/kernel:1 .*not run .*edit=lambda model",
    ):
        channels.shrink(net, groups, params=empty, keep=keep)
    small = channels.shrink(net, groups, params=empty, keep=keep, exact=False)
    narrow = build(small.params["params"])
    with pytest.raises(ValueError, match="exact: removing these channels changes the outputs by"):
        channels.shrink(net, groups, params=empty, keep=keep, edit=lambda _: narrow)


def test_zeros_of_a_module_without_norms_go_exactly():
    net, x, build, _ = CASES["scan"]
    variables = start(net, x)
    groups = channels.find(net, variables, x)
    keep = chosen(groups)
    small = channels.shrink(net, groups, params=zeroed(groups, variables, keep))
    assert {n: k.tolist() for n, k in small.kept.items()} == {n: sorted(k) for n, k in keep.items()}
