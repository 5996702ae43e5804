"""Polarization: a regulariser on the scales of norms that leaves some large and drives the others to 0."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules
from jaxsparse.engines import (
    Step,
    Units,
    all_kept,
    followed_by,
    group_setup,
    hold_masks,
    is_concrete,
    keep_best_units,
)
from jaxsparse.engines.penalties import check_strength, penalized
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing()


@register(
    "polarization",
    reference="Zhuang et al., Neuron-level structured pruning using polarization regularizer, 2020",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def polarization(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    strength: Scalar = 5e-5,
    t: Scalar | None = None,
    limit: Scalar | None = None,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds $\lambda (t \sum_i |\gamma_i| - \sum_i |\gamma_i - \bar\gamma|)$ to the loss, $\bar\gamma$ the mean over the
    network; at `end_step` the channels of smallest $|\gamma|$ go.

    On $[0, a]^n$ its minimum has a fraction $(2 - t)/4$ at a and the others at 0. An l1 penalty alone shrinks
    all of them.

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of channels that go, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel. Of a group with scales of norms $\gamma$ these alone count; without any
        (and without `groups`) all that makes a channel does, with its norm in the place of $|\gamma|$.
      strength: $\lambda$; the authors take 5e-5 (ResNet-56) and 3e-5 (VGG-16).
      t: the share of l1, in [0, 2]; None: that whose minimum has the sparsity asked for, from 0 at 50 %.
      limit: scales are clipped to this size after every step, as the authors do at 1; None: they are not.
      end_step: when the cut is made; 75 % of the run. The penalty then ends.
      allocation: "global", "uniform", or a mapping by path.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    `jaxsparse.nn.ConsensusGate` has the gates that depend on the input (Zhi et al., 2023).

    >>> import jaxsparse
    >>> tx = jaxsparse.polarization(optax.sgd(0.1), 0.6, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, t not in [0, 2], a negative `strength` or `limit`.
    """
    check_strength("strength", strength)
    if limit is not None:
        check_strength("limit", limit)
    if t is not None and is_concrete(t) and not 0 <= float(t) <= 2:
        raise ValueError(f"t={t}: must be in [0, 2]")
    updates = _TIMING.updates(total_steps, None, end_step)
    sparse = group_setup(sparsity, groups, allocation, targets, seed, pack_masks)
    # 1 - sparsity = (2 - t)/4, and no fraction above a half is a minimum
    share = jnp.maximum(4 * jnp.asarray(sparse.sparsity) - 2, 0.0) if t is None else t

    def gradient(step: Step):
        units, ws = Units(step.leaves), [v.w for v in step.views]
        slopes = polarization_slopes(units.scale_norms(ws), share)
        found = units.pulled(ws, [strength * s for s in slopes])
        return penalized(step.views, found, step.count < updates.end)

    def clip(units: Units, ws, vs, count: Array):
        largest = jnp.inf if limit is None else limit
        large = [jnp.maximum(n / largest, 1.0) for n in units.scale_norms(vs)]
        factors = zip(units.at_weights([1 / x for x in large]), units.factors(), vs)
        return [(f * v).astype(v.dtype) if yes else v for f, yes, v in factors]

    return hold_masks(
        inner if limit is None else followed_by(inner, clip, sparse),
        sparse,
        init=all_kept,
        rule=keep_best_units(Units.scale_norms, sparse),
        at=schedules.At((updates.end,)),
        gradient=gradient,
    )


def polarization_slopes(scales: Sequence[Array], t: Scalar) -> list[Array]:
    """The derivatives of the regulariser in scales that are not negative; through their mean as well.

    >>> [x.tolist() for x in polarization_slopes([jnp.array([1.0, 0.0]), jnp.array([0.0, 0.0])], 1.0)]
    [[-0.5, 1.5], [1.5, 1.5]]
    """
    number = sum(x.size for x in scales)
    mean = sum((jnp.sum(x) for x in scales), jnp.zeros(())) / number
    sides = [jnp.sign(x - mean) for x in scales]
    shift = sum((jnp.sum(s) for s in sides), jnp.zeros(())) / number
    return [t - s + shift for s in sides]
