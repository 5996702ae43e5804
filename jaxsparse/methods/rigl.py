"""RigL: drop the smallest weights, grow where the gradient is largest."""

from __future__ import annotations

import optax

from jaxsparse import schedules, scores
from jaxsparse.engines import drop_and_grow, hold_masks, random_start
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import REWIRING
from jaxsparse.typing import (
    AllocationLike,
    Scalar,
    ScalarOrSchedule,
    Seed,
    StepCount,
    StructureLike,
    Targets,
)


@register(
    "rigl",
    reference="Evci et al., Rigging the lottery: making all tickets winners, 2020",
    gradients="updates",
    timing=REWIRING,
)
def rigl(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    drop_fraction: ScalarOrSchedule = 0.3,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "erk",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse from the first step at a constant budget. Every `update_every` steps, in each layer
    with $n_1$ kept weights and $f = \alpha/2\,(1 + \cos(\pi t / T_{end}))$:

    1. keep the $n_1 - \lfloor n_1 f \rfloor$ weights of largest |w|;
    2. among all other positions, those just dropped included, grow the $\lfloor n_1 f \rfloor$ of
       largest |g|.

    An update takes the place of the gradient step: no weight moves, dense leaves included, and the
    inner optimizer's moments and their counts stay as they are. A schedule of the learning rate goes
    on, for it counts the steps of the run. A grown weight starts at 0 with a fresh inner state; one
    that is dropped and grown at once keeps its value and state. g is the dense gradient at the
    sparse parameters, of the update's own batch: average it over replicas before `update`.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      drop_fraction: $\alpha$, or a schedule of f.
      update_every: steps between two updates.
      begin_step: the first update, at least 1; after `update_every` steps by default.
      end_step: no update after it; 75 % of the run by default.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in exact counts where scores tie (they add noise to |w|);
    equal gradients are ranked by a seeded hash.

    >>> import jaxsparse
    >>> tx = jaxsparse.rigl(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, an update that never comes.
    """
    updates = REWIRING.updates(total_steps, begin_step, end_step, update_every)
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    fraction = schedules.drop_fraction(drop_fraction, updates.end)
    return hold_masks(
        inner,
        sparse,
        init=random_start(sparse, fraction, updates.begin),
        rule=drop_and_grow(
            scores.magnitude,
            scores.gradient,
            fraction,
            seed=seed,
        ),
        at=updates,
        on_update="replace",
        fresh="grown",
    )
