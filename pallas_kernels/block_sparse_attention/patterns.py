"""Masks that are a formula of positions, or drawn once: patterns of the literature.

`BlockMask` has them as constructors: `BlockMask.causal(Grid(4096, block_q=256, block_kv=256))`. A grid
may be given as a length, which is then cut into blocks of 128.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from pallas_kernels.block_sparse_attention.grid import Grid, GridLike, as_grid, takes_grid
from pallas_kernels.block_sparse_attention.rules import Keys, Rule, Stride, Window, either


class Patterns:
    """Constructors of `BlockMask`; they need `of_rule` and `from_dense` only."""

    @classmethod
    def of_rule(cls, grid: GridLike, rule: Rule) -> Self:
        """The pairs of positions that a rule allows, in every head."""
        raise NotImplementedError

    @classmethod
    def from_dense(cls, keep: np.ndarray, grid: Grid, *, capacity: int) -> Self:
        """The kept blocks."""
        raise NotImplementedError

    @classmethod
    @takes_grid
    def causal(
        cls,
        grid: GridLike,
        *,
        offset: int = 0,
    ) -> Self:
        """Query i sees the keys up to i + offset.

        Args:
          grid: lengths and block sizes, or a length.
          offset: `kv_len - q_len` aligns the ends of queries and keys.

        >>> from pallas_kernels import BlockMask
        >>> BlockMask.causal(Grid(4, block_q=2, block_kv=2)).codes[0, 0]  # 2: by the rule
        Array([[2, 0],
               [1, 2]], dtype=int8)
        """
        return cls.of_rule(grid, Window(-offset, None))

    @classmethod
    @takes_grid
    def local(
        cls,
        grid: GridLike,
        *,
        window: int | tuple[int, int],
    ) -> Self:
        """Sliding window (Longformer, Beltagy et al. 2020).

        Args:
          grid: lengths and block sizes, or a length.
          window: an int shows the last so many keys, the own one included; a pair `(left, right)`
            the keys from i - left to i + right.

        Raises:
          ValueError: for a window below 1, or a negative side.
        """
        if isinstance(window, int):
            if window < 1:
                raise ValueError(f"window={window} must be at least 1")
            rule = Window(0, window - 1)
        else:
            left, right = window
            if left < 0 or right < 0:
                raise ValueError(f"window={window} must be (left, right), neither negative")
            rule = Window(-right, left)
        return cls.of_rule(grid, rule)

    @classmethod
    @takes_grid
    def strided(
        cls,
        grid: GridLike,
        *,
        stride: int,
    ) -> Self:
        """Keys a multiple of `stride` away (Sparse Transformer, Child et al. 2019), both ways;
        `& BlockMask.causal(...)` for the causal form.

        Positions decide, not blocks: a stride below the block sizes saves no work.

        Args:
          grid: lengths and block sizes, or a length.
          stride: the distance, at least 1.

        Raises:
          ValueError: for a stride below 1.
        """
        if stride < 1:
            raise ValueError(f"stride={stride} must be at least 1")
        return cls.of_rule(grid, Stride(stride))

    @classmethod
    @takes_grid
    def sinks(
        cls,
        grid: GridLike,
        *,
        num_keys: int,
    ) -> Self:
        """The first keys, for every query (attention sinks, Xiao et al. 2023).

        Args:
          grid: lengths and block sizes, or a length.
          num_keys: how many, at least 1.

        Raises:
          ValueError: for fewer than 1.
        """
        if num_keys < 1:
            raise ValueError(f"num_keys={num_keys} must be at least 1")
        return cls.of_rule(grid, Keys(num_keys))

    @classmethod
    @takes_grid
    def prefix(
        cls,
        grid: GridLike,
        *,
        length: int,
    ) -> Self:
        """Prefix language model: a prefix that every query sees, the rest causally.

        Args:
          grid: lengths and block sizes, or a length.
          length: of the prefix.

        Raises:
          ValueError: for a negative length.
        """
        if length < 0:
            raise ValueError(f"length={length} must not be negative")
        rule = either(Window(0, None), Keys(length))
        return cls.of_rule(grid, rule)

    @classmethod
    @takes_grid
    def bigbird(
        cls,
        grid: GridLike,
        *,
        heads: int = 1,
        num_window: int = 3,
        num_global: int = 1,
        num_random: int = 3,
        seed: int = 0,
    ) -> Self:
        """BigBird in blocks (Zaheer et al. 2020): a window of `num_window` blocks, the first and
        last `num_global` block rows and columns, and `num_random` other blocks per row and head.

        Random blocks are drawn outside the window and the global columns, so that every inner row
        has exactly `num_window + 2 * num_global + num_random` blocks as far as there are any.

        Args:
          grid: lengths and block sizes, or a length.
          heads: each with random blocks of its own.
          num_window, num_global, num_random: blocks, as above; the window odd.
          seed: of the random blocks.

        Raises:
          ValueError: for numbers out of range.
        """
        grid = as_grid(grid)
        if heads < 1 or num_window < 1 or num_window % 2 == 0 or min(num_global, num_random) < 0:
            raise ValueError(
                f"heads={heads}, num_window={num_window}, num_global={num_global}, num_random="
                f"{num_random}: heads must be positive, num_window odd, the others not negative"
            )
        nq, nk = grid.q_blocks, grid.kv_blocks
        row, col = np.arange(nq)[:, None], np.arange(nk)
        centre = np.minimum(row * grid.block_q // grid.block_kv, nk - 1)
        fixed = abs(col - centre) <= num_window // 2
        fixed |= (col < num_global) | (col >= nk - num_global)
        draw = np.random.default_rng(seed).random((heads, nq, nk))
        draw[:, fixed] = np.inf
        order = draw.argsort(-1, kind="stable").argsort(-1, kind="stable")
        keep = fixed | ((order < num_random) & np.isfinite(draw))
        keep |= (row < num_global) | (row >= nq - num_global)
        capacity = int(keep.sum((1, 2)).max())
        return cls.from_dense(keep, grid, capacity=capacity)
