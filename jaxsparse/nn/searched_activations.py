r"""SAFS: activations to choose from for each layer of a sparse network, with scales that are trained afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


def symlog(x: Array) -> Array:
    r"""$sign(x) \ln(|x| + 1)$."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    r"""$sign(x) (e^{|x|} - 1)$, the inverse of `symlog`; of |x| above 30, where it would overflow soon, a line."""
    size = jnp.abs(x)
    return jnp.sign(x) * (jnp.expm1(jnp.minimum(size, 30.0)) + jnp.maximum(size - 30.0, 0.0))


def acon(x: Array) -> Array:
    r"""ACON-C with $p_1 = 1.25$, $p_2 = -0.25$, $p_3 = 1$: $(p_1 - p_2)\, x\, \sigma(p_3 (p_1 - p_2) x) + p_2 x$."""
    return 1.5 * x * jax.nn.sigmoid(1.5 * x) - 0.25 * x


def tanh_soft_1(x: Array) -> Array:
    r"""TanhSoft-1, $\tanh(x)\, softplus(x)$."""
    return jnp.tanh(x) * jax.nn.softplus(x)


def tanh_soft_2(x: Array) -> Array:
    r"""TanhSoft-2, $x \tanh(e^x)$."""
    return x * jnp.tanh(jnp.exp(jnp.minimum(x, 30.0)))


def srs(x: Array) -> Array:
    r"""Soft-root-sign, $x / (x/2 + e^{-x/3})$."""
    return x / (x / 2 + jnp.exp(-jnp.maximum(x, -60.0) / 3))


CANDIDATES: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "hardswish": jax.nn.hard_swish,
    "swish": jax.nn.swish,
    "tanh_soft_1": tanh_soft_1,
    "tanh_soft_2": tanh_soft_2,
    "acon": acon,
    "gelu": jax.nn.gelu,
    "srs": srs,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "logsigmoid": jax.nn.log_sigmoid,
    "symlog": symlog,
    "symexp": symexp,
}
"""What a layer may have. Of `softplus` and `logsigmoid` f(0) is not 0: a pruned unit then still speaks, and
activations are dense."""


class ScaledActivation(nnx.Module):
    r"""$p_1 f(p_2 x)$, f a name of `CANDIDATES`; $p_1$ and $p_2$ start at 1. They are frozen while f is searched
    (leave them out of the optimizer) and trained afterwards.

    Source: Loni et al., "Learning activation functions for sparse neural networks", 2023; the search is
    `experiments.tickets.activation_search`.

    >>> ScaledActivation("relu")(jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]

    Raises:
      ValueError: an unknown name.
    """

    def __init__(self, name: str):
        if name not in CANDIDATES:
            raise ValueError(f"name={name!r}: use one of {sorted(CANDIDATES)}")
        self.name = name
        self.outer = nnx.Param(jnp.ones(()))
        self.inner = nnx.Param(jnp.ones(()))

    def __call__(self, x: Array) -> Array:
        scale = lambda p: p[...].astype(x.dtype)
        return scale(self.outer) * CANDIDATES[self.name](scale(self.inner) * x)
