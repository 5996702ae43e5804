r"""Pruning by score, at once or gradually.

Along the cubic curve of Zhu & Gupta (To prune, or not to prune, 2017), between `begin_step` $t_0$
and `end_step` $t_1$,

$$S(t) = S_f + (S_i - S_f)\bigl(1 - \tfrac{t - t_0}{t_1 - t_0}\bigr)^3,$$

each update keeps the weights of highest score. The members of the family differ in the score, in
the split of the budget and in the curve.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse._control import is_concrete
from jaxsparse.engines import Projection, hold_masks, keep_best, refresh, straight_through
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register

_GRADUAL = "dense before begin_step, sparser along the schedule"


@register(
    "one_shot",
    reference="Gupta et al., Is complexity required for neural network pruning?, 2022",
    starts_dense=True,
    dynamics="gradual",
    dense_phase="before begin_step",
)
def one_shot(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    score: str | scores.Score = "magnitude",
    begin_step: Any = 0,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes once, at `begin_step`, to the full sparsity; then trains what is left.

    With a score that needs no gradient and `begin_step=0` the network is sparse from `init` on;
    with one that does, from the first update on.

    >>> import jaxsparse
    >>> tx = jaxsparse.one_shot(optax.sgd(0.1), 0.75, begin_step=0)
    >>> masks = jaxsparse.get_masks(tx.init({"kernel": jnp.arange(4.0).reshape(2, 2)}))
    >>> masks["kernel"].tolist()
    [[False, False], [False, True]]
    """
    function = scores.resolve(score)
    if is_concrete(begin_step) and begin_step < 0:
        raise ValueError(f"begin_step={begin_step}: must not be negative")
    rule = keep_best(
        function, recipe.allocation_of(allocation), recipe.sparsity_of(sparsity, structure),
        ramp=schedules.one_shot(begin_step), seed=seed,
    )  # fmt: skip
    return hold_masks(
        inner,
        recipe.plan_for(targets, structure),
        init=recipe.all_kept if getattr(function, "needs_gradient", False) else rule,
        rule=rule,
        at=schedules.Updates(begin_step, begin_step),
        pack_masks=pack_masks,
    )


def _gradual(
    inner, sparsity, *, score, total_steps, begin_step, end_step, update_every, initial_sparsity,
    recovery, structure, allocation, targets, seed, pack_masks,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    sparsity = recipe.sparsity_of(sparsity, structure)
    updates = schedules.window(total_steps, begin_step, end_step, update_every)
    if is_concrete(initial_sparsity, sparsity) and not 0.0 <= initial_sparsity <= sparsity:
        raise ValueError(
            f"initial_sparsity={initial_sparsity}: must be in [0, sparsity={sparsity}]"
        )
    none = is_concrete(initial_sparsity) and initial_sparsity == 0
    start = 0.0 if none else initial_sparsity / jnp.maximum(sparsity, 1e-9)
    ramp = schedules.cubic(updates.begin, updates.end, initial=start)
    rule = keep_best(
        score, recipe.allocation_of(allocation), sparsity, ramp=ramp, nested=not recovery, seed=seed
    )
    plan_for = recipe.plan_for(targets, structure)
    if not recovery:
        init = recipe.all_kept if getattr(score, "needs_gradient", False) else rule
        return hold_masks(inner, plan_for, init=init, rule=rule, at=updates, pack_masks=pack_masks)

    # Masked weights keep their last value, out of sight, and may come back with it.
    return straight_through(
        inner,
        plan_for,
        lambda step: Projection(refresh(updates.fires(step.count), rule, step)),
        pull_back=lambda v, _: jnp.where(v.m, v.g, jnp.zeros((), v.g.dtype)),
        pack_masks=pack_masks,
    )


@register(
    "magnitude",
    reference="Zhu & Gupta, To prune, or not to prune: exploring the efficacy of pruning, 2017",
    starts_dense=True,
    dynamics="gradual",
    dense_phase=_GRADUAL,
)
def magnitude(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 100,
    initial_sparsity: Any = 0.0,
    recovery: bool = False,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual magnitude pruning, by default per layer: at each update the smallest |w| go.

    $S(t) = S_f + (S_i - S_f)(1 - (t - t_0)/(t_1 - t_0))^3$ at the steps
    $t_0, t_0 + \Delta t, \dots, t_1$.

    Args:
      inner: the optimizer of the weights.
      sparsity: the final sparsity $S_f$ in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      begin_step, end_step: $t_0$ (0) and $t_1$ (75 % of the run), at which the sparsity is exact.
      update_every: $\Delta t$ in steps.
      initial_sparsity: $S_i$.
      recovery: False: a pruned weight is zero for good (masks are nested). True: a raw weight lives
        on out of sight, ranks, and may return, as in the authors' code. Its gradient is 0, so that
        plain SGD leaves it at its last value; the momentum that it has gathered and weight decay go
        on moving it. This keeps a copy of the weights.
      structure, allocation, targets, seed, pack_masks: see the guide of options.

    >>> import jaxsparse
    >>> tx = jaxsparse.magnitude(optax.adam(1e-3), 0.9, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, a schedule that does not fit into the run.
    """
    return _gradual(
        inner, sparsity, score=scores.magnitude, total_steps=total_steps, begin_step=begin_step,
        end_step=end_step, update_every=update_every, initial_sparsity=initial_sparsity,
        recovery=recovery, structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip


@register(
    "global_magnitude",
    reference="Gupta et al., Is complexity required for neural network pruning?, 2022",
    starts_dense=True,
    dynamics="gradual",
    dense_phase=_GRADUAL,
)
def global_magnitude(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    minimum: int | float = 0,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 100,
    initial_sparsity: Any = 0.0,
    recovery: bool = False,
    structure: Any = None,
    allocation: Any = None,
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`magnitude` with one threshold on |w| over the whole network.

    `minimum` is the number of weights (or, below 1, the fraction of all weights) that every layer
    keeps, so that none collapses: its best ones enter first, and one ranking fills the rest. This is
    not the minimum threshold of the authors, which takes what a layer lacks from all others in
    proportion: for that give `allocation=jaxsparse.minimum_threshold(params, sparsity)`.
    `allocation` is `allocations.Global(minimum=minimum)` unless another ranking ("lamp") is given.
    Scores are not divided by the norm of the layer; `allocations.Global(normalize="l2")` does that.

    >>> import jaxsparse
    >>> tx = jaxsparse.global_magnitude(optax.adam(1e-3), 0.9, total_steps=1000, minimum=0.0005)

    Raises:
      ValueError: as `magnitude`; `minimum` together with an `allocation`.
    """
    from jaxsparse.allocations import Global

    if allocation is not None and minimum:
        raise ValueError(f"minimum={minimum}: set it in the allocation that is given")
    return _gradual(
        inner, sparsity, score=scores.magnitude, total_steps=total_steps, begin_step=begin_step,
        end_step=end_step, update_every=update_every, initial_sparsity=initial_sparsity,
        recovery=recovery, structure=structure,
        allocation=Global(minimum=minimum) if allocation is None else allocation,
        targets=targets, seed=seed, pack_masks=pack_masks,
    )  # fmt: skip


@register(
    "random_pruning",
    reference="Gale, Elsen & Hooker, The state of sparsity in deep neural networks, 2019",
    starts_dense=True,
    dynamics="gradual",
    dense_phase=_GRADUAL,
)
def random_pruning(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 100,
    initial_sparsity: Any = 0.0,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Gradual pruning of weights drawn at random: the baseline of the family. Masks are nested.

    >>> import jaxsparse
    >>> tx = jaxsparse.random_pruning(optax.adam(1e-3), 0.9, total_steps=1000)

    Raises:
      ValueError: as `magnitude`.
    """
    return _gradual(
        inner, sparsity, score=scores.random, total_steps=total_steps, begin_step=begin_step,
        end_step=end_step, update_every=update_every, initial_sparsity=initial_sparsity,
        recovery=False, structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip


@register(
    "saliency",
    reference="Molchanov et al., Pruning convolutional neural networks for resource efficient "
    "inference, 2017",
    starts_dense=True,
    gradients="updates",
    dynamics="gradual",
    dense_phase=_GRADUAL,
)
def saliency(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 100,
    initial_sparsity: Any = 0.0,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Gradual pruning of the smallest |w g|, g the gradient of the update's own batch. Masks are
    nested; equal scores (a gradient of zeros) are ranked by a seeded hash.

    >>> import jaxsparse
    >>> tx = jaxsparse.saliency(optax.adam(1e-3), 0.9, total_steps=1000)

    Raises:
      ValueError: as `magnitude`.
    """
    return _gradual(
        inner, sparsity, score=scores.saliency, total_steps=total_steps, begin_step=begin_step,
        end_step=end_step, update_every=update_every, initial_sparsity=initial_sparsity,
        recovery=False, structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip
