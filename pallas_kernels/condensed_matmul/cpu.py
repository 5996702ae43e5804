"""Products with a condensed matrix in C++, on all threads: see `pallas_kernels.cpu`."""

import jax.numpy as jnp

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
    y = cpu.call("CondensedMatmul", (x.shape[0], w.values.shape[0]), x, w.values, w.rows)
    if w.values.shape[0] == w.shape[1]:
        return y
    return jnp.zeros((x.shape[0], w.shape[1]), x.dtype).at[:, w.outputs].set(y)


def gradients(x: Array, dy: Array, w: Condensed, *, precision=None) -> tuple[Array, Array]:
    """`dy w^T`, and the stored elements of `x^T dy`."""
    del precision
    if w.values.shape[0] < w.shape[1]:
        dy = dy[:, w.outputs]
    dx = cpu.call("CondensedMatmulTransposed", x.shape, dy, w.values, w.rows)
    return dx, cpu.call("CondensedValueGradient", w.values.shape, x, dy, w.rows)
