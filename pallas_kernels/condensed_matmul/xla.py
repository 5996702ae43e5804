"""Product with a condensed matrix in plain XLA, made for CPU.

For a set of outputs, eight stored weights of each at a time: gather eight rows of x^T (tokens are
contiguous there), multiply, add. Written as one expression, XLA makes one loop of it in which the
gather is a plain vector load; a gather that is written out would cost more than the dense product.
A few rows of x are taken one by one: gather from the row, multiply, sum.
From 16 % density on the dense product is faster and is what runs.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels._dispatch import vary_alike
from pallas_kernels._formats import Array
from pallas_kernels.condensed_matmul import reference
from pallas_kernels.condensed_matmul.format import Condensed

_UNROLL = 8
_OUTPUTS = 256  # at a time: their sums stay in the cache
_DENSE_FROM = 0.16
_FEW_ROWS = 8


def dense_is_faster(w: Condensed) -> bool:
    return w.fan_in >= _DENSE_FROM * w.shape[0]


def matmul(x: Array, w: Condensed, *, precision=None) -> Array:
    """`x @ w`, summed in float32, in the dtype of x."""
    if dense_is_faster(w):
        return reference.matmul(x, w, precision=precision)
    values, rows = jnp.where(w.filled, 0, w.values), jnp.minimum(w.rows, w.shape[0] - 1)
    w = dataclasses.replace(w, values=values, rows=rows)
    y = (_row_by_row if x.shape[0] < _FEW_ROWS else _set_by_set)(x, w).astype(x.dtype)
    if w.values.shape[0] == w.shape[1]:
        return y
    return jnp.zeros((x.shape[0], w.shape[1]), x.dtype).at[:, w.outputs].set(y)


gradients = reference.gradients  # dense products: what XLA makes of sampled ones is slower


def _row_by_row(x: Array, w: Condensed) -> Array:
    """`[tokens, stored outputs]`, float32."""
    values = w.values.astype(jnp.float32)

    def one(row):
        return (values * row.at[w.rows].get(mode="promise_in_bounds").astype(jnp.float32)).sum(1)

    return lax.map(one, x)


def _set_by_set(x: Array, w: Condensed) -> Array:
    """`[tokens, stored outputs]`, float32."""
    tokens, outputs = x.shape[0], w.values.shape[0]
    group = min(_OUTPUTS if tokens >= 128 else 64, outputs)
    sets, steps = -(-outputs // group), -(-w.fan_in // _UNROLL)
    pad = ((0, sets * group - outputs), (0, steps * _UNROLL - w.fan_in))
    # [sets, steps, group, unroll]
    cut = lambda a: jnp.pad(a, pad).reshape(sets, group, steps, _UNROLL).transpose(0, 2, 1, 3)
    rows, values = cut(w.rows), cut(w.values)
    xt = x.T

    def one_set(of_set):
        def step(total, of_step):
            r, v = of_step
            for u in range(_UNROLL):
                row = xt.at[r[:, u]].get(mode="promise_in_bounds")
                total += v[:, u, None].astype(jnp.float32) * row.astype(jnp.float32)
            return total, None

        zeros = vary_alike(jnp.zeros((group, tokens), jnp.float32), like=x)
        return lax.scan(step, zeros, of_set)[0]

    yt = lax.map(one_set, (rows, values)).reshape(sets * group, tokens)
    return yt[:outputs].T
