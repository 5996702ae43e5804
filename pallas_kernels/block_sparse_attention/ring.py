"""Sequence-parallel block-sparse attention: keys and values travel around a ring of devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._dispatch import vary, varying_axes
from pallas_kernels.block_sparse_attention import api
from pallas_kernels.block_sparse_attention.inputs import Inputs
from pallas_kernels.block_sparse_attention.mask import BlockMask
from pallas_kernels.block_sparse_attention.merge import merge_attention


def ring_block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    axis_name: str,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`block_sparse_attention` inside `shard_map`, with the length cut over `axis_name`.

    Every device keeps its queries; the shards of k and v visit all devices in turn, and the
    partial results merge by their log-sum-exp (Ring Attention, Liu, Zaharia and Abbeel 2023).
    The backward pass sends k, v and their gradients around again, so memory stays that of a shard.

    Args:
      q, k, v: this device's shards, `[batch, heads, length / devices, dim]`.
      mask: the mask of the whole sequence, the same on every device; causal order belongs into
        it. Shards must be whole blocks.
      axis_name: mesh axis over which the length is cut.
      scale, softcap, implementation: as in `block_sparse_attention` ('xla' or 'tpu').

    Returns:
      This device's part of the output and of the log-sum-exp.

    Raises:
      ValueError: if the mask does not fit the shards or they are not whole blocks.

    >>> from pallas_kernels import BlockMask, Grid
    >>> auto = jax.sharding.AxisType.Auto
    >>> mesh = jax.make_mesh((1,), ("seq",), axis_types=(auto,), devices=jax.devices()[:1])
    >>> spec = jax.P(None, None, "seq")
    >>> run = jax.shard_map(
    ...     functools.partial(ring_block_sparse_attention, axis_name="seq"), mesh=mesh,
    ...     in_specs=(spec, spec, spec, jax.P()), out_specs=(spec, spec))
    >>> q = k = v = jnp.ones((1, 1, 4, 8))
    >>> run(q, k, v, BlockMask.causal(Grid(4, block_q=2, block_kv=2)))[0].shape
    (1, 1, 4, 8)
    """
    devices = lax.axis_size(axis_name)
    for name, x, block, total in (
        ("q", q, mask.grid.block_q, mask.grid.q_len),
        ("k", k, mask.grid.block_kv, mask.grid.kv_len),
    ):
        if x.shape[2] * devices != total or x.shape[2] % block:
            raise ValueError(
                f"{name} has {x.shape[2]} positions on each of {devices} devices; the mask's "
                f"{total} must be {devices} times a multiple of its block {block}"
            )
    part = _window(mask, 0, 0, q, k)
    api.check(q, k, v, part, None, softcap, scale)
    name = api.choose_implementation(implementation, q, k, v, part, interpret=False)
    if name == "reference":
        raise ValueError("implementation='reference' has no ring; name 'xla', 'tpu' or 'gpu'")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    axes = varying_axes(q, k, v, mask) | {axis_name}
    q, k, v, mask = vary((q, k, v, mask), axes)
    result: Any = _ring(name, axis_name, Inputs(q, k, v, mask, None, scale, softcap))
    return result


def _window(mask: BlockMask, of_q: Any, of_k: Any, q: Array, k: Array) -> BlockMask:
    """The mask between shard of_q of the queries and shard of_k of the keys."""
    nq, nk = q.shape[2] // mask.grid.block_q, k.shape[2] // mask.grid.block_kv
    return mask.window(of_q * nq, nq, of_k * nk, nk)


def _visit(inputs: Inputs, k: Array, v: Array, i: Array, axis_name: str) -> Inputs:
    """What there is to compute when the keys and values have made i steps."""
    me, n = lax.axis_index(axis_name), lax.axis_size(axis_name)
    part = _window(inputs.mask, me, (me - i) % n, inputs.q, k)
    return dataclasses.replace(inputs, k=k, v=v, mask=part)


def _pass_on(tree: Any, axis_name: str) -> Any:
    n = lax.axis_size(axis_name)
    return lax.ppermute(tree, axis_name, [(i, (i + 1) % n) for i in range(n)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(name: str, axis_name: str, inputs: Inputs) -> tuple[Array, Array]:
    def visit(carry, i):
        k, v, done = carry
        now = api.run_forward(name, _visit(inputs, k, v, i, axis_name))
        out, lse = merge_attention([done, (now[0].astype(jnp.float32), now[1])])
        return (*_pass_on((k, v), axis_name), (out, lse)), None

    q, v = inputs.q, inputs.v
    rows = q.shape[:3]
    empty = jnp.zeros((*rows, v.shape[-1]), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    start = inputs.k, v, vary(empty, varying_axes(inputs))
    (*_, (out, lse)), _ = lax.scan(visit, start, jnp.arange(lax.axis_size(axis_name)))
    return out.astype(q.dtype), lse


def _ring_fwd(name, axis_name, inputs):
    result: Any = _ring(name, axis_name, inputs)
    return result, (inputs, *result)


def _ring_bwd(name, axis_name, residuals, cotangents):
    inputs, out, lse = residuals
    dout, dlse = cotangents
    delta = api.row_term(out, lse, dout, dlse)

    def visit(carry, i):
        dq, (k, v, dk, dv) = carry
        grads = api.run_backward(name, _visit(inputs, k, v, i, axis_name), lse, delta, dout)
        dq, dk, dv = (a + g.astype(jnp.float32) for a, g in zip((dq, dk, dv), grads))
        return (dq, _pass_on((k, v, dk, dv), axis_name)), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (inputs.q, inputs.k, inputs.v)]
    dq, dk, dv = vary(zeros, varying_axes(inputs, dout))
    start = dq, (inputs.k, inputs.v, dk, dv)
    (dq, (*_, dk, dv)), _ = lax.scan(visit, start, jnp.arange(lax.axis_size(axis_name)))
    return (api.cotangent(inputs, dq, dk, dv),)


_ring.defvjp(_ring_fwd, _ring_bwd)
