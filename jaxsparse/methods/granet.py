"""GraNet: gradual pruning, with a RigL update after every cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse.allocations import resolve
from jaxsparse.choose import choose
from jaxsparse.engines import Step, all_kept, hold_masks, is_concrete, random_masks, swap
from jaxsparse.engines.setup import setup
from jaxsparse.methods.pruning import start_of_ramp
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import (
    AllocationLike,
    Scalar,
    ScalarOrSchedule,
    Seed,
    StepCount,
    StructureLike,
    Targets,
)


def _windows(total_steps, begin_step, end_step, update_every, regrow_end_step):
    """The steps of the ramp, and all updates."""
    prune = Timing(end=50).updates(total_steps, begin_step, end_step, update_every)
    late = total_steps * 3 // 4
    if regrow_end_step is None:
        concrete = is_concrete(late, prune.end)
        regrow_end_step = (max if concrete else jnp.maximum)(late, prune.end)
    updates = Timing().updates(total_steps, begin_step, regrow_end_step, update_every)
    if is_concrete(updates.end, prune.end) and updates.end < prune.end:
        raise ValueError(f"regrow_end_step={regrow_end_step} is before end_step={prune.end}")
    return prune, updates


def _timing(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("total_steps", "begin_step", "end_step", "update_every", "regrow_end_step")
    prune, updates = _windows(*(options[name] for name in names))
    return {"begin_step": prune.begin, "end_step": prune.end, "regrow_end_step": updates.end}


@register(
    "granet",
    reference="Liu et al., Sparse training via boosting pruning plasticity with neuroregeneration, "
    "2021",
    dynamics="gradual",
    dense_phase="dense before begin_step where initial_sparsity is 0; then as sparse as the schedule",
    starts_dense=True,
    gradients="updates",
    timing=_timing,
)
def granet(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    initial_sparsity: Scalar = 0.0,
    drop_fraction: ScalarOrSchedule = 0.5,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    regrow_end_step: StepCount | None = None,
    initial_allocation: AllocationLike = "erk",
    structure: StructureLike = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""At every update: 1. prunes the smallest |w| (of the whole network by default) to

    $$S(t) = S_f + (S_i - S_f)\bigl(1 - \tfrac{t - t_0}{t_1 - t_0}\bigr)^3;$$

    2. in each layer drops $\lfloor \rho n \rfloor$ of the n weights that are left, those of smallest
    |w|, and grows as many of largest |g|, just dropped ones included. From $t_1$ on only step 2 is
    done. A pruned weight returns by growth only.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: $S_f$ in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      initial_sparsity: $S_i$: 0 starts dense; the authors' sparse-to-sparse training takes 0.5,
        with random masks split by `initial_allocation`.
      drop_fraction: $\rho$ at the start of a cosine to 0.005 at `regrow_end_step`, or a schedule.
      update_every: steps between updates.
      begin_step: $t_0$; 0 by default. The masks of step 0 are those of `init`.
      end_step: $t_1$; half of the run by default.
      regrow_end_step: the last update (75 % of the run, or `end_step` if that is later).
      initial_allocation: how the random masks of `initial_sparsity` are split over the layers, as
        `allocation`.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    `drop_fraction=0` is gradual magnitude pruning. The authors round the number dropped up.

    >>> import jaxsparse
    >>> tx = jaxsparse.granet(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, `initial_sparsity` above `sparsity`.
    """
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    sparsity = sparse.sparsity
    start = start_of_ramp(initial_sparsity, sparsity)
    prune, updates = _windows(total_steps, begin_step, end_step, update_every, regrow_end_step)
    fraction = schedules.drop_fraction(drop_fraction, updates.end, final=0.005)
    ramp = schedules.cubic(prune.begin, prune.end, initial=start)

    def rule(step: Step):
        pruned = choose(
            step.leaves,
            [jnp.abs(v.w) for v in step.views],
            sparse.allocation,
            sparsity,
            fraction=ramp(step.count),
            where=step.masks,
        )
        return swap(
            step.leaves,
            pruned,
            [scores.magnitude(v) for v in step.views],
            [scores.gradient(v) for v in step.views],
            fraction(step.count),
            salts=step.salts(seed),
            inside=step.inside,
        )

    return hold_masks(
        inner,
        sparse,
        init=random_masks(
            sparse.replace(allocation=resolve(initial_allocation), sparsity=initial_sparsity)
        )
        if initial_sparsity
        else all_kept,
        rule=rule,
        at=schedules.Both(updates, schedules.At((prune.end,))),
        fresh="grown",
    )
