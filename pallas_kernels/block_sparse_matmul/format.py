"""`BlockSparse`: a matrix of which only some blocks are stored.

The blocks are kept in the order of their block column, then block row, which is the order in
which `x @ w` visits them; or in any order, see `in_any_order`. `order` lists them by block row, then
block column: the order of `dy @ w.T`. It is a function of the pattern alone and is computed once, when
the pattern is set (the transposed metadata of block-sparse libraries: Gale, Narayanan, Young, Zaharia,
MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, 2023).

Places are integers and values are what is trained (see `pallas_kernels._formats`).
"""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from pallas_kernels._formats import Array, concrete, integer_places
from pallas_kernels.block_sparse_matmul.places import in_any_order, of_mask, rewire


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A matrix `[rows, columns]` cut into blocks `[bh, bw]`, of which `num_blocks` are stored.

    Build it with `from_dense`, `from_mask`, `from_block_mask`, `from_coordinates` or `random`.
    Shapes are static; values and pattern are arrays: under `jit` another pattern with the same
    number of stored blocks runs the same compiled code. A stored block may be unused (padding),
    so that `num_blocks` is a capacity and the pattern may have fewer blocks.

    The fields are leaves of a pytree in the usual way, so an instance can be jitted over, sharded and
    saved. Gradients are taken with respect to `values`, and optimizers train `values`:
    `jax.grad(lambda values: loss(w.with_values(values)))(w.values)`.

    Attributes:
      values: the stored blocks, `[num_blocks, bh, bw]`.
      places: int32 `[3, num_blocks]`: block rows, block columns, transposed order; with a fourth row,
        `column_order`, blocks are stored in any order. Read it as `block_rows`, `block_cols`, `order`,
        `column_order`.
      shape: of the matrix. Blocks at its lower and right edge may stick out; what sticks out is
        ignored in a product.
      block_shape: `(bh, bw)`.

    >>> w = BlockSparse.from_dense(jnp.eye(6).at[4, 0].set(7.0), block_shape=(2, 3))
    >>> w.num_blocks, w.block_rows.tolist(), w.block_cols.tolist()
    (5, [0, 1, 2, 1, 2], [0, 0, 0, 1, 1])
    >>> bool((w.to_dense() == jnp.eye(6).at[4, 0].set(7.0)).all())
    True
    """

    values: Array
    places: Array
    shape: tuple[int, int]
    block_shape: tuple[int, int]

    # ---- constructors -------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        dense: Array,
        block_shape: tuple[int, int],
        *,
        num_blocks: int | None = None,
        pad: bool = False,
    ) -> "BlockSparse":
        """Store the blocks of `dense [rows, columns]` that hold anything but zeros.

        Args:
          dense: the matrix.
          block_shape: `(bh, bw)`; must divide the shape unless `pad`.
          num_blocks: the capacity, by default the number of blocks there are. Needed under `jit`,
            where that number is not known; blocks beyond it are dropped there.
          pad: allow blocks that stick out at the lower and right edges.
        """
        dense = jnp.asarray(dense)
        return cls.from_mask(dense, dense != 0, block_shape, num_blocks=num_blocks, pad=pad)

    @classmethod
    def from_mask(
        cls,
        dense: Array,
        mask: Array,
        block_shape: tuple[int, int],
        *,
        num_blocks: int | None = None,
        pad: bool = False,
    ) -> "BlockSparse":
        """Store the blocks in which `mask` is true anywhere; masked elements become zero."""
        dense, mask = jnp.asarray(dense), jnp.asarray(mask)
        if mask.shape != dense.shape:
            raise ValueError(f"mask.shape={mask.shape} must equal dense.shape={dense.shape}")
        grid = _grid(dense.shape, block_shape, pad)
        blocks = _to_blocks(mask.astype(bool), grid, block_shape)
        kept = jnp.where(mask.astype(bool), dense, jnp.zeros((), dense.dtype))
        return cls.from_block_mask(
            kept, blocks.any((2, 3)), block_shape, num_blocks=num_blocks, pad=pad
        )

    @classmethod
    def from_block_mask(
        cls,
        dense: Array,
        block_mask: Array,
        block_shape: tuple[int, int] | None = None,
        *,
        num_blocks: int | None = None,
        pad: bool = False,
    ) -> "BlockSparse":
        """Store the blocks of `dense` where `block_mask [block rows, block columns]` is true.

        `block_shape` defaults to what cuts `dense` into as many equal blocks as the mask has.
        """
        dense, block_mask = jnp.asarray(dense), jnp.asarray(block_mask).astype(bool)
        if block_mask.ndim != 2:
            raise ValueError(f"block_mask.shape={block_mask.shape} must have two dimensions")
        if block_shape is None:
            rows, cols = (max(1, s // b) for s, b in zip(dense.shape, block_mask.shape))
            block_shape = rows, cols
        grid = _grid(dense.shape, block_shape, pad)
        if block_mask.shape != grid:
            raise ValueError(
                f"block_mask.shape={block_mask.shape} must be {grid} for a matrix "
                f"{dense.shape} in blocks of {tuple(block_shape)}"
            )
        places = _places_of_mask(block_mask, num_blocks)
        bh, bw = block_shape
        values = _take_blocks(dense, places, grid, (bh, bw))
        return cls(values, places, tuple(dense.shape), (bh, bw))

    @classmethod
    def from_coordinates(
        cls,
        values: Array,
        block_rows: Array,
        block_cols: Array,
        shape: tuple[int, int],
        *,
        pad: bool = False,
        validate: bool = True,
    ) -> "BlockSparse":
        """Blocks `values [n, bh, bw]` at the given coordinates, in any order.

        Raises:
          ValueError: if (with `validate`, and where the coordinates are known) a coordinate is
            out of range or occurs twice, or if the blocks do not tile the shape and not `pad`.
        """
        values = jnp.asarray(values)
        if values.ndim != 3:
            raise ValueError(f"values.shape={values.shape} must be [num_blocks, bh, bw]")
        bh, bw = values.shape[1:]
        grid = _grid(shape, (bh, bw), pad)
        n = values.shape[0]
        for name, c in (("block_rows", block_rows), ("block_cols", block_cols)):
            if np.shape(c) != (n,):
                raise ValueError(
                    f"{name}.shape={np.shape(c)} must be ({n},), one for each stored block"
                )
        if validate and concrete(block_rows, block_cols):
            _check_coordinates(np.asarray(block_rows), np.asarray(block_cols), grid)
        rows, cols = jnp.asarray(block_rows, jnp.int32), jnp.asarray(block_cols, jnp.int32)
        index = jnp.arange(n, dtype=jnp.int32)
        where = jnp.full(grid, n, jnp.int32).at[rows, cols].set(index, mode="drop")
        places = _places_of_mask(where < n, n)
        new_rows, new_cols, _ = places
        source = where.at[new_rows, new_cols].get(mode="fill", fill_value=n)
        values = values.at[source].get(mode="fill", fill_value=0)
        return cls(values, places, (int(shape[0]), int(shape[1])), (bh, bw))

    @classmethod
    def random(
        cls,
        key: Array,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        *,
        density: float,
        balanced: bool = False,
        dtype: Any = jnp.float32,
        pad: bool = False,
    ) -> "BlockSparse":
        """`round(density * blocks)` blocks at random places, normal values of variance
        `1 / (density * rows)`. `balanced`: the same number of blocks in every block column. A key that
        is traced draws other places than one that is known.

        >>> BlockSparse.random(jax.random.key(0), (8, 8), (2, 2), density=0.5).num_blocks
        8
        """
        if not 0 <= density <= 1:
            raise ValueError(f"density={density} must be between 0 and 1")
        grid = _grid(shape, block_shape, pad)
        number = round(density * grid[0]) if balanced else round(density * grid[0] * grid[1])
        if concrete(key):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32))
            permute = lambda n, _: rng.permutation(n)
        else:
            permute = lambda n, i: jax.random.permutation(jax.random.fold_in(key, i), n)
        if balanced:
            mask = jnp.stack([permute(grid[0], i) for i in range(grid[1])], 1) < number
            places = of_mask(mask, number * grid[1])
        else:
            mask = permute(grid[0] * grid[1], 0).reshape(grid) < number
            places = of_mask(jnp.asarray(mask), number)
        scale = 1 / math.sqrt(max(1.0, density * shape[0]))
        values = scale * jax.random.normal(key, (places.shape[1], *block_shape), jnp.float32)
        w = cls(
            values.astype(dtype), places, (shape[0], shape[1]), (block_shape[0], block_shape[1])
        )
        return w.with_values(jnp.where(_inside(w), w.values, 0).astype(dtype))

    # ---- what it holds ------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """How many blocks can be stored (the capacity)."""
        return self.values.shape[-3]

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns of the whole matrix."""
        return _grid(self.shape, self.block_shape, True)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def block_rows(self) -> Array:
        """int32 `[num_blocks]`; what is not in `[0, grid[0])` marks an unused block."""
        return self._places[..., 0, :]

    @property
    def block_cols(self) -> Array:
        """int32 `[num_blocks]`, ascending unless blocks are stored in any order."""
        return self._places[..., 1, :]

    @property
    def order(self) -> Array:
        """int32 `[num_blocks]`: the stored blocks by block row, then block column."""
        return self._places[..., 2, :]

    @property
    def column_order(self) -> Array:
        """int32 `[num_blocks]`: the stored blocks by block column, then block row."""
        return in_any_order(self._places)[..., 3, :]

    @property
    def used(self) -> Array:
        """bool `[num_blocks]`: which stored blocks are part of the pattern."""
        rows, cols = self.block_rows, self.block_cols
        return (rows >= 0) & (rows < self.grid[0]) & (cols >= 0) & (cols < self.grid[1])

    @property
    def block_mask(self) -> Array:
        """bool `[block rows, block columns]`: where a block is stored."""
        rows = jnp.where(self.used, self.block_rows, self.grid[0])
        return jnp.zeros(self.grid, bool).at[rows, self.block_cols].set(True, mode="drop")

    @property
    def _places(self) -> Array:
        return integer_places("places", self.places)

    def to_dense(self) -> Array:
        """The matrix with its zeros, `[rows, columns]`."""
        return _to_dense(dataclasses.replace(self, places=self._places))

    # ---- making another -----------------------------------------------------------------------

    @property
    def T(self) -> "BlockSparse":
        """The transposed matrix; its order is the transposed order of this one."""
        return _transpose(dataclasses.replace(self, places=self._places))

    def with_values(self, values: Array) -> "BlockSparse":
        """The same pattern with other values `[num_blocks, bh, bw]`."""
        if np.shape(values) != np.shape(self.values):
            raise ValueError(
                f"values.shape={np.shape(values)} must be {np.shape(self.values)}, "
                "one block for each stored one"
            )
        return dataclasses.replace(self, values=values)

    def astype(self, dtype: Any) -> "BlockSparse":
        """The same matrix in another dtype (the pattern stays as it is)."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def in_any_order(self) -> "BlockSparse":
        """The same matrix with places `[4, num_blocks]`, whose `with_pattern` moves no block: those that
        stay keep their number, new ones take the numbers of those that go. So what is kept for each
        block besides (an optimizer's slots) stays where it is."""
        return dataclasses.replace(self, places=in_any_order(self._places))

    def with_pattern(self, block_mask: Array) -> "BlockSparse":
        """Store the blocks of another mask `[block rows, block columns]` in the same capacity.

        Blocks in both patterns keep their values, new blocks start at zero. Shapes stay, so code
        compiled for this matrix runs for the new one.

        Raises:
          ValueError: if the mask has another shape than `grid`, or (where it is known) more
            blocks than can be stored.
        """
        block_mask = jnp.asarray(block_mask).astype(bool)
        if block_mask.shape != self.grid:
            raise ValueError(f"block_mask.shape={block_mask.shape} must be {self.grid}")
        n = _room(block_mask, self.num_blocks)
        if self.places.shape[0] == 4:
            places, kept = rewire(self._places, block_mask)
            values = jnp.where(kept[:, None, None], self.values, jnp.zeros((), self.dtype))
            return dataclasses.replace(self, values=values, places=places)
        rows = jnp.where(self.used, self.block_rows, self.grid[0])
        index = jnp.arange(n, dtype=jnp.int32)
        where = jnp.full(self.grid, n, jnp.int32).at[rows, self.block_cols].set(index, mode="drop")
        places = of_mask(block_mask, n)
        new_rows, new_cols, _ = places
        source = where.at[new_rows, new_cols].get(mode="fill", fill_value=n)
        values = self.values.at[source].get(mode="fill", fill_value=0)
        return dataclasses.replace(self, values=values, places=places)

    def split(self, parts: int, axis: str = "columns") -> "BlockSparse":
        """Cut the matrix into `parts` equal ones by block columns or block rows, stacked.

        The result holds arrays with a leading axis of size `parts`, each part with coordinates of
        its own and as many stored blocks as the fullest part: shard that axis over a mesh and drop
        it inside `shard_map` (`jax.tree.map(lambda a: a[0], part)`), or `vmap` over it.
        With "columns" every part yields its columns of `x @ w`; with "rows" every part takes its
        columns of x and the products are to be summed.
        """
        if axis not in ("columns", "rows"):
            raise ValueError(f"axis={axis!r} must be 'columns' or 'rows'")
        dim = 1 if axis == "columns" else 0
        if self.grid[dim] % parts or self.shape[dim] % self.block_shape[dim]:
            raise ValueError(
                f"parts={parts} must divide the {self.grid[dim]} block {axis}, without ragged edge"
            )
        if not concrete(self.values, self.places):
            raise ValueError("split needs a known pattern: call it outside of jit")
        mask, dense = np.asarray(self.block_mask), self.to_dense()
        masks = np.split(mask, parts, dim)
        capacity = max(1, max(int(m.sum()) for m in masks))
        pieces = [
            BlockSparse.from_block_mask(d, m, self.block_shape, num_blocks=capacity, pad=True)
            for d, m in zip(jnp.split(dense, parts, dim), masks)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces)


def _places_of_mask(block_mask: Array, num_blocks: int | None) -> Array:
    return of_mask(block_mask, _room(block_mask, num_blocks))


def _room(block_mask: Array, num_blocks: int | None) -> int:
    """How many blocks there is room for, checked to be enough as far as the mask is known."""
    if concrete(block_mask):
        count = int(np.asarray(block_mask).sum())
        num_blocks = count if num_blocks is None else num_blocks
        if count > num_blocks:
            raise ValueError(
                f"num_blocks={num_blocks} must be at least {count}, the blocks there are"
            )
    elif num_blocks is None:
        raise ValueError("num_blocks=None must be a number where the pattern is not known (jit)")
    return num_blocks


@functools.partial(jax.jit, static_argnums=(2, 3))
def _take_blocks(
    dense: Array, places: Array, grid: tuple[int, int], block_shape: tuple[int, int]
) -> Array:
    rows, cols, _ = places
    return _to_blocks(dense, grid, block_shape).at[rows, cols].get(mode="fill", fill_value=0)


@jax.jit
def _to_dense(w: "BlockSparse") -> Array:
    (bh, bw), (gr, gc) = w.block_shape, w.grid
    rows = jnp.where(w.used, w.block_rows, gr)
    blocks = jnp.zeros((gr, gc, bh, bw), w.dtype).at[rows, w.block_cols].set(w.values, mode="drop")
    dense = blocks.transpose(0, 2, 1, 3).reshape(gr * bh, gc * bw)
    return dense[: w.shape[0], : w.shape[1]]


@jax.jit
def _transpose(w: "BlockSparse") -> "BlockSparse":
    (rows_n, cols_n), (bh, bw) = w.shape, w.block_shape
    if w.places.shape[0] == 4:
        rows, cols, order, by_col = w.places
        places = jnp.stack([cols, rows, by_col, order])
        return BlockSparse(w.values.swapaxes(1, 2), places, (cols_n, rows_n), (bw, bh))
    rows, cols, order = w.places
    back = jnp.zeros_like(order).at[order].set(jnp.arange(w.num_blocks, dtype=jnp.int32))
    places = jnp.stack([cols[order], rows[order], back])
    values = w.values[order].swapaxes(1, 2)
    return BlockSparse(values, places, (cols_n, rows_n), (bw, bh))


def _grid(shape: tuple[int, ...], block_shape: tuple[int, int], pad: bool) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"shape={tuple(shape)} must have two dimensions")
    if len(block_shape) != 2 or min(block_shape) < 1:
        raise ValueError(f"block_shape={tuple(block_shape)} must be two positive integers")
    if not pad and (shape[0] % block_shape[0] or shape[1] % block_shape[1]):
        raise ValueError(
            f"block_shape={tuple(block_shape)} must divide shape={tuple(shape)}; "
            "pass pad=True to let the last blocks stick out"
        )
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def _to_blocks(dense: Array, grid: tuple[int, int], block_shape: tuple[int, int]) -> Array:
    """`[rows, columns]` to `[block rows, block columns, bh, bw]`, padded with zeros."""
    (gr, gc), (bh, bw) = grid, block_shape
    dense = jnp.pad(dense, ((0, gr * bh - dense.shape[0]), (0, gc * bw - dense.shape[1])))
    return dense.reshape(gr, bh, gc, bw).transpose(0, 2, 1, 3)


def _inside(w: BlockSparse) -> Array:
    """bool, like the values: false where an edge block sticks out of the matrix."""
    (bh, bw), rows, cols = w.block_shape, w.block_rows, w.block_cols
    r = rows[:, None, None] * bh + jnp.arange(bh).reshape(1, -1, 1)
    c = cols[:, None, None] * bw + jnp.arange(bw).reshape(1, 1, -1)
    return (r < w.shape[0]) & (c < w.shape[1])


def _check_coordinates(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> None:
    for name, c, size in (("block_rows", rows, grid[0]), ("block_cols", cols, grid[1])):
        bad = (c < 0) | (c >= size)
        if bad.any():
            raise ValueError(f"{name} holds {int(c[bad][0])}; it must be in [0, {size})")
    flat = np.bincount(rows.astype(np.int64) * grid[1] + cols, minlength=1)
    if flat.max(initial=0) > 1:
        r, c = divmod(int(flat.argmax()), grid[1])
        raise ValueError(f"block (row {r}, column {c}) is given twice; give each block once")


def _flatten(w: BlockSparse):
    key = jax.tree_util.GetAttrKey
    return ((key("values"), w.values), (key("places"), w.places)), (w.shape, w.block_shape)


def _unflatten(static, leaves) -> BlockSparse:
    return BlockSparse(leaves[0], leaves[1], static[0], static[1])


jax.tree_util.register_pytree_with_keys(
    BlockSparse, _flatten, _unflatten, lambda w: ((w.values, w.places), (w.shape, w.block_shape))
)

jax.export.register_pytree_node_serialization(
    BlockSparse,
    serialized_name="pallas_kernels.BlockSparse",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: tuple(tuple(s) for s in json.loads(data)),
)
