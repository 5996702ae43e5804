"""`Grid`: how queries and keys are cut into blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar, cast

from pallas_kernels.block_sparse_attention.lists import CODE_BITS

F = TypeVar("F", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Lengths and blocks of the matrix of scores. The last blocks may be shorter than the others.

    Attributes:
      q_len: positions of the queries.
      kv_len: positions of the keys; by default as many.
      block_q, block_kv: positions of a block.

    Raises:
      ValueError: for sizes below 1, or more blocks than a list can name.

    >>> grid = Grid(300, block_kv=256)
    >>> grid.q_blocks, grid.kv_blocks, grid
    (3, 2, Grid(q_len=300, kv_len=300, block_q=128, block_kv=256))
    """

    q_len: int
    kv_len: int = None  # pyright: ignore[reportAssignmentType]
    block_q: int = 128
    block_kv: int = 128

    def __post_init__(self) -> None:
        if self.kv_len is None:
            object.__setattr__(self, "kv_len", self.q_len)
        if self.block_q < 1 or self.block_kv < 1:
            raise ValueError(
                f"block_q={self.block_q} and block_kv={self.block_kv} must be positive"
            )
        if self.q_len < 1 or self.kv_len < 1:
            raise ValueError(f"q_len={self.q_len} and kv_len={self.kv_len} must be positive")
        if self.q_blocks * self.kv_blocks > 1 << (31 - CODE_BITS):
            raise ValueError(
                f"a mask of {self.q_blocks} x {self.kv_blocks} blocks is too large "
                f"(2^{31 - CODE_BITS} per head); choose larger blocks than "
                f"block_q={self.block_q}, block_kv={self.block_kv}"
            )

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.q_len // self.block_q)

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.block_kv)


GridLike = Grid | int


def takes_grid(make: F) -> F:
    """A constructor of masks that names `Grid` where it is given a size by itself."""
    sizes = [field.name for field in dataclasses.fields(Grid)]

    @functools.wraps(make)
    def checked(*args, **options):
        if alone := {name: options[name] for name in sizes if name in options}:
            given = ", ".join(f"{name}={value!r}" for name, value in alone.items())
            raise ValueError(
                f"{make.__name__}({given}): lengths and block sizes are one argument, "
                f"grid=Grid({', '.join(sizes)}), or grid=(block_q, block_kv) where the mask is of chosen blocks"
            )
        return make(*args, **options)

    return cast(F, checked)


def as_grid(grid: GridLike) -> Grid:
    """The grid itself, or that of a length in blocks of 128."""
    return grid if isinstance(grid, Grid) else Grid(grid)


def grid_of_blocks(blocks: tuple[int, int], grid: Grid | tuple[int, int] | None, name: str) -> Grid:
    """The grid of so many blocks: as given, or of whole blocks of a size.

    Args:
      blocks: how many, of queries and of keys.
      grid: a grid; the size `(block_q, block_kv)` of whole blocks; or None for 128 by 128.
      name: of what has the blocks, for the error.

    Raises:
      ValueError: if the grid has other blocks.
    """
    nq, nk = blocks
    if not isinstance(grid, Grid):
        block_q, block_kv = (128, 128) if grid is None else grid
        return Grid(nq * block_q, nk * block_kv, block_q, block_kv)
    if (grid.q_blocks, grid.kv_blocks) != (nq, nk):
        raise ValueError(
            f"{name} has {nq} x {nk} blocks of {grid.block_q} x {grid.block_kv}, which do not cover "
            f"q_len={grid.q_len} and kv_len={grid.kv_len}: expected {grid.q_blocks} x "
            f"{grid.kv_blocks}"
        )
    return grid
