"""HSPG: groups whose next step leaves the half-space around where they are become zero."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules, selection
from jaxsparse.engines import (
    GroupLasso,
    Step,
    Units,
    all_kept,
    followed_by,
    group_setup,
    hold_masks,
    keep_best_units,
)
from jaxsparse.engines.penalties import check_fraction, penalized
from jaxsparse.engines.units import safe_divide
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing(begin=25)


@register(
    "hspg",
    reference="Chen et al., Only train once: a one-shot neural network training and pruning framework, "
    "2021",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before begin_step, sparser until end_step",
    starts_dense=True,
    timing=_TIMING,
)
def hspg(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    strength: Scalar = 1e-3,
    epsilon: Scalar = 0.0,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains with a group lasso; from `begin_step` on a group becomes zero for good where the step from
    x to $\hat x$ leaves the half-space around x:

    $$\hat x \cdot x < \epsilon \|x\|^2.$$

    Groups of `channels.find` hold what makes a channel: filter, bias, scale and shift of the norm. Without
    a norm over channels a zero group may then be removed (`channels.shrink`).

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of units that end as zeros, of every group, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel.
      strength: $\lambda$ of the group lasso, whose gradient the inner optimizer sees; the authors take
        5e-4 to 1e-3.
      epsilon: $\epsilon$ in [0, 1); 0 for convolutions and 0.9 for dense layers in the authors' runs.
      begin_step: the first half-space step; a quarter of the run, as the authors.
      end_step: 75 % of the run; what is then above the sparsity is cut by its norm.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code: once as many groups are zero as asked for, no more become so, and
    of too many at once those go that leave the half-space the furthest (theirs: random ones); $\epsilon$
    is fixed (theirs grows when sparsity stalls), and `end_step` cuts what is missing.

    >>> import jaxsparse
    >>> tx = jaxsparse.hspg(optax.sgd(0.1), 0.5, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, an `epsilon` not in [0, 1), a negative `strength`,
        `groups` that are none.
    """
    check_fraction("epsilon", epsilon)
    updates = _TIMING.updates(total_steps, begin_step, end_step)
    sparse = group_setup(sparsity, groups, targets=targets, seed=seed, pack_masks=pack_masks)
    lasso = GroupLasso(strength)

    def half_space(units: Units, ws, vs, count: Array):
        inside = [safe_divide(a, b) for a, b in zip(units.dots(ws, vs), units.dots(ws, ws))]
        alive = units.alive(ws)
        on = (count >= updates.begin) & (count <= updates.end)
        leaving = [a & (x < epsilon) & on for a, x in zip(alive, inside)]
        axes = [leaf.axes for leaf in units.leaves]
        room = [
            jnp.maximum(selection.count(a, axis=axis) - k, 0)
            for a, axis, k in zip(alive, axes, units.budgets(sparse))
        ]
        go = units.most([-x for x in inside], room, sparse, leaving, count)
        stay = units.at_weights([~g for g in go])
        return [jnp.where(s, v, jnp.zeros((), v.dtype)) for s, v in zip(stay, vs)]

    def zeros(step: Step):
        units, ws = Units(step.leaves), [v.w for v in step.views]
        alive = units.at_weights(units.alive(ws))
        return [m & (a | (step.count < updates.begin)) for m, a in zip(step.masks, alive)], ws

    return hold_masks(
        followed_by(inner, half_space, sparse),
        sparse,
        init=all_kept,
        rule=keep_best_units(Units.norms, sparse),
        at=schedules.At((updates.end,)),
        gradient=lambda s: penalized(
            s.views, lasso.gradient(Units(s.leaves), [v.w for v in s.views])
        ),
        after=zeros,
        fresh="grown",
    )
