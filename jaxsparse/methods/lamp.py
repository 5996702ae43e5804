"""LAMP: one ranking over the network by magnitudes rescaled in each layer; gradually or in rounds."""

from __future__ import annotations

import optax

from jaxsparse import schedules, scores
from jaxsparse.engines import all_kept, hold_masks, keep_best
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import Scalar, Seed, StepCount, Targets

_TIMING = Timing()


@register(
    "lamp",
    reference="Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021",
    dynamics="gradual",
    dense_phase="dense before begin_step, sparser along the schedule",
    starts_dense=True,
    structures="unstructured",
    timing=_TIMING,
)
def lamp(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    rounds: int | None = None,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    update_every: StepCount = 100,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes the smallest scores of the network, with no option for layers: in a layer with
    ascending $u_1 \le \dots \le u_n$, $u = w^2$,

    $$score_i = u_i \big/ \sum_{j \ge i} u_j.$$

    The largest weight of every layer has score 1 and stays; scores do not change when a layer is
    multiplied by a constant. Masks are nested.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the final sparsity in [0, 1).
      total_steps: the length of the run, in steps.
      rounds: None: the cubic curve. A number R: the paper's iterative pruning, R cuts from
        `begin_step` to `end_step` that each leave the same fraction $(1 - S)^{1/R}$ of what is
        there (the authors take 20 rounds with retraining in between).
      begin_step: where the ramp starts; 0 by default.
      end_step: where it ends, at the exact sparsity; 75 % of the run by default.
      update_every: steps between updates.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    Any method has the same ranking with `allocation="lamp"`.

    >>> import jaxsparse
    >>> tx = jaxsparse.lamp(optax.adam(1e-3), 0.9, total_steps=1000, rounds=20)

    Raises:
      ValueError: a sparsity or a step out of range, `rounds` below 1.
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds={rounds}: give at least one, or None for the cubic curve")
    sparse = setup(sparsity, allocation="lamp", targets=targets, seed=seed, pack_masks=pack_masks)
    updates = _TIMING.updates(total_steps, begin_step, end_step, update_every)
    if rounds is None:
        ramp = schedules.cubic(updates.begin, updates.end)
    else:
        ramp = schedules.rounds(sparse.sparsity, rounds, updates.begin, updates.end)
    rule = keep_best(scores.magnitude, sparse, ramp=ramp, nested=True)
    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=rule,
        at=updates,
    )
