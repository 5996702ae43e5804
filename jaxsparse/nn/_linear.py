"""What the sparse linear layers share."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import BlockSparse, Condensed, NMSparse


class Pattern(nnx.Variable):
    """Where the stored weights belong: saved and moved with the model, not trained."""


class Scores(nnx.Variable):
    """What the parts of a weight are worth, stored or not: a variable whose gradient counts, not its
    value (see `pallas_kernels.score_blocks` and `score_inputs`)."""


Trained = (nnx.Param, Pattern, Scores)
"""The filter of all variables that `jaxsparse.stored` is given: of an `nnx.Optimizer`, of gradients."""


class SparseLinear(nnx.Module):
    """`x [..., in]` to `x W + b [..., out]`, where W is a sparse format and stored in pieces.

    A layer of a format adds the `Pattern` variables of its places, and `weight`, which puts W together.

    Attributes:
      values: the trained values of W, in the shape of its format.
      bias: `[out]`, or None.
      shape: `(in, out)`.
      dtype: of the computation; None: that of x and the parameters, promoted.
      precision: of the product, as in `jax.lax.dot_general`.
      implementation: of the product; None: the best that supports the arguments.
    """

    product: ClassVar[Callable[..., jax.Array]]  # (x, w, implementation=, precision=) -> y

    values: nnx.Param
    bias: nnx.Param | None
    shape: tuple[int, int]
    dtype: jax.typing.DTypeLike | None
    precision: lax.PrecisionLike
    implementation: str | None

    def __init__(
        self,
        weight: BlockSparse | NMSparse | Condensed,
        bias: jax.Array | None,
        *,
        dtype: jax.typing.DTypeLike | None,
        precision: lax.PrecisionLike,
        implementation: str | None,
    ):
        self.values = nnx.Param(weight.values)
        self.bias = None if bias is None else nnx.Param(bias)
        self.shape = weight.shape
        self.dtype, self.precision, self.implementation = dtype, precision, implementation

    def _multiply(self, x: jax.Array, w: BlockSparse | NMSparse | Condensed) -> jax.Array:
        return type(self).product(
            x, w, implementation=self.implementation, precision=self.precision
        )

    @property
    def weight(self) -> BlockSparse | NMSparse | Condensed:
        """W in its format."""
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`."""
        w, bias = self.weight, None if self.bias is None else self.bias[...]
        if self.dtype is not None:
            x, w = jnp.asarray(x, self.dtype), w.astype(self.dtype)
        y = self._multiply(x, w)
        return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def count_candidates(candidates: float | int, rows: int, what: str) -> int:
    """How many of the `rows` are scored.

    Raises:
      ValueError: a share outside of (0, 1], or a number outside of 1 to `rows`.
    """
    if isinstance(candidates, float) and 0.0 < candidates <= 1.0:
        return max(1, round(candidates * rows))
    if type(candidates) is int and 1 <= candidates <= rows:
        return candidates
    raise ValueError(
        f"candidates={candidates!r}: give a share of the {rows} {what}, a float in (0, 1], or their number, "
        f"an integer from 1 to {rows}"
    )


def split_linear(
    linear: nnx.Linear, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Kernel `[in, out]`, mask and bias of a dense layer, checked.

    Raises:
      ValueError: if linear is not an `nnx.Linear`, its kernel is a stack, or the mask has another
        shape.
    """
    if not isinstance(linear, nnx.Linear):
        raise ValueError(f"linear must be a flax.nnx.Linear, not {type(linear).__name__}")
    kernel = linear.kernel[...]
    if kernel.ndim != 2:
        raise ValueError(f"linear.kernel.shape={kernel.shape} must be [in, out], not a stack")
    mask = kernel != 0 if mask is None else jnp.asarray(mask).astype(bool)
    if mask.shape != kernel.shape:
        raise ValueError(f"mask.shape={mask.shape} must be that of the kernel, {kernel.shape}")
    return kernel, mask, None if linear.bias is None else linear.bias[...]
