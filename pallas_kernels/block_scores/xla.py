"""Block scores in plain XLA: the gradient matrix is made and summed one panel at a time.

A panel of the product stays in the cache until it is summed, so that this is no slower than the product
alone, which has to write its result to memory.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels._formats import Array

_PANEL = (2048, 512)  # most rows and columns of a panel (4 MB)


def why_not(x: Array, dy: Array, block_shape: tuple[int, int], interpret: bool) -> str | None:
    """The reason why this cannot score these arguments, or None."""
    del x, dy, block_shape
    return "interpret=True is about the Pallas kernel" if interpret else None


def _cut(size: int, block: int, most: int) -> tuple[int, int]:
    """The size of a panel, whole blocks, and how many there are."""
    blocks = -(-size // block)
    panels = -(-blocks // max(1, most // block))
    return -(-blocks // panels) * block, panels


def scores(
    x: Array, dy: Array, block_shape: tuple[int, int], *, precision: lax.PrecisionLike = None
) -> Array:
    """`[block rows, block columns]`, float32."""
    (bh, bw), (rows, cols) = block_shape, (x.shape[1], dy.shape[1])
    (height, down), (width, across) = _cut(rows, bh, _PANEL[0]), _cut(cols, bw, _PANEL[1])
    x = jnp.pad(x, ((0, 0), (0, down * height - rows)))
    dy = jnp.pad(dy, ((0, 0), (0, across * width - cols)))

    def panel(at):
        i, j = at // across, at % across
        product = lax.dot_general(
            lax.dynamic_slice_in_dim(x, i * height, height, 1),
            lax.dynamic_slice_in_dim(dy, j * width, width, 1),
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        columns = jnp.abs(product).reshape(height // bh, bh, width).sum(1)
        return columns.reshape(height // bh, width // bw, bw).sum(2)

    panels = lax.map(panel, jnp.arange(down * across))
    panels = panels.reshape(down, across, height // bh, width // bw).transpose(0, 2, 1, 3)
    whole = panels.reshape(down * height // bh, across * width // bw)
    return whole[: -(-rows // bh), : -(-cols // bw)]
