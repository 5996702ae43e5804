"""ITOP: SET and RigL with rare, large updates, and a record of every weight ever tried."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import masking, scores
from jaxsparse.engines import Step, hold_masks, swap
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register
from jaxsparse.methods._timing import REWIRING
from jaxsparse.state import find_states

_REFERENCE = (
    "Liu et al., Do we actually need dense over-parameterization? In-time over-parameterization in "
    "sparse training, 2021"
)


# The authors' intervals of 1,500 and 4,000 steps in runs of 97,500.
_SET = dataclasses.replace(REWIRING, every=(1, 65))
_RIGL = dataclasses.replace(REWIRING, every=(8, 195))


class Fired(NamedTuple):
    """The masks (packed to bits) of the weights that have been kept at any time, per sparse leaf."""

    masks: list


def exploration_rate(fired: Any) -> float:
    r"""$R_s = |\bigcup_t support(m_t)| / n$: the part of the weights that have ever been kept.

    Args:
      fired: an optimizer state of `set_itop` or `rigl_itop`; or, for any other method, the tree of
        masks that you have joined over time: `fired = jax.tree.map(jnp.logical_or, fired, masks)`.

    >>> exploration_rate({"kernel": jnp.array([True, True, False, False])})
    0.5

    Raises:
      ValueError: a state that keeps no record.
    """
    found = [s.aux for s in find_states(fired) if isinstance(s.aux, Fired)]
    if not found and find_states(fired):
        raise ValueError("fired: this method keeps no record of the weights that it has tried")
    trees = [f.masks for f in found] or fired
    masks = [m for m in jax.tree.leaves(trees, is_leaf=masking.is_mask) if m is not None]
    return masking.count_kept(masks) / max(sum(masking.unpack(m).size for m in masks), 1)


def _itop(
    inner, sparsity, *, by_gradient, unfired, total_steps, drop_fraction, update_every, begin_step,
    end_step, structure, allocation, targets, seed, pack_masks,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    timing = _RIGL if by_gradient else _SET
    updates = timing.updates(total_steps, begin_step, end_step, update_every)
    fraction = recipe.drop_schedule(drop_fraction, updates.end, final=0.005)

    def rule(step: Step):
        if unfired:
            grow = [(~fired.unpack()).astype(jnp.float32) for fired in step.aux.masks]
        else:
            worth = scores.gradient if by_gradient else scores.random
            grow = [worth(v) for v in step.views]
        masks = swap(
            step.leaves, step.masks, [jnp.abs(v.w) for v in step.views], grow,
            fraction(step.count), salts=step.salts(seed),
        )  # fmt: skip
        both = [masking.pack(f.unpack() | m) for f, m in zip(step.aux.masks, masks)]
        return masks, Fired(both)

    return hold_masks(
        inner,
        recipe.plan_for(targets, structure),
        init=recipe.random_masks(allocation, recipe.sparsity_of(sparsity, structure), seed),
        rule=rule,
        at=updates,
        gradient="masked" if by_gradient else "kept",
        on_update="replace" if by_gradient else "step",
        fresh="grown",
        aux=lambda step: Fired([masking.pack(m) for m in step.masks]),
        pack_masks=pack_masks,
    )


_ARGS = """

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of zeros in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      drop_fraction: the start of a cosine to 0.005 (the authors use 0.5), or a schedule.
      update_every: steps between updates; a grown weight needs time before it is judged. By default
        the authors' part of the run, which has 97,500 steps: 1,500 of them in `set_itop`, 4,000 in
        `rigl_itop`.
      begin_step, end_step: the first update (`update_every`) and the last (75 % of the run).
      structure, allocation, targets, seed, pack_masks: see the guide of options.

    This differs from the authors' code in: growth draws exactly as many positions as were dropped,
    where theirs flips a coin for each, so that their budget drifts.

    Raises:
      ValueError: as `rigl`.
"""


@register("set_itop", reference=_REFERENCE)
def set_itop(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    growth: Literal["random", "unfired"] = "random",
    drop_fraction: Any = 0.5,
    update_every: Any = None,
    begin_step: Any = None,
    end_step: Any = None,
    structure: Any = None,
    allocation: Any = "erk",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SET that drops much and rarely, and records what has been tried (`exploration_rate`).

    `growth="unfired"` draws from the positions that have never been kept while there are any, so
    that all n weights are tried after $\lceil (n - n_1)/k \rceil$ updates of k weights each.
    """
    if growth not in ("random", "unfired"):
        raise ValueError(f"growth={growth!r}: use 'random' or 'unfired'")
    return _itop(
        inner, sparsity, by_gradient=False, unfired=growth == "unfired", total_steps=total_steps,
        drop_fraction=drop_fraction, update_every=update_every, begin_step=begin_step, end_step=end_step,
        structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip


@register("rigl_itop", reference=_REFERENCE, gradients="updates")
def rigl_itop(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    drop_fraction: Any = 0.5,
    update_every: Any = None,
    begin_step: Any = None,
    end_step: Any = None,
    structure: Any = None,
    allocation: Any = "erk",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """RigL that drops much and rarely, and records what has been tried (`exploration_rate`)."""
    return _itop(
        inner, sparsity, by_gradient=True, unfired=False, total_steps=total_steps,
        drop_fraction=drop_fraction, update_every=update_every, begin_step=begin_step, end_step=end_step,
        structure=structure, allocation=allocation, targets=targets, seed=seed,
        pack_masks=pack_masks,
    )  # fmt: skip


for _method in (set_itop, rigl_itop):
    _method.__doc__ = (_method.__doc__ or "").rstrip() + _ARGS
