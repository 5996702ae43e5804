"""Block-sparse attention in plain JAX: CPU, and any device without a kernel.

Work is proportional to the kept blocks and memory to one chunk of them: for each block of queries
a loop with a run-time bound gathers a few kept blocks of keys at a time (FlashAttention-2's online
softmax, Dao 2023); the backward pass walks the same blocks by columns.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._dispatch import vary, varying_axes
from pallas_kernels.block_sparse_attention.inputs import FLOOR, LOG2E, MASKED, Inputs, pad_to
from pallas_kernels.block_sparse_attention.lists import CODE_BITS, CODE_MASK, visible

Carry = tuple[Array, Array, Array]

# Keys (or queries, backward) per step: large enough for the loop's overhead to vanish, small
# enough for the scores of one step to stay in cache.
CHUNK = 512


def _chunks(start: Array, end: Array, group: int, step: Callable, carry: Carry) -> Carry:
    """Run step(size, position, carry) over the list: whole groups, then what is left one by one
    (a last group that is mostly empty would cost short lists a third of their time)."""
    whole = (end - start) // group
    carry = lax.fori_loop(0, whole, lambda c, carry: step(group, start + c * group, carry), carry)
    if group == 1:
        return carry
    rest = start + whole * group
    return lax.fori_loop(rest, end, lambda p, carry: step(1, p, carry), carry)


class _Heads:
    """The arguments cut into blocks, and which list, keys and segments each head uses."""

    def __init__(self, inputs: Inputs):
        q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
        self.mask, self.scale, self.softcap = mask, inputs.scale, inputs.softcap
        self.batch, self.heads = q.shape[:2]
        self.kv_heads = k.shape[1]
        mask_batch, mask_heads, self.nq, self.nk = mask.codes.shape
        self.bq, self.bk = mask.grid.block_q, mask.grid.block_kv
        self.precision = inputs.precision

        self.q = self.by_block(q, self.bq)
        self.k, self.v = (self.by_block(x, self.bk) for x in (k, v))
        self.segments = None
        if inputs.segments is not None:
            self.segments = [
                pad_to(ids, 1, n * b).reshape(self.batch, n, b)
                for ids, n, b in zip(inputs.segments, (self.nq, self.nk), (self.bq, self.bk))
            ]
        index = jnp.arange(self.batch * self.heads)
        b, h = index // self.heads, index % self.heads
        self.kv_index = b * self.kv_heads + h * self.kv_heads // self.heads
        self.mask_index = (b if mask_batch > 1 else 0) * mask_heads + h * mask_heads // self.heads
        self.batch_index = b
        # Room behind the lists, so that the last chunk may be read whole.
        self.lists = {
            name: x.reshape(mask_batch * mask_heads, -1)
            for name, x in (
                ("row_starts", mask.row_starts),
                ("col_starts", mask.col_starts),
                ("row_entries", pad_to(mask.row_entries, 2, mask.capacity + CHUNK)),
                ("col_entries", pad_to(mask.col_entries, 2, mask.capacity + CHUNK)),
            )
        }
        self.offsets = mask.offsets.reshape(-1, 2)

    def by_block(self, x: Array, block: int) -> Array:
        """`[batch * heads, blocks, block, ...]` of `[batch, heads, length, ...]`."""
        n = -(-x.shape[2] // block)
        x = pad_to(x, 2, n * block)
        return x.reshape(x.shape[0] * x.shape[1], n, block, *x.shape[3:])

    def chunk(self, entries: Array, start: Array, end: Array, size: int) -> tuple[Array, Array]:
        """Indices and codes of `size` entries from `start`; behind `end` code 0 and the first index
        again: what the list does not name is not read, whatever it holds."""
        part = lax.dynamic_slice_in_dim(entries, start, size)
        listed = start + jnp.arange(size) < end
        indices = jnp.where(listed, part >> CODE_BITS, part[0] >> CODE_BITS)
        return indices, jnp.where(listed, part & CODE_MASK, 0)

    def scores(
        self,
        i: Array,
        q: Array,
        k: Array,
        rows: Array,
        cols: Array,
        codes: Array,
        by_row: bool,
    ) -> tuple[Array, Array | None]:
        """Masked scores `[rows, cols]` of blocks of queries `rows` and of keys `cols`, and the
        derivative of the soft cap. The codes are those of the rows, or else of the columns; the
        other is a single block."""
        s = jnp.einsum(
            "qd,kd->qk", q, k, precision=self.precision, preferred_element_type=jnp.float32
        )
        s = s * self.scale
        slope = None
        if self.softcap is not None:
            t = jnp.tanh(s / self.softcap)
            s, slope = self.softcap * t, 1 - t * t
        codes = jnp.repeat(codes, self.bq if by_row else self.bk)
        codes = codes[:, None] if by_row else codes[None, :]
        seen = codes != 0
        if self.mask.rules:
            q_local = (rows[:, None] * self.bq + jnp.arange(self.bq)[None]).reshape(-1, 1)
            k_local = (cols[:, None] * self.bk + jnp.arange(self.bk)[None]).reshape(1, -1)
            q_offset, k_offset = self.offsets[self.mask_index[i]]
            seen = visible(codes, self.mask.rules, q_local + q_offset, k_local + k_offset)
            seen = seen & (k_local < self.mask.grid.kv_len)
        if self.segments is not None:
            of_q, of_k = (x[self.batch_index[i]] for x in self.segments)
            seen = seen & (of_q[rows].reshape(-1, 1) == of_k[cols].reshape(1, -1))
        return jnp.where(seen, s, MASKED), slope


def forward(inputs: Inputs) -> tuple[Array, Array]:
    """Output `[batch, heads, q_len, v_dim]` and float32 log-sum-exp `[batch, heads, q_len]`."""
    at = _Heads(inputs)
    q, v = inputs.q, inputs.v
    below = inputs.skip_below
    # Blocks are skipped one by one.
    group = 1 if below is not None else min(at.nk, max(1, CHUNK // at.bk))
    axes = varying_axes(inputs)

    def head(i: Array) -> tuple[Array, Array]:
        starts = at.lists["row_starts"][at.mask_index[i]]
        entries = at.lists["row_entries"][at.mask_index[i]]
        keys, values = at.k[at.kv_index[i]], at.v[at.kv_index[i]]

        def row(r: Array) -> tuple[Array, Array]:
            start, end = starts[r], starts[r + 1]
            queries = at.q[i, r]

            def step(size: int, p: Array, carry: Carry) -> Carry:
                cols, codes = at.chunk(entries, p, end, size)
                k_part = keys[cols].reshape(size * at.bk, -1)
                s, _ = at.scores(i, queries, k_part, r[None], cols, codes, by_row=False)

                def accumulate(carry: Carry) -> Carry:
                    highest, total, acc = carry
                    v_part = values[cols].reshape(size * at.bk, -1)
                    new = jnp.maximum(highest, jnp.max(s, -1))
                    p = jnp.exp(s - new[:, None])
                    shrink = jnp.exp(highest - new)
                    product = jnp.dot(
                        p.astype(values.dtype),
                        v_part,
                        precision=at.precision,
                        preferred_element_type=jnp.float32,
                    )
                    return new, total * shrink + jnp.sum(p, -1), acc * shrink[:, None] + product

                if below is None:
                    return accumulate(carry)
                gain = jnp.max(s, -1) - carry[0]
                gain = jnp.where(r * at.bq + jnp.arange(at.bq) < q.shape[2], gain, -jnp.inf)
                # A NaN is no reason to skip.
                skip = (gain <= -below / LOG2E).all()
                return lax.cond(skip, lambda carry: carry, accumulate, carry)

            init = (
                jnp.full((at.bq,), FLOOR, jnp.float32),
                jnp.zeros((at.bq,), jnp.float32),
                jnp.zeros((at.bq, values.shape[-1]), jnp.float32),
            )
            highest, total, acc = _chunks(start, end, group, step, vary(init, axes))
            some = total != 0  # NaN is not nothing
            total = jnp.where(some, total, 1.0)
            out = (acc / total[:, None]).astype(q.dtype)
            return out, jnp.where(some, highest + jnp.log(total), -jnp.inf)

        return lax.map(row, jnp.arange(at.nq))

    out, lse = lax.map(head, jnp.arange(at.batch * at.heads))
    shape = (at.batch, at.heads, at.nq * at.bq)
    return (
        out.reshape(*shape, v.shape[-1])[:, :, : q.shape[2]],
        lse.reshape(shape)[:, :, : q.shape[2]],
    )


def backward(inputs: Inputs, lse: Array, delta: Array, dout: Array) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v.

    delta is rowsum(dout * out) minus the cotangent of the log-sum-exp, float32 `[b, h, q_len]`.
    """
    at = _Heads(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    group = min(at.nq, max(1, CHUNK // at.bq))
    axes = varying_axes(inputs, dout)
    dout = at.by_block(dout.astype(q.dtype), at.bq)
    # An empty row has lse = -inf; +inf instead makes its probabilities 0.
    lse = at.by_block(jnp.where(jnp.isneginf(lse), jnp.inf, lse), at.bq)
    delta = at.by_block(delta, at.bq)

    def product(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, precision=at.precision, preferred_element_type=jnp.float32)

    def head(i: Array) -> tuple[Array, Array, Array]:
        starts = at.lists["col_starts"][at.mask_index[i]]
        entries = at.lists["col_entries"][at.mask_index[i]]
        queries, douts, lses, deltas = at.q[i], dout[i], lse[i], delta[i]
        keys, values = at.k[at.kv_index[i]], at.v[at.kv_index[i]]

        def column(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
            start, end = starts[j], starts[j + 1]
            k_j, v_j = keys[j], values[j]

            def step(size: int, p: Array, carry: Carry) -> Carry:
                dq, dk, dv = carry
                rows, codes = at.chunk(entries, p, end, size)
                q_part, do_part = (x[rows].reshape(size * at.bq, -1) for x in (queries, douts))
                s, slope = at.scores(i, q_part, k_j, rows, j[None], codes, by_row=True)
                p = jnp.exp(s - lses[rows].reshape(-1, 1))
                dv = dv + product("qk,qd->kd", p.astype(q.dtype), do_part)
                ds = p * (product("qd,kd->qk", do_part, v_j) - deltas[rows].reshape(-1, 1))
                if slope is not None:
                    ds = ds * slope
                ds = (ds * at.scale).astype(q.dtype)
                dk = dk + product("qk,qd->kd", ds, q_part)
                dq_part = product("qk,kd->qd", ds, k_j).reshape(size, at.bq, -1)
                return dq.at[rows].add(dq_part, mode="promise_in_bounds"), dk, dv

            zero = jnp.zeros_like(k_j, jnp.float32), jnp.zeros_like(v_j, jnp.float32)
            dq, dk, dv = _chunks(start, end, group, step, vary((dq, *zero), axes))
            return dq, (dk, dv)

        dq = jnp.zeros((at.nq, at.bq, q.shape[-1]), jnp.float32)
        dq, (dk, dv) = lax.scan(column, vary(dq, axes), jnp.arange(at.nk))
        return dq.astype(q.dtype), dk, dv

    dq, dk, dv = lax.map(head, jnp.arange(at.batch * at.heads))
    dq = dq.reshape(at.batch, at.heads, at.nq * at.bq, -1)[:, :, : q.shape[2]]

    def sum_of_group(x: Array, like: Array) -> Array:
        x = x.reshape(at.batch, at.kv_heads, at.heads // at.kv_heads, at.nk * at.bk, -1)
        return jnp.sum(x, 2)[:, :, : like.shape[2]].astype(like.dtype)

    return dq, sum_of_group(dk, k), sum_of_group(dv, v)
