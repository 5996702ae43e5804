"""`Layout`: how a predictor cuts queries and keys into blocks, and which blocks it keeps in any case."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse.attention import select
from pallas_kernels import BlockMask, Grid


@dataclasses.dataclass(frozen=True)
class Layout:
    """Blocks, causality and forced blocks, which all predictors share.

    Args:
      block_q, block_kv: positions of a block of queries and of keys.
      causal: queries see no later keys. With fewer queries than keys, the ends are aligned: queries are the last
        positions.
      sinks: blocks of keys at the beginning that every row keeps.
      local: blocks of keys up to a row's own that it keeps; 1 is the own one, 0 forces none. (Own blocks are those that
        any of the row's queries lie in.) Without `causal`: the blocks around as well.
      last: blocks of queries at the end that keep everything.
      share: query heads that share keys and values (GQA) share a choice, so that a block is read once for all of them.
      capacity: blocks that a head's list has room for; None: the most that the rule can keep. What does not fit is
        counted in `BlockMask.dropped` under `jit`, and an error outside of it.

    Raises:
      ValueError: a number out of range.

    >>> Layout(block_q=2, block_kv=2, sinks=1, local=1).forced(Grid(6, 6, 2, 2)).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """

    block_q: int = 128
    block_kv: int = 128
    causal: bool = True
    sinks: int = 1
    local: int = 1
    last: int = 0
    share: bool = True
    capacity: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name}={size!r} must be an integer, at least 1")
        for name in ("sinks", "local", "last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} must be None or at least 1")

    def grid(self, q_len: int, kv_len: int) -> Grid:
        """The blocks of these lengths.

        Raises:
          ValueError: more queries than keys under a causal mask.
        """
        if self.causal and q_len > kv_len:
            raise ValueError(
                f"q_len={q_len} is more than kv_len={kv_len}: under a causal mask the queries are the last positions "
                "(arrays are [batch, heads, length, dim])"
            )
        return Grid(q_len, kv_len, self.block_q, self.block_kv)

    def bounds(self, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """First and last positions of blocks: queries as `[n, 1]`, keys as `[n]`, on the axis of the keys."""
        shift = grid.kv_len - grid.q_len if self.causal else 0
        q0 = np.arange(grid.q_blocks)[:, None] * grid.block_q
        k0 = np.arange(grid.kv_blocks) * grid.block_kv
        q1 = np.minimum(q0 + grid.block_q, grid.q_len) - 1
        k1 = np.minimum(k0 + grid.block_kv, grid.kv_len) - 1
        return q0 + shift, q1 + shift, k0, k1

    def visible(self, grid: Grid) -> np.ndarray:
        """bool `[q_blocks, kv_blocks]`: blocks of which some pair is visible."""
        _, q1, k0, _ = self.bounds(grid)
        return (k0 <= q1) if self.causal else np.ones((grid.q_blocks, grid.kv_blocks), bool)

    def forced(self, grid: Grid) -> np.ndarray:
        """bool `[q_blocks, kv_blocks]`: sink, local and last blocks that are visible."""
        q0, q1, k0, k1 = self.bounds(grid)
        row, column = np.arange(grid.q_blocks)[:, None], np.arange(grid.kv_blocks)
        kept = (column < self.sinks) | (row >= grid.q_blocks - self.last)
        if self.local:
            reach = (self.local - 1) * grid.block_kv
            before = k1 >= q0 - reach
            kept = kept | (before & (k0 <= q1 + (0 if self.causal else reach)))
        return kept & self.visible(grid)

    def mask(self, keep: Array, grid: Grid, rule: select.Rule | None = None) -> BlockMask:
        """The `BlockMask` of kept blocks `[..., q_blocks, kv_blocks]`, causal inside of blocks."""
        visible = self.visible(grid)
        most = int(visible.sum()) if rule is None else rule.capacity(visible, self.forced(grid))
        capacity = most if self.capacity is None else min(self.capacity, most)
        mask = BlockMask.from_dense(keep & visible, grid, capacity=max(1, capacity))
        if self.causal:
            mask = mask & BlockMask.causal(grid, offset=grid.kv_len - grid.q_len)
        return mask

    def filled(self, grid: Grid, lengths: Array | None) -> Array | np.ndarray:
        """bool `[batch or 1, 1, 1, kv_blocks]`: blocks with a key that is there. What pooling finds in the others is no
        score, and a budget is not spent on them.

        >>> Layout(2, 2, causal=False).filled(Grid(6, 6, 2, 2), jnp.array([3]))[0, 0, 0].tolist()
        [True, True, False]
        """
        first = np.arange(grid.kv_blocks) * grid.block_kv
        return (first >= 0 if lengths is None else first < lengths[:, None])[..., None, None, :]

    def choose(
        self, logits: Array, rule: select.Rule, grid: Grid, lengths: Array | None = None
    ) -> Array:
        """The blocks that a rule keeps of logits `[batch, heads, q_blocks, kv_blocks]`."""
        if lengths is not None:
            logits = jnp.where(self.filled(grid, lengths), logits, -jnp.inf)
        return select.keep(logits, rule, self.visible(grid), self.forced(grid))


DEFAULT = Layout()
BLOCKS_64 = Layout(64, 64)
BIDIRECTIONAL = Layout(causal=False)


class Sizes(NamedTuple):
    """What the cost of a choice depends on; per sequence."""

    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    dim: int


def check_heads(q: Array, k: Array, v: Array | None = None) -> Sizes:
    """The sizes of queries `[batch, heads, q_len, dim]` and keys `[batch, kv_heads, kv_len, dim]`.

    Raises:
      ValueError: shapes that do not fit.
    """
    for name, x in (("q", q), ("k", k)):
        if not hasattr(x, "ndim"):
            raise ValueError(
                f"{name} is a {type(x).__name__}; give an array [batch, heads, length, dim], in which sequences of different "
                "lengths are padded to one, with lengths="
            )
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q has shape {q.shape} and k {k.shape}; give [batch, heads, q_len, dim] and "
            "[batch, kv_heads, kv_len, dim]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which are no multiple of the {k.shape[1]} of k"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}; all but its last axis must be k's, {k.shape}")
    return Sizes(q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3])


def checked_lengths(lengths: Array, batch: int, most: int) -> Array:
    """How much of each sequence is filled, int32 `[batch]`. Under `jit`, where values cannot be looked at, they are cut to
    what there is.

    Raises:
      ValueError: another shape or dtype, lengths below 0 or above `most`.
    """
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths has shape {lengths.shape} and dtype {lengths.dtype}; give integers [{batch}], one for each "
            "sequence"
        )
    if is_concrete(lengths):
        known = np.asarray(lengths)  # operations of jax would be traced
        if ((known < 0) | (known > most)).any():
            raise ValueError(
                f"lengths={known.tolist()} must lie in [0, {most}], the tokens of this call"
            )
    return jnp.clip(lengths, 0, most).astype(jnp.int32)


def group(x: Array, kv_heads: int) -> Array:
    """`[batch, kv_heads, heads / kv_heads, ...]` of `[batch, heads, ...]`."""
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, *x.shape[2:])


def shared(logits: Array, kv_heads: int, visible: np.ndarray) -> Array:
    """Logits of the heads of each group together: the logarithm of their mean probability."""
    if logits.shape[1] == kv_heads:
        return logits
    mass = group(select.masses(logits, visible), kv_heads).mean(2)
    return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)
