"""The arguments that several methods share, read in one place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxsparse import allocations, schedules, scores, structures
from jaxsparse._control import is_concrete
from jaxsparse.choose import check_sparsity
from jaxsparse.engines import Step, keep_best
from jaxsparse.leaves import Leaf, find


def plan_for(targets: Any, structure: Any):
    """The function from parameters to the plan; checks `structure`."""
    kind = structure if isinstance(structure, dict) else structures.resolve(structure)
    return functools.partial(find, target_rules=targets, structure=kind)


def sparsity_of(sparsity: Any, structure: Any):
    """The sparsity asked for, or that of the structure; checked."""
    kind = structure if isinstance(structure, dict) else structures.resolve(structure)
    return check_sparsity(sparsity, kind)


def allocation_of(allocation: Any):
    """The allocation object; checked."""
    return allocations.resolve(allocation)


def shape_rule(allocation: Any) -> allocations.ByShape:
    """The allocation object, which must give every layer a sparsity of its own.

    Raises:
      ValueError: a ranking over all layers.
    """
    rule = allocations.resolve(allocation)
    if isinstance(rule, allocations.Global):
        raise ValueError(
            f"allocation={allocation!r} ranks weights over all layers; this method needs budgets of "
            "layers: give 'uniform', 'er', 'erk' or a mapping from path patterns to sparsities"
        )
    return rule


def unstructured(leaf: Leaf) -> Leaf:
    """The same leaf without its structure."""
    return dataclasses.replace(leaf, structure=structures.Unstructured())


def random_masks(allocation: Any, sparsity: Any, seed: Any):
    """The rule that draws masks uniformly at random, with exact counts."""
    return keep_best(scores.random, allocations.resolve(allocation), sparsity, seed=seed)


def all_kept(step: Step) -> list:
    """The rule that keeps everything."""
    return [jnp.ones(v.w.shape, bool) for v in step.views]


def drop_schedule(drop_fraction: Any, end_step: Any, *, final: float = 0.0) -> Any:
    """A schedule as it is; a number as the start of a cosine to `final` at `end_step`.

    Raises:
      ValueError: a number not in [0, 1].
    """
    if callable(drop_fraction):
        return drop_fraction
    if is_concrete(drop_fraction) and not 0.0 <= float(drop_fraction) <= 1.0:
        raise ValueError(
            f"drop_fraction={drop_fraction}: the part of the kept weights that an update replaces "
            "must be in [0, 1]"
        )
    return schedules.cosine(drop_fraction, end_step, final=final)
