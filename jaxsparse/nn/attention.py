"""Self-attention that reads only chosen blocks of keys, for training, prefill and decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse.attention import Info, Pages, Predictor, State, append_page, pages
from jaxsparse.attention.functions import padding
from jaxsparse.attention.measure import inform
from pallas_kernels import BlockMask, Grid, block_sparse_attention, block_sparse_decode

MaskFn = Callable[[Array, Array], BlockMask]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
    """Keys and values seen so far, and the sum of the keys of each block.

    Attributes:
      k, v: `[batch, kv_heads, capacity, head_dim]`.
      sums: float32 `[batch, kv_heads, blocks, head_dim]`: choosing blocks reads these, not k.
      lengths: int32 `[batch]`, how many positions are filled.
      pages: bounds of the keys of each page, for a layer whose predictor decodes by them (`attention.quest`).
    """

    k: Array
    v: Array
    sums: Array
    lengths: Array
    pages: Pages | None = None


def top_blocks(num_blocks: int, *, block_q: int = 128, block_kv: int = 128) -> MaskFn:
    r"""A function that chooses, per head of the keys, the blocks with the best pooled scores.

    The score of blocks I, J is $\bar q_I \cdot \bar k_J$, means over the block and (GQA) over the
    heads that share keys; the own block is always chosen, later ones never, and the result is
    causal inside blocks. All queries of a block share the choice, which therefore depends on the
    later queries of the block, as in every method that chooses by blocks of queries.

    >>> q = k = jax.random.normal(jax.random.key(0), (1, 2, 64, 8))
    >>> top_blocks(2, block_q=16, block_kv=16)(q, k).counts
    Array([[7, 7]], dtype=int32)
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} must be at least 1")

    def choose(q: Array, k: Array) -> BlockMask:
        batch, kv_heads, kv_len, dim = k.shape
        q_len = q.shape[2]

        def pooled(x: Array, block: int) -> Array:
            length = x.shape[2]
            blocks = -(-length // block)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * block - length), (0, 0)))
            sums = jnp.sum(x.reshape(*x.shape[:2], blocks, block, dim).astype(jnp.float32), 3)
            sizes = np.minimum(block, length - np.arange(blocks) * block)  # the last may be short
            return sums / sizes.astype(np.float32).reshape(1, 1, -1, 1)

        q_mean = pooled(q, block_q).reshape(batch, kv_heads, -1, -(-q_len // block_q), dim).mean(2)
        scores = jnp.einsum("bhid,bhjd->bhij", q_mean, pooled(k, block_kv))
        first = np.arange(scores.shape[2])[:, None] * block_q
        start = np.arange(scores.shape[3]) * block_kv
        last = np.minimum(first + block_q, q_len) - 1
        scores = jnp.where((start <= last)[None, None], scores, -jnp.inf)
        grid = Grid(q_len, kv_len, block_q, block_kv)
        own = (start <= last) & (start + block_kv > first)
        chosen = BlockMask.from_scores(scores, num_blocks, grid, forced=own)
        return chosen & BlockMask.causal(grid)

    return choose


class BlockSparseAttention(nnx.Module):
    """Multi-head self-attention over the blocks of keys that a mask chooses.

    Projections as in `flax.nnx.MultiHeadAttention`, with fewer heads for keys and values if
    asked for (GQA). The mask is given per call, or made from queries and keys by `mask`, e.g.
    `top_blocks(16)` or `lambda q, k: BlockMask.local(q.shape[2], window=1024)`; or by a predictor of
    `jaxsparse.attention`, `choose`. In Linen models:
    `flax.nnx.bridge.ToLinen(BlockSparseAttention, args=(...))`.

    Args:
      in_features: size of the input and output.
      num_heads, num_kv_heads, head_dim: heads of the queries, of the keys (default: as many),
        and their size (default: in_features / num_heads).
      mask: function of q `[batch, num_heads, length, head_dim]` and k that returns a `BlockMask`;
        without one, calls must be given a mask.
      choose: a predictor of `jaxsparse.attention`, in place of `mask`. It is given what the layer has: queries and keys
        before positions, and the layer's input.
      gate: parameters of a trained predictor, an `nnx.Module` (`attention.SeerGate`, `attention.LowRank`) that becomes a
        part of the layer.
      position: function of q or k and the positions `[length]` or `[batch, 1, 1]` (rotary
        embedding, say), applied before the mask is made.
      softcap, implementation: as in `pallas_kernels.block_sparse_attention`.
      use_bias, dtype, param_dtype: of the projections.
      rngs: for the parameters.

    >>> layer = BlockSparseAttention(
    ...     32, num_heads=4, num_kv_heads=2, mask=top_blocks(2, block_q=8, block_kv=8),
    ...     rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 40, 32))
    >>> layer(x).shape
    (1, 40, 32)
    >>> out, cache = layer.prefill(x, layer.init_cache(1, 64, block_kv=8))
    >>> step, cache = layer.decode(x[:, :1], cache, num_blocks=3)
    >>> step.shape, int(cache.lengths[0])
    ((1, 1, 32), 41)
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: MaskFn | None
    choose: Predictor | None
    gate: nnx.Module | None
    position: Callable[[Array, Array], Array] | None
    softcap: float | None
    implementation: str | None
    query: nnx.LinearGeneral
    key: nnx.LinearGeneral
    value: nnx.LinearGeneral
    out: nnx.LinearGeneral

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: MaskFn | None = None,
        choose: Predictor | None = None,
        gate: nnx.Module | None = None,
        position: Callable[[Array, Array], Array] | None = None,
        softcap: float | None = None,
        implementation: str | None = None,
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} must be a positive multiple of num_kv_heads={num_kv_heads}"
            )
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(
                    f"in_features={in_features} is not a multiple of num_heads={num_heads}; give "
                    "head_dim"
                )
            head_dim = in_features // num_heads
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        if mask is not None and choose is not None:
            raise ValueError(
                "mask and choose are both given; a layer chooses its blocks in one way"
            )
        self.mask, self.position = mask, position
        self.choose, self.gate = choose, gate
        self.softcap, self.implementation = softcap, implementation

        def project(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                in_features,
                (heads, head_dim),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query, self.key, self.value = (
            project(n) for n in (num_heads, num_kv_heads, num_kv_heads)
        )
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features,
            axis=(-2, -1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @overload
    def __call__(
        self, x: Array, mask: BlockMask | None = None, *, segment_ids: Array | None = None,
        with_info: Literal[False] = ..., samples: int = ...,
    ) -> Array: ...  # fmt: skip

    @overload
    def __call__(
        self, x: Array, mask: BlockMask | None = None, *, segment_ids: Array | None = None,
        with_info: Literal[True], samples: int = ...,
    ) -> tuple[Array, Info]: ...  # fmt: skip

    def __call__(
        self,
        x: Array,
        mask: BlockMask | None = None,
        *,
        segment_ids: Array | None = None,
        with_info: bool = False,
        samples: int = 64,
    ) -> Array | tuple[Array, Info]:
        """x `[batch, length, in_features]`; a mask given here takes the place of the layer's.

        `with_info` also returns `jaxsparse.attention.Info`: density, recall and error bound of evenly spaced `samples` of
        the queries against causal dense attention (or dense attention, if the predictor is not causal), and dropped
        blocks.
        """
        q, k, v, state = self._heads(x, jnp.arange(x.shape[1]))
        if not with_info:
            return self._attend(q, k, v, state, mask, segment_ids)[0]
        if segment_ids is not None or self.softcap is not None:
            raise ValueError(
                "with_info=True: recall knows no segment_ids and no softcap; leave one out"
            )
        out, lse, mask = self._attend(q, k, v, state, mask, segment_ids)
        causal = self.choose is None or self.choose.layout.causal
        return out, inform(q, k, v, mask, lse, causal=causal, samples=samples)

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        block_kv: int = 128,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> BlockCache:
        """An empty cache; the capacity must be a multiple of the block."""
        if capacity % block_kv:
            raise ValueError(f"capacity={capacity} must be a multiple of block_kv={block_kv}")
        shape = (batch, self.num_kv_heads, capacity, self.head_dim)
        sums = jnp.zeros((*shape[:2], capacity // block_kv, self.head_dim), jnp.float32)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        lengths = jnp.zeros(batch, jnp.int32)
        return BlockCache(k, v, sums, lengths, self._pages(k, lengths))

    def _pages(self, k: Array, lengths: Array) -> Pages | None:
        page = None if self.choose is None else self.choose.page
        if page is None:
            return None
        if k.shape[2] % page:
            raise ValueError(
                f"capacity={k.shape[2]} must be a multiple of the predictor's page={page}"
            )
        return pages(k, page, lengths)

    def prefill(
        self,
        x: Array,
        cache: BlockCache,
        mask: BlockMask | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, BlockCache]:
        """`__call__` on the first tokens, written into an empty cache.

        `lengths`, int `[batch]`: how many of the tokens each sequence has, from the left; None: all. Padding may hold
        anything: it reaches no output but its own, and the cache keeps nothing of it.
        """
        length, capacity = x.shape[1], cache.k.shape[2]
        if length > capacity:
            raise ValueError(f"x has {length} positions, more than the cache's capacity {capacity}")
        q, k, v, state = self._heads(x, jnp.arange(length))
        filled, segments = jnp.full_like(cache.lengths, length), None
        if lengths is not None:
            lengths, there, segments = padding(lengths, q)
            q, k, v = (jnp.where(there, y, 0) for y in (q, k, v))
            filled, state = lengths.astype(filled.dtype), state._replace(lengths=lengths)
        rest = ((0, 0), (0, 0), (0, capacity - length), (0, 0))
        k_all, v_all = jnp.pad(k, rest), jnp.pad(v, rest)
        blocks = k_all.reshape(*cache.sums.shape[:3], -1, self.head_dim)
        cache = BlockCache(
            k_all.astype(cache.k.dtype),
            v_all.astype(cache.v.dtype),
            jnp.sum(blocks.astype(jnp.float32), 3),
            filled,
            self._pages(k_all.astype(cache.k.dtype), filled),
        )
        return self._attend(q, k, v, state, mask, segments)[0], cache

    def decode(
        self, x: Array, cache: BlockCache, *, num_blocks: int | None = None, num_sinks: int = 1
    ) -> tuple[Array, BlockCache]:
        """One token `[batch, 1, in_features]`, attending to `num_blocks` blocks of the cache, or to those that the layer's
        predictor chooses, if it decodes (`attention.quest`) and no number is given.

        Per head of the keys: the newest block, the first `num_sinks` ones and those whose mean
        key agrees best with the queries (the newest and the first count inside `num_blocks`).
        Only the means and the chosen blocks are read. A token that finds the cache full is an error; under `jit`,
        where lengths cannot be looked at, it is not stored: keep `lengths` below the capacity there.
        """
        if x.shape[1] != 1:
            raise ValueError(f"x has {x.shape[1]} positions; decode takes one, prefill many")
        blocks = cache.sums.shape[2]
        if num_blocks is None:
            return self._decode_by_choice(x, cache)
        if not 1 + num_sinks <= num_blocks <= blocks or num_sinks < 0:
            raise ValueError(
                f"num_blocks={num_blocks} must lie in [1 + num_sinks, {blocks}], with num_sinks="
                f"{num_sinks} not negative"
            )
        if self.softcap is not None:
            raise ValueError(f"decode has no softcap; the layer has softcap={self.softcap}")
        batch, _, capacity, _ = cache.k.shape
        block = capacity // blocks
        at = cache.lengths
        q, cache = self._append(x, cache)
        sums = cache.sums

        index = jnp.arange(blocks, dtype=at.dtype)[None]
        newest = (at // block)[:, None]
        counts = jnp.clip(cache.lengths[:, None] - index * block, 1, block)
        q_mean = q.reshape(batch, self.num_kv_heads, -1, self.head_dim).mean(2)
        scores = jnp.einsum("bhd,bhnd->bhn", q_mean.astype(jnp.float32), sums)
        scores = scores / counts[:, None].astype(jnp.float32)
        scores = jnp.where((index <= newest)[:, None], scores, -jnp.inf)
        forced = ((index < num_sinks) & (index <= newest)) | (index == newest)
        mask = BlockMask.from_scores(
            scores[:, :, None], num_blocks, (1, block), forced=forced[:, None, None]
        )
        out = block_sparse_decode(q[:, :, 0], cache.k, cache.v, mask, cache.lengths)
        return self.out(out[:, None]), cache

    def _append(self, x: Array, cache: BlockCache) -> tuple[Array, BlockCache]:
        """Queries of one token per sequence, and the cache with it."""
        capacity = cache.k.shape[2]
        if is_concrete(cache.lengths) and (np.asarray(cache.lengths) >= capacity).any():
            raise ValueError(
                f"the cache is full: lengths={cache.lengths.tolist()}, capacity={capacity}; give init_cache more"
            )
        q, k, v, _ = self._heads(x, cache.lengths[:, None, None])
        entry, at = jnp.arange(x.shape[0]), cache.lengths
        block = cache.k.shape[2] // cache.sums.shape[2]

        def put(old: Array, new: Array) -> Array:
            return old.at[entry, :, at].set(new[:, :, 0].astype(old.dtype), mode="drop")

        sums = cache.sums.at[entry, :, at // block].add(k[:, :, 0].astype(jnp.float32), mode="drop")
        bounds = cache.pages
        if bounds is not None:
            stored = k.astype(cache.k.dtype)
            bounds = append_page(bounds, stored, at, cache.k.shape[2] // bounds.low.shape[2])
        return q, BlockCache(put(cache.k, k), put(cache.v, v), sums, at + 1, bounds)

    def _decode_by_choice(self, x: Array, cache: BlockCache) -> tuple[Array, BlockCache]:
        if self.choose is None or cache.pages is None:
            raise ValueError(
                "num_blocks=None: give a number, or a predictor that decodes (choose=attention.quest(...)) and a cache "
                "of this layer's init_cache"
            )
        q, cache = self._append(x, cache)
        state = State(params=cache.pages, lengths=cache.lengths)
        mask = self.choose(q, cache.k, cache.v, state)
        out = block_sparse_decode(q[:, :, 0], cache.k, cache.v, mask, cache.lengths)
        return self.out(out[:, None]), cache

    def _heads(self, x: Array, positions: Array) -> tuple[Array, Array, Array, State]:
        q, k, v = (jnp.swapaxes(f(x), 1, 2) for f in (self.query, self.key, self.value))
        state = State(params=self.gate, q=q, k=k, x=x)
        if self.position is not None:
            q, k = self.position(q, positions), self.position(k, positions)
        return q, k, v, state

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        state: State,
        mask: BlockMask | None,
        segment_ids: Array | None,
    ) -> tuple[Array, Array, BlockMask]:
        if mask is None:
            if self.choose is not None:
                mask = self.choose(q, k, v, state)
            elif self.mask is not None:
                mask = self.mask(q, k)
            else:
                raise ValueError("mask=None: give one here, or a function to the layer")
        out, lse = block_sparse_attention(
            q,
            k,
            v,
            mask,
            segment_ids=segment_ids,
            softcap=self.softcap,
            return_lse=True,
            implementation=self.implementation,
        )
        return self.out(jnp.swapaxes(out, 1, 2)), lse, mask
