"""What the sparse linear layers share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Pattern(nnx.Variable):
    """Where the stored weights belong: saved and moved with the model, not trained."""


class SparseLinear(nnx.Module):
    """`x [..., in]` to `x W + b [..., out]`, where W is a sparse format and stored in pieces.

    A layer holds the trained `values` of W, the `Pattern` variables of its places, and what
    `weight` needs to put them together.
    """

    product: Callable[..., jax.Array]  # (x, w, implementation=, precision=) -> y

    @property
    def weight(self) -> Any:
        """W in its format."""
        raise NotImplementedError

    def _set_rest(self, bias, dtype, precision, implementation) -> None:
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype, self.precision, self.implementation = dtype, precision, implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`."""
        w, bias = self.weight, None if self.bias is None else self.bias[...]
        if self.dtype is not None:
            x, w = jnp.asarray(x, self.dtype), w.astype(self.dtype)
        y = type(self).product(x, w, implementation=self.implementation, precision=self.precision)
        return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def split_linear(linear: nnx.Linear, mask: jax.Array | None):
    """Kernel `[in, out]`, mask, and (bias, dtype, precision) of a dense layer, checked."""
    if not isinstance(linear, nnx.Linear):
        raise ValueError(f"linear must be a flax.nnx.Linear, not {type(linear).__name__}")
    kernel = linear.kernel[...]
    if kernel.ndim != 2:
        raise ValueError(f"linear.kernel.shape={kernel.shape} must be [in, out], not a stack")
    mask = kernel != 0 if mask is None else jnp.asarray(mask).astype(bool)
    if mask.shape != kernel.shape:
        raise ValueError(f"mask.shape={mask.shape} must be that of the kernel, {kernel.shape}")
    bias = None if linear.bias is None else linear.bias[...]
    return kernel, mask, (bias, linear.dtype, linear.precision)
