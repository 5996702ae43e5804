"""Small convolutional network, for signals [length, channels] and images [height, width, channels]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class CNN(nnx.Module):
    """Strided convolutions with ReLU, flattened into one linear layer (the CNN of MNIST-1D)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        features: Sequence[int] = (25, 25, 25),
        kernel: int = 5,
        stride: int = 2,
        dtype=None,
    ):
        dims = len(shape) - 1
        channels = [shape[-1], *features]
        self.convs = nnx.List(
            [
                nnx.Conv(i, o, (kernel,) * dims, strides=(stride,) * dims, dtype=dtype, rngs=rngs)
                for i, o in zip(channels, channels[1:])
            ]
        )
        spatial = np.array(shape[:-1])
        for _ in features:
            spatial = -(-spatial // stride)  # padding is SAME
        self.head = nnx.Linear(
            int(spatial.prod()) * channels[-1], num_classes, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(jnp.reshape(x, (x.shape[0], -1)))
