"""AC/DC: sparse and dense phases in turn, ending sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse.engines import hold_masks, is_concrete, keep_best
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets

# Percent of the run: the authors' 100 epochs on ImageNet.
_SWITCHES = (10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85)


def _default_switches(total_steps) -> tuple:
    """The authors' table; a run too short to hold it has one switch, half way."""
    steps = tuple(total_steps * percent // 100 for percent in _SWITCHES)
    if is_concrete(total_steps) and len(set(steps)) < len(steps):
        return (total_steps // 2,)
    return steps


def _timing(options: Mapping[str, Any]) -> dict[str, Any]:
    given = options["switches"]
    return {"switches": _default_switches(options["total_steps"]) if given is None else given}


@register(
    "ac_dc",
    reference="Peste et al., AC/DC: alternating compressed/decompressed training of deep neural "
    "networks, 2021",
    dynamics="gradual",
    dense_phase="dense before the first switch, and between each second switch and the next",
    starts_dense=True,
    timing=_timing,
)
def ac_dc(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    switches: Sequence[StepCount] | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Alternates between compressed phases, at the full sparsity at once by the largest |w|, and
    dense phases. It starts dense and ends compressed.

    When a dense phase begins, the weights that were pruned start from 0, and the inner optimizer's
    per-weight state (its momentum) of all weights starts as at `init`, so that the first step of a
    pruned weight is $-\eta g$ with SGD. Step counts, and so learning rates, go on.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: of the compressed phases, in [0, 1); may be left out with an N:M structure (then
        with `allocation="uniform"`).
      total_steps: the length of the run, in steps.
      switches: the steps at which the phase changes, an odd number of them, so that the last phase
        is compressed. By default, in percent of the run: compressed at 10, 20, ..., 70 for 5 each,
        and from 85 on.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: "global" as the authors' main results, or "uniform".
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.ac_dc(optax.sgd(0.1, momentum=0.9), 0.9, total_steps=1000)

    Raises:
      ValueError: a sparsity out of range, switches that are even in number, not increasing or not
        within the run.
    """
    schedules.check_length(total_steps)
    if switches is None:
        switches = _default_switches(total_steps)
    if is_concrete(total_steps, *switches):
        ordered = all(a < b for a, b in zip(switches, switches[1:]))
        if len(switches) % 2 == 0 or not ordered or switches[0] < 0 or switches[-1] >= total_steps:
            raise ValueError(
                f"switches={tuple(switches)}: give an odd number of increasing steps from 0 to "
                f"{total_steps - 1}; the first one starts a compressed phase, and so does the last"
            )
    events = schedules.At(tuple(switches))
    compressed = lambda step: (events.passed(step) % 2).astype(jnp.float32)
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    rule = keep_best(scores.magnitude, sparse, ramp=compressed)
    return hold_masks(
        inner,
        sparse,
        init=rule,
        rule=rule,
        at=events,
        fresh=lambda count: events.fires(count) & (compressed(count) == 0),
    )
