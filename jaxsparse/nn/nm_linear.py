"""`NMLinear`: a linear layer that stores N of every M weights along its inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse.nn._linear import Pattern, SparseLinear, split_linear
from pallas_kernels import NMSparse, nm_matmul


class NMLinear(SparseLinear):
    r"""$y = x W + b$ with at most N nonzeros in every M consecutive rows of W `[in, out]`.

    The stored values are parameters, their places are not. What is gained, and where, is said in
    `pallas_kernels.nm_matmul`: memory everywhere; time in decoding on TPU, and with 1:4 on CPU if
    `share` (32 or more) outputs have one pattern; the element-wise form runs dense on CPU.

    Args:
      in_features: size of the last axis of x; a multiple of M.
      out_features: size of the last axis of y; a multiple of `share`.
      n: N.
      m: M.
      share: outputs with a common pattern.
      use_bias: add a bias.
      dtype: of the computation; default: that of x and the parameters, promoted.
      param_dtype: of the parameters.
      precision: of the product, as in `jax.lax.dot_general`.
      implementation: see `pallas_kernels.nm_matmul`.
      rngs: key for the weights (`params`), of which the largest are kept.

    >>> layer = NMLinear(64, 32, n=2, m=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 64))).shape, layer.values[...].shape
    ((3, 32), (2, 16, 32))
    """

    product = staticmethod(nm_matmul)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: int,
        m: int,
        share: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        scale = (m / (n * in_features)) ** 0.5
        dense = scale * jax.random.normal(rngs.params(), (in_features, out_features), param_dtype)
        bias = jnp.zeros(out_features, param_dtype) if use_bias else None
        self._set(NMSparse.from_dense(dense, n, m, share=share))
        self._set_rest(bias, dtype, precision, implementation)

    def _set(self, w: NMSparse) -> None:
        self.shape, self.n, self.m, self.share = w.shape, w.n, w.m, w.share
        self.values, self.codes = nnx.Param(w.values), Pattern(w.codes)

    @classmethod
    def from_dense(
        cls,
        linear: nnx.Linear,
        mask: jax.Array | None = None,
        *,
        n: int,
        m: int,
        share: int = 1,
        implementation: str | None = None,
    ) -> "NMLinear":
        """The layer that computes what `linear` does with its kernel masked.

        Args:
          linear: the dense layer.
          mask: bool `[in, out]`, what to keep; default: what is not zero.
          n: N, at least what the mask keeps of a group.
          m: M.
          share: outputs with a common pattern.
          implementation: see `pallas_kernels.nm_matmul`.

        Raises:
          ValueError: if the mask keeps more than N of a group, or for other shapes or types.
        """
        kernel, mask, rest = split_linear(linear, mask)
        layer = cls(m, share, n=n, m=m, share=share, rngs=nnx.Rngs(0))  # filled below
        layer._set(NMSparse.from_mask(kernel, mask, n, m, share=share))
        layer._set_rest(*rest, implementation)
        return layer

    @property
    def weight(self) -> NMSparse:
        """W as `NMSparse`."""
        return NMSparse(self.values[...], self.codes[...], self.shape, self.n, self.m, self.share)
