"""Attention with a choice, in the shapes that other code expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse.attention.layout import check_heads, checked_lengths
from jaxsparse.attention.measure import Info, inform
from jaxsparse.attention.predictor import Predictor, State, checked
from pallas_kernels import block_sparse_attention


@overload
def attend(
    q: Array, k: Array, v: Array, choose: Predictor, *, state: State | None = ..., lengths: Array | None = ...,
    softcap: float | None = ..., scale: float | None = ..., skip_below: float | None = ...,
    implementation: str | None = ...,
    with_info: Literal[False] = ..., samples: int = ...,
) -> Array: ...  # fmt: skip


@overload
def attend(
    q: Array, k: Array, v: Array, choose: Predictor, *, state: State | None = ..., lengths: Array | None = ...,
    softcap: float | None = ..., scale: float | None = ..., skip_below: float | None = ...,
    implementation: str | None = ...,
    with_info: Literal[True], samples: int = ...,
) -> tuple[Array, Info]: ...  # fmt: skip


def attend(
    q: Array,
    k: Array,
    v: Array,
    choose: Predictor,
    *,
    state: State | None = None,
    lengths: Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    skip_below: float | None = None,
    implementation: str | None = None,
    with_info: bool = False,
    samples: int = 64,
) -> Array | tuple[Array, Info]:
    """Attention over the blocks that a predictor chooses.

    Gradients flow through attention; the choice has none.

    Args:
      q: `[batch, heads, q_len, dim]`.
      k, v: `[batch, kv_heads, kv_len, dim]`.
      choose: the predictor.
      state: what it reads besides.
      lengths: int `[batch]`: how much of each sequence is filled, from the left; padding is not seen by predictors or
        queries, and padded queries give 0.
      softcap, scale, skip_below, implementation: of `pallas_kernels.block_sparse_attention`.
      with_info: also return `Info`: density, recall and error bound of sampled queries (which costs them a dense row
        each), and dropped blocks. Not with softcap or lengths.
      samples: how many queries are sampled, evenly.

    Returns:
      `[batch, heads, q_len, v_dim]`, and `Info` if asked for.

    Raises:
      ValueError: shapes that do not fit, and what the predictor says.

    >>> import jax
    >>> from jaxsparse import attention
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 2, 256, 16))
    >>> out, info = attend(q, k, v, attention.oracle(density=1.0), with_info=True)
    >>> info.density.tolist(), info.recall.round(4).tolist()
    ([[1.0, 1.0]], [[1.0, 1.0]])
    """
    if with_info and (softcap is not None or lengths is not None):
        raise ValueError(
            f"with_info=True: recall knows no softcap={softcap} and no lengths; leave one out"
        )
    choose = checked(choose)
    check_heads(q, k, v)
    segments = there = None
    if lengths is not None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"lengths with q_len={q.shape[2]} and kv_len={k.shape[2]}: they must be the same"
            )
        lengths, there, segments = padding(lengths, q)
        q, k = (jnp.where(there, x, 0) for x in (q, k))
        state = (State() if state is None else state)._replace(lengths=lengths)
    mask = choose(q, k, v, state)
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        mask,
        segment_ids=segments,
        softcap=softcap,
        scale=scale,
        skip_below=skip_below,
        return_lse=True,
        implementation=implementation,
    )
    if there is not None:
        out = jnp.where(there, out, 0)
    if not with_info:
        return out
    causal = choose.layout.causal
    return out, inform(q, k, v, mask, lse, causal=causal, samples=samples, scale=scale)


def padding(lengths: Array, q: Array) -> tuple[Array, Array, Array]:
    """The lengths of sequences `[batch, heads, length, dim]` that are filled from the left, int32 `[batch]`; what is there
    of them, bool `[batch, 1, length, 1]`; and segment ids `[batch, length]` in which padding meets itself alone.

    Raises:
      ValueError: lengths that are not integers `[batch]`, or not from 0 to the length.
    """
    lengths = checked_lengths(lengths, q.shape[0], q.shape[2])
    index = jnp.arange(q.shape[2])
    there = index < lengths[:, None]
    return lengths, there[:, None, :, None], jnp.where(there, 0, 1 + index)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    choose: Predictor,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    state: State | None = None,
    implementation: str | None = None,
) -> Array:
    """`jax.nn.dot_product_attention` with a choice: arguments and shapes are its own, `[batch, length, heads, dim]` or
    without the batch.

    Args:
      query, key, value: as there; heads of queries are a multiple of those of keys.
      bias, mask: must be None: what is seen is the predictor's business.
      choose: the predictor; its layout must be causal if and only if `is_causal` is set.
      scale: of the scores.
      is_causal: as there.
      query_seq_lengths, key_value_seq_lengths: int `[batch]`; if both are given they must be the same (under `jit`, the
        same array): the latter holds for both.
      state: for the predictor.
      implementation: of the kernel.

    Raises:
      ValueError: a bias or a mask, arrays of other ranks, a layout that is causal where the call is not or the other way round, lengths of
        queries alone.

    >>> import jax
    >>> from jaxsparse import attention
    >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
    >>> choose = attention.dense(layout=attention.Layout(16, 16))
    >>> out = dot_product_attention(x, x, x, choose=choose, is_causal=True)
    >>> bool(jnp.allclose(out, jax.nn.dot_product_attention(x, x, x, is_causal=True), atol=1e-5))
    True
    """
    if bias is not None or mask is not None:
        raise ValueError(
            "bias and mask must be None: blocks are chosen by the predictor, causality by its Layout; for another "
            "pattern use attention.static or pallas_kernels.block_sparse_attention"
        )
    if query.ndim not in (3, 4) or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            f"query has shape {query.shape}, key {key.shape}, value {value.shape}; give [batch, length, heads, dim], or "
            "all without the batch"
        )
    if is_causal != checked(choose).layout.causal:
        raise ValueError(
            f"is_causal={is_causal}, but the predictor has Layout(causal={choose.layout.causal}); they must agree"
        )
    if is_causal and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"is_causal with {query.shape[-3]} queries and {key.shape[-3]} keys: jax aligns their beginnings, this "
            "library their ends; give as many of both, or use attention.attend"
        )
    if query_seq_lengths is not None:
        _check_same(query_seq_lengths, key_value_seq_lengths)
    single = query.ndim == 3
    q, k, v = (jnp.swapaxes(x[None] if single else x, 1, 2) for x in (query, key, value))
    out = attend(
        q,
        k,
        v,
        choose,
        state=state,
        lengths=key_value_seq_lengths,
        scale=scale,
        implementation=implementation,
    )
    out = jnp.swapaxes(out, 1, 2)
    return out[0] if single else out


def _check_same(of_queries: Array, of_keys: Array | None) -> None:
    if of_keys is None:
        raise ValueError("query_seq_lengths alone: give key_value_seq_lengths, for both")
    if of_queries is of_keys:
        return
    if not (is_concrete(of_queries, of_keys) and np.array_equal(of_queries, of_keys)):
        raise ValueError(
            f"query_seq_lengths={of_queries} and key_value_seq_lengths={of_keys} must be the same: give the latter alone, for "
            "both"
        )


def as_fn(choose: Predictor) -> Callable[..., Array]:
    """A predictor as `attention_fn` of `flax.nnx.MultiHeadAttention` (and of Linen's).

    The layer must be called without a mask: causality is the layout's, which takes the place of a causal mask. Dropout
    of attention weights is refused, since they are never made.

    >>> from flax import nnx
    >>> from jaxsparse import attention
    >>> choose = attention.moba(density=0.5, layout=attention.Layout(8, 8))
    >>> layer = nnx.MultiHeadAttention(2, 16, attention_fn=as_fn(choose), decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 64, 16))).shape
    (1, 64, 16)
    """
    checked(choose)

    def attention_fn(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        is_causal: bool = False,
        module: object = None,
        **others: object,
    ) -> Array:
        if dropout_rate > 0 and not deterministic:
            raise ValueError(
                f"dropout_rate={dropout_rate}: attention weights are never made; drop outputs instead"
            )
        if module is not None:
            raise ValueError("sow_weights=True: attention weights are never made")
        if is_causal and not choose.layout.causal:
            raise ValueError("is_causal=True, but the predictor has Layout(causal=False)")
        return dot_product_attention(
            query, key, value, bias, mask, choose=choose, is_causal=choose.layout.causal
        )

    return attention_fn
