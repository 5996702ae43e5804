"""Network slimming: an l1 penalty on the scales of norms, then a threshold on them over all layers."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsparse import schedules
from jaxsparse.engines import (
    Step,
    Units,
    all_kept,
    group_setup,
    hold_masks,
    keep_best_units,
)
from jaxsparse.engines.penalties import check_strength, penalized
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing()


@register(
    "slimming",
    reference="Liu et al., Learning efficient convolutional networks through network slimming, 2017",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def slimming(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    strength: Scalar = 1e-4,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds $s\,sign(\gamma)$ to the gradients of the scales of norms; at `end_step` the channels of smallest
    $|\gamma|$ of the network go, with their shifts and filters, and the rest trains on without the penalty.

    Args:
      inner: the optimizer of the weights; its momentum and decay act on the penalty as well.
      sparsity: the fraction of channels that go, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel. Of a group with scales of norms $\gamma$ these alone count; without any
        (and without `groups`) all that makes a channel does, with its norm in the place of $|\gamma|$.
      strength: s; the authors take 1e-4 (VGG) and 1e-5 (ResNet), with scales that start at 0.5.
      end_step: when the cut is made; 75 % of the run.
      allocation: "global", one threshold for all (every group keeps a channel at least); "uniform"; a
        mapping by path.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.slimming(optax.sgd(0.1, momentum=0.9), 0.5, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, a negative `strength`, `groups` that are none.
    """
    check_strength("strength", strength)
    updates = _TIMING.updates(total_steps, None, end_step)
    sparse = group_setup(sparsity, groups, allocation, targets, seed, pack_masks)

    def gradient(step: Step):
        units, ws = Units(step.leaves), [v.w for v in step.views]
        slopes = [jnp.full(u.shape, strength, jnp.float32) for u in units.leaves]
        return penalized(step.views, units.pulled(ws, slopes), step.count < updates.end)

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=keep_best_units(Units.scale_norms, sparse),
        at=schedules.At((updates.end,)),
        gradient=gradient,
    )
