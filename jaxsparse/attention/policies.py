r"""Which entries of a cache stay: policies as data, for `Cache`.

A policy says what it observes of attention, when it evicts, and which entries it keeps. Entries of a head stand in the
order of their positions. Heads that share keys share a choice, by the mean of their probabilities (the maximum, where a
method says so).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.attention import budgets, select
from jaxsparse.selection import topk_mask


class Entries(NamedTuple):
    """What is known of the entries of a cache, of which some may be evicted.

    Attributes:
      positions: int32 `[batch, kv_heads, m]`, ascending; -1 where nothing is (at the end).
      scores: float32, what the policy has observed.
      visits: float32, how many observed queries could see the entry.
      now: int32 `[batch]`, how many tokens have been seen.
    """

    positions: Array
    scores: Array
    visits: Array
    now: Array

    @property
    def filled(self) -> Array:
        """bool `[batch, kv_heads, m]`."""
        return self.positions >= 0

    def last(self, number: int) -> Array:
        """bool: the entries of the last so many tokens."""
        return self.filled & (self.positions >= self.now[:, None, None] - number)


class Seen(NamedTuple):
    """Attention of one call, for a policy to observe.

    Attributes:
      p: float32 `[batch, kv_heads, heads / kv_heads, queries, m]`.
      visible: bool `[batch, kv_heads, queries, m]`.
      index: int32 `[batch, queries]`, counted from the last query that is there (0); -1 for padding.
    """

    p: Array
    visible: Array
    index: Array


@dataclasses.dataclass(frozen=True)
class Policy:
    """Keeps everything: a cache without eviction, and what other policies change.

    Attributes:
      budget: entries per head (their mean, where heads differ).
      evicts: "step": after every call; "prefill": after calls of `prefill`; "never".
      first: eviction makes room before attention, so that a call never sees more than the budget.
      reassign: positions are places in the cache, not in the text.
    """

    budget: int
    evicts: Literal["step", "prefill", "never"] = "never"
    first: bool = False
    reassign: bool = False

    def observe(self, entries: Entries, seen: Seen) -> Entries:
        """Scores and visits after a call."""
        return entries

    def keep(self, entries: Entries, number: int | Array, capacity: int) -> Array:
        """The entries that stay: `number` per head or in the mean, never more than `capacity`."""
        return entries.filled


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Policy):
    """See `streaming_llm`."""

    sinks: int = 4

    def keep(self, entries, number, capacity):
        recent = jnp.maximum(0, number - self.sinks)
        rank = jnp.cumsum(entries.filled, -1) - 1  # places: the oldest are the first
        size = entries.filled.sum(-1, keepdims=True)
        return entries.filled & ((rank < jnp.minimum(self.sinks, number)) | (rank >= size - recent))


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """See `h2o`."""

    recent: int = 1

    def observe(self, entries, seen):
        there = (seen.index >= 0)[:, None, None, :, None]
        new = jnp.where(there, seen.p, 0).mean(2).sum(2)
        return entries._replace(scores=entries.scores + new)

    def keep(self, entries, number, capacity):
        return _best(entries, entries.scores, entries.last(self.recent), number)


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """See `snapkv`; `floor` is that of `ada_snapkv`."""

    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    sinks: int = 0
    floor: float | None = None

    def observe(self, entries, seen):
        looking = ((seen.index >= 0) & (seen.index < self.window))[:, None, None, :, None]
        p = jnp.where(looking, seen.p, 0)
        scores = p.mean(2).sum(2) if self.floor is None else p.max((2, 3))
        return entries._replace(scores=scores)

    def keep(self, entries, number, capacity):
        forced = entries.last(self.window)
        if self.sinks:
            forced = forced | (entries.filled & (entries.positions < self.sinks))
        scores = self.pooled(entries)
        if self.floor is None:
            return _best(entries, scores, forced, number)
        scores = jnp.where(forced, jnp.inf, scores)
        # No head may have more than there is room for.
        fits = topk_mask(scores, capacity, axis=-1, where=entries.filled)
        heads = entries.positions.shape[1]
        return budgets.with_floor(scores, number * heads, int(self.floor * self.budget), where=fits)

    def pooled(self, entries: Entries) -> Array:
        """Scores of entries before the window, pooled over neighbours that are there."""
        there = entries.filled & ~entries.last(self.window)
        reach = self.kernel // 2
        shift = lambda x, fill: jnp.stack([
            jnp.pad(x, ((0, 0), (0, 0), (reach, reach)), constant_values=fill)[..., i : i + x.shape[-1]]
            for i in range(self.kernel)
        ])  # fmt: skip
        if self.pooling == "max":
            return shift(jnp.where(there, entries.scores, -jnp.inf), -jnp.inf).max(0)
        total = shift(jnp.where(there, entries.scores, 0), 0).sum(0)
        return total / jnp.maximum(shift(there, False).sum(0), 1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class DynamicKV(SnapKV):
    """See `dynamickv`."""

    base: int = 0


@dataclasses.dataclass(frozen=True)
class ZipVL(Policy):
    """See `zipvl`."""

    tau: float = 0.975
    probes: int = 64
    recent: int = 8

    def observe(self, entries, seen):
        """The last half of the probes are the last queries, the others lie evenly before."""
        queries = seen.index.shape[-1]
        size = seen.index.max(-1, keepdims=True) + 1
        late = self.probes - self.probes // 2
        step = jnp.maximum(1, (size - late) // max(1, self.probes // 2))
        early = (seen.index >= late) & ((seen.index - late) % step == 0)
        looking = (seen.index >= 0) & ((seen.index < late) | early)
        if queries <= self.probes:
            looking = seen.index >= 0
        p = jnp.where(looking[:, None, None, :, None], seen.p, 0).mean(2).sum(2)
        visits = jnp.sum(seen.visible & looking[:, None, :, None], 2, dtype=jnp.float32)
        return entries._replace(scores=entries.scores + p, visits=entries.visits + visits)

    def keep(self, entries, number, capacity):
        # One number and one set for the layer: its heads together.
        filled = entries.filled.any(1)
        total = jnp.where(entries.filled, entries.scores, 0).mean(1)
        share = total / jnp.maximum(total.sum(-1, keepdims=True), 1e-30)
        count = select.mass_count(share, self.tau - 1e-6, "reach", filled)
        count = jnp.minimum(count, number)
        normal = total / jnp.maximum(entries.visits.mean(1), 1)
        forced = entries.last(self.recent).any(1)
        ranked = jnp.where(forced, jnp.inf, normal)
        count = jnp.maximum(count, jnp.minimum(forced.sum(-1), number))
        kept = topk_mask(ranked, count, axis=-1, where=filled)
        return kept[:, None] & entries.filled


def _best(entries: Entries, scores: Array, forced: Array, number: int | Array) -> Array:
    return topk_mask(jnp.where(forced, jnp.inf, scores), number, axis=-1, where=entries.filled)


def keep_all(capacity: int) -> Policy:
    """No eviction: the cache of dense attention, for so many tokens."""
    return Policy(_positive("capacity", capacity))


def streaming_llm(budget: int = 516, *, sinks: int = 4, reassign: bool = True) -> StreamingLLM:
    """The first tokens and the last ones: Xiao et al., Efficient streaming language models with attention sinks, 2024.

    Room is made before a token comes, so that attention never sees more than `budget` entries, its own included. Keys
    are stored without positions; each call gives them those of their places in the cache (0, 1, ...), which keeps rotary
    positions within the range of training for any length.

    Args:
      budget: entries, sinks included.
      sinks: tokens at the beginning.
      reassign: positions by place; False: those of the text.

    Raises:
      ValueError: a budget that is not above the sinks.
    """
    if not 0 <= sinks < budget:
        raise ValueError(f"budget={budget} must be above sinks={sinks}, which must not be negative")
    return StreamingLLM(budget, "step", True, reassign, sinks)


def h2o(heavy: int, recent: int) -> H2O:
    """Heavy hitters and a window: Zhang et al., H2O, 2023. After each call, of the tokens before the last `recent` those
    `heavy` stay that have gathered the most probability so far; what is evicted never returns.

    Sums favour old tokens, which more queries have seen; `zipvl` divides by their number. (The authors' quick evaluation
    sums over the whole text, the future included; this does not.)

    Raises:
      ValueError: numbers that are not positive; the newest token must stay.
    """
    _positive("heavy", heavy)
    _positive("recent", recent)
    return H2O(heavy + recent, "step", recent=recent)


def snapkv(
    budget: int = 2048,
    *,
    window: int = 32,
    kernel: int = 5,
    pooling: Literal["mean", "max"] = "mean",
    sinks: int = 0,
) -> SnapKV:
    """At the end of a prompt, the keys that its last queries look at: Li et al., SnapKV, 2024.

    Scores are the probabilities of the last `window` queries, summed over them and pooled over neighbours; the best
    `budget - window` entries of each head stay, and the window. While decoding nothing is evicted: give the cache room for
    what is generated. Of a prompt in chunks, each chunk's last queries decide (a variant; `Cache.fill` takes the
    whole prompt).

    Args:
      budget: entries per head, window included.
      window: queries that look, and entries that stay in any case.
      kernel, pooling: odd number of neighbours and how they are pooled, over those that are there (the authors' code
        counts padding as zeros at the borders).
      sinks: tokens at the beginning that stay in any case, inside the budget.

    Raises:
      ValueError: a budget that is not above window and sinks, an even kernel.
    """
    _check_snapkv(budget, window, kernel, pooling, sinks)
    return SnapKV(budget, "prefill", False, False, window, kernel, pooling, sinks)


def ada_snapkv(
    budget: int = 2048,
    *,
    window: int = 128,
    kernel: int = 5,
    pooling: Literal["mean", "max"] = "mean",
    sinks: int = 4,
    floor: float = 0.2,
) -> SnapKV:
    """SnapKV with one ranking over all heads: Feng et al., Ada-KV, 2024; settings as in Nawrot et al., The Sparse
    Frontier, 2025.

    Scores are the largest probability over window and heads of a group; `budget * kv_heads` entries stay in all, of which
    each head has a share of `floor` at least. Heads have different numbers, at most the cache's capacity, and one may
    fill it to the brim: give it `budget * (1 + (1 - floor) * (kv_heads - 1))`, which no head exceeds, and room for what is
    generated.

    Args:
      budget: mean entries per head.
      window, kernel, pooling, sinks: as of `snapkv`.
      floor: share of the budget that each head keeps in any case.

    Raises:
      ValueError: as `snapkv`; a floor outside [0, 1].
    """
    _check_snapkv(budget, window, kernel, pooling, sinks)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} must lie in [0, 1]")
    return SnapKV(budget, "prefill", False, False, window, kernel, pooling, sinks, floor)


def dynamickv(
    budget: int = 512,
    *,
    window: int = 8,
    kernel: int = 7,
    pooling: Literal["mean", "max"] = "mean",
    r_max: float = 10.0,
) -> DynamicKV:
    """SnapKV in which layers share a budget: Zhou et al., DynamicKV, 2024.

    Each layer at first keeps up to `r_max * (budget - window)` entries and the window; `rebalance` then gives layers what
    a ranking over all of them says, `budget` in the mean. (The authors go over the layers so far every four
    layers, to bound memory during prefill; this does it once, after the last.)

    Raises:
      ValueError: as `snapkv`; r_max below 1.
    """
    _check_snapkv(budget, window, kernel, pooling, 0)
    if not r_max >= 1:
        raise ValueError(f"r_max={r_max} must be at least 1")
    most = int(r_max * (budget - window)) + window
    return DynamicKV(most, "prefill", False, False, window, kernel, pooling, 0, None, budget)


def zipvl(budget: int, *, tau: float = 0.975, probes: int = 64, recent: int = 8) -> ZipVL:
    """As many tokens as hold a mass of the attention, by layer: He et al., ZipVL, 2024 (formulas recalled, not verified).

    Probe queries (the last ones and evenly spaced ones before; the authors draw these) give each key the sum of its
    probabilities; p is the smallest number of keys that reaches the mass tau. The p keys with the largest sum
    *divided by the number of probes that could see them* stay, for all heads of the layer; the last ones rest on few
    queries, so `recent` stay in any case. What the authors store in fewer bits is evicted here, as in their later version.

    Args:
      budget: entries at most.
      tau: the mass, in (0, 1].
      probes: queries that are looked at.
      recent: entries that stay in any case.

    Raises:
      ValueError: a number out of range.
    """
    _positive("probes", probes)
    if not 0 < tau <= 1 or not 0 <= recent < budget:
        raise ValueError(
            f"tau={tau}, recent={recent}: tau must lie in (0, 1], recent in [0, budget={budget})"
        )
    return ZipVL(budget, "prefill", tau=tau, probes=probes, recent=recent)


def _check_snapkv(budget: int, window: int, kernel: int, pooling: str, sinks: int) -> None:
    _positive("window", window)
    if sinks < 0 or budget <= window + sinks:
        raise ValueError(
            f"budget={budget} must be above the forced entries, window={window} and sinks={sinks}"
        )
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be odd and positive")
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling={pooling!r} must be 'mean' or 'max'")


def _positive(name: str, value: int) -> int:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value} must be at least 1, an integer")
    return value
