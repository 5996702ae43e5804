"""Decoder-only Transformer: pre-norm, rotary positions, no biases; and the block that ViT shares.

Axes in names: B batch, T positions, D model, H heads, K head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from experiments.models.rows import split_rows


class Attention(nnx.Module):
    def __init__(self, dim, heads, *, causal, dtype, rngs):
        if dim % heads or dim // heads % 2:
            raise ValueError(f"dim={dim} must be an even multiple of heads={heads}")
        linear = functools.partial(nnx.Linear, dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.heads, self.causal = heads, causal

    def __call__(self, x_BTD):
        B, T, _ = x_BTD.shape
        split = lambda y: y.reshape(B, T, self.heads, -1)
        q_BTHK, k_BTHK, v_BTHK = (split(f(x_BTD)) for f in (self.query, self.key, self.value))
        if self.causal:
            q_BTHK, k_BTHK = rotate(q_BTHK), rotate(k_BTHK)
        y_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=self.causal)
        return self.out(y_BTHK.reshape(B, T, -1))


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each normalised before and added to the stream."""

    def __init__(self, dim, heads, *, expand=4, causal=True, dtype=None, rngs):
        self.norm1 = nnx.RMSNorm(dim, dtype=dtype, rngs=rngs)
        self.attention = Attention(dim, heads, causal=causal, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.RMSNorm(dim, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(dim, expand * dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(expand * dim, dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD):
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.down(nnx.gelu(self.up(self.norm2(x_BTD))))


class Transformer(nnx.Module):
    """Tokens [B, T] to logits [B, T, vocabulary].

    With `scan_layers` the blocks are one stacked block (leaves have a leading layer axis) and compile
    once; `remat` recomputes each block in the backward pass. `rows` is how the batch is split over
    devices, see `split_rows`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        expand: int = 4,
        scan_layers: bool = False,
        remat: bool = False,
        rows: NamedSharding | None = None,
        dtype=None,
    ):
        block = functools.partial(Block, dim, heads, expand=expand, dtype=dtype)
        self.embed = nnx.Embed(num_classes, dim, dtype=dtype, rngs=rngs)
        self.scan_layers, self.remat, self.rows = scan_layers, remat, rows
        self.layers: Any
        if scan_layers:
            stack = nnx.vmap(lambda rngs: block(rngs=rngs), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=depth)(stack)(rngs)
        else:
            self.layers = nnx.List([block(rngs=rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(dim, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(dim, num_classes, use_bias=False, dtype=dtype, rngs=rngs)

    @property
    def stacked(self) -> dict[str, int]:
        """Of which leaves how many leading axes are layers."""
        return {"^layers/": 1} if self.scan_layers else {}

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = split_rows(self.embed(tokens_BT), self.rows)
        apply = lambda x, layer: split_rows(layer(x), self.rows)
        if self.remat:
            apply = nnx.remat(apply)
        if self.scan_layers:
            x_BTD = nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x_BTD, self.layers)
        else:
            for layer in self.layers:
                x_BTD = apply(x_BTD, layer)
        return split_rows(self.head(self.norm(x_BTD)), self.rows)


def rotate(x_BTHK: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al., "RoFormer", 2021), in float32."""
    half = x_BTHK.shape[-1] // 2
    frequency_K = 10_000.0 ** (-jnp.arange(half) / half)
    angle_TK = jnp.arange(x_BTHK.shape[1])[:, None] * frequency_K
    cos, sin = jnp.cos(angle_TK)[None, :, None], jnp.sin(angle_TK)[None, :, None]
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x_BTHK.dtype)
