"""Small models in which coupling is hard: those that users of Torch-Pruning report, rebuilt in Flax NNX.

`MODELS` maps a name to `(model, example input)`, made on call.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import create


def images(height=8, channels=3):
    return jax.random.normal(jax.random.key(7), (2, height, height, channels))


def conv(i, o, k, rngs, **options):
    return nnx.Conv(i, o, (k, k), rngs=rngs, **options)


def mean(x):
    return jnp.mean(x, axis=(1, 2))


class DenseNet(nnx.Module):
    """Every layer reads the concatenation of all before it, one of them twice."""

    def __init__(self, rngs):
        self.stem = conv(3, 5, 3, rngs)
        self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (5, 9, 18)])
        self.convs = nnx.List([conv(n, 4, 3, rngs) for n in (5, 9)])
        self.head = nnx.Linear(18, 3, rngs=rngs)

    def __call__(self, x):
        x = stem = self.stem(x)
        x = jnp.concatenate([x, self.convs[0](nnx.relu(self.norms[0](x)))], -1)
        y = self.convs[1](nnx.relu(self.norms[1](x)))
        x = jnp.concatenate([x, y, x[..., : stem.shape[-1]]], -1)
        return self.head(mean(nnx.relu(self.norms[2](x))))


class ShuffleNet(nnx.Module):
    """Half of the channels pass, half are convolved; then the two are shuffled."""

    def __init__(self, rngs):
        self.stem = conv(3, 8, 3, rngs)
        self.blocks = nnx.List(
            [
                nnx.List(
                    [
                        conv(4, 4, 1, rngs),
                        conv(4, 4, 3, rngs, feature_group_count=4),
                        conv(4, 4, 1, rngs),
                    ]
                )
                for _ in range(2)
            ]
        )
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for first, depthwise, last in self.blocks:
            passed, y = jnp.split(x, 2, -1)
            y = last(nnx.relu(depthwise(nnx.relu(first(y)))))
            x = jnp.concatenate([passed, y], -1)
            *rows, c = x.shape
            x = jnp.swapaxes(x.reshape(*rows, 2, c // 2), -1, -2).reshape(x.shape)
        return self.head(mean(x))


class GroupedShuffle(nnx.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self, rngs):
        self.first = conv(3, 8, 3, rngs)
        self.grouped = conv(8, 8, 3, rngs, feature_group_count=2)
        self.again = conv(8, 12, 3, rngs, feature_group_count=4)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.grouped(nnx.relu(self.first(x))))
        *rows, c = x.shape
        x = jnp.swapaxes(x.reshape(*rows, 2, c // 2), -1, -2).reshape(x.shape)
        return self.head(mean(nnx.relu(self.again(x))))


class Inception(nnx.Module):
    """Branches of several widths, concatenated."""

    def __init__(self, rngs):
        self.narrow = conv(3, 4, 1, rngs)
        self.reduce = conv(3, 5, 1, rngs)
        self.wide = conv(5, 6, 3, rngs)
        self.pooled = conv(3, 3, 1, rngs)
        self.mix = conv(13, 7, 1, rngs)
        self.head = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        pooled = nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        x = jnp.concatenate(
            [self.narrow(x), self.wide(nnx.relu(self.reduce(x))), self.pooled(pooled)], -1
        )
        return self.head(mean(nnx.relu(self.mix(nnx.relu(x)))))


class UNet(nnx.Module):
    """Down, up by a transposed convolution, and a skip that is concatenated."""

    def __init__(self, rngs):
        self.enter = conv(3, 4, 3, rngs)
        self.down = conv(4, 6, 3, rngs, strides=2)
        self.up = nnx.ConvTranspose(6, 5, (2, 2), strides=(2, 2), rngs=rngs)
        self.merge = conv(9, 4, 3, rngs)
        self.out = conv(4, 2, 1, rngs)

    def __call__(self, x):
        x = nnx.relu(self.enter(x))
        y = nnx.relu(self.up(nnx.relu(self.down(x))))
        return self.out(nnx.relu(self.merge(jnp.concatenate([x, y], -1))))


class MobileNet(nnx.Module):
    """Expand, depthwise, squeeze and excite, project, add."""

    def __init__(self, rngs):
        self.stem = conv(3, 4, 3, rngs)
        self.expand, self.norm = conv(4, 12, 1, rngs), nnx.BatchNorm(12, rngs=rngs)
        self.depthwise = conv(12, 12, 3, rngs, feature_group_count=12)
        self.squeeze = nnx.Linear(12, 3, rngs=rngs)
        self.excite = nnx.Linear(3, 12, rngs=rngs)
        self.project = conv(12, 4, 1, rngs)
        self.one = conv(4, 1, 1, rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = nnx.relu6(self.depthwise(nnx.relu6(self.norm(self.expand(x)))))
        gate = nnx.sigmoid(self.excite(nnx.relu(self.squeeze(mean(y)))))
        x = x + self.project(y * gate[:, None, None])
        return self.head(mean(x * nnx.sigmoid(self.one(x))))


class GroupNormNet(nnx.Module):
    """Group normalisation splits channels by a reshape."""

    def __init__(self, rngs):
        self.stem = conv(3, 8, 3, rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.conv = conv(8, 6, 3, rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(mean(nnx.relu(self.conv(nnx.relu(self.norm(self.stem(x)))))))


class Windows(nnx.Module):
    """Attention in shifted windows, with a fused projection and a bias per head, as in Swin."""

    def __init__(self, rngs, dim=8, heads=2, window=4):
        self.patches = conv(3, dim, 1, rngs)
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (heads, window**2, window**2)))
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        self.up, self.down = nnx.Linear(dim, 12, rngs=rngs), nnx.Linear(12, dim, rngs=rngs)
        self.head = nnx.Linear(dim, 3, rngs=rngs)
        self.heads, self.window = heads, window

    def attend(self, x):
        B, H, W, C = x.shape
        n, w = H // self.window, self.window
        x = x.reshape(B, n, w, n, w, C).transpose(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(x.shape[0], w * w, 3, self.heads, -1), 2, 0)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1]) + self.bias[...]
        y = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(logits), v).reshape(x.shape[0], w * w, -1)
        y = self.out(y).reshape(B, n, n, w, w, -1).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(B, H, W, -1)

    def __call__(self, x):
        x = self.patches(x)
        x = x + jnp.roll(self.attend(jnp.roll(self.norm(x), (-2, -2), (1, 2))), (2, 2), (1, 2))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(mean(x))


class Gated(nnx.Module):
    def __init__(self, dim, hidden, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_up, self.down = linear(dim, 2 * hidden), linear(hidden, dim)

    def __call__(self, x):
        gate, up = jnp.split(self.gate_up(x), 2, -1)
        return self.down(nnx.silu(gate) * up)


class GQA(nnx.Module):
    """A decoder: grouped queries, rotary positions, a gated perceptron with one fused product, tied
    embeddings."""

    def __init__(self, rngs, vocabulary=11, dim=8, heads=4, kv=2, size=4):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(vocabulary, dim, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(dim, rngs=rngs), nnx.RMSNorm(dim, rngs=rngs)
        self.query, self.key = linear(dim, heads * size), linear(dim, kv * size)
        self.value, self.out = linear(dim, kv * size), linear(heads * size, dim)
        self.mlp = Gated(dim, 6, rngs)
        self.heads, self.kv, self.size = heads, kv, size

    def rotate(self, x):
        half = x.shape[-1] // 2
        angle = jnp.arange(x.shape[1])[:, None] * 100.0 ** (-jnp.arange(half) / half)
        cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def attend(self, x):
        B, T, _ = x.shape
        q = self.rotate(self.query(x).reshape(B, T, self.heads, self.size))
        k = self.rotate(self.key(x).reshape(B, T, self.kv, self.size))
        v = self.value(x).reshape(B, T, self.kv, -1)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.reshape(B, T, -1))

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attend(self.norm1(x))
        return self.embed.attend(x + self.mlp(self.norm2(x)))


class Experts(nnx.Module):
    """A mixture of experts: the router's scores choose two of them."""

    def __init__(self, rngs, dim=6, experts=4, hidden=5):
        draw = lambda *shape: nnx.Param(0.5 * jax.random.normal(rngs.params(), shape))
        self.enter = nnx.Linear(3, dim, rngs=rngs)
        self.router = nnx.Linear(dim, experts, use_bias=False, rngs=rngs)
        self.up, self.down = draw(experts, dim, hidden), draw(experts, hidden, dim)
        self.head = nnx.Linear(dim, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.enter(mean(x)))
        scores, chosen = jax.lax.top_k(nnx.softmax(self.router(x)), 2)
        gates = jnp.einsum("bk,bke->be", scores, jax.nn.one_hot(chosen, self.router.out_features))
        hidden = nnx.gelu(jnp.einsum("bd,edh->beh", x, self.up[...]))
        y = jnp.einsum("beh,ehd->bed", hidden, self.down[...])
        return self.head(x + jnp.einsum("be,bed->bd", gates, y))


class Scanned(nnx.Module):
    """Layers with one stack of parameters, run by `nnx.scan`, each recomputed in the backward pass."""

    def __init__(self, rngs, dim=6, hidden=9, depth=3):
        class Layer(nnx.Module):
            def __init__(self, rngs):
                self.norm = nnx.BatchNorm(dim, use_running_average=True, rngs=rngs)
                self.up = nnx.Linear(dim, hidden, rngs=rngs)
                self.down = nnx.Linear(hidden, dim, rngs=rngs)

            def __call__(self, x):
                return x + self.down(nnx.relu(self.up(self.norm(x))))

        self.enter = nnx.Linear(3, dim, rngs=rngs)
        self.layers = nnx.vmap(lambda r: Layer(r), in_axes=0, out_axes=0)(rngs.fork(split=depth))
        self.head = nnx.Linear(dim, 3, rngs=rngs)

    def __call__(self, x):
        apply = nnx.remat(lambda x, layer: layer(x))
        x = nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            self.enter(mean(x)), self.layers
        )
        return self.head(x)


class Attention(nnx.Module):
    """Flax's own attention, between a perceptron and a flattened head."""

    def __init__(self, rngs):
        self.enter = nnx.Linear(3, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=8, qkv_features=12, decode=False, rngs=rngs
        )
        self.head = nnx.Linear(8 * 8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.enter(x[:, :, 0])
        x = x + self.attention(x)
        return self.head(x.reshape(x.shape[0], -1))


class NormMLP(nnx.Module):
    """The first golden case: 5-8-norm-6-3."""

    def __init__(self, rngs, norm=nnx.LayerNorm):
        self.first, self.norm = nnx.Linear(5, 8, rngs=rngs), norm(8, rngs=rngs)
        self.second, self.last = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.norm(self.first(x))))))


class Recurrent(nnx.Module):
    """An LSTM over positions; the last state is read."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(3, 7, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x[:, :, 0])[:, -1])


def _own(cls, x=None, **options):
    return _made_once(lambda: cls(rngs=nnx.Rngs(3), **options), x)


def _named(name, shape, x, **options):
    return _made_once(lambda: create(name, shape, 10, rngs=nnx.Rngs(3), **options), x)


def _made_once(make, x):
    """A function that gives copies of one model, and its inputs."""
    model = functools.cache(make)
    return lambda: (nnx.clone(model()), images() if x is None else x)


TOKENS = jnp.arange(10).reshape(2, 5)
VECTORS = jax.random.normal(jax.random.key(1), (4, 5))

MODELS = {
    "norm_mlp": _own(NormMLP, VECTORS),
    "densenet": _own(DenseNet),
    "shufflenet": _own(ShuffleNet),
    "grouped_shuffle": _own(GroupedShuffle),
    "inception": _own(Inception),
    "unet": _own(UNet),
    "mobilenet": _own(MobileNet),
    "group_norm": _own(GroupNormNet),
    "windows": _own(Windows),
    "gqa": _own(GQA, TOKENS),
    "experts": _own(Experts),
    "scanned": _own(Scanned),
    "attention": _own(Attention),
    "recurrent": _own(Recurrent),
    "mlp": _named("mlp", (4, 3), jnp.ones((2, 4, 3)), hidden=(7, 6)),
    "cnn": _named("cnn", (8, 8, 1), images(channels=1), features=(5, 6), kernel=3),
    "resnet": _named("resnet", (8, 8, 3), images(), depth=8, width=4),
    "vit": _named("vit", (8, 8, 3), images(), dim=12, depth=1, heads=3),
    "transformer": _named("transformer", (5,), TOKENS % 10, dim=16, depth=1, heads=2),
    "transformer_scanned": _named(
        "transformer", (5,), TOKENS % 10, dim=16, depth=2, heads=2, scan_layers=True, remat=True
    ),
}
