"""`nm_matmul`: checks its arguments, picks an implementation, defines the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._dispatch import check_operands, choose, target_platform, vary_alike
from pallas_kernels._formats import Array, integer_places
from pallas_kernels.nm_matmul import gpu, reference, tpu, xla
from pallas_kernels.nm_matmul.format import NMSparse


def nm_matmul(
    x: Array,
    w: NMSparse,
    *,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> Array:
    """The product `y = x w` with an N:M sparse w.

    What a user gets: on TPU and GPU, decoding (up to 64 rows of bfloat16 x) reads 0.56 of the dense
    bytes for 2:4 and 0.28 for 1:4; larger products run dense, as there are no sparse matrix units that
    JAX could use. On CPU, with a pattern shared by 32 or more outputs (`share`), 1:4 is faster than dense, and 2:4 is
    on one core but not on several; the element-wise form is not on any CPU and runs dense.

    Args:
      x: `[..., in]`.
      w: `[in, out]`, as `NMSparse`.
      implementation: "tpu", "gpu" (compute capability 8.0), "xla", "reference", or None for the best
        that supports the arguments.
      precision: of the products, as in `jax.lax.dot_general`; they are summed in float32.
      out_dtype: of y, by default the promoted dtype of x and w.
      interpret: run the TPU or GPU kernel in the interpreter.

    Returns:
      `[..., out]`. Gradients flow to x and to `w.values`.

    Raises:
      ValueError: if the shapes do not match, a dtype is not floating point, or the named
        implementation does not support the arguments.

    The format is that of Mishra et al., Accelerating Sparse Deep Neural Networks (2021).

    >>> w = NMSparse.from_dense(jnp.array([[1.0], [-4.0], [3.0], [2.0]]), 2, 4)
    >>> nm_matmul(jnp.ones((1, 4)), w)
    Array([[-1.]], dtype=float32)
    """
    if not isinstance(w, NMSparse):
        raise ValueError(f"w must be an NMSparse, not {type(w).__name__}")
    x = check_operands(x, w)
    dtype = jnp.result_type(x.dtype, w.dtype)
    x, w = jnp.asarray(x, dtype), w.astype(dtype)
    other = "interpret=True is about the Pallas kernels" if interpret else None
    reasons = {
        "tpu": tpu.why_not(x, w, interpret),
        "gpu": gpu.why_not(x, w, interpret),
        "xla": other,
        "reference": other,
    }
    if implementation is None and not interpret and target_platform() != "cpu":
        reasons["xla"] = "its gathers are made for CPU"
    name = choose(implementation, reasons)
    out_dtype = jnp.dtype(dtype if out_dtype is None else out_dtype)
    static = (name, w.shape, w.n, w.m, w.share, precision, out_dtype, interpret)
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], w.shape[1]), out_dtype)
    rows = jnp.reshape(x, (-1, w.shape[0]))
    y = _product(static, *vary_alike(rows, w.values, integer_places("codes", w.codes)))
    return jnp.reshape(jnp.asarray(y), (*x.shape[:-1], w.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x: Array, values: Array, codes: Array) -> Array:
    name, *form, precision, out_dtype, interpret = static
    w = NMSparse(values, codes, *form)
    if name in ("tpu", "gpu"):
        kernel = tpu if name == "tpu" else gpu
        return kernel.matmul(x, w, precision=precision, out_dtype=out_dtype, interpret=interpret)
    module = xla if name == "xla" else reference
    return module.matmul(x, w, precision=precision, out_dtype=out_dtype)


def _forward(static, x, values, codes):
    return _product(static, x, values, codes), (x, values, codes)


def _backward(static, residuals, dy):
    x, values, codes = residuals
    name, *form, precision, _, _ = static
    module = xla if name == "xla" else reference
    dx, dvalues = module.gradients(
        x, dy.astype(x.dtype), NMSparse(values, codes, *form), precision=precision
    )
    return dx, dvalues, np.zeros(codes.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)
