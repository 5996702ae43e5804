r"""NSA: three branches per head, mixed by gates: compressed blocks, selected blocks, a sliding window.

1. Keys and values of block c (`length` tokens every `stride`) become one of each, by means or a small network.
2. $o^{cmp}_t$: attention over compressed blocks that are complete, $c\, s + l - 1 \le t$; queries without one get 0.
3. The probabilities of 2, summed over the heads of a group and over the compressed blocks that overlap a selection
   block, choose S selection blocks for the whole group; the own block (and first and neighbouring ones, `Layout`) are
   forced. Exact causal attention over these. The choice has no gradient.
4. A sliding window; the paper gives it keys and values of its own.
5. $o = g_1 o^{cmp} + g_2 o^{slc} + g_3 o^{swa}$, gates in (0, 1) per query and head.

Everything is causal, also a query that stands inside a block that is being compressed.

With `Layout(block_q=1)` each query chooses for itself, as published; larger blocks of queries share a choice by the sum
of their probabilities (a variant, which keeps tiles of a matrix unit full; it depends on the later queries of the tile).

Source: Yuan et al., Native sparse attention, 2025, recalled; the open implementation of fla-org, which has means, one
stride and shared keys for the window.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsparse.attention import pool, select
from jaxsparse.attention.layout import Layout, check_heads, group
from jaxsparse.attention.predictor import Predictor, State, by_scores
from pallas_kernels import BlockMask, Grid, block_sparse_attention

Compress = Callable[[Array], Array]
PUBLISHED = Layout(block_q=1, block_kv=64, sinks=1, local=2)
"""Each query for itself; the first block and two around the query are forced."""
TILES = Layout(block_kv=64)
"""128 queries share a choice."""
_QUERIES = 2048  # whose probabilities over compressed blocks exist at a time while `nsa` chooses


class Compressor(nnx.Module):
    """A block of keys (or values) as one: positions inside the block are added, then a network of one hidden layer.

    Args:
      dim: of keys or values.
      length, stride: tokens of a block, and between the starts of blocks; the paper's are 32 and 16.
      hidden: units; None: `dim`.
      rngs: for the parameters.

    >>> Compressor(4, length=4, stride=2, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 11, 4))).shape
    (1, 2, 4, 4)
    """

    def __init__(
        self,
        dim: int,
        *,
        length: int = 32,
        stride: int = 16,
        hidden: int | None = None,
        rngs: nnx.Rngs,
    ):
        _check_blocks(length, stride)
        self.length, self.stride = length, stride
        hidden = dim if hidden is None else hidden
        self.positions = nnx.Param(jnp.zeros((length, dim), jnp.float32))
        self.first = nnx.Linear(length * dim, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`[batch, heads, blocks, dim]` of `[batch, heads, tokens, dim]`; blocks that are not complete are left out."""
        windows = _windows(x, self.length, self.stride) + self.positions[...]
        flat = windows.reshape(*windows.shape[:-2], -1)
        return self.second(jax.nn.gelu(self.first(flat)))


def _check_blocks(length: int, stride: int) -> None:
    if not 1 <= stride <= length:
        raise ValueError(f"length={length}, stride={stride}: give 1 <= stride <= length")


def _windows(x: Array, length: int, stride: int) -> Array:
    """`[batch, heads, blocks, length, dim]`: complete blocks."""
    number = max(0, (x.shape[2] - length) // stride + 1)
    index = np.arange(number)[:, None] * stride + np.arange(length)
    return x[:, :, index]


def mean_blocks(length: int, stride: int | None = None) -> Compress:
    """Means of blocks, in place of a `Compressor`; `stride` None: blocks that do not overlap."""
    step = length if stride is None else stride
    _check_blocks(length, step)

    def means(x: Array) -> Array:
        if length != step:
            return _windows(x.astype(jnp.float32), length, step).mean(-2)
        return pool.mean(x[:, :, : x.shape[2] // length * length], length)

    return means


def compressed_attention(
    q: Array, k_blocks: Array, v_blocks: Array, *, length: int, stride: int, offset: int = 0
) -> tuple[Array, Array]:
    r"""Attention over compressed blocks, and its probabilities.

    Args:
      q: `[batch, heads, q_len, dim]`.
      k_blocks, v_blocks: `[batch, kv_heads, blocks, dim]`.
      length, stride: tokens of a block and between starts.
      offset: position of the first query.

    Returns:
      The output, float32 `[batch, heads, q_len, dim]`, 0 where no block is complete, and the probabilities
      `[batch, kv_heads, heads / kv_heads, q_len, blocks]`.
    """
    p = _probabilities(q, k_blocks, jnp.arange(q.shape[2]) + offset, length, stride)
    out = jnp.einsum("bgrtc,bgcd->bgrtd", p, v_blocks.astype(jnp.float32))
    return out.reshape(*q.shape[:3], -1), p


def _probabilities(q: Array, k_blocks: Array, position: Array, length: int, stride: int) -> Array:
    """Of queries at these positions over the blocks that end before them, float32
    `[batch, kv_heads, heads / kv_heads, q_len, blocks]`; 0 where none does. Scores are products in q's precision."""
    grouped = group(q, k_blocks.shape[1])
    s = jnp.einsum(
        "bgrtd,bgcd->bgrtc", grouped, k_blocks.astype(q.dtype), preferred_element_type=jnp.float32
    )
    last_key = jnp.arange(k_blocks.shape[2]) * stride + length - 1
    s = jnp.where(last_key <= position[:, None], s * q.shape[-1] ** -0.5, -jnp.inf)
    top = lax.stop_gradient(s.max(-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(s - jnp.maximum(top, -1e30))  # of a query that sees nothing, too
    total = weights.sum(-1, keepdims=True)
    return weights * (1 / jnp.where(total == 0, 1.0, total))


def _tile_scores(
    q: Array, k_blocks: Array, layout: Layout, kv_len: int, *, length: int, stride: int
) -> Array:
    """`selection_scores` of the probabilities of `compressed_attention`, of which only those of some tiles of queries
    exist at a time; the queries are the last positions."""
    tiles, block = -(-q.shape[2] // layout.block_q), layout.block_q
    number = max(1, min(tiles, _QUERIES // block))  # of tiles at a time
    rows, steps = number * block, -(-tiles // number)
    offset = kv_len - q.shape[2]
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, steps * rows - q.shape[2]), (0, 0)))

    def some_tiles(i: Array) -> Array:
        some = lax.dynamic_slice_in_dim(padded, i * rows, rows, 2)
        at = i * rows + jnp.arange(rows)
        position = jnp.where(at < q.shape[2], at + offset, -1)  # padding sees nothing
        p = _probabilities(some, k_blocks, position, length, stride)
        return pool.cut(p.sum(2), block)[0].sum(-2)

    scores = jnp.moveaxis(lax.map(some_tiles, jnp.arange(steps)), 0, 2)
    scores = scores.reshape(*scores.shape[:2], steps * number, -1)[:, :, :tiles]
    return _of_blocks(scores, layout, kv_len, length=length, stride=stride)


def selection_scores(p: Array, layout: Layout, kv_len: int, *, length: int, stride: int) -> Array:
    """Compressed probabilities summed over heads of a group, overlapping blocks and queries of a tile, float32
    `[batch, kv_heads, q_blocks, kv_blocks]`."""
    summed = pool.cut(lax.stop_gradient(p).sum(2), layout.block_q)[0].sum(-2)
    return _of_blocks(summed, layout, kv_len, length=length, stride=stride)


def _of_blocks(scores: Array, layout: Layout, kv_len: int, *, length: int, stride: int) -> Array:
    """Scores of compressed blocks, the last axis, added up to those of the blocks of keys that they overlap."""
    blocks, number = -(-kv_len // layout.block_kv), scores.shape[-1]
    if length == stride == layout.block_kv:  # each overlaps itself; the last may not be complete
        return jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, blocks - number)))
    start, first = np.arange(number) * stride, np.arange(blocks) * layout.block_kv
    meet = (start[:, None] < first + layout.block_kv) & (start[:, None] + length > first)
    return jnp.einsum("bgtc,cn->bgtn", scores, meet.astype(np.float32))


def nsa_attention(
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    *,
    num_blocks: int = 16,
    window: int = 512,
    compress_k: Compress | None = None,
    compress_v: Compress | None = None,
    length: int | None = None,
    stride: int | None = None,
    window_kv: tuple[Array, Array] | None = None,
    layout: Layout = PUBLISHED,
) -> Array:
    """The three branches; see the module. Causal.

    Args:
      q: `[batch, heads, length, dim]`.
      k, v: `[batch, kv_heads, length, dim]`.
      gates: `[batch, heads, length, 3]`, for the compressed, selected and sliding branch.
      num_blocks: S, forced ones included.
      window: w, the last so many keys.
      compress_k, compress_v: functions of keys and of values, `Compressor`s or `mean_blocks`, the default.
      length, stride: tokens of a compressed block and between starts; of a `Compressor` its own, by default
        `layout.block_kv` without overlap.
      window_kv: other keys and values for the window, of the shapes of k and v.
      layout: selection blocks; `causal` and `share` hold in any case.

    Returns:
      `[batch, heads, length, v_dim]` in q's dtype.

    Raises:
      ValueError: shapes that do not fit, a budget below the forced blocks.

    >>> x = jax.random.normal(jax.random.key(0), (1, 2, 64, 8))
    >>> gates = jnp.ones((1, 2, 64, 3)) / 3
    >>> nsa_attention(x, x[:, :1], x[:, :1], gates, num_blocks=3, window=16, layout=Layout(1, 8)).shape
    (1, 2, 64, 8)
    """
    sizes = check_heads(q, k, v)
    if sizes.q_len != sizes.kv_len or gates.shape != (*q.shape[:3], 3):
        raise ValueError(
            f"q {q.shape}, k {k.shape}, gates {gates.shape}: q and k need one length, gates {(*q.shape[:3], 3)}"
        )
    if isinstance(compress_k, Compressor):
        length, stride = compress_k.length, compress_k.stride
    length = layout.block_kv if length is None else length
    stride = length if stride is None else stride
    pooled = mean_blocks(length, stride)
    k_blocks = (compress_k or pooled)(k)
    v_blocks = (compress_v or pooled)(v)
    if k_blocks.shape[2] != v_blocks.shape[2]:
        raise ValueError(
            f"compress_k gives {k_blocks.shape[2]} blocks, compress_v {v_blocks.shape[2]}; they must agree"
        )
    out_cmp, p = compressed_attention(q, k_blocks, v_blocks, length=length, stride=stride)

    grid = layout.grid(sizes.q_len, sizes.kv_len)
    scores = selection_scores(p, layout, sizes.kv_len, length=length, stride=stride)
    rule = select.top_k(num_blocks)
    mask = layout.mask(layout.choose(scores, rule, grid), grid, rule)
    out_slc = block_sparse_attention(q, k, v, mask)

    near = Grid(sizes.q_len, sizes.kv_len, layout.block_kv, layout.block_kv)
    k_win, v_win = (k, v) if window_kv is None else window_kv
    if k_win.shape != k.shape or v_win.shape != v.shape:
        raise ValueError(
            f"window_kv has shapes {k_win.shape} and {v_win.shape}; k has {k.shape}, v {v.shape}"
        )
    out_swa = block_sparse_attention(q, k_win, v_win, BlockMask.local(near, window=window))
    mixed = sum(
        gates[..., i, None].astype(jnp.float32) * branch.astype(jnp.float32)
        for i, branch in enumerate((out_cmp, out_slc, out_swa))
    )
    return jnp.asarray(mixed).astype(q.dtype)


def nsa(
    *,
    density: float | None = None,
    rule: select.Rule | None = None,
    length: int | None = None,
    stride: int | None = None,
    layout: Layout = TILES,
) -> Predictor:
    """The selection of NSA alone, with means for compression and no training: what its scores find in any model.

    Args:
      density, rule: the budget, one of them.
      length, stride: tokens of a compressed block and between starts; by default `layout.block_kv` without overlap.
      layout: blocks; the heads of a group always share a choice.
    """
    size = layout.block_kv if length is None else length
    step = size if stride is None else stride
    _check_blocks(size, step)

    def scores(q: Array, k: Array, state: State) -> Array:
        if not layout.causal:
            raise ValueError("causal=False: nsa compresses blocks that lie before the query")
        blocks = mean_blocks(size, step)(k)
        s = _tile_scores(q, blocks, layout, k.shape[2], length=size, stride=step)
        return jnp.log(jnp.maximum(s, 1e-30))

    cost = lambda sizes: sizes.heads * sizes.q_len * (sizes.kv_len / step) * (2.0 * sizes.dim + 8)
    return by_scores("nsa", scores, select.rule_of(density, rule), layout, cost)
