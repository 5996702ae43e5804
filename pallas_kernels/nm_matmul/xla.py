"""N:M products in plain XLA, made for CPU.

With a pattern that 32 or more outputs share, those outputs take a dense product with the rows of x
that they use; one loop step gathers rows for one such set, which keeps them in the cache. The
element-wise form never beats the dense product on a CPU (shuffling costs what is saved): it runs
the dense product.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats.block_sparse import Array
from pallas_kernels.formats.nm import NMSparse
from pallas_kernels.nm_matmul import reference

_SHARED_FROM = 32  # outputs with a common pattern from which gathering pays


def _dense_is_faster(w: NMSparse) -> bool:
    return w.share < _SHARED_FROM or w.n * 4 > w.m * 3


def _by_set(w: NMSparse) -> tuple[Array, Array]:
    """Rows `[sets, kept]` and values `[sets, kept, share]` of each set of outputs."""
    sets, kept = w.shape[1] // w.share, w.values.shape[0] * w.values.shape[1]
    rows = w.rows.reshape(kept, sets).T
    return rows, w.values.reshape(kept, sets, w.share).transpose(1, 0, 2)


def matmul(x: Array, w: NMSparse, *, precision: lax.PrecisionLike = None, out_dtype=None) -> Array:
    """`x @ w`."""
    out_dtype = out_dtype or x.dtype
    if _dense_is_faster(w):
        return reference.matmul(x, w, precision=precision, out_dtype=out_dtype)
    rows, values = _by_set(w)
    xt = x.T

    def one(of_set):
        r, v = of_set
        return lax.dot_general(
            v,
            xt.at[r].get(mode="promise_in_bounds"),
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    yt = lax.map(one, (rows, values))  # [sets, share, tokens]
    return yt.reshape(w.shape[1], -1).T.astype(out_dtype)


def gradients(
    x: Array, dy: Array, w: NMSparse, *, precision: lax.PrecisionLike = None
) -> tuple[Array, Array]:
    """`dy w^T`, and the stored values of `x^T dy`."""
    if _dense_is_faster(w):
        return reference.gradients(x, dy, w, precision=precision)
    rows, values = _by_set(w)
    xt, dys = x.T, dy.T.reshape(-1, w.share, dy.shape[0])
    how: dict[str, Any] = dict(precision=precision, preferred_element_type=jnp.float32)

    def one(dxt, of_set):
        r, v, d = of_set
        dxt = dxt.at[r].add(lax.dot(v, d, **how), mode="promise_in_bounds")
        gathered = xt.at[r].get(mode="promise_in_bounds")
        return dxt, lax.dot_general(gathered, d, (((1,), (1,)), ((), ())), **how)

    dxt, dvalues = lax.scan(one, jnp.zeros(xt.shape, jnp.float32), (rows, values, dys))
    dvalues = dvalues.transpose(1, 0, 2).reshape(w.values.shape)
    return dxt.T.astype(x.dtype), dvalues.astype(w.dtype)
