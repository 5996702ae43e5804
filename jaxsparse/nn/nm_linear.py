"""`NMLinear`: a linear layer that stores N of every M weights along its inputs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxsparse.nn._linear import Pattern, SparseLinear, split_linear
from pallas_kernels import NMSparse, nm_matmul


class NMLinear(SparseLinear):
    r"""$y = x W + b$ with at most N nonzeros in every M consecutive rows of W `[in, out]`.

    The stored values are parameters, their places are not. What is gained, and where, is said in
    `pallas_kernels.nm_matmul`: memory everywhere; time in decoding on TPU, and with 1:4 on CPU if
    `share` (32 or more) outputs have one pattern; the element-wise form runs dense on CPU.

    Attributes:
      values: the stored values (see `pallas_kernels.NMSparse`).
      codes: their packed places, int32.
      n, m, share: as below.

    Args:
      in_features: size of the last axis of x; a multiple of M.
      out_features: size of the last axis of y; a multiple of `share`.
      n: N.
      m: M.
      share: outputs with a common pattern.
      weight: W, in place of a random one (then without `rngs`).
      use_bias: add a bias, zero at first.
      dtype: of the computation; default: that of x and the parameters, promoted.
      param_dtype: of the parameters.
      precision: of the product, as in `jax.lax.dot_general`.
      implementation: see `pallas_kernels.nm_matmul`.
      rngs: key for the weights (`params`), of which the largest are kept.

    Raises:
      ValueError: without `rngs` and `weight`, or if the weight is of another kind.

    >>> layer = NMLinear(64, 32, n=2, m=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 64))).shape, layer.values[...].shape
    ((3, 32), (2, 16, 32))
    """

    product = staticmethod(nm_matmul)

    codes: Pattern
    n: int
    m: int
    share: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: int,
        m: int,
        share: int = 1,
        weight: NMSparse | None = None,
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        shape = in_features, out_features
        if weight is None:
            if rngs is None:
                raise ValueError("rngs=None: give a key, or a weight")
            scale = (m / (n * in_features)) ** 0.5
            dense = scale * jax.random.normal(rngs.params(), shape, param_dtype)
            weight = NMSparse.from_dense(dense, n, m, share=share)
        kind = weight.shape, weight.n, weight.m, weight.share
        if kind != (shape, n, m, share):
            raise ValueError(f"weight has (shape, n, m, share)={kind}, not {(shape, n, m, share)}")
        bias = jnp.zeros(out_features, param_dtype) if use_bias else None
        super().__init__(
            weight, bias, dtype=dtype, precision=precision, implementation=implementation
        )
        self.codes = Pattern(weight.codes)
        self.n, self.m, self.share = n, m, share

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
        kernel, mask, bias = split_linear(linear, mask)
        layer = cls(
            *kernel.shape,
            n=n,
            m=m,
            share=share,
            weight=NMSparse.from_mask(kernel, mask, n, m, share=share),
            use_bias=bias is not None,
            dtype=linear.dtype,
            param_dtype=kernel.dtype,
            precision=linear.precision,
            implementation=implementation,
        )
        if bias is not None and layer.bias is not None:
            layer.bias[...] = bias
        return layer

    @property
    def weight(self) -> NMSparse:
        """W as `NMSparse`."""
        return NMSparse(self.values[...], self.codes[...], self.shape, self.n, self.m, self.share)
