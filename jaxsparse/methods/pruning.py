"""Gradual pruning along the cubic curve: by magnitude in each layer or over all, at random, by saliency."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax

from jaxsparse import allocations, schedules, scores
from jaxsparse.engines import (
    Projection,
    all_kept,
    hold_masks,
    is_concrete,
    keep_best,
    refresh,
    straight_through,
)
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import preset, register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets

_TIMING = Timing()
_FACTS: dict[str, Any] = dict(
    starts_dense=True,
    dynamics="gradual",
    dense_phase="dense before begin_step, sparser along the schedule",
    timing=_TIMING,
)


@register(
    "magnitude",
    reference="Zhu & Gupta, To prune, or not to prune: exploring the efficacy of pruning, 2017",
    **_FACTS,
)
def magnitude(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    score: Literal["magnitude", "random", "saliency"] | scores.ScoreLike = "magnitude",
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    update_every: StepCount = 100,
    initial_sparsity: Scalar = 0.0,
    recovery: bool = False,
    minimum: int | float = 0,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual magnitude pruning, by default per layer: at each update the smallest |w| go.

    $S(t) = S_f + (S_i - S_f)(1 - (t - t_0)/(t_1 - t_0))^3$ at the steps
    $t_0, t_0 + \Delta t, \dots, t_1$.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the final sparsity $S_f$ in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      score: what a weight is worth: "magnitude" (|w|), "random" (the baseline of the family),
        "saliency" ($|w g|$ with the gradient of the update's own batch), or a function.
      begin_step: $t_0$; 0 by default.
      end_step: $t_1$, at which the sparsity is exact; 75 % of the run by default.
      update_every: $\Delta t$ in steps.
      initial_sparsity: $S_i$.
      recovery: False: a pruned weight is zero for good (masks are nested). True: a raw weight lives
        on out of sight, ranks, and may return, as in the authors' code. Its gradient is 0, so that
        plain SGD leaves it at its last value; the momentum that it has gathered and weight decay go
        on moving it. This keeps a copy of the weights.
      minimum: with a global ranking, the number of weights (below 1: the fraction of all weights)
        that every layer keeps: its best enter first, and one ranking fills the rest. This is not the
        minimum threshold of Gupta et al., which takes what a layer lacks from all others in
        proportion: `jaxsparse.minimum_threshold` gives that as an allocation.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.magnitude(optax.adam(1e-3), 0.9, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, a schedule that does not fit into the run,
        `recovery` with a score that reads gradients, `minimum` without a global ranking.
    """
    worth = scores.resolve(score)
    if recovery and scores.needs_gradient(worth):
        raise ValueError(f"recovery=True: score={score!r} reads gradients, which only updates have")
    if minimum:
        allocation = _with_minimum(allocation, minimum)
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    updates = _TIMING.updates(total_steps, begin_step, end_step, update_every)
    ramp = schedules.cubic(
        updates.begin, updates.end, initial=start_of_ramp(initial_sparsity, sparse.sparsity)
    )
    rule = keep_best(worth, sparse, ramp=ramp, nested=not recovery)
    if not recovery:
        init = all_kept if scores.needs_gradient(worth) else rule
        return hold_masks(inner, sparse, init=init, rule=rule, at=updates)
    return straight_through(
        inner,
        sparse,
        lambda step: Projection(refresh(updates.fires(step.count), rule, step)),
        pull_back=lambda v, _: jnp.where(v.m, v.g, jnp.zeros((), v.g.dtype)),
    )


def start_of_ramp(initial, sparsity):
    """The part of the way to `sparsity` at which a ramp from `initial` starts.

    Raises:
      ValueError: `initial` above `sparsity`, or negative.
    """
    if not is_concrete(initial):
        return initial / jnp.maximum(sparsity, 1e-9)
    if is_concrete(sparsity) and not 0.0 <= initial <= sparsity:
        raise ValueError(f"initial_sparsity={initial}: must be in [0, sparsity={sparsity}]")
    return 0.0 if initial == 0 else initial / jnp.maximum(sparsity, 1e-9)


def _with_minimum(allocation: AllocationLike, minimum) -> allocations.Global:
    rule = allocations.resolve(allocation)
    if not isinstance(rule, allocations.Global) or rule.minimum:
        raise ValueError(
            f"minimum={minimum}: it belongs to a global ranking that has none yet, such as "
            f"allocation='global'; allocation={allocation!r} is another"
        )
    return allocations.Global(rule.normalize, minimum)


global_magnitude = preset(
    "global_magnitude",
    magnitude,
    """Gradual pruning with one threshold on |w| over the whole network. It is `magnitude` with
    `allocation="global"`, where the options are explained.

    Scores are not divided by the norm of the layer; `allocations.Global(normalize="l2")` does that.
    `minimum` is what every layer keeps; it is not the minimum threshold of the authors, which
    `jaxsparse.minimum_threshold` gives.

    >>> import jaxsparse
    >>> tx = jaxsparse.global_magnitude(optax.adam(1e-3), 0.9, total_steps=1000, minimum=0.0005)
    """,
    reference="Gupta et al., Is complexity required for neural network pruning?, 2022",
    fixed={"score": "magnitude"},
    defaults={"allocation": "global"},
    **_FACTS,
)

random_pruning = preset(
    "random_pruning",
    magnitude,
    """Gradual pruning of weights drawn at random, the baseline of the family. It is `magnitude` with
    `score="random"`, where the options are explained. Masks are nested.

    >>> import jaxsparse
    >>> tx = jaxsparse.random_pruning(optax.adam(1e-3), 0.9, total_steps=1000)
    """,
    reference="Gale, Elsen & Hooker, The state of sparsity in deep neural networks, 2019",
    fixed={"score": "random", "recovery": False},
    **_FACTS,
)

saliency = preset(
    "saliency",
    magnitude,
    """Gradual pruning of the smallest |w g|, g the gradient of the update's own batch. It is
    `magnitude` with `score="saliency"`, where the options are explained. Masks are nested; equal
    scores (a gradient of zeros) are ranked by a seeded hash.

    >>> import jaxsparse
    >>> tx = jaxsparse.saliency(optax.adam(1e-3), 0.9, total_steps=1000)
    """,
    reference="Molchanov et al., Pruning convolutional neural networks for resource efficient "
    "inference, 2017",
    fixed={"score": "saliency", "recovery": False},
    gradients="updates",
    **_FACTS,
)
