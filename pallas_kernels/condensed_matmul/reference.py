"""Product with a condensed matrix, written to be obviously right."""

import jax.numpy as jnp

from pallas_kernels._formats import Array
from pallas_kernels.condensed_matmul.format import Condensed


def matmul(x: Array, w: Condensed, *, precision=None) -> Array:
    """`x @ w`, summed in float32, in the dtype of x."""
    y = jnp.matmul(x, w.to_dense(), precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def gradients(x: Array, dy: Array, w: Condensed, *, precision=None) -> tuple[Array, Array]:
    """`dy w^T`, and the stored elements of `x^T dy`, in the dtypes of x and w."""
    dx = jnp.matmul(dy, w.to_dense().T, precision=precision, preferred_element_type=jnp.float32)
    full = jnp.matmul(x.T, dy, precision=precision, preferred_element_type=jnp.float32)
    dvalues = full.at[w.rows, w.outputs[:, None]].get(mode="fill", fill_value=0)
    return dx.astype(x.dtype), dvalues.astype(w.dtype)
