"""MEST: prune and regrow at random without a dense gradient, by elastic or soft mutation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import plan as plans
from jaxsparse import schedules, selection, structures
from jaxsparse._counts import is_concrete
from jaxsparse.allocations import ByShape
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register
from jaxsparse.plan import Leaf
from jaxsparse.transforms import Step, masked, refill

_REFERENCE = "Yuan et al., MEST: accurate and fast memory-economic sparse training framework on the edge, 2021"


@dataclasses.dataclass(frozen=True)
class _Shifted(ByShape):
    """The sparsities of `base`, by `amount` higher or lower; dense layers stay dense, and no layer
    loses more than all but one slice's unit."""

    base: ByShape
    amount: Any

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        def shift(leaf, s):
            if leaf.structure.sparsity is not None:
                raise ValueError(
                    f"structure={leaf.structure} fixes its sparsity, and leaves no room for the "
                    "mutation of this method; give another structure"
                )
            most = leaf.structure.slices(leaf.layer_shape) * leaf.structure.unit_size(
                leaf.layer_shape
            )
            moved = jnp.clip(s + self.amount, 0.0, 1.0 - most / leaf.layer_size)
            dense = jnp.asarray(s) <= 0
            return jnp.where(dense | (jnp.asarray(self.amount) == 0), s, moved)

        return [shift(leaf, s) for leaf, s in zip(leaves, self.base.sparsities(leaves, sparsity))]


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
        return plans.unit_budgets(step.leaves, _Shifted(budget, shift), sparsity)

    def rule(step: Step):
        moved, masks = amount(step.count), []
        lower, upper = (0.0, -moved) if soft else (moved, 0.0)
        for v, low, high in zip(step.views, units(step, lower), units(step, upper)):
            kind, lead = v.leaf.structure, v.leaf.lead
            axes = kind.axes(v.leaf.shape, lead)
            score = kind.pool(jnp.abs(v.w) + gradient_weight * jnp.abs(v.g), lead)
            held = structures.unit_mask(kind, v.m, lead)
            keep = selection.topk_mask(score, low, where=held, axis=axes)
            missing = high - selection.count(keep, axis=axes)
            salt = v.leaf.salt(seed, step.count)
            masks.append(refill(v.leaf, keep, missing, jnp.zeros_like(v.w), salt=salt))
        return masks

    start = (
        (lambda step: _random(step, units(step, -amount(0)), seed))
        if soft
        else recipe.random_masks(budget, sparsity, seed)
    )
    return masked(
        inner,
        recipe.plan_for(targets, structure),
        start,
        rule=rule,
        updates=updates,
        rule_sees="masked",
        restarts=True,
        pack_masks=pack_masks,
    )


def _random(step: Step, units, seed):
    return [
        structures.topk(
            v.leaf.structure, jnp.zeros_like(v.w), k, lead=v.leaf.lead, ties="hash",
            seed=v.leaf.salt(seed, 0),
        )
        for v, k in zip(step.views, units)
    ]  # fmt: skip


_ARGS = """

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of zeros in [0, 1).
      total_steps: the length of the run, in steps.
      mutation: the sparsity that an update moves, one number for each of equally long phases between
        `begin_step` and `end_step`, or a schedule of it. The last phase of the authors' tables
        moves nothing.
      gradient_weight: lambda of the score; 0 as in the released code is magnitude.
      update_every, begin_step, end_step: as `rigl`; from `end_step` on the sparsity is exact and the
        mask stays.
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
    mutation: Any = (0.02, 0.01, 0.0),
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

    The layer is pruned to the sparsity $S + \mu_t$ by $|w| + \lambda |g|$ and grown back to S; $\mu_t$
    falls in steps. g is the gradient of kept weights only: no dense gradient is ever needed.
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

    Each layer is pruned to S and grown to $S - \mu_t$.
    The network needs the memory of $S - \mu_0$.
    """
    return _mest(
        inner, sparsity, soft=True, total_steps=total_steps, mutation=mutation,
        gradient_weight=gradient_weight, update_every=update_every, begin_step=begin_step,
        end_step=end_step, structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip


for _method in (mest, mest_soft):
    _method.__doc__ = (_method.__doc__ or "").rstrip() + _ARGS
