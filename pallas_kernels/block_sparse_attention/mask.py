"""`BlockMask`: which blocks of keys each block of queries reads, as compact lists per head.

The lists are made under `jit` (one sort of integers), so the mask may depend on the data. What is
visible inside a kept block is a formula of positions (see `rules`), not a stored mask.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from pallas_kernels.block_sparse_attention.grid import (
    Grid,
    GridLike,
    as_grid,
    grid_of_blocks,
    takes_grid,
)
from pallas_kernels.block_sparse_attention.lists import (
    DROPPED,
    FULL,
    RULE_MASK,
    SEGMENTS,
    best,
    compact,
    module_of,
    visible,
)
from pallas_kernels.block_sparse_attention.patterns import Patterns
from pallas_kernels.block_sparse_attention.rules import Everything, Rule, both, either


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "codes",
        "row_starts",
        "row_entries",
        "col_starts",
        "col_entries",
        "dropped",
        "offsets",
    ],
    meta_fields=["grid", "rules", "pattern", "is_window"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask(Patterns):
    """Blocks of keys that each block of queries reads; per batch entry and per head.

    Make one with `from_dense`, `from_scores`, `from_indices` or a pattern (`causal`, `local`,
    `strided`, `sinks`, `prefix`, `bigbird`), and compose masks with `|` and `&`. All arrays lead
    with `[batch or 1, heads or 1]` (1: shared; heads may be those of the queries or of the
    keys), so that a mask is sharded over heads or batch like the attention it belongs to.

    Attributes:
      codes: int8 `[b, h, q_blocks, kv_blocks]`: 0 dropped, 1 every pair visible, `2 + i`: the
        pairs that `rules[i]` allows.
      row_starts, row_entries: for each block of queries the kept blocks of keys, ascending, as one
        list per head: row i has `row_entries[row_starts[i]:row_starts[i + 1]]`. An entry is
        `index * 128 + code`. The list's length is the static capacity.
      col_starts, col_entries: the same blocks by block of keys, for dK and dV.
      dropped: int32 `[b, h]`, how many blocks did not fit the capacity. Zero in a sound mask.
      offsets: int32 `[b, h, 2]`, position of the first query and the first key (see `window`).
      grid: lengths and block sizes.
      rules: what partial blocks show.
      pattern: the rule that says everything about this mask, or None if blocks were chosen.
      is_window: whether this is a part of a larger mask.

    >>> keep = np.array([[True, False], [True, True]])
    >>> grid = Grid(4, block_q=2, block_kv=2)
    >>> mask = BlockMask.from_dense(keep, grid) & BlockMask.causal(grid)
    >>> mask.to_dense()[0, 0].astype(int)
    Array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]], dtype=int32)
    >>> int(mask.counts[0, 0]), mask.capacity
    (3, 3)
    """

    codes: Array
    row_starts: Array
    row_entries: Array
    col_starts: Array
    col_entries: Array
    dropped: Array
    offsets: Array
    grid: Grid
    rules: tuple[Rule, ...]
    pattern: Rule | None
    is_window: bool = False

    # ---------------------------------------------------------------- chosen blocks

    @classmethod
    @takes_grid
    def from_dense(
        cls,
        keep: Array | np.ndarray,
        grid: Grid | tuple[int, int] | None = None,
        *,
        capacity: int | None = None,
    ) -> BlockMask:
        """A mask from booleans, one per block; works under `jit`.

        Args:
          keep: bool `[q_blocks, kv_blocks]`, `[heads, ...]` or `[batch, heads, ...]`.
          grid: lengths and block sizes; or `(block_q, block_kv)` for whole blocks of this size, by
            default (128, 128).
          capacity: static length of each head's list. By default all blocks fit. With a smaller
            one the last blocks (in row-major order) are dropped and counted in `dropped`.

        Raises:
          ValueError: if shapes, sizes or the capacity do not fit, or (concrete masks only) if the
            capacity overflows.
        """
        return _chosen(keep, grid, capacity, fits=capacity is None)

    @classmethod
    @takes_grid
    def from_scores(
        cls,
        scores: Array,
        num_blocks: int | Array,
        grid: Grid | tuple[int, int] | None = None,
        *,
        forced: Array | np.ndarray | None = None,
        capacity: int | None = None,
    ) -> BlockMask:
        """Keep the `num_blocks` best blocks of keys for each block of queries.

        Exact, without a sort. Ties go to the lower index; a score of -inf or NaN is never chosen.
        Not differentiable (a choice).

        Args:
          scores: float `[..., q_blocks, kv_blocks]`, leading axes as in `from_dense`.
          num_blocks: how many per row; an int or an array that broadcasts to `[..., q_blocks]`.
          forced: bool, broadcasts to scores: blocks that are always chosen, inside the budget.
          grid, capacity: as in `from_dense`. The default capacity is
            `q_blocks * num_blocks` if num_blocks is an int.

        >>> mask = BlockMask.from_scores(jnp.array([[1., 3., 2.]]), 2, (8, 8))
        >>> mask.codes[0, 0]
        Array([[0, 1, 1]], dtype=int8)
        """
        if not jnp.issubdtype(scores.dtype, jnp.floating) or not 2 <= scores.ndim <= 4:
            raise ValueError(
                f"scores has dtype {scores.dtype} and shape {tuple(scores.shape)}; it must be "
                "floating point with 2 to 4 axes, [..., q_blocks, kv_blocks]"
            )
        if isinstance(num_blocks, int) and num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks} must not be negative")
        scores = lax.stop_gradient(scores).astype(jnp.float32)
        if forced is not None:
            scores = jnp.where(jnp.broadcast_to(forced, scores.shape), jnp.inf, scores)
        fits = capacity is None
        if fits and isinstance(num_blocks, int):
            nq, nk = scores.shape[-2:]
            capacity = nq * max(1, min(num_blocks, nk))
        keep = best(scores, jnp.asarray(num_blocks, jnp.int32))
        return _chosen(keep, grid, capacity, fits=fits)

    @classmethod
    @takes_grid
    def from_indices(
        cls,
        indices: Array | np.ndarray,
        num_kv_blocks: int,
        grid: Grid | tuple[int, int] | None = None,
        *,
        capacity: int | None = None,
    ) -> BlockMask:
        """A mask from lists: `indices` int `[..., q_blocks, n]`, -1 where a row has fewer.

        Raises:
          ValueError: for an index out of range or listed twice in a row, if the indices are
            concrete. Traced: an index out of range is left out, a duplicate counts once.

        >>> BlockMask.from_indices(np.array([[2, 0], [1, -1]]), 3).codes[0, 0]
        Array([[1, 0, 1],
               [0, 1, 0]], dtype=int8)
        """
        if not jnp.issubdtype(indices.dtype, jnp.integer) or not 2 <= indices.ndim <= 4:
            raise ValueError(
                f"indices has dtype {indices.dtype} and shape {tuple(indices.shape)}; it must be "
                "integer with 2 to 4 axes, [..., q_blocks, n]"
            )
        blocks = np.arange(num_kv_blocks, dtype=indices.dtype)
        hits = indices[..., None] == blocks.reshape((1,) * indices.ndim + (-1,))
        if _concrete(indices):
            if bool((np.asarray(hits).sum(-2) > 1).any()):
                raise ValueError("indices lists a block twice in one row; each may appear once")
            low, high = int(np.min(indices)), int(np.max(indices))
            if low < -1 or high >= num_kv_blocks:
                raise ValueError(
                    f"indices lie in [{low}, {high}]; they must be -1 (none) or in "
                    f"[0, {num_kv_blocks})"
                )
        return cls.from_dense(hits.any(-2), grid, capacity=capacity)

    @classmethod
    def of_rule(cls, grid: GridLike, rule: Rule) -> BlockMask:
        """The pairs of positions that a rule allows, in every head."""
        grid = as_grid(grid)
        q0 = np.arange(0, grid.q_len, grid.block_q)[:, None]
        k0 = np.arange(0, grid.kv_len, grid.block_kv)
        q1 = np.minimum(q0 + grid.block_q, grid.q_len) - 1
        k1 = np.minimum(k0 + grid.block_kv, grid.kv_len) - 1
        some, every = rule.classify(q0, q1, k0, k1)
        codes = np.where(every, FULL, np.where(some, FULL + 1, DROPPED)).astype(np.int8)
        capacity = max(1, int(some.sum()))
        return _build(codes[None, None], capacity, grid, (rule,), rule)

    # ---------------------------------------------------------------- composition

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that both masks show."""
        return _compose(self, other, all_=True)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either mask shows."""
        return _compose(self, other, all_=False)

    def window(
        self, q_block: int | Array, num_q: int, kv_block: int | Array, num_kv: int
    ) -> BlockMask:
        """The part for `num_q` blocks of queries from `q_block` on and `num_kv` blocks of keys.

        Positions stay those of the whole (`offsets` moves along). The starts may be traced if the
        lengths are whole blocks: the mask of one device in a ring.
        """
        nq, nk = self.codes.shape[-2:]
        if not (0 < num_q <= nq and 0 < num_kv <= nk):
            raise ValueError(f"num_q={num_q}, num_kv={num_kv} must lie in [1, {nq}] and [1, {nk}]")
        grid, lengths = self.grid, []
        for start, num, block, total in (
            (q_block, num_q, grid.block_q, grid.q_len),
            (kv_block, num_kv, grid.block_kv, grid.kv_len),
        ):
            if isinstance(start, int):
                if not 0 <= start <= -(-total // block) - num:
                    raise ValueError(f"{num} blocks from {start} on leave the mask's {total}")
                lengths.append(min(num * block, total - start * block))
            elif total % block:
                raise ValueError(
                    f"a traced start needs whole blocks; the length {total} is not a multiple of "
                    f"the block {block}"
                )
            else:
                lengths.append(num * block)
        codes = lax.dynamic_slice_in_dim(self.codes, q_block, num_q, 2)
        codes = lax.dynamic_slice_in_dim(codes, kv_block, num_kv, 3)
        start = jnp.stack(
            [jnp.asarray(q_block) * grid.block_q, jnp.asarray(kv_block) * grid.block_kv]
        )
        sizes = dataclasses.replace(grid, q_len=lengths[0], kv_len=lengths[1])
        part = _build(codes, self.capacity, sizes, self.rules, None)
        return dataclasses.replace(
            part,
            dropped=self.dropped,
            offsets=self.offsets + start.astype(jnp.int32).reshape(1, 1, 2),
            is_window=True,
        )

    # ---------------------------------------------------------------- what it says

    @property
    def capacity(self) -> int:
        """How many blocks a head's list can hold."""
        return self.row_entries.shape[-1]

    @property
    def counts(self) -> Array:
        """How many blocks are kept, int32 `[b, h]`."""
        return self.row_starts[..., -1]

    @property
    def density(self) -> Array:
        """Kept blocks over all blocks, float32 `[b, h]`."""
        nq, nk = self.codes.shape[-2:]
        return self.counts / (nq * nk)

    def to_dense(self) -> Array:
        """The visible pairs, bool `[b, h, q_len, kv_len]`: for tests and small inputs."""
        grid = self.grid
        codes = jnp.repeat(jnp.repeat(self.codes, grid.block_q, 2), grid.block_kv, 3)
        codes = codes[..., : grid.q_len, : grid.kv_len]
        q = self.offsets[..., 0, None, None] + jnp.arange(grid.q_len).reshape(1, 1, -1, 1)
        k = self.offsets[..., 1, None, None] + jnp.arange(grid.kv_len).reshape(1, 1, 1, -1)
        return visible(codes, self.rules, q, k)


# -------------------------------------------------------------------- making lists


def _concrete(x: Array | np.ndarray) -> bool:
    return not isinstance(x, Tracer)


def _host(*arrays: Array) -> Any:
    """The arrays as numpy if all their values are at hand, else as they are."""
    if all(_concrete(x) and x.is_fully_addressable for x in arrays):
        return [np.asarray(x) for x in arrays]
    return arrays


def _chosen(
    keep: Array | np.ndarray,
    grid: Grid | tuple[int, int] | None,
    capacity: int | None,
    *,
    fits: bool,
) -> BlockMask:
    """`BlockMask.from_dense`; `fits` says that the blocks cannot be more than the capacity."""
    if keep.dtype != np.bool_ or not 2 <= keep.ndim <= 4:
        raise ValueError(
            f"keep has dtype {keep.dtype} and shape {tuple(keep.shape)}; it must be bool "
            "[q_blocks, kv_blocks], [heads, q_blocks, kv_blocks] or with a leading batch"
        )
    nq, nk = keep.shape[-2:]
    grid = grid_of_blocks((int(nq), int(nk)), grid, "keep")
    codes = keep.reshape((1,) * (4 - keep.ndim) + keep.shape).astype(np.int8)
    return _build(codes, capacity, grid, (), None, fits=fits)


def _build(
    codes: Any,
    capacity: int | None,
    grid: Grid,
    rules: tuple[Rule, ...],
    pattern: Rule | None,
    *,
    fits: bool = True,
) -> BlockMask:
    """The mask of these codes, with at most `capacity` blocks per head; `fits`: there are no more."""
    xp = module_of(codes)
    b, h, nq, nk = codes.shape
    if grid.kv_len % grid.block_kv:
        # Full blocks at the end of the keys become partial: the kernels look at codes only.
        if Everything() not in rules:
            rules = (*rules, Everything())
        cut = FULL + 1 + rules.index(Everything())
        is_last = (np.arange(nk) == nk - 1).reshape(1, 1, 1, nk)
        codes = xp.where(is_last & (codes == FULL), cut, codes).astype(np.int8)
    blocks: int = nq * nk
    if capacity is None:
        capacity = blocks
    elif capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1")
    capacity = min(capacity, blocks)
    dropped, offsets = np.zeros((b, h), np.int32), np.zeros((b, h, 2), np.int32)
    if not fits:
        total = xp.sum(codes != DROPPED, (2, 3), dtype=np.int32)
        dropped = xp.maximum(total - capacity, 0)
        if _concrete(dropped) and (worst := int(dropped.max())):
            raise ValueError(
                f"capacity={capacity} is too small: {worst} blocks of one head do not fit; give "
                f"at least {capacity + worst}"
            )
    arrays: dict[str, Any] = _lists(codes, capacity, fits)
    arrays |= dict(dropped=dropped, offsets=offsets)
    with jax.ensure_compile_time_eval():  # what is known stays concrete, inside `jit` too
        arrays = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in arrays.items()}
    return BlockMask(**arrays, grid=grid, rules=rules, pattern=pattern)


def _lists(codes: Any, capacity: int, fits: bool = True) -> dict[str, Any]:
    """The fields that follow from the codes; without those blocks that do not fit."""
    row_starts, row_entries, listed = compact(codes, capacity)
    if not fits:
        xp = module_of(codes)
        row_starts = xp.minimum(row_starts, capacity)
        codes = xp.where(listed, codes, DROPPED).astype(np.int8)
    col_starts, col_entries, _ = compact(codes.swapaxes(2, 3), capacity)
    return dict(
        codes=codes,
        row_starts=row_starts,
        row_entries=row_entries,
        col_starts=col_starts,
        col_entries=col_entries,
    )


def within_segments(mask: BlockMask, q_ids: Array, kv_ids: Array) -> BlockMask:
    """The lists for packed sequences with ids `[batch, length]`, in any order.

    Blocks whose ranges of ids do not meet leave the lists; blocks whose pairs may have different
    ids are flagged, so that ids are compared in these only.
    """

    def bounds(ids: Array, block: int) -> tuple[Array, Array]:
        n = -(-ids.shape[1] // block)
        ids = jnp.pad(ids, ((0, 0), (0, n * block - ids.shape[1])), mode="edge")
        ids = ids.reshape(ids.shape[0], 1, n, block)
        return jnp.min(ids, -1), jnp.max(ids, -1)

    q_low, q_high = (x[..., None] for x in bounds(q_ids, mask.grid.block_q))
    k_low, k_high = (x[..., None, :] for x in bounds(kv_ids, mask.grid.block_kv))
    codes = jnp.where((q_low <= k_high) & (k_low <= q_high), mask.codes, DROPPED)
    equal = (q_low == k_high) & (k_low == q_high) & (q_low == q_high)
    codes = jnp.where(equal | (codes == DROPPED), codes, codes | SEGMENTS).astype(jnp.int8)
    lead = codes.shape[:2]
    return dataclasses.replace(
        mask,
        **_lists(codes, mask.capacity),
        dropped=jnp.broadcast_to(mask.dropped, lead),
        offsets=jnp.broadcast_to(mask.offsets, (*lead, 2)),
    )


def _compose(a: BlockMask, b: BlockMask, *, all_: bool) -> BlockMask:
    for name in ("q_len", "kv_len", "block_q", "block_kv"):
        of_a, of_b = getattr(a.grid, name), getattr(b.grid, name)
        if of_a != of_b:
            raise ValueError(
                f"masks with {name}={of_a} and {name}={of_b} cannot be "
                "composed; build both for the same lengths and blocks"
            )
    if a.is_window or b.is_window:
        raise ValueError("a window of a mask cannot be composed; compose first, then take windows")
    join = both if all_ else either
    if a.pattern is not None and b.pattern is not None:
        return BlockMask.of_rule(a.grid, join(a.pattern, b.pattern))
    rules: list[Rule] = []

    def code_of(rule: Rule) -> int:
        if rule not in rules:
            rules.append(rule)
            if FULL + len(rules) > RULE_MASK:
                raise ValueError(
                    f"this mask needs more than {RULE_MASK - FULL} different rules; compose the "
                    "patterns with each other first, then with the chosen blocks"
                )
        return FULL + 1 + rules.index(rule)

    of_a, of_b = _host(a.codes, b.codes)
    xp = module_of(of_a)
    shape = np.broadcast_shapes(of_a.shape, of_b.shape)
    codes = xp.zeros(shape, np.int8)
    states_a = [(FULL, Everything()), *((FULL + 1 + i, r) for i, r in enumerate(a.rules))]
    states_b = [(FULL, Everything()), *((FULL + 1 + i, r) for i, r in enumerate(b.rules))]
    pairs = [(x, y, join(r, s)) for x, r in states_a for y, s in states_b]
    if not all_:
        pairs += [(x, DROPPED, r) for x, r in states_a] + [(DROPPED, y, s) for y, s in states_b]
    for x, y, rule in pairs:
        code = FULL if isinstance(rule, Everything) else code_of(rule)
        codes = xp.where((of_a == x) & (of_b == y), np.int8(code), codes)
    blocks = shape[-2] * shape[-1]
    capacity = min(a.capacity, b.capacity) if all_ else min(a.capacity + b.capacity, blocks)
    mask = _build(codes, capacity, a.grid, tuple(rules), None)
    return dataclasses.replace(mask, dropped=a.dropped + b.dropped + mask.dropped)
