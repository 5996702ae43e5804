"""RigL: drop the smallest weights, grow where the gradient is largest."""

from __future__ import annotations

from typing import Any

import optax

from jaxsparse import scores
from jaxsparse.engines import drop_and_grow, hold_masks
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register
from jaxsparse.methods._timing import REWIRING


@register(
    "rigl",
    reference="Evci et al., Rigging the lottery: making all tickets winners, 2020",
    gradients="updates",
)
def rigl(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    drop_fraction: Any = 0.3,
    update_every: Any = 100,
    begin_step: Any = None,
    end_step: Any = None,
    structure: Any = None,
    allocation: Any = "erk",
    targets: Any = None,
    seed: Any = 0,
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
      inner: the optimizer of the weights.
      sparsity: the fraction of zeros in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      drop_fraction: $\alpha$, or a schedule of f.
      update_every: steps between two updates.
      begin_step, end_step: the first update (`update_every`) and $T_{end}$ (75 % of the run).
      structure, allocation, targets, seed, pack_masks: see the guide of options.

    This differs from the authors' code in exact counts where scores tie (they add noise to |w|);
    equal gradients are ranked by a seeded hash.

    >>> import jaxsparse
    >>> tx = jaxsparse.rigl(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, an update that never comes.
    """
    updates = REWIRING.updates(total_steps, begin_step, end_step, update_every)
    return hold_masks(
        inner,
        recipe.plan_for(targets, structure),
        init=recipe.random_masks(allocation, recipe.sparsity_of(sparsity, structure), seed),
        rule=drop_and_grow(
            scores.magnitude,
            scores.gradient,
            recipe.drop_schedule(drop_fraction, updates.end),
            seed=seed,
        ),  # fmt: skip
        at=updates,
        on_update="replace",
        fresh="grown",
        pack_masks=pack_masks,
    )
