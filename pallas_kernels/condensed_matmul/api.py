"""`condensed_matmul`: checks its arguments, picks an implementation, defines the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._dispatch import check_operands, choose, target_platform
from pallas_kernels.condensed_matmul import reference, xla
from pallas_kernels.formats.block_sparse import Array
from pallas_kernels.formats.condensed import Condensed


def condensed_matmul(
    x: Array,
    w: Condensed,
    *,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    """The product `y = x w` with an unstructured w, or one of constant fan-in.

    What a user gets: on CPU the forward product is faster than dense from about 85 % sparsity (and
    runs dense below); gradients are computed from dense products, exact but not faster. On TPU and
    GPU it runs dense: what is saved there is memory.

    Args:
      x: `[..., in]`.
      w: `[in, out]`, as `Condensed`.
      implementation: "xla" (made for CPU), "reference" (builds the dense matrix), or None.
      precision: of dense products, as in `jax.lax.dot_general`.

    Returns:
      `[..., out]`. Gradients flow to x and to `w.values`.

    Raises:
      ValueError: if the shapes do not match, a dtype is not floating point, or the implementation
        is unknown.

    >>> w = Condensed.from_dense(jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    >>> condensed_matmul(jnp.ones((1, 3)), w)
    Array([[3., 3.]], dtype=float32)
    """
    if not isinstance(w, Condensed):
        raise ValueError(f"w must be a Condensed, not {type(w).__name__}")
    x = check_operands(x, w)
    not_cpu = None if target_platform() == "cpu" else "its loops are made for CPU"
    why_not_xla = not_cpu if implementation is None else None
    name = choose(implementation, {"xla": why_not_xla, "reference": None})
    dtype = jnp.result_type(x.dtype, w.dtype)
    rows = jnp.reshape(x, (-1, w.shape[0])).astype(dtype)
    y = _product((name, w.shape, precision), rows, w.values.astype(dtype), w.rows)
    return jnp.reshape(jnp.asarray(y), (*x.shape[:-1], w.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x: Array, values: Array, rows: Array) -> Array:
    name, shape, precision = static
    module = xla if name == "xla" else reference
    return module.matmul(x, Condensed(values, rows, shape), precision=precision)


def _forward(static, x, values, rows):
    return _product(static, x, values, rows), (x, values, rows)


def _backward(static, residuals, dy):
    x, values, rows = residuals
    _, shape, precision = static
    product = functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)
    dx = product(dy, Condensed(values, rows, shape).to_dense().T).astype(x.dtype)
    full = product(x.T, dy)
    dvalues = full[rows, jnp.arange(shape[1])[:, None]].astype(values.dtype)
    return dx, dvalues, np.zeros(rows.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)
