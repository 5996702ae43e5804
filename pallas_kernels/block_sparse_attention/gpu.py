"""Block-sparse attention as Pallas Triton kernels: forward, dK and dV, dQ.

* Forward: a program has a tile of queries of a head and walks the list of their row; tiles of keys and
  values of kept blocks come to shared memory, a few stages ahead of the tensor cores (FlashAttention-2's
  online softmax, Dao 2023). Time follows the kept blocks.
* Backward: one kernel for dK and dV, which walks the lists by columns, the heads of a group one after the
  other (so the gradients of shared keys are summed in registers), and one for dQ, which walks them by
  rows. Nothing is added atomically: results are the same in every run.
* Rows that keep much start first where lists grow to the end (causal), so that none is left for last.
* Rules and segment ids are looked at inside blocks that are flagged as partial only, if there are such
  blocks in the mask at all. Head sizes that are no power of two are filled up with zeros in the kernel,
  and so are ragged ends.

Scores are kept in base 2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import _gpu
from pallas_kernels._gpu import Config, dot, in_32_bits, largest_tile, load, power_of_2, result
from pallas_kernels.block_sparse_attention.inputs import FLOOR, LOG2E, MASKED, Inputs
from pallas_kernels.block_sparse_attention.lists import CODE_BITS, CODE_MASK, FULL, visible
from pallas_kernels.block_sparse_attention.mask import BlockMask
from pallas_kernels.block_sparse_attention.rules import Rule

SMALLEST = 16  # positions of a block

# By the kind of numbers (`_gpu.kind`) and the larger head size, filled up. `tile` is queries (dkv: keys) of a
# program, `depth` keys (dkv: queries) at a time. "small": devices with less shared memory (L4, RTX).
FORWARD: dict[str, dict[str, Config]] = {
    "h100": {
        "16 bits, 16": Config(128, 64, 8, 3),
        "16 bits, 32": Config(128, 64, 8, 3),
        "16 bits, 64": Config(128, 64, 8, 3),
        "16 bits, 128": Config(64, 64, 4, 2),
        "16 bits, 256": Config(64, 32, 8, 2),
        "exact, 16": Config(64, 32, 4, 2),
        "exact, 32": Config(64, 32, 4, 2),
        "exact, 64": Config(64, 32, 4, 2),
        "exact, 128": Config(32, 16, 4, 2),
    },
    "a100": {
        "16 bits, 16": Config(64, 64, 4, 3),
        "16 bits, 32": Config(64, 64, 4, 3),
        "16 bits, 64": Config(64, 64, 4, 3),
        "16 bits, 128": Config(64, 32, 4, 3),
        "16 bits, 256": Config(32, 32, 4, 2),
        "exact, 16": Config(32, 32, 4, 2),
        "exact, 32": Config(32, 32, 4, 2),
        "exact, 64": Config(32, 32, 4, 2),
        "exact, 128": Config(32, 16, 4, 2),
    },
}
DKV: dict[str, dict[str, Config]] = {
    "h100": {
        "16 bits, 16": Config(64, 64, 4, 3),
        "16 bits, 32": Config(64, 64, 4, 3),
        "16 bits, 64": Config(64, 64, 4, 3),
        "16 bits, 128": Config(64, 32, 4, 3),
        "16 bits, 256": Config(64, 32, 8, 2),
        "exact, 16": Config(32, 32, 4, 2),
        "exact, 32": Config(32, 32, 4, 2),
        "exact, 64": Config(32, 32, 4, 2),
        "exact, 128": Config(16, 16, 4, 2),
    },
    "a100": {
        "16 bits, 16": Config(32, 64, 4, 2),
        "16 bits, 32": Config(32, 64, 4, 2),
        "16 bits, 64": Config(32, 64, 4, 2),
        "16 bits, 128": Config(32, 32, 4, 3),
        "16 bits, 256": Config(32, 32, 8, 2),
        "exact, 16": Config(32, 16, 4, 2),
        "exact, 32": Config(32, 16, 4, 2),
        "exact, 64": Config(32, 16, 4, 2),
        "exact, 128": Config(16, 16, 4, 2),
    },
}
DQ: dict[str, dict[str, Config]] = {
    "h100": {
        "16 bits, 16": Config(64, 64, 4, 3),
        "16 bits, 32": Config(64, 64, 4, 3),
        "16 bits, 64": Config(64, 64, 4, 3),
        "16 bits, 128": Config(64, 32, 4, 3),
        "16 bits, 256": Config(64, 32, 8, 2),
        "exact, 16": Config(32, 32, 4, 2),
        "exact, 32": Config(32, 32, 4, 2),
        "exact, 64": Config(32, 32, 4, 2),
        "exact, 128": Config(16, 16, 4, 2),
    },
    "a100": {
        "16 bits, 16": Config(64, 32, 4, 3),
        "16 bits, 32": Config(64, 32, 4, 3),
        "16 bits, 64": Config(64, 32, 4, 3),
        "16 bits, 128": Config(64, 32, 4, 3),
        "16 bits, 256": Config(32, 32, 4, 2),
        "exact, 16": Config(32, 32, 4, 2),
        "exact, 32": Config(32, 32, 4, 2),
        "exact, 64": Config(32, 32, 4, 2),
        "exact, 128": Config(16, 16, 4, 2),
    },
}
for _table in (FORWARD, DKV, DQ):
    _table["small"] = _table["a100"]


def why_not(q: Array, k: Array, v: Array, mask: BlockMask, interpret: bool) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if (reason := _gpu.why_not(interpret)) is not None:
        return reason
    block_q, block_kv = mask.grid.block_q, mask.grid.block_kv
    if block_q % SMALLEST or block_kv % SMALLEST:
        return f"block_q={block_q} and block_kv={block_kv} must be multiples of {SMALLEST}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"head_dim={q.shape[-1]} and v_dim={v.shape[-1]} must be at most 256"
    if q.dtype == jnp.float32 and max(q.shape[-1], v.shape[-1]) > 128:
        return (
            f"head_dim={q.shape[-1]} and v_dim={v.shape[-1]} must be at most 128 in float32, whose "
            "products take too many registers (bfloat16: 256)"
        )
    if max(q.size, k.size, v.size) >= 1 << 31:
        return f"it takes up to 2^31 numbers, not q {q.shape}, k {k.shape}, v {v.shape}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one call."""

    q_len: int
    kv_len: int
    dim: int
    v_dim: int
    heads: int
    kv_heads: int
    of_mask: tuple[int, int]  # its batch and heads
    block: tuple[int, int]  # queries and keys
    tile: tuple[int, int]
    rules: tuple[Rule, ...]
    segments: bool
    scale: float
    softcap: float | None
    multiply: Callable[[Array, Array], Array]

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of all queries, and of all keys."""
        return -(-self.q_len // self.tile[0]), -(-self.kv_len // self.tile[1])

    @property
    def width(self) -> tuple[int, int]:
        """Head sizes of the keys and of the values, filled up."""
        return max(16, power_of_2(self.dim)), max(16, power_of_2(self.v_dim))

    def of_head(self, b: Array, h: Array) -> Array:
        """The list of a head."""
        batch, heads = self.of_mask
        h = lax.div(h * heads, self.heads) if heads < self.heads else h
        return (b if batch > 1 else 0) * heads + h

    def scores(self, products: Array) -> tuple[Array, Array | None]:
        """Scores in base 2 of products of queries and keys, and the derivative of the soft cap."""
        if self.softcap is None:
            return products * (self.scale * LOG2E), None
        t = _tanh(products * (self.scale / self.softcap))
        return t * (self.softcap * LOG2E), 1 - t * t


def _tanh(x: Array) -> Array:
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))


def _plan(inputs: Inputs, how: Config, interpret: bool, *, by_keys: bool = False) -> _Plan:
    q, mask = inputs.q, inputs.mask
    grid = mask.grid
    tile = (how.depth, how.tile) if by_keys else (how.tile, how.depth)
    return _Plan(
        q_len=q.shape[2],
        kv_len=inputs.k.shape[2],
        dim=q.shape[3],
        v_dim=inputs.v.shape[3],
        heads=q.shape[1],
        kv_heads=inputs.k.shape[1],
        of_mask=(mask.codes.shape[0], mask.codes.shape[1]),
        block=(grid.block_q, grid.block_kv),
        tile=(largest_tile(grid.block_q, tile[0]), largest_tile(grid.block_kv, tile[1])),
        rules=mask.rules,
        segments=inputs.segments is not None,
        scale=inputs.scale,
        softcap=inputs.softcap,
        multiply=dot(inputs.precision, interpret),
    )


def _fit(how: Config, tile: int) -> Config:
    """Fewer warps for a tile that is smaller than asked for, since blocks are."""
    return dataclasses.replace(how, warps=max(4, how.warps * tile // how.tile))


def _config(kernel: str, table: dict[str, dict[str, Config]], inputs: Inputs) -> Config:
    width = max(16, power_of_2(max(inputs.q.shape[3], inputs.v.shape[3])))
    return _gpu.config(kernel, f"{_gpu.kind(inputs.q.dtype, inputs.precision)}, {width}", table)


# ---- inside a kernel ----------------------------------------------------------------------------


def _divide(a: Array, b: int) -> tuple[Array, Array]:
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def _positions(start: Array, size: int, axis: int) -> Array:
    """`size` positions from the start, along this axis of a matrix."""
    return start + lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def _rows(ref: Any, of: Array, start: Array, size: int, length: int, dim: int, width: int) -> Array:
    """Positions of one head, `[size, width]`; 0 beyond the length and the size of the head."""
    mask = None
    if length % size:
        mask = jnp.broadcast_to(_positions(start, size, 0) < length, (size, width))
    if dim < width:
        inside = jnp.broadcast_to(_positions(jnp.int32(0), width, 1) < dim, (size, width))
        mask = inside if mask is None else mask & inside
    return load(ref.at[of, pl.ds(start, size), pl.ds(0, width)], mask)


def _numbers(ref: Any, of: Array, start: Array, size: int, length: int, other: float) -> Array:
    """A number for each position of one head, `[size]`."""
    mask = start + jnp.arange(size, dtype=jnp.int32) < length if length % size else None
    return load(ref.at[of, pl.ds(start, size)], mask, other)


def _hide(
    p: _Plan, refs: Any, b: Array, of: Array, scores: Array, code: Array, q0, k0, by_keys
) -> Array:
    """The scores `[queries, keys]` (or transposed) with MASKED where a pair is hidden."""
    if not p.rules and not p.segments:
        return scores
    tq, tk = p.tile
    at_q, at_k = _positions(q0, tq, int(by_keys)), _positions(k0, tk, int(not by_keys))

    def hidden() -> Array:
        seen = at_k < p.kv_len
        if p.rules:
            offsets = refs["offsets"]
            seen &= visible(code, p.rules, at_q + offsets[of, 0], at_k + offsets[of, 1])
        if p.segments:
            of_q = _numbers(refs["q_ids"], b, q0, tq, p.q_len, 0).reshape(at_q.shape)
            of_k = _numbers(refs["kv_ids"], b, k0, tk, p.kv_len, 0).reshape(at_k.shape)
            seen &= of_q == of_k
        return jnp.where(seen, scores, MASKED)

    return lax.cond(code == FULL, lambda: scores, hidden)


def _walk(
    p: _Plan, refs: Any, of: Array, outer: Array, by_keys: bool, step: Callable, carry: Any
) -> Any:
    """step(start of a tile of the inner positions, its code, carry) over the list of block `outer`."""
    starts, entries = refs["starts"], refs["entries"]
    block, tile = (p.block[0], p.tile[0]) if by_keys else (p.block[1], p.tile[1])
    parts = block // tile

    def body(at: Array, carry: Any) -> Any:
        place, part = _divide(at, parts) if parts > 1 else (at, 0)
        entry = entries[of, place]
        start = lax.shift_right_logical(entry, jnp.int32(CODE_BITS)) * block + part * tile
        return step(start, entry & CODE_MASK, carry)

    return lax.fori_loop(starts[of, outer] * parts, starts[of, outer + 1] * parts, body, carry)


# ---- forward ------------------------------------------------------------------------------------


def _forward_kernel(p: _Plan, names: tuple[str, ...], *arrays: Any) -> None:
    refs: dict[str, Any] = dict(zip((*names, "out", "lse"), arrays))
    (tq, tk), (width, v_width) = p.tile, p.width
    t = p.tiles[0] - 1 - pl.program_id(0)
    bh = pl.program_id(1)
    b, h = _divide(bh, p.heads)
    kv = b * p.kv_heads + lax.div(h, jnp.int32(p.heads // p.kv_heads))
    of = p.of_head(b, h)
    q = _rows(refs["q"], bh, t * tq, tq, p.q_len, p.dim, width)

    def step(k0, code, carry):
        highest, total, acc = carry
        k = _rows(refs["k"], kv, k0, tk, p.kv_len, p.dim, width)
        s, _ = p.scores(p.multiply(q, k.T))
        s = _hide(p, refs, b, of, s, code, t * tq, k0, False)
        new = jnp.maximum(highest, jnp.max(s, 1))
        weights = jnp.exp2(s - new[:, None])
        shrink = jnp.exp2(highest - new)
        v = _rows(refs["v"], kv, k0, tk, p.kv_len, p.v_dim, v_width)
        acc = acc * shrink[:, None] + p.multiply(weights.astype(v.dtype), v)
        return new, total * shrink + jnp.sum(weights, 1), acc

    zero = jnp.zeros((tq,), jnp.float32)
    init = zero + FLOOR, zero, jnp.zeros((tq, v_width), jnp.float32)
    row = lax.div(t, jnp.int32(p.block[0] // tq))
    highest, total, acc = _walk(p, refs, of, row, False, step, init)
    some = total != 0  # NaN is not nothing
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, (highest + jnp.log2(total)) / LOG2E, -jnp.inf)
    _store(refs["out"], bh, t * tq, acc / total[:, None], p.q_len, p.v_dim)
    inside = t * tq + jnp.arange(tq, dtype=jnp.int32) < p.q_len if p.q_len % tq else None
    _gpu.store(refs["lse"].at[bh, pl.ds(t * tq, tq)], lse, inside)


def _store(ref: Any, of: Array, start: Array, value: Array, length: int, dim: int) -> None:
    """Write the positions and the part of the head size that there are."""
    size, width = value.shape
    mask = None
    if length % size or dim < width:
        mask = (_positions(start, size, 0) < length) & (_positions(jnp.int32(0), width, 1) < dim)
    _gpu.store(ref.at[of, pl.ds(start, size), pl.ds(0, width)], value.astype(ref.dtype), mask)


def _call(
    kernel: Callable[..., None],
    name: str,
    p: _Plan,
    programs: tuple[int, int],
    arrays: dict[str, Array],
    inputs: Inputs,
    lists: tuple[Array, Array],
    out: dict[str, Any],
    how: Config,
    interpret: bool,
    products: int,
) -> dict[str, Array]:
    """Runs a kernel over the lists of all heads; q, k and v as `[batch * heads, length, dim]`."""
    mask, flat = inputs.mask, lambda x: x.reshape(-1, *x.shape[2:])
    arrays = dict(starts=flat(lists[0]), entries=flat(lists[1])) | arrays
    if p.rules:
        arrays["offsets"] = flat(mask.offsets)
    if inputs.segments is not None:
        arrays |= dict(zip(("q_ids", "kv_ids"), inputs.segments))
    pairs = inputs.q.shape[0] * p.heads * mask.capacity * p.block[0] * p.block[1]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *out.values()))
    cost = pl.CostEstimate(
        flops=products * pairs * (p.dim + p.v_dim), transcendentals=pairs, bytes_accessed=moved
    )
    results = _gpu.call(
        functools.partial(kernel, p, tuple(arrays)),
        name,
        programs,
        tuple(out.values()),
        how,
        interpret,
        *arrays.values(),
        cost=cost,
    )
    return dict(zip(out, results))


@in_32_bits
def forward(inputs: Inputs, *, interpret: bool = False) -> tuple[Array, Array]:
    """As `xla.forward`."""
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    how = _config("attention", FORWARD, inputs)
    p = _plan(inputs, how, interpret)
    (b, h, n), flat = q.shape[:3], lambda x: x.reshape(-1, *x.shape[2:])
    out = _call(
        _forward_kernel,
        "block_sparse_attention",
        p,
        (p.tiles[0], b * h),
        dict(q=flat(q), k=flat(k), v=flat(v)),
        inputs,
        (mask.row_starts, mask.row_entries),
        dict(out=result((b * h, n, p.v_dim), q.dtype, q), lse=result((b * h, n), jnp.float32, q)),
        _fit(how, p.tile[0]),
        interpret,
        2,
    )
    return out["out"].reshape(b, h, n, p.v_dim), out["lse"].reshape(b, h, n)


# ---- backward -----------------------------------------------------------------------------------


def _dkv_kernel(p: _Plan, names: tuple[str, ...], *arrays: Any) -> None:
    refs: dict[str, Any] = dict(zip((*names, "dk", "dv"), arrays))
    (tq, tk), (width, v_width), group = p.tile, p.width, p.heads // p.kv_heads
    t, kv = pl.program_id(0), pl.program_id(1)
    b, of_kv = _divide(kv, p.kv_heads)
    k = _rows(refs["k"], kv, t * tk, tk, p.kv_len, p.dim, width)
    v = _rows(refs["v"], kv, t * tk, tk, p.kv_len, p.v_dim, v_width)
    column = lax.div(t, jnp.int32(p.block[1] // tk))

    def head(g: Array, carry: Any) -> Any:
        h = of_kv * group + g
        bh, of = b * p.heads + h, p.of_head(b, h)

        def step(q0, code, carry):
            dk, dv = carry
            q = _rows(refs["q"], bh, q0, tq, p.q_len, p.dim, width)
            s, slope = p.scores(p.multiply(k, q.T))  # keys by rows, queries by columns
            s = _hide(p, refs, b, of, s, code, q0, t * tk, True)
            weights = jnp.exp2(s - _numbers(refs["lse"], bh, q0, tq, p.q_len, -MASKED)[None, :])
            dout = _rows(refs["dout"], bh, q0, tq, p.q_len, p.v_dim, v_width)
            dv += p.multiply(weights.astype(dout.dtype), dout)
            products = p.multiply(v, dout.T)
            ds = weights * (products - _numbers(refs["delta"], bh, q0, tq, p.q_len, 0)[None, :])
            ds = ds if slope is None else ds * slope
            return dk + p.multiply(ds.astype(q.dtype), q), dv

        return _walk(p, refs, of, column, True, step, carry)

    zero = jnp.zeros((tk, width), jnp.float32), jnp.zeros((tk, v_width), jnp.float32)
    if group == 1:
        dk, dv = head(jnp.int32(0), zero)
    else:
        dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(group), head, zero)
    _store(refs["dk"], kv, t * tk, dk * p.scale, p.kv_len, p.dim)
    _store(refs["dv"], kv, t * tk, dv, p.kv_len, p.v_dim)


def _dq_kernel(p: _Plan, names: tuple[str, ...], *arrays: Any) -> None:
    refs: dict[str, Any] = dict(zip((*names, "dq"), arrays))
    (tq, tk), (width, v_width) = p.tile, p.width
    t = p.tiles[0] - 1 - pl.program_id(0)
    bh = pl.program_id(1)
    b, h = _divide(bh, p.heads)
    kv = b * p.kv_heads + lax.div(h, jnp.int32(p.heads // p.kv_heads))
    of = p.of_head(b, h)
    q = _rows(refs["q"], bh, t * tq, tq, p.q_len, p.dim, width)
    dout = _rows(refs["dout"], bh, t * tq, tq, p.q_len, p.v_dim, v_width)
    lse = _numbers(refs["lse"], bh, t * tq, tq, p.q_len, -MASKED)
    delta = _numbers(refs["delta"], bh, t * tq, tq, p.q_len, 0)

    def step(k0, code, dq):
        k = _rows(refs["k"], kv, k0, tk, p.kv_len, p.dim, width)
        s, slope = p.scores(p.multiply(q, k.T))
        s = _hide(p, refs, b, of, s, code, t * tq, k0, False)
        weights = jnp.exp2(s - lse[:, None])
        v = _rows(refs["v"], kv, k0, tk, p.kv_len, p.v_dim, v_width)
        ds = weights * (p.multiply(dout, v.T) - delta[:, None])
        ds = ds if slope is None else ds * slope
        return dq + p.multiply(ds.astype(k.dtype), k)

    row = lax.div(t, jnp.int32(p.block[0] // tq))
    dq = _walk(p, refs, of, row, False, step, jnp.zeros((tq, width), jnp.float32))
    _store(refs["dq"], bh, t * tq, dq * p.scale, p.q_len, p.dim)


@in_32_bits
def backward(
    inputs: Inputs, lse: Array, delta: Array, dout: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """As `xla.backward`."""
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    (b, h, n), kv_heads, flat = q.shape[:3], k.shape[1], lambda x: x.reshape(-1, *x.shape[2:])
    # An empty row has lse = -inf; a huge number instead makes its probabilities 0.
    lse = jnp.where(jnp.isneginf(lse), -MASKED, lse * LOG2E)
    arrays = dict(q=flat(q), k=flat(k), v=flat(v), dout=flat(dout.astype(q.dtype)))
    arrays |= dict(lse=flat(lse), delta=flat(delta))
    how = _config("attention_dkv", DKV, inputs)
    p = _plan(inputs, how, interpret, by_keys=True)
    grads = _call(
        _dkv_kernel,
        "block_sparse_attention_dkv",
        p,
        (p.tiles[1], b * kv_heads),
        arrays,
        inputs,
        (mask.col_starts, mask.col_entries),
        {
            name: result((b * kv_heads, *x.shape[2:]), x.dtype, q)
            for name, x in (("dk", k), ("dv", v))
        },
        _fit(how, p.tile[1]),
        interpret,
        4,
    )
    how = _config("attention_dq", DQ, inputs)
    p = _plan(inputs, how, interpret)
    grads |= _call(
        _dq_kernel,
        "block_sparse_attention_dq",
        p,
        (p.tiles[0], b * h),
        arrays,
        inputs,
        (mask.row_starts, mask.row_entries),
        dict(dq=result((b * h, n, p.dim), q.dtype, q)),
        _fit(how, p.tile[0]),
        interpret,
        3,
    )
    return grads["dq"].reshape(q.shape), grads["dk"].reshape(k.shape), grads["dv"].reshape(v.shape)
