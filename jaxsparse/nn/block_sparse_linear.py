"""`BlockSparseLinear`: a linear layer that stores, multiplies and trains only some blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse.nn._linear import Pattern, Scores, SparseLinear, count_candidates, split_linear
from pallas_kernels import BlockSparse, block_sparse_matmul, score_blocks, sketch_blocks
from pallas_kernels.block_scores.sketch import check_sketch


class BlockSparseLinear(SparseLinear):
    r"""$y = x W + b$ with W `[in, out]` block-sparse: time and memory follow the stored blocks.

    The blocks are parameters (`nnx.Param`), their places are not (`Pattern`): an optimizer trains the
    blocks where they are, and averages or noise belong on the parameters alone.
    To move them while they train, give the optimizer to `jaxsparse.stored`; by hand:
    `layer.set_weight(layer.weight.with_pattern(block_mask))`. Nothing is compiled
    anew. For the products see `pallas_kernels.block_sparse_matmul`.
    Use it from Linen through `flax.nnx.bridge.to_linen`.

    Attributes:
      values: the stored blocks, `[num_blocks, bh, bw]`.
      places: where they are, int32 `[4, num_blocks]` (see `pallas_kernels.BlockSparse`).
      scores: float32 `[candidates, block columns]`, not read; where some are due, its gradient is that of
        all blocks of W in the block rows that are, stored or not, as a norm for each
        (`pallas_kernels.score_blocks`).
      due: int32 `[block rows]`, 1 in the steps whose gradients a rule is to read, at the candidates.
      sketch: float32 `[block rows, r, block columns, c]`, not read; its gradient is a sketch of every block of W's
        gradient, in every step (`pallas_kernels.sketch_blocks`). None: there is none.
      block_shape: `(bh, bw)`.

    Args:
      in_features: size of the last axis of x.
      out_features: size of the last axis of y.
      block_shape: `(bh, bw)`; blocks at the edges may stick out of the matrix.
      density: share of the blocks that is stored, at random places.
      balanced: store as many in every block column.
      weight: W, in place of a random one (then without `density` and `rngs`).
      use_bias: add a bias, zero at first.
      candidates: how many block rows are scored for growth by gradient, drawn anew in each update: a share
        of all (float), or a number (int). The scores cost as much of a dense product.
      sketch: `(r, c)`, the sides of a block's sketch, for growth by momentum; it takes `r c / (bh bw)` of the dense
        matrix's memory, twice, and of the operations of a dense product. None: no such growth.
      dtype: of the computation; default: that of x and the parameters, promoted.
      param_dtype: of the parameters.
      precision: of the product, as in `jax.lax.dot_general`.
      implementation: see `pallas_kernels.block_sparse_matmul`.
      rows: how the first axis of x is split over a mesh, where the blocks are shared by its devices:
        each device then gathers the blocks and multiplies its own rows (`jax.shard_map`), with kernels
        that XLA could not partition. None: XLA partitions the product, or there is one device.
      axis_name: of the replicas whose gradients are averaged, where the layer is called inside of `pmap` or
        `shard_map`: scores are then those of the average (`pallas_kernels.score_blocks`).
      rngs: key for places and values (`params`).

    Raises:
      ValueError: if not exactly one of `density` with `rngs` and `weight` is given, the weight has
        another shape or block shape, there are not so many candidates, a sketch exceeds a block, or `rows` splits
        nothing or comes with `axis_name`.

    >>> layer = BlockSparseLinear(64, 32, block_shape=(16, 16), density=0.5, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 64))).shape, layer.values[...].shape
    ((3, 32), (4, 16, 16))
    """

    product = staticmethod(block_sparse_matmul)

    places: Pattern
    scores: Scores
    due: Pattern
    sketch: Scores | None
    block_shape: tuple[int, int]
    rows: NamedSharding | None
    axis_name: str | tuple[str, ...] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_shape: tuple[int, int],
        density: float | None = None,
        balanced: bool = False,
        weight: BlockSparse | None = None,
        use_bias: bool = True,
        candidates: float | int = 1.0,
        sketch: tuple[int, int] | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        implementation: str | None = None,
        rows: NamedSharding | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        shape = in_features, out_features
        if weight is None:
            if density is None or rngs is None:
                raise ValueError("density=None or rngs=None: give both, or a weight")
            key = rngs.params()
            weight = BlockSparse.random(
                key,
                shape,
                block_shape,
                density=density,
                balanced=balanced,
                dtype=param_dtype,
                pad=True,
            )
            if weight.num_blocks == 0:
                raise ValueError(
                    f"density={density} stores none of the {weight.grid[0]} x {weight.grid[1]} blocks of "
                    f"{block_shape}; ask for more, or for smaller blocks"
                )
        elif density is not None:
            raise ValueError(f"density={density} and a weight are given; give one of them")
        _check_shapes(weight, shape, tuple(block_shape))
        bias = jnp.zeros(out_features, param_dtype) if use_bias else None
        super().__init__(
            weight, bias, dtype=dtype, precision=precision, implementation=implementation
        )
        self.places, self.block_shape = Pattern(weight.in_any_order().places), weight.block_shape
        _check_rows(rows, axis_name)
        self.rows, self.axis_name = rows, axis_name
        scored = count_candidates(candidates, weight.grid[0], "block rows")
        self.scores = Scores(jnp.zeros((scored, weight.grid[1]), jnp.float32))
        self.due = Pattern(jnp.zeros(weight.grid[0], jnp.int32))
        probe = None
        if sketch is not None:
            check_sketch(sketch, weight.block_shape)
            (r, c), (above, across) = sketch, weight.grid
            probe = Scores(jnp.zeros((above, r, across, c), jnp.float32))
        self.sketch = probe

    @classmethod
    def from_dense(
        cls,
        linear: nnx.Linear,
        mask: jax.Array | None = None,
        *,
        block_shape: tuple[int, int],
        candidates: float | int = 1.0,
        sketch: tuple[int, int] | None = None,
        implementation: str | None = None,
    ) -> "BlockSparseLinear":
        """The layer that computes what `linear` does with its kernel masked.

        Args:
          linear: the dense layer.
          mask: bool `[in, out]`, what to keep; default: what is not zero. A block is stored if any
            of it is kept.
          block_shape: `(bh, bw)`.
          candidates, sketch: as of the layer.
          implementation: see `pallas_kernels.block_sparse_matmul`.

        Raises:
          ValueError: if linear is not an `nnx.Linear` or the mask has another shape.

        >>> dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> layer = BlockSparseLinear.from_dense(dense, jnp.eye(4) > 0, block_shape=(2, 2))
        >>> layer.values[...].shape
        (2, 2, 2)
        """
        kernel, mask, bias = split_linear(linear, mask)
        layer = cls(
            *kernel.shape,
            block_shape=block_shape,
            weight=BlockSparse.from_mask(kernel, mask, block_shape, pad=True),
            use_bias=bias is not None,
            candidates=candidates,
            sketch=sketch,
            dtype=linear.dtype,
            param_dtype=kernel.dtype,
            precision=linear.precision,
            implementation=implementation,
        )
        if bias is not None and layer.bias is not None:
            layer.bias[...] = bias
        return layer

    def _multiply(self, x: jax.Array, w: BlockSparse) -> jax.Array:
        axis_name = self.axis_name if self.rows is None else self.rows.spec[0]

        def one(x, w, scores, due, sketch):
            y = super(BlockSparseLinear, self)._multiply(x, w)
            options: Any = dict(precision=self.precision)
            if sketch is not None:
                y = sketch_blocks(x, y, sketch, self.block_shape, **options)
            return score_blocks(x, y, scores, due, self.block_shape, axis_name=axis_name, **options)

        run = one
        if self.rows is not None:
            rows, whole = PartitionSpec(self.rows.spec[0]), PartitionSpec()
            specs = (rows, whole, whole, whole, whole)
            run = jax.shard_map(one, mesh=self.rows.mesh, in_specs=specs, out_specs=rows)
        sketch = None if self.sketch is None else self.sketch[...]
        return run(x, w, self.scores[...], self.due[...], sketch)

    @property
    def weight(self) -> BlockSparse:
        """W as `BlockSparse`."""
        return BlockSparse(self.values[...], self.places[...], self.shape, self.block_shape)

    def set_weight(self, w: BlockSparse) -> None:
        """Take values and places of another `BlockSparse` of the same shape and block shape.

        Raises:
          ValueError: for another shape or block shape.
        """
        _check_shapes(w, self.shape, self.block_shape)
        self.values[...], self.places[...] = w.values, w.in_any_order().places


class BlockSparsePointwise(BlockSparseLinear):
    """A 1 x 1 convolution that stores blocks of its matrix of channels: `BlockSparseLinear` at every position
    of `x [..., *space, in]`, or at every `strides`-th.

    Args:
      in_features, out_features: channels of x and y.
      strides: one for each axis of space.
      options: of `BlockSparseLinear`.

    >>> options = dict(block_shape=(4, 4), density=0.5, rngs=nnx.Rngs(0))
    >>> layer = BlockSparsePointwise(8, 16, strides=(2, 2), **options)
    >>> layer(jnp.ones((1, 7, 7, 8))).shape
    (1, 4, 4, 16)
    """

    strides: tuple[int, ...]

    def __init__(
        self, in_features: int, out_features: int, *, strides: tuple[int, ...], **options: Any
    ):
        super().__init__(in_features, out_features, **options)
        self.strides = tuple(strides)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., *space, in]` to `[..., *space, out]`, with fewer positions where strides are above 1."""
        return super().__call__(
            x[(..., *(slice(None, None, s) for s in self.strides), slice(None))]
        )


def _check_shapes(w: BlockSparse, shape: tuple[int, int], block_shape: tuple[int, ...]) -> None:
    if (w.shape, w.block_shape) != (shape, block_shape):
        raise ValueError(
            f"weight has shape={w.shape}, block_shape={w.block_shape}; "
            f"they must stay {shape}, {block_shape}"
        )


def _check_rows(rows: NamedSharding | None, axis_name: object) -> None:
    if rows is None:
        return
    if axis_name is not None:
        raise ValueError(
            f"rows={rows} and axis_name={axis_name!r} are given: with rows the layer calls jax.shard_map itself; inside of one "
            "give axis_name alone"
        )
    if not isinstance(rows, NamedSharding) or not rows.spec or rows.spec[0] is None:
        raise ValueError(
            f"rows={rows} must be a NamedSharding whose first entry names mesh axes, as NamedSharding(mesh, "
            "PartitionSpec('data'))"
        )
