"""SET: drop the smallest weights, grow at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules, scores, selection
from jaxsparse.engines import Step, View, drop_and_grow, hold_masks, random_start, refill
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import REWIRING
from jaxsparse.selection import scale_count
from jaxsparse.typing import (
    AllocationLike,
    Scalar,
    ScalarOrSchedule,
    Seed,
    StepCount,
    StructureLike,
    Targets,
)


def _kept_by_sign(v: View, fraction) -> tuple[Array, Array]:
    """The units without the fraction closest to zero of the positive and of the negative ones, and
    without those that are zero; and the number that is missing."""
    axes, units = v.leaf.axes, v.leaf.units(v.m)
    value, size = v.leaf.pool(v.w), v.leaf.pool(jnp.abs(v.w))
    keep = jnp.zeros_like(units)
    for side in (units & (value > 0), units & (value < 0)):
        n = selection.count(side, axis=axes)
        keep |= selection.topk_mask(size, n - scale_count(n, fraction), where=side, axis=axes)
    return keep, selection.count(units, axis=axes) - selection.count(keep, axis=axes)


def drawn_values(step: Step, initializer: Callable[..., Array], seed) -> list[Array]:
    """Values of the initializer for all weights, from a key of the leaf, the step and the seed."""
    keys = [jax.random.key(salt ^ jnp.uint32(0x5BF03635)) for salt in step.salts(seed)]
    return [initializer(k, v.w.shape, v.w.dtype) for k, v in zip(keys, step.views)]


@register(
    "set",
    reference="Mocanu et al., Scalable training of artificial neural networks with adaptive sparse "
    "connectivity inspired by network science, 2018",
    timing=REWIRING,
)
def set_(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    removal: Literal["magnitude", "signwise"] = "magnitude",
    grow_init: Callable[..., Array] | None = None,
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
    r"""As `rigl`, but the positions that grow are drawn uniformly at random among those not kept,
    and the gradient step is taken at updates too (survivors move; a grown weight starts at 0 with
    a fresh inner state).

    By default this is SET as RigL's authors run it: smallest |w| whatever their sign, and a fraction
    that falls along a cosine. The first SET is `removal="signwise"` with a constant fraction
    (`drop_fraction=lambda step: 0.3`): it drops that fraction of the positive and of the negative
    weights separately, those closest to zero, and kept weights that are exactly zero; it starts
    grown weights at the values that their positions had, here they are 0, or drawn by `grow_init`
    (as in the authors' sparse code, N(0, 1)/10).

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      removal: "magnitude" or "signwise", see above.
      grow_init: an initializer `(key, shape, dtype) -> values` of grown weights, such as
        `jax.nn.initializers.normal(0.1)`; None: they start at 0.
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

    >>> import jaxsparse
    >>> tx = jaxsparse.set_(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, an update that never comes, an unknown
        `removal`.
    """
    updates = REWIRING.updates(total_steps, begin_step, end_step, update_every)
    if removal not in ("magnitude", "signwise"):
        raise ValueError(f"removal={removal!r}: use 'magnitude' or 'signwise'")
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    fraction = schedules.drop_fraction(drop_fraction, updates.end)

    def by_sign(step: Step):
        f = fraction(step.count)
        keep, missing = map(list, zip(*[_kept_by_sign(v, f) for v in step.views]))
        return refill(
            step.leaves,
            keep,
            missing,
            None,
            salts=step.salts(seed),
            inside=step.inside,
        )

    by_magnitude = drop_and_grow(scores.magnitude, scores.random, fraction, seed=seed)
    return hold_masks(
        inner,
        sparse,
        init=random_start(sparse, fraction, updates.begin),
        rule=by_sign if removal == "signwise" else by_magnitude,
        grow_init=None if grow_init is None else lambda step: drawn_values(step, grow_init, seed),
        at=updates,
        gradient="kept",
        fresh="grown",
    )
