"""`block_sparse_matmul`: checks its arguments, picks an implementation, defines the gradient."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._dispatch import check_operands, choose, vary_alike
from pallas_kernels._formats import Array, integer_places
from pallas_kernels.block_sparse_matmul import cpu, gpu, reference, tpu, xla
from pallas_kernels.block_sparse_matmul.format import BlockSparse


class Implementation(Protocol):
    """What a module (or any object) needs to be one of `IMPLEMENTATIONS`; only those that can be
    interpreted are given `interpret=True`."""

    @property
    def why_not(self) -> Callable[[Array, BlockSparse, bool], str | None]:
        """`why_not(x, w, interpret)`: the reason why it cannot take these arguments, or None."""
        ...

    @property
    def matmul(self) -> Callable[..., Array]:
        """`matmul(x, w, transposed=, precision=, out_dtype=)`: `x @ w`, or `x @ w.T`."""
        ...

    @property
    def weight_gradient(self) -> Callable[..., Array]:
        """`weight_gradient(x, dy, w, precision=)`: the stored blocks of `x^T dy`."""
        ...


IMPLEMENTATIONS: dict[str, Implementation] = {
    "tpu": tpu,
    "gpu": gpu,
    "cpu": cpu,
    "xla": xla,
    "reference": reference,
}
"""By name, the best first."""

_PLAIN = ("xla", "reference")  # `jnp` alone, which `vmap` takes as it is


@dataclasses.dataclass(frozen=True)
class _Static:
    """Everything about a product that is known when it is traced."""

    implementation: str
    shape: tuple[int, int]
    block_shape: tuple[int, int]
    precision: lax.PrecisionLike
    out_dtype: jnp.dtype
    interpret: bool


def block_sparse_matmul(
    x: Array,
    w: BlockSparse,
    *,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> Array:
    """The product `y = x w` with a block-sparse w: work and memory follow the stored blocks.

    Gradients with respect to x and to the stored blocks, `w.values`, cost the like; there are
    derivatives of any order in reverse mode, and none in forward mode (`jax.jvp`).
    A NaN in a row of x reaches that row of y only.

    Args:
      x: `[..., in]`.
      w: `[in, out]`, as `BlockSparse`. Operands of different dtypes are promoted as usual.
      implementation: "tpu" (Pallas: bfloat16 and float32, blocks of multiples of 128), "gpu"
        (Pallas Triton, compute capability 8.0: float16 too, blocks of multiples of 16), "cpu" (C++:
        float32, blocks of multiples of 16; see `pallas_kernels.cpu`), "xla" (anywhere; made for
        CPU), "reference" (builds the dense matrix); None takes the first of them that supports the
        arguments. XLA cannot partition "cpu", so None takes it where there is one device only.
      precision: of the products, as in `jax.lax.dot_general`. They are summed in float32. On a GPU
        float32 is multiplied as tf32 unless it is "highest".
      out_dtype: of y, by default the promoted dtype; `jnp.float32` keeps the sums of bfloat16
        operands as they are.
      interpret: run the TPU or GPU kernels in the interpreter, for tests on a machine without one.

    Returns:
      `[..., out]`.

    Raises:
      ValueError: if the shapes do not match, x is not floating point, or the named
        implementation does not support the arguments.

    The products and their transposes are those of Gale, Narayanan, Young, Zaharia, MegaBlocks:
    Efficient Sparse Training with Mixture-of-Experts (2023).

    >>> w = BlockSparse.from_dense(jnp.diag(jnp.arange(4.0)), block_shape=(2, 2))
    >>> block_sparse_matmul(jnp.ones((1, 4)), w)
    Array([[0., 1., 2., 3.]], dtype=float32)
    >>> loss = lambda values: block_sparse_matmul(jnp.ones((1, 4)), w.with_values(values)).sum()
    >>> jax.grad(loss)(w.values).shape
    (2, 2, 2)
    """
    if not isinstance(w, BlockSparse):
        raise ValueError(f"w must be a BlockSparse, not {type(w).__name__}")
    x = check_operands(x, w)
    dtype = jnp.result_type(x.dtype, w.dtype)
    out_dtype = jnp.dtype(dtype if out_dtype is None else out_dtype)
    x, w = jnp.asarray(x, dtype), w.astype(dtype)
    reasons = {name: module.why_not(x, w, interpret) for name, module in IMPLEMENTATIONS.items()}
    if implementation is None:
        reasons["cpu"] = reasons["cpu"] or cpu.why_not_unasked(w)
    name = choose(implementation, reasons)
    static = _Static(name, w.shape, w.block_shape, precision, out_dtype, interpret)
    if w.num_blocks == 0 or x.size == 0:
        return jnp.zeros((*x.shape[:-1], w.shape[1]), out_dtype)
    rows = jnp.reshape(x, (-1, w.shape[0]))
    y = _product(static, False, *vary_alike(rows, w.values, integer_places("places", w.places)))
    return jnp.reshape(jnp.asarray(y), (*x.shape[:-1], w.shape[1]))


# The derivatives of a product are products: of x W, of dy W^T and of the stored blocks of x^T dy each leads to
# the other two, so that there are derivatives of any order in reverse mode.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(static: _Static, transposed: bool, x: Array, values: Array, places: Array) -> Array:
    """`x W`, or `x W^T` if `transposed`, in the dtype `static.out_dtype`."""
    return _multiply(static, transposed, static.out_dtype, x, values, places)


def _product_fwd(static: _Static, transposed: bool, x: Array, values: Array, places: Array):
    return _product(static, transposed, x, values, places), (x, values, places)


def _product_bwd(static: _Static, transposed: bool, residuals, dy: Array):
    x, values, places = residuals
    static, dy = dataclasses.replace(static, out_dtype=x.dtype), dy.astype(x.dtype)
    dx = _product(static, not transposed, dy, values, places)
    pair = (dy, x) if transposed else (x, dy)
    dvalues = _sampled(static, *pair, values, places)
    return dx, dvalues, _no_gradient(places)


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sampled(static: _Static, x: Array, dy: Array, values: Array, places: Array) -> Array:
    """The stored blocks of `x^T dy`, in the shape and dtype of the values, which it does not depend on."""
    return _weight_gradient(static, x, dy, values, places)


def _sampled_fwd(static: _Static, x: Array, dy: Array, values: Array, places: Array):
    return _sampled(static, x, dy, values, places), (x, dy, places)


def _sampled_bwd(static: _Static, residuals, blocks: Array):
    x, dy, places = residuals
    dx = _product(static, True, dy, blocks, places)
    return (
        dx,
        _product(static, False, x, blocks, places),
        jnp.zeros_like(blocks),
        _no_gradient(places),
    )


_sampled.defvjp(_sampled_fwd, _sampled_bwd)


def _no_gradient(places: Array) -> np.ndarray:
    return np.zeros(places.shape, jax.dtypes.float0)


def _multiply(
    static: _Static, transposed: bool, out_dtype: jnp.dtype, x: Array, values: Array, places: Array
) -> Array:
    kwargs: dict[str, Any] = dict(
        transposed=transposed, precision=static.precision, out_dtype=out_dtype
    )
    if static.interpret:
        kwargs["interpret"] = True

    def run(x, values, places):
        w = BlockSparse(values, places, static.shape, static.block_shape)
        return IMPLEMENTATIONS[static.implementation].matmul(x, w, **kwargs)

    if static.implementation in _PLAIN:
        return run(x, values, places)
    kernel = jax.custom_batching.custom_vmap(run)

    @kernel.def_vmap
    def batched(size, is_batched, x, values, places):
        if is_batched == [True, False, False]:  # the same w: more rows of x
            y = _multiply(static, transposed, out_dtype, x.reshape(-1, x.shape[-1]), values, places)
            return y.reshape(size, -1, y.shape[-1]), True
        return _one_by_one(
            functools.partial(_multiply, static, transposed, out_dtype),
            is_batched,
            (x, values, places),
        )

    return kernel(x, values, places)


def _weight_gradient(static: _Static, x: Array, dy: Array, values: Array, places: Array) -> Array:
    def run(x, dy, values, places):
        w = BlockSparse(values, places, static.shape, static.block_shape)
        kwargs: dict[str, Any] = {"interpret": True} if static.interpret else {}
        module = IMPLEMENTATIONS[static.implementation]
        return module.weight_gradient(x, dy, w, precision=static.precision, **kwargs)

    if static.implementation in _PLAIN:
        return run(x, dy, values, places)
    kernel = jax.custom_batching.custom_vmap(run)

    @kernel.def_vmap
    def batched(size, is_batched, *args):
        return _one_by_one(functools.partial(_weight_gradient, static), is_batched, args)

    return kernel(x, dy, values, places)


def _one_by_one(function, is_batched, args):
    """The kernel for each element of the batch in turn, where one call cannot take them all."""
    batched = [a for a, b in zip(args, is_batched) if b]

    def one(elements):
        elements = iter(elements)
        return function(*(next(elements) if b else a for a, b in zip(args, is_batched)))

    return lax.map(one, batched), True
