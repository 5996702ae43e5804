"""ITOP: SET and RigL with rare, large updates, and a record of every weight ever tried."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import masking, schedules, scores
from jaxsparse.engines import Step, hold_masks, random_start, swap
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import preset
from jaxsparse.methods.timing import REWIRING
from jaxsparse.state import find_states
from jaxsparse.typing import (
    AllocationLike,
    Scalar,
    ScalarOrSchedule,
    Seed,
    StepCount,
    StructureLike,
    Targets,
)


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


# The authors' intervals of 1,500 steps in a run of 97,500, and 4,000 where gradients choose.
_RANDOM = dataclasses.replace(REWIRING, every=(1, 65))
_GRADIENT = dataclasses.replace(REWIRING, every=(8, 195))


def itop(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    growth: Literal["random", "unfired", "gradient"] = "random",
    drop_fraction: ScalarOrSchedule = 0.5,
    update_every: StepCount | None = None,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "erk",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic sparse training that drops much and rarely, so that over time many weights are tried
    and each is tried for long. The state records what has been tried (`exploration_rate`).

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      growth: "random": uniformly among the positions that are not kept, as `set_`. "unfired": among
        those that have never been kept while there are any, so that all n weights are tried after
        $\lceil (n - n_1)/k \rceil$ updates of k weights each. "gradient": where |g| is largest, and
        updates take the place of the gradient step, as `rigl`.
      drop_fraction: the start of a cosine to 0.005 (the authors use 0.5), or a schedule.
      update_every: steps between updates; a grown weight needs time before it is judged. By default
        the authors' part of the run: 1,500 of 97,500 steps, with `growth="gradient"` 4,000.
      begin_step: the first update, at least 1; after `update_every` steps by default.
      end_step: no update after it; 75 % of the run by default.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in: growth draws exactly as many positions as were dropped,
    where theirs flips a coin for each, so that their budget drifts.

    >>> import jaxsparse
    >>> tx = jaxsparse.itop(optax.sgd(0.1), 0.9, total_steps=10_000, growth="unfired")

    Raises:
      ValueError: a sparsity, fraction or step out of range, an update that never comes, an unknown
        growth.
    """
    if growth not in ("random", "unfired", "gradient"):
        raise ValueError(f"growth={growth!r}: use 'random', 'unfired' or 'gradient'")
    by_gradient = growth == "gradient"
    timing = _GRADIENT if by_gradient else _RANDOM
    updates = timing.updates(total_steps, begin_step, end_step, update_every)
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    fraction = schedules.drop_fraction(drop_fraction, updates.end, final=0.005)

    def rule(step: Step):
        if growth == "unfired":
            grow = [(~fired.unpack()).astype(jnp.float32) for fired in step.aux.masks]
        else:
            grow = [scores.gradient(v) for v in step.views] if by_gradient else None
        masks = swap(
            step.leaves,
            step.masks,
            [jnp.abs(v.w) for v in step.views],
            grow,
            fraction(step.count),
            salts=step.salts(seed),
            inside=step.inside,
        )
        both = [masking.pack(f.unpack() | m) for f, m in zip(step.aux.masks, masks)]
        return masks, Fired(both)

    return hold_masks(
        inner,
        sparse,
        init=random_start(sparse, fraction, updates.begin),
        rule=rule,
        at=updates,
        gradient="masked" if by_gradient else "kept",
        on_update="replace" if by_gradient else "step",
        fresh="grown",
        aux=lambda step: Fired([masking.pack(m) for m in step.masks]),
    )


_REFERENCE = (
    "Liu et al., Do we actually need dense over-parameterization? In-time over-parameterization in "
    "sparse training, 2021"
)

set_itop = preset(
    "set_itop",
    itop,
    """SET that drops much and rarely, and records what has been tried. It is `itop` with random growth,
    where the options are explained.

    >>> import jaxsparse
    >>> tx = jaxsparse.set_itop(optax.sgd(0.1), 0.9, total_steps=10_000, growth="unfired")
    """,
    reference=_REFERENCE,
    fixed={},
    timing=_RANDOM,
)

rigl_itop = preset(
    "rigl_itop",
    itop,
    """RigL that drops much and rarely, and records what has been tried. It is `itop` with
    `growth="gradient"`, where the options are explained.

    >>> import jaxsparse
    >>> tx = jaxsparse.rigl_itop(optax.sgd(0.1), 0.9, total_steps=10_000)
    """,
    reference=_REFERENCE,
    fixed={"growth": "gradient"},
    gradients="updates",
    timing=_GRADIENT,
)
