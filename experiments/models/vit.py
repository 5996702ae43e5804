"""Vision Transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021), mean pooling."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from experiments.models.rows import split_rows
from experiments.models.transformer import Block


class ViT(nnx.Module):
    """Images [B, H, W, C] to logits. The defaults are a tiny model; S/16 is 384, 12, 6 and patch 16."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        patch: int = 4,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        rows: NamedSharding | None = None,
        dtype=None,
    ):
        height, width, channels = shape
        if height % patch or width % patch:
            raise ValueError(f"patch={patch} does not divide images of {height}x{width}")
        self.rows = rows
        self.patches = nnx.Conv(
            channels, dim, (patch, patch), strides=patch, padding="VALID", dtype=dtype, rngs=rngs
        )
        positions = (height // patch) * (width // patch)
        self.position_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (positions, dim))
        )
        self.layers = nnx.List(
            [Block(dim, heads, causal=False, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.norm = nnx.RMSNorm(dim, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(dim, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = split_rows(x + self.position_embedding[...].astype(x.dtype), self.rows)
        for layer in self.layers:
            x = split_rows(layer(x), self.rows)
        return self.head(jnp.mean(self.norm(x), axis=1))
