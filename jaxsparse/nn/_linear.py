"""What the sparse linear layers share."""

import jax
import jax.numpy as jnp
from flax import nnx


class Pattern(nnx.Variable):
    """Where the stored weights belong: saved and moved with the model, not trained."""


def split_linear(linear: nnx.Linear, mask: jax.Array | None):
    """Kernel, mask, bias and dtype of a dense layer, checked."""
    if not isinstance(linear, nnx.Linear):
        raise ValueError(f"linear must be a flax.nnx.Linear, not {type(linear).__name__}")
    kernel = linear.kernel[...]
    mask = kernel != 0 if mask is None else jnp.asarray(mask).astype(bool)
    if mask.shape != kernel.shape:
        raise ValueError(f"mask.shape={mask.shape} must be that of the kernel, {kernel.shape}")
    bias = None if linear.bias is None else linear.bias[...]
    return kernel, mask, bias, linear.dtype
