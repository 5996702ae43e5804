"""`BlockSparseLinear`: a linear layer that stores, multiplies and trains only some blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse.nn._linear import Pattern, SparseLinear, split_linear
from pallas_kernels import BlockSparse, block_sparse_matmul


class BlockSparseLinear(SparseLinear):
    r"""$y = x W + b$ with W `[in, out]` block-sparse: time and memory follow the stored blocks.

    The blocks are parameters, their places are not: an optimizer trains the blocks where they are.
    To change them: `layer.set_weight(layer.weight.with_pattern(block_mask))`; nothing is compiled
    anew. For the products see `pallas_kernels.block_sparse_matmul`.
    Use it from Linen through `flax.nnx.bridge.to_linen`.

    Args:
      in_features: size of the last axis of x.
      out_features: size of the last axis of y.
      block_shape: `(bh, bw)`; blocks at the edges may stick out of the matrix.
      density: share of the blocks that is stored, at random places.
      use_bias: add a bias.
      dtype: of the computation; default: that of x and the parameters, promoted.
      param_dtype: of the parameters.
      precision: of the product, as in `jax.lax.dot_general`.
      implementation: see `pallas_kernels.block_sparse_matmul`.
      rngs: key for places and values (`params`).

    >>> layer = BlockSparseLinear(64, 32, block_shape=(16, 16), density=0.5, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 64))).shape, layer.values[...].shape
    ((3, 32), (4, 16, 16))
    """

    product = staticmethod(block_sparse_matmul)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_shape: tuple[int, int],
        density: float,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        w = BlockSparse.random(
            rngs.params(),
            (in_features, out_features),
            block_shape,
            density=density,
            dtype=param_dtype,
            pad=True,
        )
        bias = jnp.zeros(out_features, param_dtype) if use_bias else None
        self._set(w)
        self._set_rest(bias, dtype, precision, implementation)

    def _set(self, w: BlockSparse) -> None:
        self.shape, self.block_shape = w.shape, w.block_shape
        self.values, self.pattern = nnx.Param(w.values), Pattern(w.pattern)

    @classmethod
    def from_dense(
        cls,
        linear: nnx.Linear,
        mask: jax.Array | None = None,
        *,
        block_shape: tuple[int, int],
        implementation: str | None = None,
    ) -> "BlockSparseLinear":
        """The layer that computes what `linear` does with its kernel masked.

        Args:
          linear: the dense layer.
          mask: bool `[in, out]`, what to keep; default: what is not zero. A block is stored if any
            of it is kept.
          block_shape: `(bh, bw)`.
          implementation: see `pallas_kernels.block_sparse_matmul`.

        Raises:
          ValueError: if linear is not an `nnx.Linear` or the mask has another shape.

        >>> dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> layer = BlockSparseLinear.from_dense(dense, jnp.eye(4) > 0, block_shape=(2, 2))
        >>> layer.values[...].shape
        (2, 2, 2)
        """
        kernel, mask, rest = split_linear(linear, mask)
        layer = cls(*kernel.shape, block_shape=block_shape, density=0.0, rngs=nnx.Rngs(0))
        layer._set(BlockSparse.from_mask(kernel, mask, block_shape, pad=True))
        layer._set_rest(*rest, implementation)
        return layer

    @property
    def weight(self) -> BlockSparse:
        """W as `BlockSparse`."""
        return BlockSparse(self.values[...], self.pattern[...], self.shape, self.block_shape)

    def set_weight(self, w: BlockSparse) -> None:
        """Take values and pattern of another `BlockSparse` of the same shape and block shape."""
        if (w.shape, w.block_shape) != (self.shape, self.block_shape):
            raise ValueError(
                f"weight has shape={w.shape}, block_shape={w.block_shape}; "
                f"they must stay {self.shape}, {self.block_shape}"
            )
        self.values[...], self.pattern[...] = w.values, w.pattern
