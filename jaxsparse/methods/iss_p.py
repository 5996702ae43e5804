"""ISS-P: the smallest weights shrink a little at every step, until they are cut."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse._counts import is_concrete, when
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register
from jaxsparse.transforms import Step, keep_best, masked


@register(
    "iss_p",
    reference="Wang et al., Iterative soft shrinkage learning for efficient image super-resolution, "
    "2023",
    dynamics="gradual",
    dense_phase="dense before end_step",
    starts_dense=True,
)
def iss_p(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    shrink: Any = 0.95,
    end_step: Any = None,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""After each step the weights that are now the smallest of their layer are multiplied by r:

    $$w \leftarrow \begin{cases} w & \text{among the largest } |w| \text{ at the sparsity}\\
      r\,w & \text{otherwise.}\end{cases}$$

    The set is chosen anew every time, so that a weight whose gradient is strong enough comes back.
    At `end_step` the smallest are cut, and the rest trains on.

    Args:
      inner: the optimizer of the weights. Adaptive ones move small weights by a full step, against
        which r has to win.
      sparsity: in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      shrink: r in [0, 1]; 0.95 in the authors' commands (0.99 in their code). 0 is iterative hard
        thresholding.
      end_step: when the masks become fixed; a sixth of the run, as the authors (100k of 600k).
      structure, allocation, targets, seed, pack_masks: see the guide of options.

    Large layers are ranked exactly (the authors estimate the threshold from 32,400 entries).

    >>> import jaxsparse
    >>> tx = jaxsparse.iss_p(optax.adam(2e-4), 0.95, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, `shrink` not in [0, 1].
    """
    if is_concrete(shrink) and not 0 <= shrink <= 1:
        raise ValueError(f"shrink={shrink}: the factor of the smallest weights must be in [0, 1]")
    updates = schedules.window(total_steps, None, end_step, fraction=0.17)
    best = keep_best(
        scores.magnitude, recipe.allocation_of(allocation), recipe.sparsity_of(sparsity, structure),
        seed=seed,
    )  # fmt: skip

    def settle(step: Step):
        def soften(ws, count, *_):
            views = [type(v)(v.leaf, w, None, None) for v, w in zip(step.views, ws)]
            return [
                jnp.where(m | jnp.isnan(w), w, (shrink * w).astype(w.dtype))
                for m, w in zip(best(Step(count, views)), ws)
            ]

        soft = when(step.count < updates.end, soften, [v.w for v in step.views], step.count)
        return step.masks, soft

    return masked(
        inner,
        recipe.plan_for(targets, structure),
        recipe.all_kept,
        rule=best,
        updates=schedules.At((updates.end,)),
        settle=settle,
        pack_masks=pack_masks,
    )
