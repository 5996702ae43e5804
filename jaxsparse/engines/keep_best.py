"""Rules that make masks: at init, once, or along a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from jaxsparse import scores
from jaxsparse.choose import choose
from jaxsparse.engines.hold_masks import Rule
from jaxsparse.engines.setup import Setup
from jaxsparse.engines.step import Step
from jaxsparse.engines.units import Units
from jaxsparse.schedules import Schedule


def keep_best(
    score: str | scores.ScoreLike,
    setup: Setup,
    *,
    ramp: Schedule | None = None,
    nested: bool = False,
) -> Rule:
    """The rule that keeps the highest scores at the sparsity `ramp(step) * setup.sparsity`.

    Args:
      score: the score of a weight: a name, a function of a `View`, or of `(w, g)`.
      setup: structure, allocation, final sparsity, and the seed of ties that are ranked by a hash.
      ramp: the part of the way that is gone, 0 to 1; None: all of it.
      nested: choose among the weights that are still kept only, so that a pruned weight never
        returns.
    """
    worth = scores.resolve(score)

    def rule(step: Step) -> list[Array]:
        return choose(
            step.leaves,
            [worth(v) for v in step.views],
            setup.allocation,
            setup.sparsity,
            fraction=1.0 if ramp is None else ramp(step.count),
            where=step.masks if nested else step.inside,
            ties=scores.ties(worth),
            seed=setup.seed,
            stream=step.count,
        )

    return rule


def keep_best_units(
    worth: Callable[[Units, Sequence[Array]], Sequence[Array]], setup: Setup
) -> Rule:
    """The rule that keeps whole units at the sparsity of the setup, of those that are still held.

    Args:
      worth: what the units are ranked by, from the `Units` and the weights: `Units.norms`,
        `Units.scale_norms`, or another.
      setup: structure, allocation, sparsity, and the seed of ties.
    """

    def rule(step: Step) -> list[Array]:
        units = Units(step.leaves)
        return units.cut(step.masks, worth(units, [v.w for v in step.views]), setup)

    return rule


def random_masks(setup: Setup) -> Rule:
    """The rule that draws masks uniformly at random, with exact counts."""
    return keep_best(scores.random, setup)


def all_kept(step: Step) -> list[Array]:
    """The rule that keeps everything."""
    return [jnp.ones(v.w.shape, bool) for v in step.views]
