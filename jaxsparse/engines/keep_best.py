"""Rules that make masks from scores: at init, once, or along a schedule."""

from __future__ import annotations

from typing import Any

from jaxsparse import scores
from jaxsparse.allocations import Allocation
from jaxsparse.choose import choose
from jaxsparse.engines.hold_masks import Rule
from jaxsparse.engines.step import Step
from jaxsparse.schedules import Schedule


def keep_best(
    score: str | scores.ScoreLike,
    allocation: Allocation,
    sparsity,
    *,
    ramp: Schedule | None = None,
    nested: bool = False,
    seed: Any = 0,
) -> Rule:
    """The rule that keeps the highest scores at the sparsity `ramp(step) * sparsity`.

    Args:
      score: the score of a weight: a name, a function of a `View`, or of `(w, g)`.
      allocation: how the budget is split over the layers.
      sparsity: the final sparsity.
      ramp: the part of the way that is gone, 0 to 1; None: all of it.
      nested: choose among the weights that are still kept only, so that a pruned weight never
        returns.
      seed: for ties that are ranked by a hash.
    """

    worth = scores.resolve(score)

    def rule(step: Step):
        return choose(
            step.leaves,
            [worth(v) for v in step.views],
            allocation,
            sparsity,
            fraction=1.0 if ramp is None else ramp(step.count),
            where=step.masks if nested else None,
            ties=scores.ties(worth),
            seed=seed,
            stream=step.count,
        )

    return rule
