"""Block-sparse attention: what is checked, which implementation runs, and the gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._dispatch import choose, target_platform
from pallas_kernels.block_sparse_attention import gpu, reference, tpu, xla
from pallas_kernels.block_sparse_attention.inputs import Inputs
from pallas_kernels.block_sparse_attention.mask import BlockMask, within_segments

SegmentIds = Array | tuple[Array, Array] | None


@overload
def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    causal: bool = ...,
    segment_ids: SegmentIds = ...,
    softcap: float | None = ...,
    scale: float | None = ...,
    skip_below: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
    interpret: bool = ...,
) -> Array: ...


@overload
def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    causal: bool = ...,
    segment_ids: SegmentIds = ...,
    softcap: float | None = ...,
    scale: float | None = ...,
    skip_below: float | None = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
    interpret: bool = ...,
) -> tuple[Array, Array]: ...


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    causal: bool = False,
    segment_ids: SegmentIds = None,
    softcap: float | None = None,
    scale: float | None = None,
    skip_below: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Attention that reads only the blocks of keys that the mask keeps.

    $$ s_{ij} = c\, q_i \cdot k_j, \quad  o_i = \sum_{j \in V_i} e^{s_{ij} - L_i} v_j, \quad
       L_i = \log \sum_{j \in V_i} e^{s_{ij}} $$

    where $V_i$ are the keys that query i may see. With `softcap` t, $t \tanh(s / t)$ takes the
    place of s. A query that sees no key has output 0, $L_i = -\infty$ and gradients 0. What a query
    does not see reaches neither its output nor a gradient, whatever it holds: padding may be NaN.

    Gradients flow to q, k and v from the output and from L, so results over disjoint sets of keys
    merge exactly (`merge_attention`). The backward pass recomputes the probabilities of kept
    blocks from L (FlashAttention-2, Dao 2023) and itself cannot be differentiated, except in the
    `reference` implementation.

    Args:
      q: `[batch, heads, q_len, head_dim]`, float32, bfloat16 or float16.
      k: `[batch, kv_heads, kv_len, head_dim]`; heads is a multiple of kv_heads (GQA, MQA).
      v: `[batch, kv_heads, kv_len, v_dim]`.
      mask: which blocks; its heads are 1, kv_heads or heads, its batch is 1 or batch.
      causal: also hide keys after the query. The same as `mask & BlockMask.causal(...)`, which
        is cheaper if the mask is used more than once.
      segment_ids: int `[batch, length]`, or a pair for queries and keys; only equal ids meet.
        Blocks in which none can meet (other documents of a packed batch) are skipped.
      softcap: bound t of the scores.
      scale: c; by default `head_dim ** -0.5`.
      skip_below: $\lambda$, for inference: a kept block is skipped, its exponentials and its product with v, if no query
        of its row has a score there above $m - \lambda \ln 2$, with m the largest score of that query in blocks before
        (SpargeAttn's second stage; the authors' tuned values lie below 50). Each skipped block has at most
        $|J|\, 2^{-\lambda}$ of the weight of the largest score. L is that of what was not skipped. Not on TPU, where a
        branch in the loop would part the two chunks that overlap, nor on a GPU; it has no gradient.
      return_lse: also return L, float32 `[batch, heads, q_len]`.
      implementation: `'tpu'` (Pallas kernels), `'gpu'` (Pallas Triton, compute capability 8.0),
        `'xla'` (any device), `'reference'` (the whole score matrix), or None for the best one that
        takes these arguments.
      interpret: run the TPU or GPU kernels in the interpreter, for tests on a machine without one.

    Returns:
      The output `[batch, heads, q_len, v_dim]` in q's dtype, and L if asked for.

    Raises:
      ValueError: if shapes, dtypes and the mask do not fit together, or the named implementation
        cannot take them.

    >>> from pallas_kernels import Grid
    >>> q = k = v = jnp.ones((1, 2, 4, 8))
    >>> mask = BlockMask.causal(Grid(4, block_q=2, block_kv=2))
    >>> out, lse = block_sparse_attention(q, k, v, mask, scale=1.0, return_lse=True)
    >>> out.shape, jnp.exp(lse[0, 0] - 8).round()
    ((1, 2, 4, 8), Array([1., 2., 3., 4.], dtype=float32))
    """
    segments = check(q, k, v, mask, segment_ids, softcap, scale)
    if skip_below is not None and not skip_below >= 0:
        raise ValueError(f"skip_below={skip_below} must be None or at least 0")
    if causal:
        mask = mask & BlockMask.causal(mask.grid)
    name = choose_implementation(implementation, q, k, v, mask, interpret, skip_below)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if segments is not None and name != "reference":
        mask = within_segments(mask, *segments)
    inputs = Inputs(q, k, v, mask, segments, scale, softcap, skip_below)
    result: Any = reference.forward(inputs) if name == "reference" else _attention(name, inputs)
    out, lse = result
    return (out, lse) if return_lse else out


# -------------------------------------------------------------------- the gradient

_FORWARD: dict[str, Callable[..., Any]] = {
    "xla": xla.forward,
    "tpu": tpu.forward,
    "tpu, interpreted": functools.partial(tpu.forward, interpret=True),
    "gpu": gpu.forward,
    "gpu, interpreted": functools.partial(gpu.forward, interpret=True),
}
_BACKWARD: dict[str, Callable[..., Any]] = {
    "xla": xla.backward,
    "tpu": tpu.backward,
    "tpu, interpreted": functools.partial(tpu.backward, interpret=True),
    "gpu": gpu.backward,
    "gpu, interpreted": functools.partial(gpu.backward, interpret=True),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(name: str, inputs: Inputs) -> tuple[Array, Array]:
    return run_forward(name, inputs)


def _attention_fwd(name, inputs):
    if inputs.skip_below is not None:
        raise ValueError(
            f"skip_below={inputs.skip_below} is for inference and has no gradient; leave it out in training"
        )
    out, lse = run_forward(name, inputs)
    return (out, lse), (inputs, out, lse)


def _attention_bwd(name, residuals, cotangents):
    inputs, out, lse = residuals
    dout, dlse = cotangents
    grads = run_backward(name, inputs, lse, row_term(out, lse, dout, dlse), dout)
    return (cotangent(inputs, *grads),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def cotangent(inputs: Inputs, *grads: Array) -> Any:
    """The cotangent of all inputs: that of q, k and v in their dtypes, none of the integers."""
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, (inputs.q, inputs.k, inputs.v)))
    return dataclasses.replace(inputs, q=dq, k=dk, v=dv, mask=None, segments=None)  # pyright: ignore


def row_term(out: Array, lse: Array, dout: Array, dlse: Array) -> Array:
    """rowsum(dout * out) - dlse: what the softmax's derivative subtracts in each row.

    The log-sum-exp's cotangent g enters as P * g, so it is taken off. Merging empty rows has NaN
    derivatives, and nothing of an empty row may come back.
    """
    dout, out = dout.astype(jnp.float32), out.astype(jnp.float32)
    delta = jnp.sum(jnp.where(dout == 0, 0.0, dout * out), -1) - dlse
    return jnp.where(jnp.isneginf(lse), 0.0, delta)


def run_forward(name: str, inputs: Inputs) -> tuple[Array, Array]:
    """Output and LSE by the named implementation.

    Where a kept block has hidden pairs, a value that is not finite must not meet their weights: 0 *
    NaN is NaN. Values become 0 there and their keys NaN, since scores of hidden pairs are replaced
    and those of others carry the NaN to the queries that see it. The one elementwise pass over keys
    and values joins what made them.
    """
    if inputs.hides_pairs:
        broken = _broken(inputs.k) | _broken(inputs.v)
        k, v = jnp.where(broken, jnp.nan, inputs.k), jnp.where(broken, 0, inputs.v)
        inputs = dataclasses.replace(inputs, k=k, v=v)
    return _fold_vmap(_FORWARD[name])(inputs)


def run_backward(
    name: str, inputs: Inputs, lse: Array, delta: Array, dout: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v from LSE, `row_term` and dout, by the named implementation.

    As in `run_forward`, where a kept block has hidden pairs: only finite numbers are multiplied.
    A query that is not finite, sees something that is not, or whose cotangent is not, gets a NaN
    gradient and takes no part in those of the keys. (One whose cotangent is 0 has gradient 0.)
    """
    if not inputs.hides_pairs:
        return _fold_vmap(_BACKWARD[name])(inputs, lse, delta, dout)
    unused = (delta == 0) & (dout == 0).all(-1)
    broken = (_broken(inputs.q) | _broken(dout))[..., 0] | jnp.isnan(lse) | ~jnp.isfinite(delta)
    out = unused | broken
    q, k, v = (jnp.where(_broken(x), 0, x) for x in (inputs.q, inputs.k, inputs.v))
    inputs = dataclasses.replace(inputs, q=jnp.where(out[..., None], 0, q), k=k, v=v)
    lse, delta = jnp.where(out, -jnp.inf, lse), jnp.where(out, 0, delta)
    dout = jnp.where(out[..., None], 0, dout)
    dq, dk, dv = _fold_vmap(_BACKWARD[name])(inputs, lse, delta, dout)
    return jnp.where((broken & ~unused)[..., None], jnp.nan, dq), dk, dv


def _broken(x: Array) -> Array:
    """bool `[batch, heads, length, 1]`: positions with a number that is not finite."""
    return ~jnp.isfinite(x).all(-1, keepdims=True)


def _fold_vmap(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let `vmap` of run(inputs, ...) become a longer batch: all lists in one call.

    (A loop with a run-time bound, mapped as it stands, would run as long as the longest list.)
    """
    folded = jax.custom_batching.custom_vmap(run)

    @folded.def_vmap
    def _rule(size: int, batched: list[Any], inputs: Inputs, *of_rows: Array) -> Any:
        batch = inputs.q.shape[1 if batched[0].q else 0]

        def fold(x: Array, is_batched: bool) -> Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            if x.shape[1] == 1 < batch:  # a mask that the batch shares
                x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

        args = jax.tree.map(fold, (inputs, *of_rows), tuple(batched))
        if not any(jax.tree.leaves(batched[0].mask)) and inputs.mask.codes.shape[0] == 1:
            args = (dataclasses.replace(args[0], mask=inputs.mask), *args[1:])  # one for all
        out = _fold_vmap(run)(*args)
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return folded


# -------------------------------------------------------------------- checks


def check(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    segment_ids: SegmentIds,
    softcap: float | None,
    scale: float | None,
) -> tuple[Array, Array] | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {x.shape}; it must have 4 axes [batch, heads, length, dim]"
            )
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be float32, bfloat16 or float16")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but q has {q.dtype}; they must agree")
    batch, heads, q_len, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]:
        raise ValueError(
            f"k has shape {k.shape}, q {q.shape}; k must be [{batch}, a divisor of {heads}, kv_len,"
            f" {dim}]"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}; all but its last axis must be k's, {k.shape}")
    if (mask.grid.q_len, mask.grid.kv_len) != (q_len, k.shape[2]):
        raise ValueError(
            f"mask is for q_len={mask.grid.q_len} and kv_len={mask.grid.kv_len}; q has {q_len} and k has "
            f"{k.shape[2]} positions"
        )
    mask_batch, mask_heads = mask.codes.shape[:2]
    if mask_batch not in (1, batch) or mask_heads not in (1, k.shape[1], heads):
        raise ValueError(
            f"mask is for batch {mask_batch} and {mask_heads} heads; with q {q.shape} and k "
            f"{k.shape} its batch must be 1 or {batch}, its heads 1, {k.shape[1]} or {heads}"
        )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap={softcap} must be None or positive and finite")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale} must be None or positive and finite")
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    for name, ids, length in (("queries", pair[0], q_len), ("keys", pair[1], k.shape[2])):
        if ids.shape != (batch, length) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids of the {name} have shape {ids.shape} and dtype {ids.dtype}; they "
                f"must be integer [{batch}, {length}]"
            )
    return pair[0].astype(jnp.int32), pair[1].astype(jnp.int32)


def choose_implementation(
    implementation: str | None, q: Array, k: Array, v: Array, mask: BlockMask, interpret: bool,
    skip_below: float | None = None,
) -> str:  # fmt: skip
    """The name of the implementation to run; see `pallas_kernels._dispatch.choose`."""
    not_tpu = tpu.why_not(q, k, v, mask)
    if implementation is None and target_platform() != "tpu" and not interpret:
        not_tpu = f"the program runs on {target_platform()}"
    not_gpu = gpu.why_not(q, k, v, mask, interpret)
    if skip_below is not None:
        not_tpu = not_gpu = "skip_below is for 'xla' and 'reference'"
    other = "interpret=True is about the Pallas kernels" if interpret else None
    reasons = {"tpu": not_tpu, "gpu": not_gpu, "xla": other, "reference": other}
    name = choose(implementation, reasons)
    return f"{name}, interpreted" if interpret else name
