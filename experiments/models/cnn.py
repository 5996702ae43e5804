"""Small convolutional network, for signals [length, channels] and images [height, width, channels]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse.nn import TwoViewConv, TwoViewLinear


class CNN(nnx.Module):
    """Strided convolutions with ReLU, flattened into one linear layer (the CNN of MNIST-1D). With
    `two_view` they are layers whose input gradient has weights of its own (`jaxsparse.nn.two_view`)."""

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
        two_view: bool = False,
    ):
        dims = len(shape) - 1
        conv, linear = (TwoViewConv, TwoViewLinear) if two_view else (nnx.Conv, nnx.Linear)
        channels = [shape[-1], *features]
        self.convs = nnx.List(
            [
                conv(i, o, (kernel,) * dims, strides=(stride,) * dims, dtype=dtype, rngs=rngs)
                for i, o in zip(channels, channels[1:])
            ]
        )
        spatial = np.array(shape[:-1])
        for _ in features:
            spatial = -(-spatial // stride)  # padding is SAME
        self.head = linear(int(spatial.prod()) * channels[-1], num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(jnp.reshape(x, (x.shape[0], -1)))
