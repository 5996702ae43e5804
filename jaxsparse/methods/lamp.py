"""LAMP: one ranking over the network by magnitudes rescaled in each layer; gradually or in rounds."""

from __future__ import annotations

from typing import Any

import optax

from jaxsparse import schedules, scores
from jaxsparse.allocations import Global
from jaxsparse.engines import hold_masks, keep_best
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register


@register(
    "lamp",
    reference="Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021",
    dynamics="gradual",
    dense_phase="dense before begin_step, sparser along the schedule",
    starts_dense=True,
    structures="unstructured",
)
def lamp(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    rounds: int | None = None,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 100,
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes the smallest scores of the network, with no option for layers: in a layer with
    ascending $u_1 \le \dots \le u_n$, $u = w^2$,

    $$score_i = u_i \big/ \sum_{j \ge i} u_j.$$

    The largest weight of every layer has score 1 and stays; scores do not change when a layer is
    multiplied by a constant. Masks are nested.

    Args:
      inner: the optimizer of the weights.
      sparsity: the final sparsity in [0, 1).
      total_steps: the length of the run, in steps.
      rounds: None: the cubic curve. A number R: the paper's iterative pruning, R cuts from
        `begin_step` to `end_step` that each leave the same fraction $(1 - S)^{1/R}$ of what
        is there (the authors take 20 rounds with retraining in between).
      begin_step, end_step: the ramp: 0 and 75 % of the run, at which the sparsity is exact.
      update_every: steps between updates.
      targets, seed, pack_masks: see the guide of options.

    Any method has the same ranking with `allocation="lamp"`.

    >>> import jaxsparse
    >>> tx = jaxsparse.lamp(optax.adam(1e-3), 0.9, total_steps=1000, rounds=20)

    Raises:
      ValueError: a sparsity or a step out of range, `rounds` below 1.
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds={rounds}: give at least one, or None for the cubic curve")
    sparsity = recipe.sparsity_of(sparsity, None)
    updates = schedules.window(total_steps, begin_step, end_step, update_every)
    if rounds is None:
        ramp = schedules.cubic(updates.begin, updates.end)
    else:
        ramp = schedules.rounds(sparsity, rounds, updates.begin, updates.end)
    rule = keep_best(
        scores.magnitude, Global(normalize="lamp"), sparsity, ramp=ramp, nested=True, seed=seed
    )
    return hold_masks(
        inner,
        recipe.plan_for(targets, None),
        init=recipe.all_kept,
        rule=rule,
        at=updates,
        pack_masks=pack_masks,
    )
