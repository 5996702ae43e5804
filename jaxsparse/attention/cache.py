"""A cache of keys and values of fixed capacity, which a policy keeps within its budget.

All shapes are static: it works under `jit`, as the carry of a `scan`, under `vmap`, and in NNX modules as a value.

    cache = attention.Cache.create(policy=attention.snapkv(1024), batch=1, kv_heads=8, head_dim=128, capacity=2048)
    out, cache = cache.prefill(q, k, v, position=rotary)      # the prompt, whole or in chunks
    out, cache = cache.decode(q, k, v, position=rotary)       # a token

Entries of a head stand in the order of their positions, the filled ones first. After eviction the length of the cache is
not the position of the next token: `lengths` counts tokens, `counts` entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse.attention import budgets, select
from jaxsparse.attention.layout import check_heads, checked_lengths, group
from jaxsparse.attention.policies import DynamicKV, Entries, Policy, Seen
from jaxsparse.selection import topk_mask

Position = Callable[[Array, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys, values and what a policy knows of them; see the module, and `create`.

    Attributes:
      k, v: `[batch, kv_heads, capacity, head_dim]`; keys after positions, unless the policy reassigns them.
      positions: int32 `[batch, kv_heads, capacity]`, -1 where nothing is.
      scores, visits: float32 of the same shape, what the policy has observed.
      lengths: int32 `[batch]`, how many tokens have come.
      overflow: int32 `[batch, kv_heads]`, entries that found no room. Zero in a sound cache.
      policy: which entries stay.
    """

    k: Array
    v: Array
    positions: Array
    scores: Array
    visits: Array
    lengths: Array
    overflow: Array
    policy: Policy = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        *,
        policy: Policy,
        batch: int,
        kv_heads: int,
        head_dim: int,
        v_dim: int | None = None,
        capacity: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Cache:
        """An empty cache.

        Args:
          policy: `keep_all`, `streaming_llm`, `h2o`, `snapkv`, `ada_snapkv`, `dynamickv`, `zipvl`.
          batch, kv_heads, head_dim, v_dim: sizes.
          capacity: entries per head that there is room for; by default the policy's budget. A policy that evicts at the
            end of a prompt needs room for the tokens that are generated, besides.
          dtype: of keys and values.

        Raises:
          ValueError: a capacity below the budget, sizes that are not positive.

        >>> from jaxsparse import attention
        >>> cache = Cache.create(policy=attention.h2o(2, 2), batch=1, kv_heads=1, head_dim=4)
        >>> q = k = v = jnp.ones((1, 1, 6, 4))
        >>> out, cache = cache.prefill(q, k, v)
        >>> out.shape, cache.positions[0, 0].tolist(), cache.lengths.tolist()
        ((1, 1, 6, 4), [0, 1, 4, 5], [6])
        """
        if not isinstance(policy, Policy):
            raise ValueError(
                f"policy={policy!r} must be a policy, which attention.snapkv(1024) for instance returns"
            )
        capacity = policy.budget if capacity is None else capacity
        if capacity < policy.budget:
            raise ValueError(f"capacity={capacity} is below the policy's budget={policy.budget}")
        v_dim = head_dim if v_dim is None else v_dim
        if min(batch, kv_heads, head_dim, v_dim) < 1:
            raise ValueError(
                f"batch={batch}, kv_heads={kv_heads}, head_dim={head_dim}, v_dim={v_dim} must be positive"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype={jnp.dtype(dtype)} must be a floating-point type")
        shape = (batch, kv_heads, capacity)
        floats = jnp.zeros(shape, jnp.float32)
        return cls(
            jnp.zeros((*shape, head_dim), dtype),
            jnp.zeros((*shape, v_dim), dtype),
            jnp.full(shape, -1, jnp.int32),
            floats,
            floats,
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(shape[:2], jnp.int32),
            policy,
        )

    @property
    def capacity(self) -> int:
        """Entries per head that there is room for."""
        return self.k.shape[2]

    @property
    def counts(self) -> Array:
        """Entries per head, int32 `[batch, kv_heads]`."""
        return jnp.sum(self.positions >= 0, -1, dtype=jnp.int32)

    @property
    def _fields(self) -> dict[str, Array]:
        """What is kept of each entry."""
        names = "k", "v", "positions", "scores", "visits"
        return {name: getattr(self, name) for name in names}

    @property
    def _entries(self) -> Entries:
        return Entries(self.positions, self.scores, self.visits, self.lengths)

    def prefill(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        lengths: Array | None = None,
        position: Position | None = None,
        scale: float | None = None,
    ) -> tuple[Array, Cache]:
        """Attention of a prompt, or of a chunk of it, to the cache and itself; then the policy evicts.

        Takes memory of queries times (capacity + queries): give long prompts in chunks, or use `fill`.

        Args:
          q: `[batch, heads, n, head_dim]`, before positions.
          k, v: `[batch, kv_heads, n, ...]`.
          lengths: int `[batch]`, how many of the n tokens each sequence has, from the left; None: all.
          position: function of q or k and int positions that broadcast to `[batch, heads, n]` (rotary embedding, say,
            `attention.rotary`); None: positions are in q and k already, which no policy that reassigns them can take.
          scale: of the scores; by default `head_dim ** -0.5`.

        Returns:
          `[batch, heads, n, v_dim]` in q's dtype, 0 for padding, and the cache.

        Raises:
          ValueError: shapes that do not fit; entries that find no room (outside of `jit`; inside they are counted in
            `overflow`).
        """
        return self._call(q, k, v, lengths, None, position, scale, prompt=True)

    def decode(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        lengths: Array | None = None,
        store: Array | None = None,
        position: Position | None = None,
        scale: float | None = None,
    ) -> tuple[Array, Cache]:
        """The same for generated tokens, one or a few: policies that evict after prompts keep all of them.

        Args:
          q, k, v, lengths, position, scale: as of `prefill`. `lengths` 0: nothing came for this sequence.
          store: bool `[batch, n]`: tokens that stay in the cache; the others are seen in this call only (as those that
            Dynamic-LLaVA's predictor drops).

        Returns, Raises: as `prefill`.
        """
        return self._call(q, k, v, lengths, store, position, scale, prompt=False)

    def fill(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        lengths: Array | None = None,
        position: Position | None = None,
        scale: float | None = None,
    ) -> Cache:
        """A whole prompt into an empty cache, where its attention is computed elsewhere (by a predictor, say): the policy
        looks at the last queries only.

        Args:
          q: the last queries of the prompt, `[batch, heads, m, head_dim]`, m at most n; of a sequence with `lengths`
            these are its queries at `n - m` to n, so give all of them (m = n) where lengths differ.
          k, v: all of its keys and values, `[batch, kv_heads, n, ...]`.
          lengths, position, scale: as of `prefill`.

        Raises:
          ValueError: as `prefill`; more queries than keys, fewer queries than keys with lengths.
        """
        n, m = k.shape[2], q.shape[2]
        if m > n or (lengths is not None and m != n):
            raise ValueError(
                f"q has {m} positions and k {n}: give the last queries of the prompt, all of them with lengths"
            )
        if m < n:  # the queries that are not there take no part
            q = jnp.pad(q, ((0, 0), (0, 0), (n - m, 0), (0, 0)))
        return self._call(q, k, v, lengths, None, position, scale, prompt=True, looking=m)[1]

    def trim(self, room: int = 0) -> Cache:
        """The cache with as much room as its fullest head needs, and for so many tokens more, but no more than it had:
        memory that is really given back. Outside of `jit`."""
        size = min(self.capacity, max(1, int(self.counts.max()) + room))
        return dataclasses.replace(
            self,
            **{name: x[:, :, :size] for name, x in self._fields.items()},
            policy=dataclasses.replace(self.policy, budget=min(self.policy.budget, size)),
        )

    # ---------------------------------------------------------------- one call

    def _call(
        self, q: Array, k: Array, v: Array, lengths: Array | None, store: Array | None,
        position: Position | None, scale: float | None, *, prompt: bool, looking: int | None = None,
    ) -> tuple[Array, Cache]:  # fmt: skip
        sizes = check_heads(q, k, v)
        n, policy = k.shape[2], self.policy
        batch, kv_heads, capacity = self.positions.shape
        dims, kept_dims = (k.shape[3], v.shape[3]), (self.k.shape[3], self.v.shape[3])
        if k.shape[:2] != (batch, kv_heads) or q.shape[2] != n or dims != kept_dims:
            raise ValueError(
                f"q {q.shape}, k {k.shape} and v {v.shape} do not fit a cache of batch {batch}, {kv_heads} heads, head_dim "
                f"{self.k.shape[3]} and v_dim {self.v.shape[3]}; sequences of different lengths are padded to one, with lengths="
            )
        if lengths is None:
            lengths = jnp.full(batch, n, jnp.int32)
        else:
            lengths = checked_lengths(lengths, batch, n)
        if store is not None:
            store = jnp.asarray(store)
            if store.shape != (batch, n) or store.dtype != bool:
                raise ValueError(
                    f"store has shape {store.shape} and dtype {store.dtype}; give booleans [{batch}, {n}], one for each "
                    "token"
                )
        if policy.reassign and position is None:
            raise ValueError(
                f"{type(policy).__name__} reassigns positions: give position=, or reassign=False"
            )
        if policy.first and n > policy.budget:
            raise ValueError(
                f"a call of {n} tokens is more than budget={policy.budget}; give the prompt in chunks"
            )

        cache = self._make_room(lengths) if policy.first else self
        index = jnp.arange(n)
        there = index < lengths[:, None]
        text = self.lengths[:, None] + index  # [batch, n]
        q_position = text[:, None]
        k, v = (jnp.where(there[:, None, :, None], x, 0) for x in (k, v))  # padding may be NaN
        if position is not None and not policy.reassign:
            k, q = position(k, q_position), position(q, q_position)
        fields = cache._insert(k, v, jnp.where(there, text, -1), n)
        entries = Entries(
            fields["positions"], fields["scores"], fields["visits"], self.lengths + lengths
        )

        keys = fields["k"].astype(q.dtype)
        if policy.reassign:
            assert position is not None
            place = jnp.arange(capacity + n)
            first = jnp.sum(
                cache.positions[:, :1] >= 0, -1
            )  # places of the new tokens, alike for all heads
            keys = position(keys, place[None, None])
            q = position(q, first[..., None] + index)
        # Entries that are not there have position -1 and are hidden; so are those of later tokens.
        visible = entries.filled[:, :, None] & (
            entries.positions[:, :, None] <= text[:, None, :, None]
        )
        visible = visible & there[:, None, :, None]
        if looking is not None:
            visible = visible & (index >= n - looking)[:, None]
        s = jnp.einsum(
            "bgrqd,bgkd->bgrqk", group(q, kv_heads), keys, preferred_element_type=jnp.float32
        ) * (sizes.dim**-0.5 if scale is None else scale)
        p = select.masses(s, visible[:, :, None])
        values = fields["v"].astype(q.dtype)
        out = jnp.einsum("bgrqk,bgke->bgrqe", p.astype(values.dtype), values)
        out = out.reshape(*q.shape[:3], -1).astype(q.dtype)

        came = (lengths > 0)[:, None, None]  # others stay as they are
        if prompt or policy.evicts == "step":
            back = jnp.where(there, lengths[:, None] - 1 - index, -1)
            after = policy.observe(entries, Seen(p, visible, back))
            entries = entries._replace(
                scores=jnp.where(came, after.scores, entries.scores),
                visits=jnp.where(came, after.visits, entries.visits),
            )
        keep = entries.filled
        if store is not None:
            dropped = (
                jnp.where(store, -2, text)[:, None, None, :] == entries.positions[..., None]
            ).any(-1)
            keep = keep & ~dropped
        if policy.evicts == "step" and not policy.first or policy.evicts == "prefill" and prompt:
            keep = keep & (policy.keep(entries, policy.budget, capacity) | ~came)
        fields |= dict(scores=entries.scores, visits=entries.visits)
        return out, self._store(fields, keep, self.lengths + lengths, self.overflow)

    def _make_room(self, coming: Array) -> Cache:
        """Entries beside which the coming tokens fit the budget; attention does not see the others."""
        entries = self._entries
        number = self.policy.budget - coming[:, None, None]
        keep = self.policy.keep(entries, number, self.capacity)
        full = self.counts[..., None] > number
        kept = keep | (entries.filled & ~full)
        return self._store(self._fields, kept, self.lengths, self.overflow)

    def _insert(self, k: Array, v: Array, positions: Array, n: int) -> dict[str, Array]:
        """All fields with n more places, the new tokens right behind the filled entries."""
        batch, kv_heads, _ = self.positions.shape
        at = self.counts[..., None] + jnp.arange(n)
        b, g = np.arange(batch)[:, None, None], np.arange(kv_heads)[:, None]

        def put(old: Array, new: Array, fill: float = 0) -> Array:
            wide = jnp.pad(
                old, [(0, 0), (0, 0), (0, n), *[(0, 0)] * (old.ndim - 3)], constant_values=fill
            )
            return wide.at[b, g, at].set(new.astype(old.dtype))

        zeros = jnp.zeros(at.shape, jnp.float32)
        return dict(
            k=put(self.k, k),
            v=put(self.v, v),
            positions=put(self.positions, jnp.broadcast_to(positions[:, None], at.shape), -1),
            scores=put(self.scores, zeros),
            visits=put(self.visits, zeros),
        )

    def _store(
        self, fields: dict[str, Array], keep: Array, lengths: Array, overflow: Array
    ) -> Cache:
        """The kept entries in their order, as many as there is room for."""
        batch, kv_heads, capacity = self.positions.shape
        m = keep.shape[-1]
        more = jnp.maximum(keep.sum(-1, dtype=jnp.int32) - capacity, 0)
        if is_concrete(more) and (worst := int(more.max())):
            raise ValueError(
                f"the cache is full: {worst} entries of a head do not fit capacity={capacity}; give more, or a policy that "
                "evicts"
            )
        target = jnp.where(keep, jnp.cumsum(keep, -1) - 1, m).reshape(-1, m)
        place = jax.vmap(lambda t: jnp.full(capacity, m, jnp.int32).at[t].set(jnp.arange(m, dtype=jnp.int32), mode="drop"))  # fmt: skip
        source = place(target).reshape(batch, kv_heads, capacity)
        empty = source == m

        def take(x: Array, fill: float) -> Array:
            wide = (..., None) if x.ndim == 4 else ...
            got = jnp.take_along_axis(x, jnp.where(empty, 0, source)[wide], axis=2)
            return jnp.where(empty[wide], jnp.asarray(fill, x.dtype), got)

        new = {name: take(x, -1 if name == "positions" else 0) for name, x in fields.items()}
        return Cache(**new, lengths=lengths, overflow=overflow + more, policy=self.policy)


def rebalance(caches: Sequence[Cache]) -> list[Cache]:
    """DynamicKV's second part: after a prompt went through all layers, each keeps what the ranking over all says.

    Args:
      caches: one per layer, with a policy of `dynamickv`, after `prefill` or `fill`.

    Returns:
      The caches, with `budget` entries per head in the mean over layers, the window included. `Cache.trim` gives the rest of
      the memory back.

    Raises:
      ValueError: another policy, or caches that differ.
    """
    policy = caches[0].policy if caches else None
    if not isinstance(policy, DynamicKV) or any(c.policy != policy for c in caches):
        raise ValueError(f"caches must share one policy of attention.dynamickv, not {policy}")
    entries = [c._entries for c in caches]
    before = [e.filled & ~e.last(policy.window) for e in entries]
    scores = [jnp.where(b, policy.pooled(e), -jnp.inf) for b, e in zip(before, entries)]
    stacked = jnp.stack(scores, 1)  # [batch, layers, heads, capacity]
    most = policy.budget - policy.window
    count = lambda s: budgets.by_counts(s, policy.base - policy.window, most)
    lengths = jax.vmap(count)(stacked)
    result = []
    for i, cache in enumerate(caches):
        kept = topk_mask(scores[i], lengths[:, i, None], axis=-1, where=before[i])
        keep = kept | entries[i].last(policy.window)
        result.append(cache._store(cache._fields, keep, cache.lengths, cache.overflow))
    return result
