"""The rule of dynamic sparse training at a constant budget: drop the least, grow the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxsparse import scores, selection
from jaxsparse._counts import scale_count
from jaxsparse.engines.hold_masks import Rule
from jaxsparse.engines.step import Step
from jaxsparse.leaves import Leaf, coupling
from jaxsparse.schedules import Schedule


def drop_and_grow(
    drop: str | scores.ScoreLike,
    grow: str | scores.ScoreLike,
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

    worth, promise = scores.resolve(drop), scores.resolve(grow)

    def rule(step: Step):
        return swap(
            step.leaves,
            step.masks,
            [worth(v) for v in step.views],
            [promise(v) for v in step.views],
            fraction(step.count),
            drop_ties=scores.ties(worth),
            salts=step.salts(seed),
            inside=step.inside,
        )

    return rule


def swap(
    leaves: Sequence[Leaf],
    masks: Sequence[Array],
    drop_scores: Sequence[Array],
    grow_scores: Sequence[Array],
    fraction,
    *,
    drop_ties: str = "position",
    salts: Sequence[Any],
    inside: Sequence[Array] | None = None,
) -> list[Array]:
    """The new masks of all leaves, see `drop_and_grow`; all of them `inside`, where that is given."""
    if (together := coupling(leaves)) is not None:
        units = swap(
            together.leaves,
            together.units(masks),
            together.pool(drop_scores),
            together.pool(grow_scores),
            fraction,
            drop_ties=drop_ties,
            salts=together.salts(salts),
            inside=None if inside is None else together.units(inside),
        )
        return together.expand(units)
    units = [leaf.units(m) for leaf, m in zip(leaves, masks)]
    ones = [selection.count(u, axis=leaf.axes) for leaf, u in zip(leaves, units)]
    swapped = [scale_count(n, fraction) for n in ones]
    held = units
    if inside is not None:
        held = [u & leaf.units(m) for u, leaf, m in zip(units, leaves, inside)]
    keep = selection.topk_masks(
        [leaf.pool(x) for leaf, x in zip(leaves, drop_scores)],
        [n - s for n, s in zip(ones, swapped)],
        where=held,
        ties=drop_ties,
        seed=salts,
        axis=[leaf.axes for leaf in leaves],
    )
    if inside is not None:  # what a method inside has dropped meanwhile is made up for
        rows = zip(ones, keep, leaves)
        swapped = [n - selection.count(k, axis=leaf.axes) for n, k, leaf in rows]
    return refill(leaves, keep, swapped, grow_scores, salts=salts, inside=inside)


def refill(
    leaves: Sequence[Leaf],
    keep: Sequence[Array],
    numbers: Sequence,
    grow_scores: Sequence[Array],
    *,
    salts: Sequence[Any],
    inside: Sequence[Array] | None = None,
) -> list[Array]:
    """The masks of all leaves with the units `keep` and, in each slice, the `number` (int32, one per
    slice or for all) units of highest score among the others (and `inside`, where that is given);
    equal scores by a seeded hash."""
    free = [~k for k in keep]
    if inside is not None:
        free = [f & leaf.units(m) for f, leaf, m in zip(free, leaves, inside)]
    grown = selection.topk_masks(
        [leaf.pool(x) for leaf, x in zip(leaves, grow_scores)],
        numbers,
        where=free,
        ties="hash",
        seed=[salt ^ jnp.uint32(0x9E3779B9) for salt in salts],
        axis=[leaf.axes for leaf in leaves],
    )
    return [leaf.expand(k | g) for leaf, k, g in zip(leaves, keep, grown)]
