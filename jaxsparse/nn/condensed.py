"""`CondensedLinear`: a linear layer that stores a few weights of each output, wherever they are."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxsparse.nn._linear import Pattern, SparseLinear, split_linear
from pallas_kernels import Condensed, condensed_matmul


class CondensedLinear(SparseLinear):
    r"""$y = x W + b$ with W `[in, out]` unstructured or of constant fan-in, stored per output.

    Made from a trained layer, by `from_dense` or `jaxsparse.compact`: outputs that are switched off
    store nothing, the others as many weights as the fullest of them. On CPU with a C++ compiler a
    training step is faster than dense from about 75 % sparsity; without one the forward product is
    from about 90 %, and gradients cost what dense ones do.

    Attributes:
      values: the stored weights, `[stored outputs, fan_in]`.
      rows, outputs: their places, int32 (see `pallas_kernels.Condensed`).

    Args:
      weight: W.
      bias: `[out]` or None.
      dtype: of the computation; default: that of x and the parameters, promoted.
      precision: of dense products, as in `jax.lax.dot_general`.
      implementation: see `pallas_kernels.condensed_matmul`.

    >>> w = Condensed.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
    >>> CondensedLinear(w)(jnp.ones((1, 3)))
    Array([[4., 2.]], dtype=float32)
    """

    product = staticmethod(condensed_matmul)

    rows: Pattern
    outputs: Pattern

    def __init__(
        self,
        weight: Condensed,
        bias: jax.Array | None = None,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        precision: lax.PrecisionLike = None,
        implementation: str | None = None,
    ):
        super().__init__(
            weight, bias, dtype=dtype, precision=precision, implementation=implementation
        )
        self.rows, self.outputs = Pattern(weight.rows), Pattern(weight.outputs)

    @classmethod
    def from_dense(
        cls,
        linear: nnx.Linear,
        mask: jax.Array | None = None,
        *,
        implementation: str | None = None,
    ) -> "CondensedLinear":
        """The layer that computes what `linear` does with its kernel masked.

        Args:
          linear: the dense layer.
          mask: bool `[in, out]`, what to keep; default: what is not zero.
          implementation: see `pallas_kernels.condensed_matmul`.

        Raises:
          ValueError: if linear is not an `nnx.Linear` or the mask has another shape.

        >>> dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> CondensedLinear.from_dense(dense, jnp.eye(4) > 0).values[...].shape
        (4, 1)
        """
        kernel, mask, bias = split_linear(linear, mask)
        w = Condensed.from_mask(kernel, mask)
        return cls(
            w,
            bias,
            dtype=linear.dtype,
            precision=linear.precision,
            implementation=implementation,
        )

    @property
    def weight(self) -> Condensed:
        """W as `Condensed`."""
        return Condensed(self.values[...], self.rows[...], self.outputs[...], self.shape)


def condense(kernel: jax.Array, mask: jax.Array | np.ndarray | None = None) -> Condensed:
    """A kernel `[..., in, out]` as SRigL leaves it, condensed; leading axes of a convolution are
    merged with its inputs. (Lasby et al., Dynamic sparse training with structured sparsity, 2024.)

    Args:
      kernel: concrete weights.
      mask: its mask; where the weights are not 0 if None.

    Returns:
      For `pallas_kernels.condensed_matmul`; outputs that are switched off are left out.

    Raises:
      ValueError: outputs with different numbers of inputs.

    >>> w = condense(jnp.array([[1.0, 0.0, 3.0], [0.0, 0.0, 4.0], [2.0, 0.0, 0.0]]))
    >>> w.values.tolist(), w.rows.tolist(), w.outputs.tolist()
    ([[1.0, 2.0], [3.0, 4.0]], [[0, 2], [0, 1]], [0, 2])
    """
    matrix = jnp.reshape(kernel, (-1, kernel.shape[-1]))
    kept = np.asarray(kernel if mask is None else mask).reshape(matrix.shape) != 0
    counts = kept.sum(0)
    least, most = counts[counts > 0].min(initial=kept.shape[0]), counts.max(initial=0)
    if least < most:
        raise ValueError(
            f"kernel: active outputs have from {least} to {most} inputs; "
            "give one with constant fan-in, as srigl or structure=FanIn() make it"
        )
    return Condensed.from_mask(matrix, kept)
