r"""How good a choice was: density, recall, and the error that recall bounds.

The kept set's probability under dense attention is $r_i = e^{L_i^{kept} - L_i^{all}}$: both log-sum-exps come from
attention itself, so recall is exact for any mask, and costs nothing but L of some rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.attention.layout import Layout
from jaxsparse.attention.mass import row_lse
from pallas_kernels import BlockMask, block_sparse_attention


class Info(NamedTuple):
    """What a layer reports about its choice.

    Attributes:
      density: kept blocks over those that the pattern without a choice would read (causal area, not the square),
        float32 `[batch, heads of the mask]`.
      recall: the mean of $r_i$ over the sampled queries, float32 `[batch, heads]`.
      bound: the mean of $2 (1 - r_i) \\max_j \\|v_j\\|$, which the error $\\|o'_i - o_i\\|$ of these queries does not exceed.
      dropped: blocks that did not fit the capacity, int32 `[batch, heads of the mask]`.
    """

    density: Array
    recall: Array
    bound: Array
    dropped: Array


def density(mask: BlockMask, *, causal: bool = True) -> Array:
    """Kept blocks over visible ones, float32 `[batch, heads]`; 1 for dense attention, causal or not.

    >>> from pallas_kernels import Grid
    >>> density(BlockMask.causal(Grid(512))).tolist()
    [[1.0]]
    """
    if not isinstance(mask, BlockMask):
        raise ValueError(
            f"mask={mask} is no BlockMask; the rule that keeps a share of blocks is attention.select.density, or "
            "density= of a predictor"
        )
    return mask.counts / int(Layout(causal=causal).visible(mask.grid).sum())


def sampled_rows(q_len: int, samples: int) -> np.ndarray:
    """Rows that stand for all: evenly spaced, the last one among them."""
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    number = min(samples, q_len)
    return (np.arange(1, number + 1) * q_len) // number - 1


def recall(
    q: Array,
    k: Array,
    kept_lse: Array,
    *,
    causal: bool = True,
    samples: int | None = 64,
    scale: float | None = None,
) -> Array:
    r"""$r_i = e^{L_i^{kept} - L_i}$ of sampled queries, float32 `[batch, heads, samples]`, at most 1.

    Args:
      q, k: as of `block_sparse_attention`.
      kept_lse: its log-sum-exp, `[batch, heads, q_len]`.
      causal: what dense attention would see.
      samples: how many evenly spaced queries; None: all of them.
      scale: of the scores.
    """
    rows = sampled_rows(q.shape[2], q.shape[2] if samples is None else samples)
    lse = row_lse(q, k, jnp.asarray(rows), causal=causal, scale=scale)
    return jnp.exp(jnp.minimum(kept_lse[:, :, rows] - lse, 0.0))


def error_bound(recall_: Array, v: Array) -> Array:
    r"""$2 (1 - r_i) \max_j \|v_j\|$: no selection whose weights are renormalised errs more.

    The kept weights become $p_j / r$, so $o' - o = (1/r - 1) \sum_{kept} p_j v_j - \sum_{dropped} p_j v_j$, and both
    sums have weight $1 - r$.

    Args:
      recall_: `[batch, heads, rows]`.
      v: `[batch, kv_heads, kv_len, dim]`.

    >>> float(error_bound(jnp.full((1, 1, 1), 0.75), jnp.ones((1, 1, 2, 4)))[0, 0, 0])
    1.0
    """
    largest = jnp.linalg.norm(v.astype(jnp.float32), axis=-1).max(-1)
    largest = jnp.repeat(largest, recall_.shape[1] // v.shape[1], axis=1)
    return 2 * (1 - recall_) * largest[..., None]


def relative_error(out: Array, dense: Array) -> Array:
    r"""$\sum |o' - o| / \sum |o|$ per head, float32 `[batch, heads]`: the measure of SpargeAttn's tuning."""
    out, dense = out.astype(jnp.float32), dense.astype(jnp.float32)
    return jnp.sum(jnp.abs(out - dense), (2, 3)) / jnp.sum(jnp.abs(dense), (2, 3))


def inform(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    kept_lse: Array,
    *,
    causal: bool,
    samples: int,
    scale: float | None = None,
) -> Info:
    """`Info` about attention that gave this log-sum-exp."""
    r = recall(q, k, kept_lse, causal=causal, samples=samples, scale=scale)
    bound = error_bound(r, v).mean(-1)
    return Info(density(mask, causal=causal), r.mean(-1), bound, mask.dropped)


def attend_with_info(
    q: Array, k: Array, v: Array, mask: BlockMask, *, causal: bool = True, samples: int = 64
) -> tuple[Array, Info]:
    """Attention through a mask, and `Info` about it.

    >>> from pallas_kernels import Grid
    >>> q = k = v = jnp.ones((1, 2, 64, 8))
    >>> mask = BlockMask.local(Grid(64, block_q=16, block_kv=16), window=16)
    >>> out, info = attend_with_info(q, k, v, mask, samples=1)
    >>> out.shape, info.recall[0].round(2).tolist(), info.density[0].tolist()
    ((1, 2, 64, 8), [0.25, 0.25], [0.699999988079071])
    """
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    return out, inform(q, k, v, mask, lse, causal=causal, samples=samples)
