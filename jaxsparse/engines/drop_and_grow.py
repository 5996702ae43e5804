"""The rule of dynamic sparse training at a constant budget: drop the least, grow the best."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import scores, selection
from jaxsparse._control import is_concrete
from jaxsparse._counts import scale_count
from jaxsparse.allocations import ByShape
from jaxsparse.choose import unit_budgets
from jaxsparse.engines.hold_masks import Rule
from jaxsparse.engines.keep_best import random_masks
from jaxsparse.engines.setup import Setup
from jaxsparse.engines.step import Step
from jaxsparse.leaves import Leaf, coupling
from jaxsparse.schedules import Schedule

GROWTH = 0x9E3779B9
"""What the seed of a leaf is mixed with, where equal scores of growth are ranked."""


def random_start(setup: Setup, fraction: Schedule, first) -> Rule:
    """`random_masks`, for a method that replaces `fraction(step)` of them from step `first` on: warns of
    leaves of which that is less than one unit in every slice, so that they would never change."""
    draw = random_masks(setup)

    def rule(step: Step):
        with jax.ensure_compile_time_eval():  # known while `init` is traced, too
            f = fraction(first)
        apart = coupling(step.leaves) is None  # units of several leaves are counted together
        if apart and isinstance(setup.allocation, ByShape):
            budgets = unit_budgets(step.leaves, setup.allocation, setup.sparsity)
            warn_of_idle([(x.path, n) for x, n in zip(step.leaves, budgets)], f, stacklevel=5)
        return draw(step)

    return rule


def warn_of_idle(rows: Sequence[tuple[str, Any]], fraction: Any, *, stacklevel: int) -> None:
    """Warns of leaves, given as (path, units kept in a slice), of which `fraction` is less than one unit."""
    if not is_concrete(fraction):
        return
    f = float(fraction)
    idle = [(path, n) for path, n in rows if isinstance(n, int) and scale_count(n, f) < 1]
    if idle:
        path, n = idle[0]
        warnings.warn(
            f"drop_fraction: {f:.3g} of the {n} units kept in a slice of {path!r} is less than one at the "
            f"first update, so that its mask never changes ({len(idle)} such leaves); give {1 / n:.3g} or "
            "more, or larger slices",
            stacklevel=stacklevel,
        )


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
            None if promise is scores.random else [promise(v) for v in step.views],
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
    grow_scores: Sequence[Array] | None,
    fraction,
    *,
    drop_ties: str = "position",
    salts: Sequence[Any],
    inside: Sequence[Array] | None = None,
) -> list[Array]:
    """The new masks of all leaves, see `drop_and_grow`; all of them `inside`, where that is given.
    Without `grow_scores` what grows is drawn at random."""
    if (together := coupling(leaves)) is not None:
        units = swap(
            together.leaves,
            together.units(masks),
            together.pool(drop_scores),
            None if grow_scores is None else together.pool(grow_scores),
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
    grow_scores: Sequence[Array] | None,
    *,
    salts: Sequence[Any],
    inside: Sequence[Array] | None = None,
) -> list[Array]:
    """The masks of all leaves with the units `keep` and, in each slice, the `number` (int32, one per
    slice or for all) units of highest score among the others (and `inside`, where that is given);
    equal scores, or all units without `grow_scores`, by a seeded hash."""
    free = [~k for k in keep]
    if inside is not None:
        free = [f & leaf.units(m) for f, leaf, m in zip(free, leaves, inside)]
    ranked, score = free, selection.equal_scores
    if grow_scores is not None:
        ranked, score = [leaf.pool(x) for leaf, x in zip(leaves, grow_scores)], None
    grown = selection.topk_masks(
        ranked,
        numbers,
        where=free,
        ties="hash",
        seed=[salt ^ jnp.uint32(GROWTH) for salt in salts],
        axis=[leaf.axes for leaf in leaves],
        score=score,
    )
    return [leaf.expand(k | g) for leaf, k, g in zip(leaves, keep, grown)]
