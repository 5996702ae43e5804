"""Product with a condensed matrix in plain XLA, made for CPU.

For a set of outputs, eight stored weights of each at a time: gather eight rows of x^T (tokens are
contiguous there), multiply, add. Written as one expression, XLA makes one loop of it in which the
gather is a plain vector load; a gather that is written out would cost more than the dense product.
From 16 % density on (and for a few rows of x) the dense product is faster and is what runs.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.condensed_matmul import reference
from pallas_kernels.formats.block_sparse import Array
from pallas_kernels.formats.condensed import Condensed

_UNROLL = 8
_OUTPUTS = 256  # at a time: their sums stay in the cache
_DENSE_FROM = 0.16
_FEW_ROWS = 8


def dense_is_faster(x: Array, w: Condensed) -> bool:
    return w.fan_in >= _DENSE_FROM * w.shape[0] or x.shape[0] < _FEW_ROWS


def matmul(x: Array, w: Condensed, *, precision=None) -> Array:
    """`x @ w`, summed in float32, in the dtype of x."""
    if dense_is_faster(x, w):
        return reference.matmul(x, w, precision=precision)
    tokens, outputs = x.shape[0], w.shape[1]
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

        return lax.scan(step, jnp.zeros((group, tokens), jnp.float32), of_set)[0]

    yt = lax.map(one_set, (rows, values)).reshape(sets * group, tokens)
    return yt[:outputs].T.astype(x.dtype)
