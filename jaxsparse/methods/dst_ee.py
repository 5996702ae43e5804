"""DST-EE: RigL with a bonus for weights that have rarely been tried."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsparse import schedules
from jaxsparse.engines import Step, hold_masks, is_concrete, random_start, swap
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
    "dst_ee",
    reference="Huang et al., Dynamic sparse training via balancing the exploration-exploitation "
    "trade-off, 2023",
    gradients="updates",
    timing=REWIRING,
)
def dst_ee(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    exploration: Scalar = 0.1,
    epsilon: float = 1.0,
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
    r"""As `rigl`, but growth ranks by

    $$|g| + c\, \overline{|g|}\, \frac{\ln t}{N + \epsilon}$$

    with N the number of rounds (from `init` on) in which the weight was kept, t the step, and
    $\overline{|g|}$ the mean over the layer: gradient and coverage, as an upper confidence bound.
    c = 0 is RigL, bit for bit; a very large c tries every weight once before any again.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      exploration: c. The authors tune it per data set for a bonus without the mean; in units of the
        mean it has the same meaning in every layer.
      epsilon: $\epsilon$, so that N = 0 has a finite bonus.
      drop_fraction: the part of the kept weights that the first update replaces, which falls along
        a cosine to 0 at `end_step`; or a schedule.
      update_every: steps between two updates of the masks.
      begin_step: the first update, at least 1; after `update_every` steps by default.
      end_step: no update after it; 75 % of the run by default.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    The counters N are int32, one per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.dst_ee(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: as `rigl`; a negative `exploration`, an `epsilon` that is not positive.
    """
    if is_concrete(exploration) and exploration < 0:
        raise ValueError(f"exploration={exploration}: must not be negative")
    if epsilon <= 0:
        raise ValueError(f"epsilon={epsilon}: must be positive")
    updates = REWIRING.updates(total_steps, begin_step, end_step, update_every)
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    fraction = schedules.drop_fraction(drop_fraction, updates.end)

    def rule(step: Step):
        f, log_t = fraction(step.count), jnp.log(jnp.maximum(step.count, 1).astype(jnp.float32))

        def worth(v, tried):
            size = jnp.abs(v.g).astype(jnp.float32)
            mean = jnp.mean(size, axis=v.leaf.layer_axes, keepdims=True)
            return size + exploration * mean * log_t / (tried.astype(jnp.float32) + epsilon)

        masks = swap(
            step.leaves,
            step.masks,
            [jnp.abs(v.w) for v in step.views],
            [worth(v, tried) for v, tried in zip(step.views, step.aux)],
            f,
            salts=step.salts(seed),
            inside=step.inside,
        )
        return masks, [n + m.astype(jnp.int32) for n, m in zip(step.aux, masks)]

    return hold_masks(
        inner,
        sparse,
        init=random_start(sparse, fraction, updates.begin),
        rule=rule,
        at=updates,
        on_update="replace",
        fresh="grown",
        aux=lambda step: [m.astype(jnp.int32) for m in step.masks],
    )
