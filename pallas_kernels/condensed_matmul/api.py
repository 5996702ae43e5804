"""`condensed_matmul`: checks its arguments, picks an implementation, defines the gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._dispatch import check_operands, choose, target_platform, vary_alike
from pallas_kernels._formats import Array, integer_places
from pallas_kernels.condensed_matmul import reference, xla
from pallas_kernels.condensed_matmul.format import Condensed


def condensed_matmul(
    x: Array,
    w: Condensed,
    *,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    """The product `y = x w` with an unstructured w, or one of constant fan-in.

    What a user gets: on CPU the forward product is faster than dense from about 90 % sparsity (and
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
    for field, places in (("rows", w.rows), ("outputs", w.outputs)):
        integer_places(field, places)
    rows, w = jnp.reshape(x, (-1, w.shape[0])).astype(dtype), w.astype(dtype)
    if w.values.size == 0:
        return jnp.zeros((*x.shape[:-1], w.shape[1]), dtype)
    rows, w = vary_alike(rows, w)
    y = _product((name, precision), rows, w.values, dataclasses.replace(w, values=None))
    return jnp.reshape(jnp.asarray(y), (*x.shape[:-1], w.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x: Array, values: Array, pattern: Condensed) -> Array:
    name, precision = static
    module = xla if name == "xla" else reference
    return module.matmul(x, dataclasses.replace(pattern, values=values), precision=precision)


def _forward(static, x, values, pattern):
    return _product(static, x, values, pattern), (x, values, pattern)


def _backward(static, residuals, dy):
    x, values, pattern = residuals
    product = functools.partial(jnp.matmul, precision=static[1], preferred_element_type=jnp.float32)
    dense = dataclasses.replace(pattern, values=values).to_dense()
    dx = product(dy, dense.T).astype(x.dtype)
    dvalues = product(x.T, dy)[pattern.rows, pattern.outputs[:, None]].astype(values.dtype)
    return dx, dvalues, jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), pattern)


_product.defvjp(_forward, _backward)
