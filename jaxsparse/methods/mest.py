"""MEST: prune and regrow at random without a dense gradient, by elastic or soft mutation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import schedules, selection
from jaxsparse.allocations import ByShape
from jaxsparse.choose import unit_budgets
from jaxsparse.engines import Step, hold_masks, is_concrete, random_masks, refill
from jaxsparse.engines.setup import setup
from jaxsparse.leaves import Leaf
from jaxsparse.methods.registry import preset, register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import (
    AllocationLike,
    Scalar,
    Schedule,
    Seed,
    StepCount,
    StructureLike,
    Targets,
)

_REFERENCE = (
    "Yuan et al., MEST: accurate and fast memory-economic sparse training framework on the edge, "
    "2021"
)
_TIMING = Timing(begin=None)
# The authors' tables: 0.02 of sparsity at 90 % and 0.01 at 95 % are a fifth of what is kept.
_MUTATION = {"elastic": (0.2, 0.1, 0.0), "soft": (0.05, 0.025, 0.0)}


@register("mest", reference=_REFERENCE, structures="any but n:m", timing=_TIMING)
def mest(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    memory: Literal["elastic", "soft"] = "elastic",
    mutation: Sequence[float] | Schedule | None = None,
    gradient_weight: Scalar = 0.0,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes each layer by |w| and |g| and grows it back at random, in phases that mutate less and
    less. The score is $|w| + \lambda |g|$, with g of kept weights only: no dense gradient is ever
    needed.

    - `memory="elastic"` (EM): the layer is pruned to the density $(1 - S)(1 - \mu_t)$ and grown back
      to its sparsity S.
    - `memory="soft"` (EM&S): it is pruned to S and grown to $S - \mu_t$, denser than S until the last
      phase, and needs the memory of $S - \mu_0$.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1).
      total_steps: the length of the run, in steps.
      memory: see above.
      mutation: $\mu$, one number for each of equally long phases between `begin_step` and `end_step`,
        or a schedule: of "elastic" the part of the kept weights, of "soft" sparsity. By default the
        authors' (0.2, 0.1, 0) and (0.05, 0.025, 0); the last phase moves nothing.
      gradient_weight: $\lambda$ of the score; 0 as in the released code is magnitude.
      update_every: steps between two updates of the masks.
      begin_step: where the phases start, 0 or more; after `update_every` steps by default. The masks
        of step 0 are those of `init`.
      end_step: from here on the sparsity is exact and the mask stays; 75 % of the run by default.
      structure: which patterns of zeros are allowed, any but N:M, whose sparsity is fixed: a
        structure, its text ("block:16x16"), None for any, or a mapping from path patterns to these.
      allocation: the budgets of layers: "uniform", "er", "erk", a mapping by path; dense layers are left
        alone.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in: counts are exact; theirs prunes below a percentile, and so
    all that are equal to it.

    >>> import jaxsparse
    >>> tx = jaxsparse.mest(optax.sgd(0.1), 0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity or a step out of range, a mutation out of [0, 1), a structure that fixes
        its sparsity, an unknown `memory`.
    """
    if memory not in _MUTATION:
        raise ValueError(f"memory={memory!r}: use 'elastic' or 'soft'")
    if is_concrete(gradient_weight) and gradient_weight < 0:
        raise ValueError(f"gradient_weight={gradient_weight}: must not be negative")
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks, by_layer=True)
    updates = _TIMING.updates(total_steps, begin_step, end_step, update_every)
    amount = _phases(_MUTATION[memory] if mutation is None else mutation, updates)

    def budgets(step: Step) -> tuple[list, list]:
        """The units of each layer after pruning and after growth."""
        moved = amount(step.count)
        lower, upper = {
            "elastic": (lambda s: s + moved * (1.0 - s), lambda s: s),
            "soft": (lambda s: s, lambda s: s - moved),
        }[memory]
        units = lambda shift: unit_budgets(
            step.leaves, _Shifted(sparse.by_shape, shift), sparse.sparsity
        )
        return units(lower), units(upper)

    def rule(step: Step):
        low, high = budgets(step)
        leaves, axes = step.leaves, [leaf.axes for leaf in step.leaves]
        worth = [jnp.abs(v.w) + gradient_weight * jnp.abs(v.g) for v in step.views]
        keep = selection.topk_masks(
            [leaf.pool(x) for leaf, x in zip(leaves, worth)],
            low,
            where=[leaf.units(m) for leaf, m in zip(leaves, step.held)],
            axis=axes,
        )
        missing = [n - selection.count(k, axis=a) for n, k, a in zip(high, keep, axes)]
        return refill(leaves, keep, missing, None, salts=step.salts(seed), inside=step.inside)

    def denser(step: Step):
        inside = step.inside or [None] * len(step.views)
        return [
            v.leaf.best(jnp.zeros_like(v.w), k, where=m, ties="hash", seed=v.leaf.salt(seed, 0))
            for v, k, m in zip(step.views, budgets(step)[1], inside)
        ]

    return hold_masks(
        inner,
        sparse,
        init=denser if memory == "soft" else random_masks(sparse),
        rule=rule,
        at=updates,
        gradient="kept",
        fresh="grown",
    )


def _phases(mutation: Sequence[float] | Schedule, updates: schedules.Updates) -> Schedule:
    if callable(mutation):
        return mutation
    # In numpy: jnp would trace what is known, where the method is made under jit.
    known = np.asarray(mutation) if is_concrete(mutation) else np.zeros(1)
    if known.ndim != 1 or ((known < 0) | (known >= 1)).any():
        raise ValueError(f"mutation={mutation}: give fractions in [0, 1), one per phase")
    return schedules.phases(jnp.asarray(mutation, jnp.float32), updates.begin, updates.end)


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


mest_soft = preset(
    "mest_soft",
    mest,
    """MEST with a soft memory bound (EM&S), denser than asked until its last phase. It is `mest` with
    `memory="soft"`, where the options are explained.

    >>> import jaxsparse
    >>> tx = jaxsparse.mest_soft(optax.sgd(0.1), 0.9, total_steps=10_000)
    """,
    reference=_REFERENCE,
    fixed={"memory": "soft"},
    structures="any but n:m",
    dense_phase="denser than asked by the mutation before end_step",
    exact_budget=False,
    timing=_TIMING,
)
