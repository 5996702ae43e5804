"""`condensed_matmul`: checks its arguments, picks an implementation, defines the gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import cpu as kernels
from pallas_kernels._dispatch import check_operands, choose, target_platform, vary_alike
from pallas_kernels._formats import Array, integer_places
from pallas_kernels._probe import probed
from pallas_kernels.condensed_matmul import cpu, reference, xla
from pallas_kernels.condensed_matmul.format import Condensed


def condensed_matmul(
    x: Array,
    w: Condensed,
    *,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    """The product `y = x w` with an unstructured w, or one of constant fan-in.

    What a user gets: on CPU with a C++ compiler the product and both gradients cost about twice what
    the stored weights would in a dense product; without one the forward product in XLA is faster than
    dense from about 90 % sparsity, and gradients cost what dense ones do. On TPU and GPU it runs
    dense: what is saved there is memory.

    Args:
      x: `[..., in]`.
      w: `[in, out]`, as `Condensed`.
      implementation: "cpu" (C++, float32; see `pallas_kernels.cpu`), "xla" (made for CPU too),
        "reference" (builds the dense matrix); None takes the first of them that supports the
        arguments. XLA cannot partition "cpu", so None takes it where there is one device only.
      precision: of dense products, as in `jax.lax.dot_general`.

    Returns:
      `[..., out]`. Gradients flow to x and to `w.values`: derivatives of any order in reverse mode, none in
      forward mode (`jax.jvp`).

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
    dtype = jnp.result_type(x.dtype, w.dtype)
    reasons = {"cpu": kernels.why_not(dtype), "xla": None, "reference": None}
    if implementation is None:
        reasons.update(cpu=reasons["cpu"] or cpu.why_not_unasked(w), xla=not_cpu)
    name = choose(implementation, reasons)
    for field, places in (("rows", w.rows), ("outputs", w.outputs)):
        integer_places(field, places)
    if w.values.size == 0:
        return jnp.zeros((*x.shape[:-1], w.shape[1]), dtype)
    rows, w = jnp.reshape(x, (-1, w.shape[0])).astype(dtype), w.astype(dtype)
    rows, w = vary_alike(rows, w)
    y = _product((name, precision), rows, w.values, dataclasses.replace(w, values=None))
    return jnp.reshape(jnp.asarray(y), (*x.shape[:-1], w.shape[1]))


def score_inputs(
    x: Array,
    y: Array,
    probe: Array,
    due: Array,
    outputs: Array,
    *,
    precision: lax.PrecisionLike = None,
) -> Array:
    """y, unchanged; but the gradient of `probe` is that of the weight that made y of x, stored or not, at
    the inputs that are due: `x[due]^T dy`, computed in the backward pass, and only where some are.

    Args:
      x: `[..., in]`.
      y: `[..., out]`, a product of x with a weight `[in, out]`.
      probe: float32 `[scored inputs, stored outputs]`; its values are not read.
      due: integers `[in]`, not 0 where an input is to be scored: at as many as the probe has rows, or
        nowhere.
      outputs: int32 `[stored outputs]`, which of y are scored.
      precision: of the product `x^T dy`, which is summed in float32.

    Raises:
      ValueError: a probe or `due` of another shape, a `due` that holds no integers.

    >>> x, w = jnp.array([[1.0, 4.0, 2.0]]), jnp.ones((3, 2))
    >>> loss = lambda probe: score_inputs(
    ...     x, x @ w, probe, jnp.array([0, 1, 1]), jnp.arange(2)
    ... ).sum()
    >>> jax.grad(loss)(jnp.zeros((2, 2))).tolist()
    [[4.0, 4.0], [2.0, 2.0]]
    """
    if probe.ndim != 2 or probe.shape[1] != outputs.shape[0] or due.shape != x.shape[-1:]:
        raise ValueError(
            f"probe.shape={probe.shape}, due.shape={due.shape}: they must be [scored inputs, "
            f"{outputs.shape[0]}] and {x.shape[-1:]}"
        )
    return probed(_input_scores, precision, x, y, probe, due, integer_places("outputs", outputs))


def _input_scores(precision, x: Array, dy: Array, at: Array | None, outputs: Array | None) -> Array:
    x, dy = (jnp.reshape(a, (-1, a.shape[-1])) for a in (x, dy))
    if at is not None:
        x = x[:, at]
    if outputs is not None and outputs.shape[0] < dy.shape[1]:
        dy = dy[:, outputs]
    return jnp.matmul(x.T, dy, precision=precision, preferred_element_type=jnp.float32)


_MODULES = {"cpu": cpu, "xla": xla, "reference": reference}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x: Array, values: Array, pattern: Condensed) -> Array:
    name, precision = static
    w = dataclasses.replace(pattern, values=values)
    return _MODULES[name].matmul(x, w, precision=precision)


def _forward(static, x, values, pattern):
    return _product(static, x, values, pattern), (x, values, pattern)


def _backward(static, residuals, dy):
    x, values, pattern = residuals
    name, precision = static
    w = dataclasses.replace(pattern, values=values)
    dx, dvalues = _MODULES[name].gradients(x, dy.astype(x.dtype), w, precision=precision)
    return dx, dvalues, jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), pattern)


_product.defvjp(_forward, _backward)
