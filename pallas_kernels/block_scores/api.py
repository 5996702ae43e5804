"""`block_scores`: norms of the blocks of `x^T dy`; `score_blocks`: the same as the gradient of a probe."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._dispatch import choose, vary_alike
from pallas_kernels._formats import Array
from pallas_kernels._probe import probed
from pallas_kernels.block_scores import reference, tpu, xla

IMPLEMENTATIONS: dict[str, Any] = {"tpu": tpu, "xla": xla, "reference": reference}
"""By name, the best first."""


def block_scores(
    x: Array,
    dy: Array,
    block_shape: tuple[int, int],
    *,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
    interpret: bool = False,
) -> Array:
    r"""The norm $\sum_{ij \in B} |x^T dy|_{ij}$ of every block $B$ of the gradient of a weight
    `[in, out]`, whose blocks may not be stored: what RigL grows by.

    The gradient is computed panel by panel and never held: the operations are those of one dense
    product, the memory that of x, dy, the scores and one panel.

    Args:
      x: `[..., in]`, what the weight is multiplied by.
      dy: `[..., out]`, the gradient of the product. Operands of different dtypes are promoted.
      block_shape: `(bh, bw)`; blocks may stick out at the lower and right edges.
      implementation: "tpu" (Pallas: bfloat16 and float32, blocks of multiples of 128 up to 1024),
        "xla" (anywhere), "reference" (builds the gradient); None takes the first of them that
        supports the arguments.
      precision: of the product, as in `jax.lax.dot_general`; it is summed in float32.
      interpret: run the TPU kernel in the interpreter, for tests on a machine without one.

    Returns:
      `[block rows, block columns]`, float32.

    Raises:
      ValueError: if the shapes do not match, a dtype is not floating point, or the named
        implementation does not support the arguments.

    The criterion is that of Evci et al., Rigging the lottery (2020), summed over a block.

    >>> x, dy = jnp.array([[1.0, 0.0, 2.0, 0.0]]), jnp.array([[1.0, -3.0]])
    >>> block_scores(x, dy, (2, 1)).tolist()
    [[1.0, 3.0], [2.0, 6.0]]
    """
    x, dy = jnp.asarray(x), jnp.asarray(dy)
    for name, a in (("x", x), ("dy", dy)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype={a.dtype} must be a floating-point type")
    (bh, bw), grid = grid_of(x, dy, block_shape, name="dy")
    dtype = jnp.result_type(x.dtype, dy.dtype)
    x, dy = (jnp.reshape(a, (-1, a.shape[-1])).astype(dtype) for a in (x, dy))
    reasons = {
        name: module.why_not(x, dy, (bh, bw), interpret) for name, module in IMPLEMENTATIONS.items()
    }
    name = choose(implementation, reasons)
    if x.size == 0 or dy.size == 0:
        return jnp.zeros(grid, jnp.float32)
    options: dict[str, Any] = {"interpret": True} if interpret else {}
    x, dy = vary_alike(x, dy)
    return IMPLEMENTATIONS[name].scores(x, dy, (bh, bw), precision=precision, **options)


def grid_of(
    x: Array, y: Array, block_shape: Any, *, name: str = "y"
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The block shape, checked, and how many block rows and block columns a weight has that makes y of x.

    Raises:
      ValueError: x and y (called `name`) of other rows, a block shape that is no two positive integers.
    """
    if x.ndim < 1 or y.ndim < 1 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"x.shape={x.shape} and {name}.shape={y.shape} must be equal but for the last axis"
        )
    if np.shape(block_shape) != (2,) or not all(
        isinstance(b, int | np.integer) and b >= 1 for b in block_shape
    ):
        raise ValueError(f"block_shape={block_shape} must be two positive integers")
    bh, bw = map(int, block_shape)
    return (bh, bw), (-(-x.shape[-1] // bh), -(-y.shape[-1] // bw))


def score_blocks(
    x: Array,
    y: Array,
    probe: Array,
    due: Array,
    block_shape: tuple[int, int],
    *,
    precision: lax.PrecisionLike = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """y, unchanged; but the gradient of `probe` is the `block_scores` of the weight that made y of x.

    They are computed in the backward pass, and only where some of `due` is not 0; else the gradient is 0
    and costs nothing. With fewer rows than there are block rows it is that of those which are due, at as
    much less cost.

    Args:
      x: `[..., in]`.
      y: `[..., out]`, a product of x with a weight `[in, out]`.
      probe: float32 `[scored block rows, block columns]`; its values are not read.
      due: integers `[block rows]`, not 0 where a block row is to be scored: at as many as the probe has
        rows, or nowhere.
      block_shape: `(bh, bw)`.
      precision: of the product `x^T dy`.
      axis_name: inside `shard_map` or `pmap`, the axes over which rows are split: devices then exchange rows,
        each scores its share of the block columns with those of all, and has zeros for the others. Summed
        over the devices (as gradients of what `shard_map` holds whole are, and by `pmean`, which takes dy for the
        gradient of a mean) that is the norm of the sum of all gradients. None: of the rows that are here.

    Raises:
      ValueError: x and y of other rows, a probe or `due` of another shape, a `due` that holds no integers, an
        `axis_name` that is no name.

    >>> import jax
    >>> probe = jnp.zeros((2, 2))
    >>> x, w = jnp.array([[1.0, 0.0, 2.0, 0.0]]), jnp.ones((4, 2))
    >>> loss = lambda probe, due: score_blocks(x, x @ w, probe, due, (2, 1)).sum()
    >>> [jax.grad(loss)(probe, jnp.full(2, due)).tolist() for due in (0, 1)]
    [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]]
    >>> jax.grad(loss)(jnp.zeros((1, 2)), jnp.array([0, 1])).tolist()
    [[2.0, 2.0]]
    """
    (bh, bw), grid = grid_of(x, y, block_shape)
    if isinstance(axis_name, list) or axis_name == ():
        raise ValueError(f"axis_name={axis_name} must be a name, a tuple of names, or None")
    if probe.ndim != 2 or not 0 < probe.shape[0] <= grid[0] or probe.shape[1] != grid[1]:
        raise ValueError(
            f"probe.shape={probe.shape} must be {grid}, one number for each block, or have fewer rows"
        )
    if due.shape != grid[:1]:
        raise ValueError(f"due.shape={due.shape} must be {grid[:1]}, one number for each block row")
    return probed(_scores, ((bh, bw), precision, axis_name), x, y, probe, due)


def _scores(static, x: Array, dy: Array, at: Array | None, places: None) -> Array:
    """The scores of all block rows, or of those `at` some numbers."""
    block_shape, precision, axis_name = static
    x, dy = (jnp.reshape(a, (-1, a.shape[-1])) for a in (x, dy))
    if at is not None:
        height = block_shape[0]
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % height)))
        x = x.reshape(x.shape[0], -1, height)[:, at].reshape(x.shape[0], -1)
    if axis_name is None:
        return block_scores(x, dy, block_shape, precision=precision)
    columns, devices = -(-dy.shape[1] // block_shape[1]), lax.axis_size(axis_name)
    share = -(-columns // devices)
    x = lax.all_gather(x, axis_name, tiled=True)
    dy = jnp.pad(dy, ((0, 0), (0, devices * share * block_shape[1] - dy.shape[1])))
    dy = lax.all_to_all(dy, axis_name, split_axis=1, concat_axis=0, tiled=True)
    own = block_scores(x, dy, block_shape, precision=precision)
    every = jnp.zeros((own.shape[0], devices, share), own.dtype)
    every = every.at[:, lax.axis_index(axis_name)].set(own)
    return every.reshape(own.shape[0], -1)[:, :columns]
