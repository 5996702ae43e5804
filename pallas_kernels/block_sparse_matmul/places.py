"""Places of stored blocks as one array of integers, and how they change.

`places` is int32 `[3, n]` or `[4, n]`, with a column for each stored block: its block row, its block
column, and the order of a product (the numbers of the stored blocks by block row, then block column).
With three rows the blocks are stored by block column, then block row. With four they are stored in any
order, and the fourth row lists them by block column. Then a pattern changes without moving a block:
those that stay keep their number, and new ones take the numbers of those that go.

Unused blocks have the block row and column beyond the last, and come last in both orders.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._formats import Array


def of_mask(block_mask: Array, n: int) -> Array:
    """The places `[3, n]` of a mask `[block rows, block columns]` with at most n blocks. Nothing is
    sorted: the place of a block is a running count."""
    return _of_mask(block_mask, n)


@functools.partial(jax.jit, static_argnums=1)
def _of_mask(block_mask: Array, n: int) -> Array:
    gr, gc = block_mask.shape
    by_col = block_mask.T.reshape(-1)
    place = jnp.where(by_col, jnp.cumsum(by_col) - 1, n)  # n: dropped
    at = jnp.arange(gr * gc, dtype=jnp.int32)
    cols = jnp.full(n, gc, jnp.int32).at[place].set(at // gr, mode="drop")
    rows = jnp.full(n, gr, jnp.int32).at[place].set(at % gr, mode="drop")
    by_row = block_mask.reshape(-1)
    place_t = jnp.where(by_row, jnp.cumsum(by_row) - 1, n)
    stored = place.reshape(gc, gr).T.reshape(-1).astype(jnp.int32)
    order = jnp.arange(n, dtype=jnp.int32).at[place_t].set(stored, mode="drop")
    return jnp.stack([rows, cols, order])


def in_any_order(places: Array) -> Array:
    """The places `[..., 4, n]` of blocks that are stored by block column."""
    if places.shape[-2] == 4:
        return places
    one = jnp.broadcast_to(
        jnp.arange(places.shape[-1], dtype=places.dtype), (*places.shape[:-2], 1, places.shape[-1])
    )
    return jnp.concatenate([places, one], -2)


def mask_of(places: Array, grid: tuple[int, int]) -> Array:
    """bool `[block rows, block columns]`: where a block is stored."""
    return jnp.zeros(grid, bool).at[places[0], places[1]].set(True, mode="drop")


def rewire(places: Array, block_mask: Array) -> tuple[Array, Array]:
    """The places `[4, n]` of another pattern, and which blocks stay: bool `[n]`.

    Blocks of both patterns stay where they are stored. The new ones, by block column, take the first
    of the places that are free.

    Args:
      places: `[4, n]`.
      block_mask: the new pattern, at most n blocks.

    >>> old = in_any_order(of_mask(jnp.array([[True, False], [True, False]]), 2))
    >>> new, kept = rewire(old, jnp.array([[False, True], [True, False]]))
    >>> new[:2].tolist(), kept.tolist()
    ([[0, 1], [1, 0]], [False, True])
    """
    return _rewire(places, block_mask)


@jax.jit
def _rewire(places: Array, block_mask: Array) -> tuple[Array, Array]:
    (gr, gc), n = block_mask.shape, places.shape[-1]
    rows, cols = places[0], places[1]
    kept = block_mask.at[rows, cols].get(mode="fill", fill_value=False)
    grown = (block_mask & ~mask_of(places, (gr, gc))).T.reshape(-1)
    # The r-th new block goes where the r-th free place is.
    number = jnp.where(grown, jnp.cumsum(grown) - 1, n)
    at = jnp.arange(gr * gc, dtype=jnp.int32)
    found = jnp.full(n, gr * gc, jnp.int32).at[number].set(at, mode="drop")
    free = jnp.cumsum(~kept) - 1
    flat = jnp.where(kept, cols * gr + rows, found[jnp.maximum(free, 0)])
    used = flat < gr * gc
    rows = jnp.where(used, flat % gr, gr).astype(jnp.int32)
    cols = jnp.where(used, flat // gr, gc).astype(jnp.int32)

    index = jnp.arange(n, dtype=jnp.int32)
    stored = jnp.full((gr, gc), n, jnp.int32).at[rows, cols].set(index, mode="drop")
    unused = jnp.where(used, n, jnp.sum(used) + jnp.cumsum(~used) - 1)

    def order(stored: Array) -> Array:
        there = stored < n
        place = jnp.where(there, jnp.cumsum(there) - 1, n)
        listed = jnp.zeros(n, jnp.int32).at[place].set(stored, mode="drop")
        return listed.at[unused].set(index, mode="drop")

    return jnp.stack([rows, cols, order(stored.reshape(-1)), order(stored.T.reshape(-1))]), kept
