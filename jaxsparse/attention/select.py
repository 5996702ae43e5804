r"""Which blocks of a row are kept: the rules that predictors share.

A rule sees logits `[..., q_blocks, kv_blocks]`, larger for what matters more, and says *how many* blocks each row
keeps; `keep` then takes the forced blocks first, and the best others, ties at the lower index. Forced blocks are
always inside the budget. Rules of mass look at $p = \mathrm{softmax}(\text{logits})$ over the visible blocks of a row.

The two published rules of mass differ by one block, and are different names here. With p in descending order and
$c_m = p_1 + \dots + p_m$:

- `top_p(p, rule="reach")`: the smallest set whose mass reaches p, $\#\{c_m < p\} + 1$ (FlexPrefill, ZipVL, D2DMoE);
- `top_p(p, rule="stop_before")`: the largest set whose mass does not exceed p, $\#\{c_m \le p\}$, at least 1
  (SpargeAttn).

Nothing is sorted: the place where the mass is reached is found by bisection over the bits of p.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.block_sparse_attention.lists import best


class Rule(Protocol):
    """How many blocks each row keeps."""

    def counts(
        self, logits: Array | None, visible: np.ndarray, forced: np.ndarray
    ) -> Array | np.ndarray:
        """Integers that broadcast to `[..., q_blocks]`; forced blocks are counted.

        Args:
          logits: float32 `[..., q_blocks, kv_blocks]`, $-\\infty$ for what cannot be chosen.
          visible, forced: bool `[q_blocks, kv_blocks]`; forced blocks are visible.
        """
        ...

    def capacity(self, visible: np.ndarray, forced: np.ndarray) -> int:
        """The most blocks that a head can keep."""
        ...


@dataclasses.dataclass(frozen=True)
class TopK:
    """See `top_k`."""

    num_blocks: int

    def counts(self, logits, visible, forced):
        need, number = forced.sum(-1), visible.sum(-1)
        most = int(need[need < number].max(initial=0))
        if most > self.num_blocks:
            raise ValueError(
                f"num_blocks={self.num_blocks} is below the {most} forced blocks of a row (sinks, "
                f"local); give at least {most}, or force fewer"
            )
        return np.maximum(np.minimum(self.num_blocks, number), need)

    def capacity(self, visible, forced):
        return int(self.counts(None, visible, forced).sum())


@dataclasses.dataclass(frozen=True)
class Density:
    """See `density`."""

    value: float

    def counts(self, logits, visible, forced):
        rows = per_row(self.value, visible, forced)
        if rows is None:
            least, most = int(forced.sum()), int(visible.sum())
            raise ValueError(
                f"density={self.value} has no room for the forced blocks (sinks, local, last): they are "
                f"{least} of {most}; give at least {math.ceil(least / most * 1000) / 1000}, smaller "
                "blocks, or force fewer"
            )
        return rows

    def capacity(self, visible, forced):
        return int(self.counts(None, visible, forced).sum())


@dataclasses.dataclass(frozen=True)
class TopP:
    """See `top_p`."""

    p: float
    rule: Literal["reach", "stop_before"]
    minimum: int = 1

    def counts(self, logits, visible, forced):
        mass = masses(logits, visible)
        first = jnp.sum(jnp.where(forced, mass, 0.0), -1)
        rest = jnp.where(visible & ~forced, mass, 0.0)
        number = mass_count(rest, self.p - first, self.rule, visible & ~forced) + forced.sum(-1)
        return jnp.minimum(jnp.maximum(number, self.minimum), visible.sum(-1))

    def capacity(self, visible, forced):
        return int(visible.sum())


@dataclasses.dataclass(frozen=True)
class Threshold:
    """See `threshold`."""

    value: float

    def counts(self, logits, visible, forced):
        more = (masses(logits, visible) > self.value) & visible & ~forced
        return jnp.sum(more, -1, dtype=jnp.int32) + forced.sum(-1)

    def capacity(self, visible, forced):
        return int(visible.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """As many blocks as an array says, int `[..., q_blocks]` or what broadcasts to it; traced or not. At least the
    forced ones, at most the visible ones."""

    number: Array

    def counts(self, logits, visible, forced):
        return jnp.clip(self.number, forced.sum(-1), visible.sum(-1))

    def capacity(self, visible, forced):
        return int(visible.sum())


def top_k(num_blocks: int) -> TopK:
    """So many blocks in each row, or all visible ones where there are fewer.

    Raises:
      ValueError: a number below 1; when used, one below the forced blocks of a row.
    """
    if not isinstance(num_blocks, (int, np.integer)) or num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks!r} must be an integer, at least 1")
    return TopK(int(num_blocks))


def density(value: float) -> Density:
    r"""As many blocks in each row as make a share of the visible blocks, over all rows.

    Rows keep $\min(k, \text{visible})$ blocks with one k for all rows, the last rows one more, and forced blocks in any
    case: the largest numbers whose sum is at most the share. Under a causal mask $k \approx (1 - \sqrt{1 - d})\, n$ of n blocks.

    Raises:
      ValueError: a share outside (0, 1]; when used, one that has no room for the forced blocks.
    """
    if not 0 < value <= 1:
        raise ValueError(f"density={value} must lie in (0, 1]")
    return Density(float(value))


def top_p(p: float, *, rule: Literal["reach", "stop_before"] = "reach", minimum: int = 1) -> TopP:
    """The best blocks up to a mass p of the predicted probability; see the module for the two rules.

    Args:
      p: the mass. Cumulative sums round, so that 1 may drop the last block: above 1 keeps all.
      rule: "reach" or "stop_before".
      minimum: blocks that each row keeps at least.

    Raises:
      ValueError: a mass that is not positive, an unknown rule, a minimum below 1.
    """
    if not (p > 0 and math.isfinite(p)):
        raise ValueError(f"p={p} must be positive and finite")
    if rule not in ("reach", "stop_before"):
        raise ValueError(f"rule={rule!r} must be 'reach' or 'stop_before'")
    if minimum < 1:
        raise ValueError(f"minimum={minimum} must be at least 1")
    return TopP(float(p), rule, minimum)


def threshold(value: float) -> Threshold:
    """Blocks whose predicted probability is above a value, and the forced ones.

    Probabilities of a row are about 1 over its number of blocks, so a threshold must shrink with the length.

    Raises:
      ValueError: a negative value.
    """
    if not value >= 0:
        raise ValueError(f"threshold={value} must not be negative")
    return Threshold(float(value))


def keep(logits: Array, rule: Rule, visible: np.ndarray, forced: np.ndarray) -> Array:
    """The blocks that a rule keeps, bool of the shape of the logits; no gradient (a choice).

    Args:
      logits: float `[..., q_blocks, kv_blocks]`. NaN and -inf are never chosen, unless forced.
      rule: of this module.
      visible, forced: bool `[q_blocks, kv_blocks]`.

    Raises:
      ValueError: the budget is below the forced blocks.

    >>> visible, forced = np.tri(3, dtype=bool), np.eye(3, dtype=bool)
    >>> keep(jnp.zeros((3, 3)), top_k(2), visible, forced).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    forced = forced & visible
    logits = lax.stop_gradient(logits).astype(jnp.float32)
    logits = jnp.where(visible & ~jnp.isnan(logits), logits, -jnp.inf)
    counts = jnp.broadcast_to(rule.counts(logits, visible, forced), logits.shape[:-1])
    ranked = jnp.where(forced, jnp.inf, logits)
    return best(ranked, counts)


def masses(logits: Array, visible: Array | np.ndarray) -> Array:
    """The softmax over what each row sees (bool that broadcasts to the logits); rows that see nothing are 0."""
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.max(logits, -1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
    weights = jnp.where(visible, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def mass_count(
    mass: Array,
    p: Array | float,
    rule: Literal["reach", "stop_before"],
    eligible: Array | np.ndarray | bool = True,
) -> Array:
    r"""How many of the largest entries of each row make the mass p, int32 of the leading axes.

    Args:
      mass: float32 `[..., n]`, not negative; need not sum to 1.
      p: broadcasts to the leading axes.
      rule: "reach": the smallest number of entries with a sum of at least p (0 if p is not positive);
        "stop_before": the largest number with a sum of at most p. All eligible ones if there is no more.
      eligible: bool that broadcasts to mass: the others count as none.

    >>> row = jnp.array([0.125, 0.5, 0.25, 0.125])
    >>> [int(mass_count(row, 0.75, rule)) for rule in ("reach", "stop_before")]
    [2, 2]
    >>> [int(mass_count(row, 0.7, rule)) for rule in ("reach", "stop_before")]
    [2, 1]
    """
    eligible = jnp.broadcast_to(eligible, mass.shape)
    mass = jnp.where(eligible, mass, 0.0).astype(jnp.float32)
    p = jnp.broadcast_to(p, mass.shape[:-1]).astype(jnp.float32)[..., None]
    bits = lax.bitcast_convert_type(
        mass, jnp.int32
    )  # floats that are not negative order like integers
    enough = (lambda m: m >= p) if rule == "reach" else (lambda m: m > p)

    def refine(i: Array, found: Array) -> Array:
        candidate = found | (jnp.int32(1 << 30) >> i.astype(jnp.int32))
        total = jnp.sum(jnp.where(bits >= candidate, mass, 0.0), -1, keepdims=True)
        return jnp.where(enough(total), candidate, found)

    # The largest value such that all entries from it on are enough: what is above it is not.
    found = lax.fori_loop(0, 31, refine, jnp.zeros_like(bits[..., :1]))
    above = eligible & (bits > found)
    equal = eligible & (bits == found)
    value = lax.bitcast_convert_type(found, jnp.float32)
    short = (p - jnp.sum(jnp.where(above, mass, 0.0), -1, keepdims=True)) / value
    room = jnp.ceil(short) if rule == "reach" else jnp.floor(short)
    ties = jnp.sum(equal, -1, keepdims=True, dtype=jnp.int32)
    room = jnp.clip(room, 0, ties.astype(jnp.float32)).astype(jnp.int32)
    room = jnp.where(found == 0, ties, room)
    number = (jnp.sum(above, -1, keepdims=True, dtype=jnp.int32) + room)[..., 0]
    none = p[..., 0] <= 0 if rule == "reach" else p[..., 0] < 0
    return jnp.where(none, 0, number)


def per_row(value: float, visible: np.ndarray, forced: np.ndarray) -> np.ndarray | None:
    """Blocks of each row that make a share of the visible ones, `density`; None if the forced ones are more.

    >>> per_row(0.5, np.tri(4, dtype=bool), np.eye(4, dtype=bool)).tolist()  # 5 of 10
    [1, 1, 1, 2]
    """
    number, least = visible.sum(-1), forced.sum(-1)
    budget = math.floor(value * int(number.sum()) + 1e-9)
    if least.sum() > budget:
        return None
    rows = lambda k: np.maximum(np.minimum(k, number), least)
    k = int(number.max(initial=0))
    while rows(k).sum() > budget:
        k -= 1
    found = rows(k)
    more = np.flatnonzero((number > k) & (least <= k))  # the rows that would take one more
    left = budget - int(found.sum())
    found[more[len(more) - min(left, len(more)) :]] += 1
    return found


def rule_of(density_: float | None, rule: Rule | None) -> Rule:
    """The rule that the two options of every predictor name.

    Raises:
      ValueError: both or neither are given.
    """
    if (density_ is None) == (rule is None):
        raise ValueError(
            f"density={density_}, rule={rule}: give one of them, density=0.1 or rule=attention.top_k(16)"
        )
    if rule is None:
        assert density_ is not None
        return density(density_)
    if not hasattr(rule, "counts"):
        raise ValueError(f"rule={rule!r} must be a rule, as attention.top_k(16)")
    return rule
