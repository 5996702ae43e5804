"""Fully connected network with ReLU."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from jaxsparse.nn import TwoViewLinear


class MLP(nnx.Module):
    """Flattens its input; one linear layer per entry of `hidden`, and one to the logits. With
    `two_view` they are layers whose input gradient has weights of its own (`jaxsparse.nn.two_view`)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        hidden: Sequence[int] = (100, 100),
        dtype=None,
        two_view: bool = False,
    ):
        widths = [math.prod(shape), *hidden, num_classes]
        linear = TwoViewLinear if two_view else nnx.Linear
        self.layers = nnx.List(
            [linear(i, o, dtype=dtype, rngs=rngs) for i, o in zip(widths, widths[1:])]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)
