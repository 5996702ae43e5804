"""SET: drop the smallest weights, grow at random."""

from __future__ import annotations

from typing import Any

import optax

from jaxsparse import schedules, scores
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register
from jaxsparse.transforms import drop_and_grow, masked


@register(
    "set",
    reference="Mocanu et al., Scalable training of artificial neural networks with adaptive sparse "
    "connectivity inspired by network science, 2018",
)
def set_(
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
    r"""As `rigl`, but the positions that grow are drawn uniformly at random among those not kept,
    and the gradient step is taken at updates too (survivors move; a grown weight starts at 0 with
    a fresh inner state).

    This is SET as RigL's authors run it: smallest |w| whatever their sign, and a fraction that falls
    along a cosine; the first SET drops a constant fraction of the positive and of the negative
    weights separately (`drop_fraction=lambda step: 0.3` keeps it constant).

    Args and errors: see `rigl`.

    >>> import jaxsparse
    >>> tx = jaxsparse.set_(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)
    """
    updates = schedules.window(
        total_steps, begin_step, end_step, update_every, default_begin=update_every, at_end=False
    )
    return masked(
        inner,
        recipe.plan_for(targets, structure),
        recipe.random_masks(allocation, recipe.sparsity_of(sparsity, structure), seed),
        rule=drop_and_grow(
            scores.magnitude,
            scores.random,
            recipe.drop_schedule(drop_fraction, updates.end),
            seed=seed,
        ),  # fmt: skip
        updates=updates,
        restarts=True,
        pack_masks=pack_masks,
    )
