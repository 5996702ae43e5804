"""The rule of dynamic sparse training at a constant budget: drop the least, grow the best."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxsparse import scores, selection, structures
from jaxsparse._counts import scale_count
from jaxsparse.plan import Leaf
from jaxsparse.schedules import Schedule
from jaxsparse.transforms._common import Step
from jaxsparse.transforms.masked import Rule


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
        f = fraction(step.count)
        return [
            swap(
                v.leaf,
                v.m,
                drop(v.w, v.g),
                grow(v.w, v.g),
                f,
                drop_ties=scores.ties(drop),
                salt=v.leaf.salt(seed, step.count),
            )
            for v in step.views
        ]

    return rule


def swap(
    leaf: Leaf, mask: Array, drop_score: Array, grow_score: Array, fraction, *,
    drop_ties: str = "position", salt: Any = 0,
) -> Array:  # fmt: skip
    """The new mask of one leaf, see `drop_and_grow`."""
    kind, lead = leaf.structure, leaf.lead
    axes = kind.axes(leaf.shape, lead)
    units = structures.unit_mask(kind, mask, lead)
    ones = selection.count(units, axis=axes)
    swapped = scale_count(ones, fraction)
    keep = selection.topk_mask(
        kind.pool(drop_score, lead),
        ones - swapped,
        where=units,
        ties=drop_ties,
        seed=salt,
        axis=axes,
    )
    return refill(leaf, keep, swapped, grow_score, salt=salt)


def refill(leaf: Leaf, keep: Array, number, score: Array, *, salt: Any = 0) -> Array:
    """The mask of one leaf with the units `keep` and, in each slice, the `number` (int32, one per
    slice or for all) units of highest `score` among the others; equal scores by a seeded hash."""
    kind, lead = leaf.structure, leaf.lead
    grown = selection.topk_mask(
        kind.pool(score, lead), number, where=~keep, ties="hash",
        seed=salt ^ jnp.uint32(0x9E3779B9), axis=kind.axes(leaf.shape, lead),
    )  # fmt: skip
    return kind.expand(keep | grown, leaf.shape, lead)
