"""APP: on a stream of data, prune a little more before each new batch of it is trained on."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse.engines import all_kept, hold_masks, is_concrete, keep_best
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets


def cumulative_error(errors: Iterable[float]) -> float:
    """The anytime metric of APP: the sum of the test errors after each megabatch. It is smaller for
    a learner that is good early.

    >>> cumulative_error([0.5, 0.25, 0.125])
    0.875
    """
    return float(sum(errors))


@register(
    "app",
    reference="Misra et al., APP: anytime progressive pruning, 2022",
    dynamics="gradual",
    dense_phase="the first forward pass, whose gradient the first cut reads",
    starts_dense=True,
    gradients="updates",
)
def app(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    stages: int = 8,
    base: float = 0.8,
    score: str | scores.ScoreLike = "saliency",
    structure: StructureLike = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The data arrive in `stages` megabatches of equally many steps; before it trains on number i,
    the network is pruned to the density

    $$0.8^{\tau_i}, \qquad \tau = 1, \dots, \frac{\ln(1 - S)}{\ln 0.8} \text{ in equal steps,}$$

    by $|w g|$ with the gradient of that step, so that it is at S for the last one. The first cut is
    at the first update, before which the network is dense, unless the score needs no gradient: then
    it is made at `init`. A pruned weight stays pruned.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: S at the last megabatch, in [0, 1); the authors' 4.5 is $1 - 0.8^{4.5} = 0.634$. A
        sparsity below 1 - `base` is reached at once.
      total_steps: the length of the run, in steps.
      stages: the number of megabatches.
      base: the density per unit of $\tau$.
      score: "saliency" (SNIP's), "magnitude", or a function `(w, g) -> score`.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    The authors take the gradient of 20 % of the new megabatch: accumulate over it (with
    `optax.MultiSteps`) where one batch is too noisy.

    >>> import jaxsparse
    >>> tx = jaxsparse.app(optax.sgd(0.1), sparsity=0.63, total_steps=800)

    Raises:
      ValueError: a sparsity out of range, fewer steps than stages, `base` not in (0, 1).
    """
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    sparsity = sparse.sparsity
    if not 0 < base < 1:
        raise ValueError(f"base={base}: the density per unit of the exponent must be in (0, 1)")
    if stages < 1 or (is_concrete(total_steps) and total_steps < stages):
        raise ValueError(f"stages={stages}: must be from 1 to total_steps={total_steps}")
    starts = schedules.At(tuple(i * total_steps // stages for i in range(stages)))
    densities = schedules.anytime_densities(sparsity, stages, base=base)

    def ramp(step):
        now = densities[jnp.maximum(starts.passed(step), 1) - 1]
        done = (1.0 - now) / jnp.maximum(jnp.asarray(sparsity), 1e-9)
        return jnp.where(starts.passed(step) >= stages, 1.0, jnp.minimum(done, 1.0))

    function = scores.resolve(score)
    rule = keep_best(function, sparse, ramp=ramp, nested=True)
    return hold_masks(
        inner,
        sparse,
        init=all_kept if scores.needs_gradient(function) else rule,
        rule=rule,
        at=starts,
    )
