"""DepGraph: a decay of coupled groups that is the stronger the less a group matters, then a cut."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules
from jaxsparse.engines import (
    Step,
    Units,
    all_kept,
    group_setup,
    hold_masks,
    is_concrete,
    keep_best_units,
)
from jaxsparse.engines.penalties import check_strength, penalized
from jaxsparse.engines.units import safe_divide
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing()


@register(
    "depgraph",
    reference="Fang et al., DepGraph: towards any structural pruning, 2023",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def depgraph(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    strength: Scalar = 1e-4,
    spread: Scalar = 16.0,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds $\lambda\, A^{(I_{max} - I_c)/(I_{max} - I_{min})} w$ to the gradients of all members of channel c: the
    kernels that make it, those that read it, its bias and scales. $I_c$ is the root of the mean over the
    members of $\sum w^2$. At `end_step` the channels of smallest $I_c^2$, relative to the mean of their group,
    are cut; the rest trains on without the penalty.

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of channels that go, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel.
      strength: $\lambda$, the decay of the strongest channel of a group.
      spread: A, the decay of the weakest in units of that; at least 1.
      end_step: when the cut is made; 75 % of the run.
      allocation: "uniform", "global", or a mapping by path.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.depgraph(optax.sgd(0.1, momentum=0.9), 0.5, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, a negative `strength`, a `spread` below 1.
    """
    check_strength("strength", strength)
    if is_concrete(spread) and not float(spread) >= 1:
        raise ValueError(
            f"spread={spread}: the decay of the weakest must be at least that of the strongest"
        )
    updates = _TIMING.updates(total_steps, None, end_step)
    sides = ("out", "with", "in")
    sparse = group_setup(sparsity, groups, allocation, targets, seed, pack_masks, sides=sides)

    def squares(units: Units, ws):
        return units.pool([jnp.square(w.astype(jnp.float32)) for w in ws], "mean")

    def gradient(step: Step):
        units, ws = Units(step.leaves), [v.w for v in step.views]
        decay = units.at_weights(
            [grown_decay(jnp.sqrt(x), spread) for x in squares(units, ws)], "sum"
        )
        found = [(strength * d * w).astype(w.dtype) for d, w in zip(decay, ws)]
        return penalized(step.views, found, step.count < updates.end)

    def relative(units: Units, ws):
        return [safe_divide(x, jnp.mean(x)) for x in squares(units, ws)]

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=keep_best_units(relative, sparse),
        at=schedules.At((updates.end,)),
        gradient=gradient,
    )


def grown_decay(importance: Array, spread: Scalar) -> Array:
    """The factor of the decay of every channel: 1 of the most important, `spread` of the least; 1 of all
    where they are equal.

    >>> grown_decay(jnp.array([1.0, 3.0, 2.0]), 16.0).tolist()
    [16.0, 1.0, 4.0]
    """
    most, least = jnp.max(importance), jnp.min(importance)
    return jnp.asarray(spread, jnp.float32) ** safe_divide(most - importance, most - least)
