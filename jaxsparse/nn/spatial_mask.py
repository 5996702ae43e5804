r"""Semi-structured activation sparsity: the same positions of a feature map are dropped in all channels, so that whole
rows of the lowered convolution vanish."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsparse import selection


class Positions(nnx.Variable):
    """A map of scores at input resolution, float32 `[height, width]`, that all layers share."""


def pooled(scores: Array, shape: Sequence[int]) -> Array:
    """A map averaged to another size, over windows of the whole-numbered ratio (what is left over at the edge does not
    count).

    >>> pooled(jnp.arange(16.0).reshape(4, 4), (2, 2)).tolist()
    [[2.5, 4.5], [10.5, 12.5]]

    Raises:
      ValueError: a size above that of the map.
    """
    ratio = [n // m for n, m in zip(scores.shape, shape)]
    if min(ratio) < 1:
        raise ValueError(f"shape={tuple(shape)}: larger than the map, {scores.shape}")
    cut = scores[: ratio[0] * shape[0], : ratio[1] * shape[1]]
    return cut.reshape(shape[0], ratio[0], shape[1], ratio[1]).mean(axis=(1, 3))


def position_mask(scores: Array, shape: Sequence[int], sparsity: float | Array) -> Array:
    """The positions that are kept at a layer: all but the `round(S h w)` of lowest pooled score, bool `[h, w]`.

    Args:
      scores: the map, `[height, width]`.
      shape: `(h, w)` of the layer's output.
      sparsity: S, in [0, 1); may be traced.

    >>> position_mask(jnp.arange(16.0).reshape(4, 4), (2, 2), 0.5).tolist()
    [[False, False], [True, True]]
    """
    size = int(np.prod(shape))
    dropped = jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)
    return selection.topk_mask(pooled(scores, shape), size - dropped)


class SpatialSparsity(nnx.Module):
    """Multiplies a feature map `[batch, h, w, channels]` with a mask of positions, the same for all channels and
    examples. Layers share one map of scores:

        positions = Positions(jax.random.uniform(key, (32, 32)))
        layer.sparsity = SpatialSparsity(positions)

    In training give `positions` a new random map at every sparse step, with the sparsity of
    `schedules.polynomial(..., power=2)` in `layer.sparsity.level`, and leave it alone from some step on: what is dropped
    in the end is what training has seen last. With level 0 the layer is dense.

    Args:
      positions: the shared map.

    Source: Grimaldi et al., "Accelerating deep neural networks via semi-structured activation sparsity", 2023.

    >>> layer = SpatialSparsity(Positions(jnp.arange(16.0).reshape(4, 4)))
    >>> layer.level[...] = jnp.float32(0.25)
    >>> int((layer(jnp.ones((2, 4, 4, 3))) == 0).sum())  # 4 of 16 positions, 3 channels, 2 examples
    24
    """

    def __init__(self, positions: Positions):
        self.positions = positions
        self.level = nnx.Variable(jnp.float32(0.0))

    def mask(self, shape: Sequence[int]) -> Array:
        """The positions that are kept, bool `[h, w]`."""
        return position_mask(self.positions[...], shape, self.level[...])

    def __call__(self, x: Array) -> Array:
        mask = self.mask(x.shape[1:3])
        return jnp.where(mask[None, :, :, None], x, jnp.zeros((), x.dtype))


def conv_at(x: Array, kernel: Array, positions: np.ndarray, *, bias: Array | None = None) -> Array:
    """A convolution ("SAME", stride 1) at some positions only; 0 elsewhere. It lowers the rows of these positions and
    multiplies them alone: its work falls with their number.

    Args:
      x: `[batch, h, w, in]`.
      kernel: `[kh, kw, in, out]`, odd sizes.
      positions: bool `[h, w]`, known outside of `jit`: a frozen mask.
      bias: `[out]`.

    Returns:
      `[batch, h, w, out]`.

    >>> x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
    >>> conv_at(x, k, np.eye(4, dtype=bool))[0, 1, 1, 0].item(), conv_at(x, k, np.eye(4, dtype=bool))[0, 0, 1, 0].item()
    (18.0, 0.0)

    Raises:
      ValueError: positions of another size, even kernels.
    """
    kh, kw, channels, features = kernel.shape
    if positions.shape != x.shape[1:3] or kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(
            f"positions {positions.shape} must be those of x, {x.shape[1:3]}, and the kernel odd, not {kh}x{kw}"
        )
    row, column = np.nonzero(np.asarray(positions))
    padded = jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    dy, dx = (d.ravel() for d in np.mgrid[:kh, :kw])
    lowered = padded[:, row[:, None] + dy, column[:, None] + dx]  # [batch, rows, kh kw, in]
    lowered = lowered.reshape(x.shape[0], len(row), kh * kw * channels)
    found = lax.dot(lowered.reshape(-1, kh * kw * channels), kernel.reshape(-1, features))
    found = found.reshape(x.shape[0], len(row), features)
    if bias is not None:
        found = found + bias
    out = jnp.zeros((*x.shape[:3], features), found.dtype)
    return out.at[:, row, column].set(found)


def new_map(positions: Positions, key: Array) -> None:
    """A new random map in place of the one that layers share."""
    positions[...] = jax.random.uniform(key, positions[...].shape)
