"""HESSO: the least important groups are chosen period by period, and shrink to exactly zero in each."""

from __future__ import annotations

import functools
import operator

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules
from jaxsparse.engines import Step, Units, all_kept, group_setup, hold_masks, is_concrete
from jaxsparse.engines.step import any_nan
from jaxsparse.engines.units import safe_divide
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing(begin=10)


@register(
    "hesso",
    reference="Chen et al., HESSO: towards automatic efficient and user friendly any neural network "
    "training and pruning, 2024",
    dynamics="gradual",
    structures="groups",
    gradients="updates",
    dense_phase="dense before begin_step, sparser until end_step",
    starts_dense=True,
    timing=_TIMING,
)
def hesso(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    periods: int = 10,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""At the start of each period of T steps the least important groups are chosen, then multiplied after
    every step $t = 0 \dots T - 1$ by $(T - t - 1)/(T - t)$: they are exactly zero at the end of it.

    The importance of a group x with gradient v is the mean of five numbers, each divided by its norm over
    all groups: $\|x\|$, $\|x\|/\sqrt n$, $1 + \cos(x, v)$, $|x \cdot v|$, $(x \cdot v)^2 / 2$.

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of units that end as zeros, of every group, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel.
      periods: how many.
      begin_step: the start of the first period; a tenth of the run.
      end_step: the last step of the last period; 75 % of the run.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.hesso(optax.adamw(1e-3), 0.5, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, fewer than one period, `groups` that are none.
    """
    if not isinstance(periods, int) or periods < 1:
        raise ValueError(f"periods={periods!r}: give a positive integer")
    updates = _TIMING.updates(total_steps, begin_step, end_step)
    begin, end = updates.begin, updates.end
    if is_concrete(begin, end) and end - begin + 1 < periods:
        raise ValueError(
            f"periods={periods}: there are {end - begin + 1} steps from begin_step={begin} to "
            f"end_step={end}; give fewer periods or more steps"
        )
    length = (end - begin + 1) // periods
    sparse = group_setup(sparsity, groups, targets=targets, seed=seed, pack_masks=pack_masks)

    def period(count: Array) -> Array:
        return jnp.clip((count - begin) // length, 0, periods - 1)

    def choose(step: Step):
        """More units that must go, those of the last period among them."""
        units, old = Units(step.leaves), step.aux
        worth = importance(units, [v.w for v in step.views], [v.g for v in step.views])
        total = [u.layer_size for u in units.leaves]
        gone = [
            (n - k) * (period(step.count) + 1) // periods
            for n, k in zip(total, units.budgets(sparse))
        ]
        left = [n - g for n, g in zip(total, gone)]
        stay = units.most(worth, left, sparse, [~d for d in old], step.count)
        return step.masks, [~s for s in stay]

    def shrink(step: Step):
        units, count = Units(step.leaves), step.count
        start = begin + period(count) * length
        stop = jnp.where(period(count) == periods - 1, end, start + length - 1)
        left = jnp.maximum(stop - count + 1, 1).astype(jnp.float32)
        factor = jnp.where(count < begin, 1.0, (left - 1) / left)
        doomed = [~m for m in units.at_weights([~d for d in step.aux])]
        sound = ~any_nan(
            [v.g for v in step.views], [v.w for v in step.views]
        )  # NaN removes nothing
        last = (count >= begin) & (count >= stop) & sound
        ws = [jnp.where(d, factor * v.w, v.w).astype(v.w.dtype) for d, v in zip(doomed, step.views)]
        return [m & ~(d & last) for m, d in zip(step.masks, doomed)], ws

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=choose,
        at=schedules.Updates(begin, begin + (periods - 1) * length, length, at_end=False),
        after=shrink,
        aux=lambda step: [jnp.zeros(u.shape, bool) for u in Units(step.leaves).leaves],
    )


def importance(units: Units, xs: list[Array], vs: list[Array]) -> list[Array]:
    """The importance of units by the five measures of HESSO, each normalised over all units."""
    norm, steep, inner = units.norms(xs), units.norms(vs), units.dots(xs, vs)
    size = [jnp.sqrt(n) for n in units.sizes()]
    measures = [
        norm,
        [safe_divide(n, s) for n, s in zip(norm, size)],
        [1 + safe_divide(p, n * s) for p, n, s in zip(inner, norm, steep)],
        [jnp.abs(p) for p in inner],
        [p * p / 2 for p in inner],
    ]

    def normalised(found):
        whole = jnp.sqrt(sum((jnp.sum(x * x) for x in found), jnp.zeros(())))
        return [safe_divide(x, whole) / len(measures) for x in found]

    rows = zip(*map(normalised, measures))
    return [functools.reduce(operator.add, row) for row in rows]
