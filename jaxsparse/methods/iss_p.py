"""ISS-P: the smallest weights shrink a little at every step, until they are cut."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse.engines import Step, all_kept, hold_masks, is_concrete, keep_best, when
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets

_TIMING = Timing(end=17)


@register(
    "iss_p",
    reference="Wang et al., Iterative soft shrinkage learning for efficient image super-resolution, "
    "2023",
    dynamics="gradual",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def iss_p(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    penalty: Literal["shrink", "l2"] = "shrink",
    shrink: Scalar = 0.95,
    limit: Scalar = 0.5,
    update_every: StepCount = 20,
    end_step: StepCount | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""After each step the weights that are now the smallest of their layer are multiplied by r:

    $$w \leftarrow \begin{cases} w & \text{among the largest } |w| \text{ at the sparsity}\\
      r\,w & \text{otherwise.}\end{cases}$$

    The set is chosen anew every time, so that a weight whose gradient is strong enough comes back.
    At `end_step` the smallest are cut, and the rest trains on.

    With `penalty="l2"` (the authors' second variant) they are not multiplied; every weight has an L2
    penalty $\lambda$ of its own, added to its gradient as $\lambda w$, which grows by one step for the
    smallest weights of each update and reaches `limit` at `end_step` for one that was always among
    them. What a weight has gathered it keeps.

    Args:
      inner: the optimizer of the weights. Adaptive ones move small weights by a full step, against
        which r has to win.
      sparsity: in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      penalty: "shrink" or "l2".
      shrink: r in [0, 1]; 0.95 in the authors' commands (0.99 in their code). 0 is iterative hard
        thresholding. Not read with "l2".
      limit: the largest $\lambda$, with "l2" only.
      update_every: steps between two updates of $\lambda$, with "l2" only. The authors add 1e-4
        every 20 steps up to 0.5, in 100k steps: the same line, if the run is as long.
      end_step: when the masks become fixed; a sixth of the run, as the authors (100k of 600k).
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    Large layers are ranked exactly (the authors estimate the threshold from 32,400 entries).

    >>> import jaxsparse
    >>> tx = jaxsparse.iss_p(optax.adam(2e-4), 0.95, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, `update_every` below 1, `shrink` not in [0, 1], a
        negative `limit`, another `penalty`.
    """
    if penalty not in ("shrink", "l2"):
        raise ValueError(f"penalty={penalty!r}: use 'shrink' or 'l2'")
    if is_concrete(limit) and limit < 0:
        raise ValueError(f"limit={limit}: the largest L2 penalty must not be negative")
    if is_concrete(shrink) and not 0 <= shrink <= 1:
        raise ValueError(f"shrink={shrink}: the factor of the smallest weights must be in [0, 1]")
    updates = _TIMING.updates(total_steps, 0, end_step, update_every)
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    best = keep_best(scores.magnitude, sparse)

    def settle(step: Step):
        def soften(ws, count, *_):
            views = [v.replace(w=w, g=None, m=None) for v, w in zip(step.views, ws)]
            return [
                jnp.where(m | jnp.isnan(w), w, (shrink * w).astype(w.dtype))
                for m, w in zip(best(Step(count, views)), ws)
            ]

        soft = when(step.count < updates.end, soften, [v.w for v in step.views], step.count)
        return step.masks, soft

    def grow(step: Step):
        """Dense masks and the penalties, until the last update cuts."""
        found, last = best(step), step.count >= updates.end
        # The updates at 0, T, 2T, ... before the cut; a part of the last interval has one, too.
        rises = -((updates.begin - updates.end) // updates.every)
        more = limit / jnp.maximum(rises, 1)
        grown = [
            jnp.minimum(old + jnp.where(m | last, 0.0, more).astype(old.dtype), limit)
            for old, m in zip(step.aux, found)
        ]
        return [m | ~last for m in found], grown

    def pulled(step: Step):
        rows = zip(step.views, step.aux)
        zero = lambda g: jnp.zeros((), g.dtype)
        return [jnp.where(v.m, v.g + (x * v.w).astype(v.g.dtype), zero(v.g)) for v, x in rows]

    if penalty == "l2":
        return hold_masks(
            inner,
            sparse,
            init=all_kept,
            rule=grow,
            at=updates,
            gradient=pulled,
            aux=lambda step: [jnp.zeros_like(v.w) for v in step.views],
        )
    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=best,
        at=schedules.At((updates.end,)),
        after=settle,
    )
