"""Products with a condensed matrix in C++, on all threads: see `pallas_kernels.cpu`.

The derivatives of a product are products: of x W, of dy W^T and of the stored elements of x^T dy each leads to
the other two, so that there are derivatives of any order in reverse mode.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu
from pallas_kernels._formats import Array
from pallas_kernels.condensed_matmul.format import Condensed

_DENSE_FROM = 0.25  # density from which a training step is faster with dense products


def why_not_unasked(w: Condensed) -> str | None:
    """The reason why it should not run where nobody named it, or None."""
    if w.fan_in >= _DENSE_FROM * w.shape[0]:
        return "dense products are faster at this density"
    return cpu.why_not_unasked()


def matmul(x: Array, w: Condensed, *, precision=None) -> Array:
    """`x @ w`, float32."""
    del precision
    y = _product(x, w.values, w.rows)
    if w.values.shape[0] == w.shape[1]:
        return y
    return jnp.zeros((x.shape[0], w.shape[1]), x.dtype).at[:, w.outputs].set(y)


def gradients(x: Array, dy: Array, w: Condensed, *, precision=None) -> tuple[Array, Array]:
    """`dy w^T`, and the stored elements of `x^T dy`."""
    del precision
    if w.values.shape[0] < w.shape[1]:
        dy = dy[:, w.outputs]
    return _transposed(w.shape[0], dy, w.values, w.rows), _sampled(x, dy, w.rows)


@jax.custom_vjp
def _product(x: Array, values: Array, rows: Array) -> Array:
    """`x W`, `[tokens, stored outputs]`."""
    return cpu.call("CondensedMatmul", (x.shape[0], values.shape[0]), x, values, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(inputs: int, dy: Array, values: Array, rows: Array) -> Array:
    """`dy W^T`, `[tokens, inputs]`."""
    return cpu.call("CondensedMatmulTransposed", (dy.shape[0], inputs), dy, values, rows)


@jax.custom_vjp
def _sampled(x: Array, dy: Array, rows: Array) -> Array:
    """The stored elements of `x^T dy`, in the shape of `rows`."""
    return cpu.call("CondensedValueGradient", rows.shape, x, dy, rows)


def _no_gradient(rows: Array) -> np.ndarray:
    return np.zeros(rows.shape, jax.dtypes.float0)


def _product_bwd(residuals, dy):
    x, values, rows = residuals
    return _transposed(x.shape[1], dy, values, rows), _sampled(x, dy, rows), _no_gradient(rows)


def _transposed_bwd(inputs, residuals, dx):
    dy, values, rows = residuals
    return _product(dx, values, rows), _sampled(dx, dy, rows), _no_gradient(rows)


def _sampled_bwd(residuals, dvalues):
    x, dy, rows = residuals
    dx = _transposed(x.shape[1], dy, dvalues, rows)
    return dx, _product(x, dvalues, rows), _no_gradient(rows)


_product.defvjp(lambda *args: (_product(*args), args), _product_bwd)
_transposed.defvjp(lambda n, *args: (_transposed(n, *args), args), _transposed_bwd)
_sampled.defvjp(lambda *args: (_sampled(*args), args), _sampled_bwd)
