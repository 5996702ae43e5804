"""MaskSparsity: choose first which channels will go, then penalise these alone."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax

from jaxsparse import schedules
from jaxsparse.engines import Step, Units, all_kept, group_setup, hold_masks
from jaxsparse.engines.penalties import check_strength, penalized
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing(begin=25)


@register(
    "mask_sparsity",
    reference="Jiang et al., Pruning-aware sparse regularization for network pruning, 2022",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def mask_sparsity(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    strength: Scalar = 5e-4,
    penalty: Literal["l1", "l2", "smooth_l1"] = "smooth_l1",
    band: Scalar = 5e-5,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""At `begin_step` the channels of smallest $|\gamma|$ are marked; from then on $s\,sign(\gamma)$ is added to
    the gradients of their scales only, until `end_step` removes them. All others train as without a penalty.

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of channels that go, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel. Of a group with scales of norms $\gamma$ these alone count; without any
        (and without `groups`) all that makes a channel does, with its norm in the place of $|\gamma|$.
      strength: s; the authors take 5e-4.
      penalty: "l1"; "l2", $s\,\gamma$; or "smooth_l1", which is l2 where $|\gamma|$ is below `band`, so that a scale
        stays near 0 in place of jumping over it.
      band: the learning rate times s, of "smooth_l1".
      begin_step: when channels are marked; a quarter of the run.
      end_step: when they go; 75 % of the run.
      allocation: "global", "uniform", or a mapping by path.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.mask_sparsity(optax.sgd(0.1), 0.5, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, another `penalty`, a negative `strength` or `band`.
    """
    if penalty not in ("l1", "l2", "smooth_l1"):
        raise ValueError(f"penalty={penalty!r}: use 'l1', 'l2' or 'smooth_l1'")
    check_strength("strength", strength)
    check_strength("band", band)
    updates = _TIMING.updates(total_steps, begin_step, end_step)
    sparse = group_setup(sparsity, groups, allocation, targets, seed, pack_masks)

    def rule(step: Step):
        """Marks at the first update; cuts what is marked at the second."""
        units, last = Units(step.leaves), step.count >= updates.end
        stay = units.best(units.scale_norms([v.w for v in step.views]), sparse)
        first = step.count <= updates.begin
        marked = [jnp.where(first, ~s, old) for s, old in zip(stay, step.aux)]
        left = units.at_weights([~m for m in marked])
        return [m & (x | ~last) for m, x in zip(step.masks, left)], marked

    def gradient(step: Step):
        units, ws = Units(step.leaves), [v.w for v in step.views]
        slopes = []
        for n, marked in zip(units.scale_norms(ws), step.aux):
            quadratic = penalty == "l2" or (jnp.bool_(penalty == "smooth_l1") & (n < band))
            slopes.append(jnp.where(marked, strength * jnp.where(quadratic, n, 1.0), 0.0))
        return penalized(step.views, units.pulled(ws, slopes), step.count < updates.end)

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=rule,
        at=schedules.At((updates.begin, updates.end)),
        gradient=gradient,
        aux=lambda step: [jnp.zeros(u.shape, bool) for u in Units(step.leaves).leaves],
    )
