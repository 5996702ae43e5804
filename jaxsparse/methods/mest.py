"""MEST: prune and regrow at random without a dense gradient, by elastic or soft mutation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import schedules, selection
from jaxsparse._control import is_concrete
from jaxsparse.allocations import ByShape
from jaxsparse.choose import unit_budgets
from jaxsparse.engines import Step, hold_masks, refill
from jaxsparse.leaves import Leaf
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register

_REFERENCE = "Yuan et al., MEST: accurate and fast memory-economic sparse training framework on the edge, 2021"


@dataclasses.dataclass(frozen=True)
class _Shifted(ByShape):
    """The sparsities S of `base` as `shift(S)`; dense layers stay dense, and no layer loses more than
    all but one slice's unit."""

    base: ByShape
    shift: Callable[[Any], Any]

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        def shifted(leaf, s):
            if leaf.structure.sparsity is not None:
                raise ValueError(
                    f"structure={leaf.structure} fixes its sparsity, and leaves no room for the "
                    "mutation of this method; give another structure"
                )
            most = leaf.structure.slices(leaf.layer_shape) * leaf.structure.unit_size(
                leaf.layer_shape
            )
            moved = jnp.clip(self.shift(s), 0.0, 1.0 - most / leaf.layer_size)
            dense = jnp.asarray(s) <= 0
            return jnp.where(dense | (self.shift(s) == s), s, moved)

        return [shifted(leaf, s) for leaf, s in zip(leaves, self.base.sparsities(leaves, sparsity))]


def _mest(
    inner, sparsity, *, soft, total_steps, mutation, gradient_weight, update_every, begin_step,
    end_step, structure, allocation, targets, seed, pack_masks,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    sparsity, budget = recipe.sparsity_of(sparsity, structure), recipe.shape_rule(allocation)
    updates = schedules.window(
        total_steps, begin_step, end_step, update_every, default_begin=update_every
    )
    if is_concrete(gradient_weight) and gradient_weight < 0:
        raise ValueError(f"gradient_weight={gradient_weight}: must not be negative")
    amount = mutation
    if not callable(mutation):
        table = jnp.asarray(mutation, jnp.float32)
        # In numpy: jnp would trace what is known, where the method is made under jit.
        known = np.asarray(mutation) if is_concrete(mutation) else np.zeros(1)
        if known.ndim != 1 or ((known < 0) | (known >= 1)).any():
            raise ValueError(f"mutation={mutation}: give fractions in [0, 1), one per phase")
        amount = schedules.phases(table, updates.begin, updates.end)

    def units(step: Step, shift):
        return unit_budgets(step.leaves, _Shifted(budget, shift), sparsity)

    asked = lambda s: s
    denser = lambda moved: lambda s: s - moved
    sparser = lambda moved: lambda s: s + moved * (1.0 - s)

    def rule(step: Step):
        moved, views = amount(step.count), step.views
        lower, upper = (asked, denser(moved)) if soft else (sparser(moved), asked)
        low, high = units(step, lower), units(step, upper)
        axes = [v.leaf.axes for v in views]
        keep = selection.topk_masks(
            [v.leaf.pool(jnp.abs(v.w) + gradient_weight * jnp.abs(v.g)) for v in views],
            low,
            where=[v.leaf.units(v.m) for v in views],
            axis=axes,
        )
        missing = [n - selection.count(k, axis=a) for n, k, a in zip(high, keep, axes)]
        return refill(
            step.leaves, keep, missing, [jnp.zeros_like(v.w) for v in views],
            salts=step.salts(seed),
        )  # fmt: skip

    start = (
        (lambda step: _random(step, units(step, denser(amount(0))), seed))
        if soft
        else recipe.random_masks(budget, sparsity, seed)
    )
    return hold_masks(
        inner,
        recipe.plan_for(targets, structure),
        init=start,
        rule=rule,
        at=updates,
        gradient="kept",
        fresh="grown",
        pack_masks=pack_masks,
    )


def _random(step: Step, units, seed):
    return [
        v.leaf.best(jnp.zeros_like(v.w), k, ties="hash", seed=v.leaf.salt(seed, 0))
        for v, k in zip(step.views, units)
    ]


_ARGS = """

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of zeros in [0, 1).
      total_steps: the length of the run, in steps.
      mutation: what an update moves, one number for each of equally long phases between
        `begin_step` and `end_step`, or a schedule of it. `mest`: the part of the kept weights (the
        authors' tables, 0.02 of sparsity at 90 % and 0.01 at 95 %, are a fifth of them both times).
        `mest_soft`: sparsity (0.05 in the authors' tables, at 90 and at 95 %). The last phase of
        these tables moves nothing.
      gradient_weight: lambda of the score; 0 as in the released code is magnitude.
      update_every, begin_step, end_step: as `rigl`; from `end_step` on the sparsity is exact and the
        mask stays. `begin_step` may be 0, where the phases start; the masks of step 0 are those of
        `init`.
      structure: any but N:M, whose sparsity is fixed.
      allocation, targets, seed, pack_masks: see the guide of options. Dense layers are left alone.

    This differs from the authors' code in: counts are exact; theirs prunes below a percentile, and so
    all that are equal to it.

    Raises:
      ValueError: as `rigl`; a mutation out of [0, 1), a structure that fixes its sparsity.
"""


@register("mest", reference=_REFERENCE, structures="unstructured", exact_budget=True)
def mest(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    mutation: Any = (0.2, 0.1, 0.0),
    gradient_weight: Any = 0.0,
    update_every: Any = 100,
    begin_step: Any = None,
    end_step: Any = None,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""MEST with elastic mutation (EM): prune each layer beyond its sparsity S by |w| and |g|, and grow
    it back at random.

    The layer is pruned to the density $(1 - S)(1 - \mu_t)$ by $|w| + \lambda |g|$ and grown back to S;
    $\mu_t$ falls in steps. g is the gradient of kept weights only: no dense gradient is ever needed.
    """
    return _mest(
        inner, sparsity, soft=False, total_steps=total_steps, mutation=mutation,
        gradient_weight=gradient_weight, update_every=update_every, begin_step=begin_step,
        end_step=end_step, structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip


@register(
    "mest_soft",
    reference=_REFERENCE,
    structures="unstructured",
    dense_phase="denser than asked by the mutation before end_step",
    exact_budget=False,
)
def mest_soft(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    mutation: Any = (0.05, 0.025, 0.0),
    gradient_weight: Any = 0.0,
    update_every: Any = 100,
    begin_step: Any = None,
    end_step: Any = None,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""MEST with a soft memory bound (EM&S): as `mest`, but denser than S until the last phase.

    Each layer is pruned to the sparsity S and grown to $S - \mu_t$: it needs the memory of
    $S - \mu_0$.
    """
    return _mest(
        inner, sparsity, soft=True, total_steps=total_steps, mutation=mutation,
        gradient_weight=gradient_weight, update_every=update_every, begin_step=begin_step,
        end_step=end_step, structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip


for _method in (mest, mest_soft):
    _method.__doc__ = (_method.__doc__ or "").rstrip() + _ARGS
