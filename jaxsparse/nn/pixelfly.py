r"""Pixelated butterfly: a fixed block-sparse pattern of a few diagonals, on the block-sparse product, plus low rank."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsparse.nn.block_sparse_linear import BlockSparseLinear
from pallas_kernels import BlockSparse


def flat_butterfly(size: int, factors: int) -> np.ndarray:
    r"""The pattern of the sum of butterfly factors: cell (r, c) is on where r xor c is 0 or a power of 2 below
    $2^{factors}$. Each row and column has `factors + 1` cells.

    The product of factors $\prod (I + \lambda B_i)$ is $I + \lambda \sum B_i$ up to $\lambda^2$.

    Args:
      size: b, a power of 2.
      factors: k, from 1 to $\log_2 b$.

    Returns:
      bool `[size, size]`.

    >>> [np.flatnonzero(flat_butterfly(8, 3)[r]).tolist() for r in (0, 5)]
    [[0, 1, 2, 4], [1, 4, 5, 7]]

    Raises:
      ValueError: a size that is no power of 2, too many factors.
    """
    if size < 2 or size & (size - 1):
        raise ValueError(f"size={size}: must be a power of 2, at least 2")
    if not 1 <= factors <= int(math.log2(size)):
        raise ValueError(f"factors={factors}: must be in 1..{int(math.log2(size))}")
    apart = np.arange(size)[:, None] ^ np.arange(size)
    return np.isin(apart, [0, *(1 << np.arange(factors))])


def butterfly_blocks(
    shape: tuple[int, int], size: int, factors: int, block: int, *, whole: int = 0
) -> np.ndarray:
    """The blocks of a matrix `[in, out]` that its flat butterfly touches, `[in / block, out / block]` rounded up.

    Args:
      shape: of the matrix.
      size, factors: of `flat_butterfly`, whose cells are stretched to `in / size` x `out / size` weights.
      block: side of a stored block.
      whole: so many first rows and columns of weights are on throughout.

    >>> float(butterfly_blocks((64, 32), 4, 1, 8).mean())
    0.5

    Raises:
      ValueError: sides that `size` does not divide.
    """
    if shape[0] % size or shape[1] % size:
        raise ValueError(f"size={size}: must divide both sides of {shape}")
    cells = np.kron(
        flat_butterfly(size, factors), np.ones((shape[0] // size, shape[1] // size), bool)
    )
    cells[:whole], cells[:, :whole] = True, True
    rows, columns = -(-shape[0] // block), -(-shape[1] // block)
    padded = np.zeros((rows * block, columns * block), bool)
    padded[: shape[0], : shape[1]] = cells
    return np.asarray(padded.reshape(rows, block, columns, block).any(axis=(1, 3)))


class PixelflyLinear(nnx.Module):
    r"""$y = (1 - g)\, x S + g\, (x A) B + b$: S block-sparse in a flat butterfly, A B of low rank, and g the sigmoid of a
    linear function of x for each example, or 1/2.

    The product with S is `jaxsparse.nn.BlockSparseLinear`: time and memory follow the stored blocks. If a cell of the
    pattern is smaller than a block, blocks straddle cells and more of them are stored (`density` tells).

    Args:
      in_features, out_features: `size` divides both.
      size, factors: of `flat_butterfly`.
      block: side of a stored block; 128 on TPU.
      rank: of A B; 0: none.
      gated: whether g is learnt.
      use_bias: one bias for both.
      rngs: of all parameters.

    Source: Chen, Dao et al., "Pixelated butterfly: simple and efficient sparse training for neural network models",
    2022.

    >>> layer = PixelflyLinear(64, 32, size=4, factors=1, block=8, rank=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 64))).shape, layer.density
    ((3, 32), 0.5)

    Raises:
      ValueError: as `butterfly_blocks`; a negative rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        size: int,
        factors: int,
        block: int = 32,
        rank: int = 32,
        gated: bool = True,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        if rank < 0:
            raise ValueError(f"rank={rank}: must not be negative")
        shape = in_features, out_features
        blocks = butterfly_blocks(shape, size, factors, block)
        mask = np.kron(blocks, np.ones((block, block), bool))[:in_features, :out_features]
        # The dense layer's bound, made up for the inputs that an output block has not.
        left = mask.sum(axis=0)
        bound = 1 / math.sqrt(in_features) * np.sqrt(in_features / np.maximum(left, 1))
        uniform = lambda s: jax.random.uniform(rngs.params(), s, minval=-1.0)
        weight = BlockSparse.from_mask(
            uniform(shape) * jnp.asarray(bound, jnp.float32),
            jnp.asarray(mask),
            (block, block),
            pad=True,
        )
        self.sparse = BlockSparseLinear(
            *shape, block_shape=(block, block), weight=weight, use_bias=False
        )
        self.density = float(blocks.mean())
        self.rank, self.gated = rank, gated
        if rank:
            self.down = nnx.Param(uniform((in_features, rank)) / math.sqrt(in_features))
            self.up = nnx.Param(uniform((rank, out_features)) / math.sqrt(rank))
            self.gate = nnx.Linear(in_features, 1, rngs=rngs) if gated else None
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """`[..., in_features]` to `[..., out_features]`."""
        y = self.sparse(x)
        if self.rank:
            low = (x @ self.down[...].astype(x.dtype)) @ self.up[...].astype(x.dtype)
            g = jax.nn.sigmoid(self.gate(x)) if self.gate is not None else 0.5
            y = y + g * (low - y)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
