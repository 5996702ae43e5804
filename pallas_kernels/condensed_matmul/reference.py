"""Product with a condensed matrix, written to be obviously right."""

import jax.numpy as jnp

from pallas_kernels._formats import Array
from pallas_kernels.condensed_matmul.format import Condensed


def matmul(x: Array, w: Condensed, *, precision=None) -> Array:
    """`x @ w`, summed in float32, in the dtype of x."""
    y = jnp.matmul(x, w.to_dense(), precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
