"""N:M products in plain XLA, made for CPU.

With a pattern that 32 or more outputs share, those outputs take a dense product with the rows of x
that they use; one loop step gathers rows for one such set and 256 tokens, which keeps them in the
cache. The element-wise form never beats the dense product on a CPU (shuffling costs what is saved):
it runs the dense product.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._dispatch import vary_alike
from pallas_kernels._formats import Array
from pallas_kernels.nm_matmul import reference
from pallas_kernels.nm_matmul.format import NMSparse

_SHARED_FROM = 32  # outputs with a common pattern from which gathering pays
_TOKENS = 256  # at a time


def _dense_is_faster(w: NMSparse) -> bool:
    return w.share < _SHARED_FROM or w.n * 4 > w.m * 3


def _rows_of_sets(w: NMSparse) -> Array:
    """int32 `[sets, kept]`: the rows of x that each set of outputs uses."""
    return w.rows.reshape(-1, w.shape[1] // w.share).T


def _tiles(x: Array) -> Array:
    """`[tokens, in]` to `[tiles, in, tokens of a tile]`; tokens are filled up with zeros."""
    tile = min(_TOKENS, x.shape[0])
    x = jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))
    return x.reshape(-1, tile, x.shape[1]).transpose(0, 2, 1)


def matmul(x: Array, w: NMSparse, *, precision: lax.PrecisionLike = None, out_dtype=None) -> Array:
    """`x @ w`."""
    out_dtype = out_dtype or x.dtype
    if _dense_is_faster(w):
        return reference.matmul(x, w, precision=precision, out_dtype=out_dtype)
    rows = _rows_of_sets(w)

    def one_tile(xt):
        def one_set(of_set):
            r, v = of_set
            used = xt.at[r].get(mode="promise_in_bounds")
            return lax.dot(v, used, precision=precision, preferred_element_type=jnp.float32)

        return lax.map(one_set, (rows, w.values)).reshape(w.shape[1], -1).T.astype(out_dtype)

    y = lax.map(one_tile, _tiles(x))  # [tiles, tokens of a tile, out]
    return y.reshape(-1, w.shape[1])[: x.shape[0]]


def gradients(
    x: Array, dy: Array, w: NMSparse, *, precision: lax.PrecisionLike = None
) -> tuple[Array, Array]:
    """`dy w^T`, and the stored values of `x^T dy`."""
    if _dense_is_faster(w):
        return reference.gradients(x, dy, w, precision=precision)
    rows = _rows_of_sets(w)
    how: dict[str, Any] = dict(precision=precision, preferred_element_type=jnp.float32)

    def one_tile(dvalues, of_tile):
        xt, dyt = of_tile

        def one_set(dxt, of_set):
            r, v, d = of_set  # d: [share, tokens of a tile]
            dxt = dxt.at[r].add(lax.dot(v.T, d, **how), mode="promise_in_bounds")
            used = xt.at[r].get(mode="promise_in_bounds")
            return dxt, lax.dot_general(d, used, (((1,), (1,)), ((), ())), **how)

        zeros = vary_alike(jnp.zeros(xt.shape, jnp.float32), like=x)
        sets = dyt.reshape(-1, w.share, dyt.shape[1])
        dxt, more = lax.scan(one_set, zeros, (rows, w.values, sets))
        return dvalues + more, dxt.T.astype(x.dtype)

    zeros = vary_alike(jnp.zeros(w.values.shape, jnp.float32), like=x)
    dvalues, dx = lax.scan(one_tile, zeros, (_tiles(x), _tiles(dy)))
    return dx.reshape(-1, x.shape[1])[: x.shape[0]], dvalues.astype(w.dtype)
