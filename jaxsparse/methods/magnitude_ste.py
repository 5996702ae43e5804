"""Straight-through top-k on raw weights: DNW, and magnitude STE with a schedule."""

from __future__ import annotations

from typing import Any

import optax

from jaxsparse import schedules, scores
from jaxsparse._control import is_concrete
from jaxsparse.engines import Projection, keep_best, refresh, straight_through
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register


@register(
    "magnitude_ste",
    reference="Wortsman, Farhadi & Rastegari, Discovering neural wirings, 2019",
    keeps_raw=True,
    gradients="all",
    dynamics="projected",
)
def magnitude_ste(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    begin_step: Any = 0,
    end_step: Any = 0,
    update_every: Any = 1,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    raw_dtype: Any = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z \odot topk(|z|)$, and the gradient at p is applied unchanged to every raw weight z,
    so that a pruned weight goes on learning and returns with its raw value when it ranks again.

    As DNW, the sparsity is in force from the first step; with `end_step` > `begin_step` it grows
    along the cubic curve between them. Weight decay of `inner` acts on z.

    Args:
      inner: the optimizer of z.
      sparsity: the (final) sparsity in [0, 1); may be left out with an N:M structure.
      begin_step, end_step: the ramp, in steps.
      update_every: steps between two rankings; in between the mask stays.
      structure, allocation, targets, seed, pack_masks: see the guide of options.
      raw_dtype: the dtype of z; give float32 if the parameters are bfloat16, where small steps of z
        would be lost.

    >>> import jaxsparse
    >>> tx = jaxsparse.magnitude_ste(optax.sgd(0.1), 0.8)

    Raises:
      ValueError: a sparsity out of range, `end_step` before `begin_step`.
    """
    if is_concrete(begin_step, end_step, update_every):
        if not 0 <= begin_step <= end_step:
            raise ValueError(
                f"begin_step={begin_step}, end_step={end_step}: need 0 <= begin <= end"
            )
        if update_every < 1:
            raise ValueError(f"update_every={update_every}: must be at least 1")
    rule = keep_best(
        scores.magnitude, recipe.allocation_of(allocation), recipe.sparsity_of(sparsity, structure),
        ramp=schedules.cubic(begin_step, end_step), seed=seed,
    )  # fmt: skip
    return straight_through(
        inner,
        recipe.plan_for(targets, structure),
        lambda step: Projection(
            refresh((step.count - begin_step) % update_every == 0, rule, step)
            if not is_concrete(update_every) or update_every > 1
            else rule(step)
        ),
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
    )
