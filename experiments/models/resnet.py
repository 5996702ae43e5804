"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", 2016).

`depth` 20, 32, 44, 56, 110 are the CIFAR networks (three stages of 16, 32, 64 channels); 18 and 34
(basic blocks) and 50, 101, 152 (bottlenecks, stride in the 3x3 convolution) those for ImageNet.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from experiments.models.rows import split_rows

_IMAGENET = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class Block(nnx.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with a four times wider output, and a shortcut."""

    def __init__(self, c_in, width, stride, bottleneck, *, conv, norm, rngs):
        c_out = 4 * width if bottleneck else width
        if bottleneck:
            plan = [(c_in, width, 1, 1), (width, width, 3, stride), (width, c_out, 1, 1)]
        else:
            plan = [(c_in, width, 3, stride), (width, width, 3, 1)]
        self.convs = nnx.List([conv(i, o, (k, k), strides=s, rngs=rngs) for i, o, k, s in plan])
        self.norms = nnx.List([norm(o, rngs=rngs) for _, o, _, _ in plan])
        # The last norm of a block starts at zero, so that the block starts as the identity.
        self.norms[-1].scale[...] = jnp.zeros_like(self.norms[-1].scale[...])
        self.projects = stride != 1 or c_in != c_out
        if self.projects:
            self.shortcut = conv(c_in, c_out, (1, 1), strides=stride, rngs=rngs)
            self.shortcut_norm = norm(c_out, rngs=rngs)

    def __call__(self, x):
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(y))
            if i < len(self.convs) - 1:
                y = nnx.relu(y)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 20,
        width: int | None = None,
        axis_name: str | None = None,
        rows: NamedSharding | None = None,
        dtype=None,
    ):
        imagenet = depth in _IMAGENET
        if not imagenet and ((depth - 2) % 6 or depth < 8):
            raise ValueError(f"depth={depth}: must be 6n+2 (CIFAR) or one of {sorted(_IMAGENET)}")
        stages = _IMAGENET[depth] if imagenet else ((depth - 2) // 6,) * 3
        bottleneck = imagenet and depth >= 50
        width = width or (64 if imagenet else 16)
        conv = functools.partial(nnx.Conv, use_bias=False, padding="SAME", dtype=dtype)
        # Statistics and their sums in float32, whatever the convolutions compute in.
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, dtype=dtype, axis_name=axis_name)
        self.imagenet, self.rows = imagenet, rows
        if imagenet:
            self.stem = conv(shape[-1], width, (7, 7), strides=2, rngs=rngs)
        else:
            self.stem = conv(shape[-1], width, (3, 3), rngs=rngs)
        self.stem_norm = norm(width, rngs=rngs)
        blocks, channels = [], width
        for stage, count in enumerate(stages):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                block_width = width * 2**stage
                blocks.append(
                    Block(
                        channels, block_width, stride, bottleneck, conv=conv, norm=norm, rngs=rngs
                    )
                )
                channels = block_width * (4 if bottleneck else 1)
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(channels, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = split_rows(nnx.relu(self.stem_norm(self.stem(x))), self.rows)
        if self.imagenet:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = split_rows(block(x), self.rows)
        return self.head(jnp.mean(x, axis=(1, 2)))
