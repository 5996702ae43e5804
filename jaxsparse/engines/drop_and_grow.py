"""The rule of dynamic sparse training at a constant budget: drop the least, grow the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxsparse import scores, selection, structures
from jaxsparse._counts import scale_count
from jaxsparse.engines._common import Step
from jaxsparse.engines.hold_masks import Rule
from jaxsparse.plan import Leaf
from jaxsparse.schedules import Schedule


def drop_and_grow(
    drop: scores.Score,
    grow: scores.Score,
    fraction: Schedule,
    *,
    seed: Any = 0,
) -> Rule:
    """In each slice of each layer: of n kept units drop the `int(n * fraction(step))` of lowest
    `drop` score, then grow as many of the highest `grow` score among all units that are not kept,
    those just dropped included.

    The number of kept units never changes. Equal growth scores are ranked by a seeded hash, so that
    a gradient of zeros grows at random, not in the first rows.
    """

    def rule(step: Step):
        return swap(
            step.leaves,
            step.masks,
            [drop(v.w, v.g) for v in step.views],
            [grow(v.w, v.g) for v in step.views],
            fraction(step.count),
            drop_ties=scores.ties(drop),
            salts=step.salts(seed),
        )

    return rule


def swap(
    leaves: Sequence[Leaf], masks: Sequence[Array], drop_scores: Sequence[Array],
    grow_scores: Sequence[Array], fraction, *, drop_ties: str = "position", salts: Sequence[Any],
) -> list[Array]:  # fmt: skip
    """The new masks of all leaves, see `drop_and_grow`."""
    axes = [leaf.structure.axes(leaf.shape, leaf.lead) for leaf in leaves]
    units = [structures.unit_mask(x.structure, m, x.lead) for x, m in zip(leaves, masks)]
    ones = [selection.count(u, axis=a) for u, a in zip(units, axes)]
    swapped = [scale_count(n, fraction) for n in ones]
    keep = selection.topk_masks(
        [leaf.structure.pool(x, leaf.lead) for leaf, x in zip(leaves, drop_scores)],
        [n - s for n, s in zip(ones, swapped)],
        where=units,
        ties=drop_ties,
        seeds=salts,
        axes=axes,
    )
    return refill(leaves, keep, swapped, grow_scores, salts=salts)


def refill(
    leaves: Sequence[Leaf], keep: Sequence[Array], numbers: Sequence, grow_scores: Sequence[Array],
    *, salts: Sequence[Any],
) -> list[Array]:  # fmt: skip
    """The masks of all leaves with the units `keep` and, in each slice, the `number` (int32, one per
    slice or for all) units of highest score among the others; equal scores by a seeded hash."""
    grown = selection.topk_masks(
        [leaf.structure.pool(x, leaf.lead) for leaf, x in zip(leaves, grow_scores)],
        numbers,
        where=[~k for k in keep],
        ties="hash",
        seeds=[salt ^ jnp.uint32(0x9E3779B9) for salt in salts],
        axes=[leaf.structure.axes(leaf.shape, leaf.lead) for leaf in leaves],
    )
    rows = zip(leaves, keep, grown)
    return [leaf.structure.expand(k | g, leaf.shape, leaf.lead) for leaf, k, g in rows]
