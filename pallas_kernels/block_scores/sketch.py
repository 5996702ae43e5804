"""`sketch_blocks`: a few numbers for each block of a gradient that is never made."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._formats import Array
from pallas_kernels._probe import probed
from pallas_kernels.block_scores.api import grid_of

# Of the signs of rows and columns, which never change: sketches of all steps add up.
SEEDS = (1907, 4840)


def sketch_blocks(
    x: Array,
    y: Array,
    probe: Array,
    block_shape: tuple[int, int],
    *,
    precision: lax.PrecisionLike = None,
) -> Array:
    r"""y, unchanged; but the gradient of `probe` is a sketch of the gradient $G = x^T dy$ of the weight that
    made y of x.

    The sketch of a block $G_B$ `[bh, bw]` is $S_B = R^T G_B C$ `[r, c]`, with random signs over $\sqrt r$ in R and over
    $\sqrt c$ in C: others for each block row and block column, the same at every call. It is linear, so that the sum of
    sketches of batches, devices or steps is the sketch of their sum. The mean of $\|S_B\|_F^2$ over the signs is
    $\|G_B\|_F^2$. Where r is bh, R is the identity, and so is C where c is bw.

    x and dy are summed up to r and c numbers for each block first, so that the product takes
    $rc / (bh \, bw)$ of the operations of a dense one, and no array of the size of G is made.

    Args:
      x: `[..., in]`.
      y: `[..., out]`, a product of x with a weight `[in, out]`.
      probe: float32 `[block rows, r, block columns, c]`; its values are not read.
      block_shape: `(bh, bw)`; blocks may stick out at the lower and right edges.
      precision: of the products, which are summed in float32.

    Raises:
      ValueError: x and y of other rows, a block shape that is no two positive integers, a probe of another grid,
        or with an r above bh or a c above bw.

    Random signs keep norms: Achlioptas, Database-friendly random projections, 2003.

    >>> x, w = jnp.array([[1.0, 0.0, 2.0, 0.0]]), jnp.ones((4, 2))
    >>> loss = lambda probe: sketch_blocks(x, x @ w, probe, (2, 1)).sum()
    >>> jax.grad(loss)(jnp.zeros((2, 2, 2, 1)))[:, :, 0, 0].tolist()
    [[1.0, 0.0], [2.0, 0.0]]
    """
    block_shape, grid = grid_of(x, y, block_shape)
    if probe.ndim != 4 or (probe.shape[0], probe.shape[2]) != grid:
        raise ValueError(
            f"probe.shape={probe.shape} must be ({grid[0]}, r, {grid[1]}, c): an r by c sketch of each block"
        )
    check_sketch((probe.shape[1], probe.shape[3]), block_shape)
    static = block_shape, (probe.shape[1], probe.shape[3]), precision
    return probed(_sketch, static, x, y, probe, jnp.ones(grid[0], jnp.int32))


def check_sketch(sketch: tuple[int, int], block_shape: tuple[int, int]) -> None:
    """Raises `ValueError` unless `sketch` is `(r, c)` of at least 1 and at most the block's sides."""
    sides = tuple(sketch) if isinstance(sketch, tuple | list) else ()
    if len(sides) != 2 or not all(
        isinstance(r, int | np.integer) and 1 <= r <= b for r, b in zip(sides, block_shape)
    ):
        raise ValueError(
            f"sketch={sketch!r}: give two integers, from 1 to the sides of a block, {tuple(block_shape)}"
        )


def _sketch(static: Any, x: Array, dy: Array, at: Array | None, places: None) -> Array:
    block_shape, (r, c), precision = static
    z = _summed(x, block_shape[0], r, SEEDS[0], precision)
    e = _summed(dy, block_shape[1], c, SEEDS[1], precision)
    dtype = jnp.result_type(z, e)
    z, e = z.astype(dtype), e.astype(dtype)
    rows = (((0,), (0,)), ((), ()))
    options: Any = dict(precision=precision, preferred_element_type=jnp.float32)
    product = lax.dot_general(z.reshape(len(z), -1), e.reshape(len(e), -1), rows, **options)
    return product.reshape(z.shape[1], r, e.shape[1], c)


def _key(seed: int) -> Array:
    """A key whose bits do not depend on JAX's settings: a momentum that was saved fits later sketches."""
    return jax.random.key(seed, impl="threefry2x32")


def _summed(a: Array, side: int, r: int, seed: int, precision: lax.PrecisionLike) -> Array:
    """`[rows, blocks, r]`: r signed sums over each block of the last axis."""
    a = jnp.reshape(a, (-1, a.shape[-1]))
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % side))).reshape(len(a), -1, side)
    if r == side:
        return a
    if a.dtype == jnp.float16:  # which does not hold sums of many
        a = a.astype(jnp.float32)
    bits = jax.random.bits(_key(seed), (a.shape[1], side, r), jnp.uint32)
    signs = jnp.where(bits >> 31 == 0, 1, -1).astype(a.dtype)
    return jnp.einsum("bij,ijr->bir", a, signs, precision=precision) / r**0.5
