"""One-shot pruning: one cut by a score, then the rest trains on."""

from __future__ import annotations

import optax

from jaxsparse import schedules, scores
from jaxsparse.engines import all_kept, hold_masks, is_concrete, keep_best
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets


@register(
    "one_shot",
    reference="Gupta et al., Is complexity required for neural network pruning?, 2022",
    starts_dense=True,
    dynamics="gradual",
    dense_phase="before begin_step",
)
def one_shot(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    score: str | scores.ScoreLike = "magnitude",
    begin_step: StepCount = 0,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes once, at `begin_step`, to the full sparsity; then trains what is left.

    With a score that needs no gradient and `begin_step=0` the network is sparse from `init` on;
    with one that does, from the first update on.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1); may be left out with an N:M structure.
      score: what a weight is worth: "magnitude", "random", "gradient", "saliency" ($|w g|$), or a
        function of a `scores.View` or of `(w, g)`.
      begin_step: the step of the cut.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse, jax.numpy as jnp
    >>> tx = jaxsparse.one_shot(optax.sgd(0.1), 0.75, begin_step=0)
    >>> masks = jaxsparse.get_masks(tx.init({"kernel": jnp.arange(4.0).reshape(2, 2)}))
    >>> masks["kernel"].tolist()
    [[False, False], [False, True]]

    Raises:
      ValueError: a sparsity out of range, a negative `begin_step`, an unknown score.
    """
    function = scores.resolve(score)
    if is_concrete(begin_step) and begin_step < 0:
        raise ValueError(f"begin_step={begin_step}: must not be negative")
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    rule = keep_best(function, sparse, ramp=schedules.one_shot(begin_step))
    return hold_masks(
        inner,
        sparse,
        init=all_kept if scores.needs_gradient(function) else rule,
        rule=rule,
        at=schedules.Updates(begin_step, begin_step),
    )
