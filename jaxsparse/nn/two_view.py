r"""Layers whose input gradient is taken with other weights than their output.

$$y = x w_f + bias, \qquad \partial x = \partial y\, w_b^T, \qquad \partial w_f = x^T \partial y.$$

With $w_b$ sparse along the outputs, both products of activations with weights can run on N:M
hardware, which wants the zeros along the contraction of each: Bi-Mask, BDWP, SLoPe.

`kernel`, the parameter, is $w_f$, exactly sparse like that of every other method. $w_b$ is a variable
of its own kind, `Backward`, that no optimizer trains. It follows the masks in the optimizer's state
when `refresh` says so, once after every update:

    model = ...                                  # with TwoViewLinear layers
    graphdef, params, views, rest = nnx.split(model, nnx.Param, Backward, ...)
    tx = jaxsparse.methods.bi_mask(optax.adamw(1e-3))
    opt_state = tx.init(params)
    params = jaxsparse.apply_masks(params, opt_state)
    views = refresh(views, params, opt_state)    # the two lines that the second view costs:
    ...                                          # here, and after each optax.apply_updates

or `refresh_model(model, opt_state)` with a model that is updated in place. Without a refresh $w_b$
stays what it was. The products are dense here: masks simulate what N:M hardware would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array, lax

from jaxsparse.engines.two_view import backward_views
from jaxsparse.targets import named_leaves

_lecun = nnx.initializers.lecun_normal()


class Backward(nnx.Variable):
    """The weights that a layer's input gradient is taken with. Not trained; see `refresh`."""


def two_view(product: Callable[[Array, Array], Array], x: Array, w_fwd: Array, w_bwd: Array):
    """`product(x, w_fwd)`, whose gradient with respect to x is that of `product(x, w_bwd)`.

    The gradient with respect to `w_fwd` is the ordinary, dense one; that of `w_bwd` is 0.

    Args:
      product: bilinear in both arguments (a matrix product, a convolution).
      x: activations.
      w_fwd, w_bwd: weights of one shape and dtype.
    """

    @jax.custom_vjp
    def apply(x, w_fwd, w_bwd):
        return product(x, w_fwd)

    def forward(x, w_fwd, w_bwd):
        return product(x, w_fwd), (x, w_fwd, w_bwd)

    def backward(saved, dy):
        x, w_fwd, w_bwd = saved
        (dx,) = jax.vjp(lambda x: product(x, w_bwd), x)[1](dy)
        (dw,) = jax.vjp(lambda w: product(x, w), w_fwd)[1](dy)
        return dx, dw, jnp.zeros_like(w_bwd)

    apply.defvjp(forward, backward)
    return apply(x, w_fwd, w_bwd)


def two_view_matmul(x: Array, w_fwd: Array, w_bwd: Array) -> Array:
    """`x [..., in] @ w_fwd [in, out]`, with `w_bwd [in, out]` in the gradient of x.

    >>> x, w = jnp.ones((1, 2)), jnp.eye(2)
    >>> y, pull_back = jax.vjp(lambda x: two_view_matmul(x, w, 3 * w), x)
    >>> y.tolist(), pull_back(jnp.ones((1, 2)))[0].tolist()
    ([[1.0, 1.0]], [[3.0, 3.0]])

    Raises:
      ValueError: weights of different shapes, or that do not fit x.
    """
    if w_fwd.shape != w_bwd.shape or w_fwd.ndim != 2 or x.shape[-1] != w_fwd.shape[0]:
        raise ValueError(
            f"two_view_matmul: x {x.shape}, w_fwd {w_fwd.shape}, w_bwd {w_bwd.shape}; expected "
            "[..., in], [in, out] and [in, out]"
        )
    return two_view(jnp.matmul, x, w_fwd, w_bwd)


class TwoViewLinear(nnx.Module):
    """A linear layer `[..., in] -> [..., out]` with two views of its kernel: the layer of Bi-Mask and
    of BDWP, which differ in the masks only (`jaxsparse.methods.bi_mask`, `bdwp`).

    Attributes:
      kernel: the weights of the forward product, `[in, out]`; a parameter.
      backward: those of the gradient of the input, `[in, out]`; the kernel until `refresh`.
      bias: `[out]`, or None.

    >>> layer = TwoViewLinear(8, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 8))).shape
    (2, 4)
    """

    kernel: nnx.Param
    backward: Backward
    bias: nnx.Param | None
    dtype: jax.typing.DTypeLike | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = _lecun,
        rngs: nnx.Rngs,
    ):
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        self.kernel = nnx.Param(kernel)
        self.backward = Backward(jnp.array(kernel, copy=True))
        self.bias = (
            nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else nnx.data(None)
        )
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        return _affine(self, x, two_view_matmul)


class TwoViewConv(nnx.Module):
    """A convolution `[batch, *space, in] -> [batch, *space, out]` with two views of its kernel
    `[*window, in, out]`; groups of the forward view run over input channels, those of the backward
    view over output channels. See `TwoViewLinear`.

    >>> layer = TwoViewConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 5, 4))).shape
    (2, 5, 5, 8)
    """

    kernel: nnx.Param
    backward: Backward
    bias: nnx.Param | None
    strides: tuple[int, ...]
    padding: str
    dtype: jax.typing.DTypeLike | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str = "SAME",
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = _lecun,
        rngs: nnx.Rngs,
    ):
        shape = (*kernel_size, in_features, out_features)
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        self.kernel = nnx.Param(kernel)
        self.backward = Backward(jnp.array(kernel, copy=True))
        self.bias = (
            nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else nnx.data(None)
        )
        window = len(kernel_size)
        self.strides = (strides,) * window if isinstance(strides, int) else tuple(strides)
        self.padding, self.dtype = padding, dtype

    def __call__(self, x: Array) -> Array:
        space = "DHW"[-len(self.strides) :]
        layout = (f"N{space}C", f"{space}IO", f"N{space}C")

        def product(x, w):
            return lax.conv_general_dilated(
                x, w, self.strides, self.padding, dimension_numbers=layout
            )

        return _affine(self, x, lambda x, f, b: two_view(product, x, f, b))


class SLoPeLinear(TwoViewLinear):
    r"""`TwoViewLinear` plus low-rank adapters $x L R / r$, for `jaxsparse.methods.slope`, which
    leaves them untouched until the last steps.

    $R$ (`adapter_out`, `[rank, out]`) is 0 at first and $L$ (`adapter_in`, `[in, rank]`) random, so
    that the adapters change nothing until they are trained. With `rank=0` there are none;
    `insert_adapters` adds them to a trained layer.

    >>> layer = SLoPeLinear(8, 4, rank=2, rngs=nnx.Rngs(0))
    >>> layer.adapter_in.shape, layer.adapter_out.shape
    ((8, 2), (2, 4))
    """

    rank: int
    adapter_in: nnx.Param | None
    adapter_out: nnx.Param | None

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, rngs: nnx.Rngs, **options: Any
    ):
        if rank < 0:
            raise ValueError(f"rank={rank}: must not be negative; 0 means no adapters")
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.rank = 0
        self.adapter_in = nnx.data(None)
        self.adapter_out = nnx.data(None)
        if rank:
            self.insert_adapters(rank, rngs)

    def insert_adapters(self, rank: int, rngs: nnx.Rngs) -> None:
        """Adds adapters of this rank; the output does not change. The optimizer's state must be made
        anew, or hold them already."""
        if rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1")
        features, out = self.kernel.shape
        dtype = self.kernel.dtype
        self.rank = rank
        self.adapter_in = nnx.Param(_lecun(rngs.params(), (features, rank), dtype))
        self.adapter_out = nnx.Param(jnp.zeros((rank, out), dtype))

    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        if self.adapter_in is None or self.adapter_out is None:
            return y
        low, high = self.adapter_in[...].astype(y.dtype), self.adapter_out[...].astype(y.dtype)
        return y + (x.astype(y.dtype) @ low) @ high / self.rank


def _affine(layer, x: Array, product) -> Array:
    bias = None if layer.bias is None else layer.bias[...]
    x, f, b, bias = dtypes.promote_dtype(
        (x, layer.kernel[...], layer.backward[...], bias), dtype=layer.dtype
    )
    y = product(x, f, b)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def refresh(views: Any, params: Any, opt_state: Any) -> Any:
    """The backward weights of every layer, from the optimizer's state: a pure function.

    Args:
      views: the `Backward` variables of the model, from `nnx.split(model, nnx.Param, Backward, ...)`
        or `nnx.state(model, Backward)` (or the pure dictionary of either).
      params: the parameters, of the form that the optimizer was given.
      opt_state: the state of a two-view method, alone or inside optax wrappers.

    Returns:
      New `views`: `where(b, z, 0)`; the kernel itself where the method leaves the layer dense.

    Raises:
      ValueError: `opt_state` holds no two-view state, `views` has a leaf without a kernel.
    """
    masks = backward_views(opt_state)
    kernels = dict(named_leaves(params))

    def one(name, old):
        if name.rpartition("/")[2] != "backward":
            raise ValueError(f"views: {name!r} is no Backward variable; split them from the model")
        name = f"{name[: -len('backward')]}kernel"
        if name not in kernels:
            raise ValueError(
                f"params: no leaf {name!r} for a layer of views; they hold {sorted(kernels)[:8]}"
            )
        w = kernels[name]
        if name in masks:
            b, raw = masks[name]
            w = jnp.where(b, w if raw is None else raw, jnp.zeros((), w.dtype))
        return jnp.asarray(w).astype(old.dtype)

    new = [one(name, old) for name, old in named_leaves(views)]
    return jax.tree.unflatten(jax.tree.structure(views), new)


def refresh_model(model: nnx.Module, opt_state: Any) -> None:
    """`refresh` in place, for a model that is trained in place (`nnx.Optimizer`, or `nnx.update`)."""
    views = nnx.state(model, Backward)
    nnx.update(model, refresh(views, nnx.state(model, nnx.Param), opt_state))


def step_cost(n: int, m: int) -> float:
    """Operations of a training step of a two-view n:m layer relative to a dense one: the forward
    product and the input gradient cost n/m each, the dense weight gradient 1, of 3.

    >>> step_cost(2, 8)
    0.5
    """
    return (2 * n / m + 1) / 3
