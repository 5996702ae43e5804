"""Straight-through top-k on raw weights: DNW, and magnitude STE with a schedule."""

from __future__ import annotations

import optax
from jax.typing import DTypeLike

from jaxsparse import schedules, scores
from jaxsparse.engines import Projection, is_concrete, keep_best, refresh, straight_through
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets


@register(
    "magnitude_ste",
    reference="Wortsman, Farhadi & Rastegari, Discovering neural wirings, 2019",
    keeps_raw=True,
    gradients="all",
    dynamics="projected",
)
def magnitude_ste(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    begin_step: StepCount = 0,
    end_step: StepCount = 0,
    update_every: StepCount = 1,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z \odot topk(|z|)$, and the gradient at p is applied unchanged to every raw weight z,
    so that a pruned weight goes on learning and returns with its raw value when it ranks again.

    As DNW, the sparsity is in force from the first step; with `end_step` > `begin_step` it grows
    along the cubic curve between them. Weight decay of `inner` acts on z.

    Args:
      inner: the optimizer of z, any optax transformation.
      sparsity: the (final) sparsity in [0, 1); may be left out with an N:M structure.
      begin_step: where the ramp starts.
      end_step: where it ends, at the full sparsity; equal to `begin_step`: at once.
      update_every: steps between two rankings; in between the mask stays.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      raw_dtype: the dtype of z; give float32 if the parameters are bfloat16, where small steps of z
        would be lost.
      pack_masks: store masks as one bit per weight.

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
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    rule = keep_best(scores.magnitude, sparse, ramp=schedules.cubic(begin_step, end_step))
    return straight_through(
        inner,
        sparse,
        lambda step: Projection(
            refresh((step.count - begin_step) % update_every == 0, rule, step)
            if not is_concrete(update_every) or update_every > 1
            else rule(step)
        ),
        raw_dtype=raw_dtype,
    )
