"""SSL: group lasso over filters, channels, filter shapes or whole layers, then a cut and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping

import optax

from jaxsparse import schedules
from jaxsparse.engines import (
    GroupLasso,
    Step,
    Sum,
    Units,
    all_kept,
    group_setup,
    hold_masks,
    keep_best_units,
)
from jaxsparse.engines.penalties import Family, penalized
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing()


@register(
    "ssl",
    reference="Wen et al., Learning structured sparsity in deep neural networks, 2016",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def ssl(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    families: Mapping[Family, Scalar] | None = None,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds $\sum_f \lambda_f \sum_{g \in f} \|w_g\|_2$ to the loss; at `end_step` the units of smallest norm
    are cut and the rest trains on without the penalty.

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of units that are cut, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel.
      families: the strength of each: "units" (the groups), "filters", "channels", "shapes", "layers", see
        `engines.GroupLasso`; None: 1e-3 on the units.
      end_step: when the cut is made; 75 % of the run.
      allocation: the budgets of groups: "uniform", "global", a mapping by path.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    The subgradient never gives exact zeros, the cut does; `engines.proximal(GroupLasso(...), step)` after
    an optimizer gives them in training. The authors cut by a small threshold.

    >>> import jaxsparse
    >>> tx = jaxsparse.ssl(optax.sgd(0.1), 0.5, total_steps=1000, families={"filters": 1e-3, "shapes": 1e-4})

    Raises:
      ValueError: a sparsity or a step out of range, an unknown family, a negative strength.
    """
    updates = _TIMING.updates(total_steps, None, end_step)
    sparse = group_setup(sparsity, groups, allocation, targets, seed, pack_masks)
    terms: Mapping[Family, Scalar] = {"units": 1e-3} if families is None else families
    penalty = Sum(tuple(GroupLasso(strength, family) for family, strength in terms.items()))

    def gradient(step: Step):
        found = penalty.gradient(Units(step.leaves), [v.w for v in step.views])
        return penalized(step.views, found, step.count < updates.end)

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=keep_best_units(Units.norms, sparse),
        at=schedules.At((updates.end,)),
        gradient=gradient,
    )
