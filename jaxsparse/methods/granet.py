"""GraNet: gradual pruning, with a RigL update after every cut."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse._control import is_concrete
from jaxsparse.choose import choose
from jaxsparse.engines import Step, hold_masks, swap
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register


@register(
    "granet",
    reference="Liu et al., Sparse training via boosting pruning plasticity with neuroregeneration, "
    "2021",
    dynamics="gradual",
    dense_phase="dense before begin_step where initial_sparsity is 0; then as sparse as the schedule",
    starts_dense=True,
    gradients="updates",
)
def granet(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    initial_sparsity: Any = 0.0,
    drop_fraction: Any = 0.5,
    update_every: Any = 100,
    begin_step: Any = None,
    end_step: Any = None,
    regrow_end_step: Any = None,
    initial_allocation: Any = "erk",
    structure: Any = None,
    allocation: Any = "global",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""At every update: 1. prunes the smallest |w| (of the whole network by default) to

    $$S(t) = S_f + (S_i - S_f)\bigl(1 - \tfrac{t - t_0}{t_1 - t_0}\bigr)^3;$$

    2. in each layer drops $\lfloor \rho n \rfloor$ of the n weights that are left, those of smallest
    |w|, and grows as many of largest |g|, just dropped ones included. From $t_1$ on only step 2 is
    done. A pruned weight returns by growth only.

    Args:
      inner: the optimizer of the weights.
      sparsity: $S_f$ in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      initial_sparsity: $S_i$: 0 starts dense; the authors' sparse-to-sparse training takes 0.5, with
        random masks split by `initial_allocation`.
      drop_fraction: $\rho$ at the start of a cosine to 0.005 at `regrow_end_step`, or a schedule.
      update_every: steps between updates.
      begin_step, end_step: $t_0$ (0; the masks of step 0 are those of `init`) and $t_1$ (half of the
        run).
      regrow_end_step: the last update (75 % of the run, or `end_step` if that is later).
      structure, allocation, targets, seed, pack_masks: see the guide of options.

    `drop_fraction=0` is gradual magnitude pruning. The authors round the number dropped up.

    >>> import jaxsparse
    >>> tx = jaxsparse.granet(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, `initial_sparsity` above `sparsity`.
    """
    sparsity = recipe.sparsity_of(sparsity, structure)
    if is_concrete(initial_sparsity, sparsity) and not 0.0 <= initial_sparsity <= sparsity:
        raise ValueError(
            f"initial_sparsity={initial_sparsity}: must be in [0, sparsity={sparsity}]"
        )
    prune = schedules.window(total_steps, begin_step, end_step, update_every, fraction=0.5)
    late = total_steps * 3 // 4
    if regrow_end_step is None:
        regrow_end_step = max(late, prune.end) if is_concrete(late, prune.end) else jnp.maximum(
            late, prune.end
        )  # fmt: skip
    updates = schedules.window(total_steps, begin_step, regrow_end_step, update_every)
    if is_concrete(updates.end, prune.end) and updates.end < prune.end:
        raise ValueError(f"regrow_end_step={regrow_end_step} is before end_step={prune.end}")
    budget = recipe.allocation_of(allocation)
    fraction = recipe.drop_schedule(drop_fraction, updates.end, final=0.005)
    start = initial_sparsity / jnp.maximum(sparsity, 1e-9) if initial_sparsity else 0.0
    ramp = schedules.cubic(prune.begin, prune.end, initial=start)

    def rule(step: Step):
        pruned = choose(
            step.leaves, [jnp.abs(v.w) for v in step.views], budget, sparsity,
            fraction=ramp(step.count), where=step.masks,
        )  # fmt: skip
        return swap(
            step.leaves, pruned, [scores.magnitude(v) for v in step.views],
            [scores.gradient(v) for v in step.views], fraction(step.count),
            salts=step.salts(seed),
        )  # fmt: skip

    return hold_masks(
        inner,
        recipe.plan_for(targets, structure),
        init=recipe.random_masks(initial_allocation, initial_sparsity, seed)
        if initial_sparsity
        else recipe.all_kept,
        rule=rule,
        at=schedules.Both(updates, schedules.At((prune.end,))),
        fresh="grown",
        pack_masks=pack_masks,
    )
