"""Probes: variables whose gradient counts, not their value. Numbers that only a backward pass can compute
(what the gradient of a weight that is not stored would be) leave it as the gradient of a probe."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._dispatch import vary_alike
from pallas_kernels._formats import Array

Score = Callable[[Any, Array, Array, Array | None, Array | None], Array]
"""`score(static, x, dy, at, places)`: the gradient of a probe, for x and dy of one dtype; `at` numbers the rows of
it, None: all."""


def probed(
    score: Score, static: Any, x: Array, y: Array, probe: Array, due: Array, places: Any = None
) -> Array:
    """y, unchanged; but the gradient of `probe` is what `score` makes of x and the gradient of y.

    It is computed in the backward pass, and only where some of `due` is not 0; else it is 0 and costs
    nothing.

    Args:
      score: see `Score`.
      static: what it depends on besides, hashable.
      x, y: arrays.
      probe: `[n, ...]`; its values are not read.
      due: integers `[rows]`, not 0 at the n rows that are scored.
      places: integers for `score`, or None.

    Raises:
      ValueError: a `due` that is no vector of integers, or shorter than the probe.
    """
    if due.ndim != 1 or not jnp.issubdtype(due.dtype, jnp.integer):
        raise ValueError(f"due has shape {due.shape}, dtype {due.dtype}: give a vector of integers")
    if probe.shape[0] > due.shape[0]:
        raise ValueError(f"probe.shape={probe.shape} has more rows than due, {due.shape[0]}")
    x = lax.stop_gradient(jnp.asarray(x))
    return _probed(score, static, *vary_alike(x, jnp.asarray(y), probe, due, places))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _probed(score, static, x: Array, y: Array, probe: Array, due: Array, places: Any) -> Array:
    del score, static, x, probe, due, places
    return y


def _forward(score, static, x, y, probe, due, places):
    return _probed(score, static, x, y, probe, due, places), (x, probe, due, places)


def _backward(score, static, residuals, dy):
    x, probe, due, places = residuals
    rows, all_rows = probe.shape[0], probe.shape[0] == due.shape[0]

    def run(x, dy, due, places):
        at = None if all_rows else jnp.nonzero(due, size=rows, fill_value=0)[0]
        dtype = jnp.result_type(x, dy)  # that of x alone may not hold small gradients
        found = score(static, x.astype(dtype), dy.astype(dtype), at, places)
        return vary_alike(found, like=(x, dy)).astype(probe.dtype)

    none = lambda x, dy, *_: vary_alike(jnp.zeros(probe.shape, probe.dtype), like=(x, dy))
    found = lax.cond(jnp.any(due != 0), run, none, x, dy, due, places)
    no_gradient = lambda a: np.zeros(a.shape, jax.dtypes.float0)
    return jnp.zeros_like(x), dy, found, no_gradient(due), jax.tree.map(no_gradient, places)


_probed.defvjp(_forward, _backward)
