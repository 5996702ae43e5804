"""Group channel pruning: slimming whose penalty spares likely survivors, with a threshold per bunch of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import optax

from jaxsparse import schedules, selection
from jaxsparse.engines import Step, Units, all_kept, group_setup, hold_masks
from jaxsparse.engines.penalties import check_fraction, check_strength, penalized
from jaxsparse.leaves import salt
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.selection import kept_count, no_less, scale_count
from jaxsparse.targets import check_matched
from jaxsparse.typing import GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing(begin=40)


@register(
    "group_slimming",
    reference="Chu et al., Group channel pruning and spatial attention distilling for object detection, "
    "2022",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def group_slimming(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    bunches: Mapping[str, Scalar] | None = None,
    strength: Scalar = 1e-3,
    survivors: Scalar = 0.35,
    spared: Scalar = 0.99,
    layer_keep: Scalar = 0.01,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds $s\,sign(\gamma)$ to the gradients of the scales of norms; from `begin_step` on the largest $|\gamma|$ of
    each step see $0.01 s$ only. At `end_step` every bunch of layers has its own threshold on $|\gamma|$.

    Channels that a shortcut ties are one channel of a group: it stays or goes as a whole.

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of channels that go, of bunches that are not named, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel. Of a group with scales of norms $\gamma$ these alone count; without any
        (and without `groups`) all that makes a channel does, with its norm in the place of $|\gamma|$.
      bunches: sparsities by a regular expression on the names of groups (the paths of their leaves); the
        first that matches counts. None: one bunch, which is network slimming.
      strength: s; the authors take 0.001 to 0.005.
      survivors: the fraction of all channels, the largest, that the penalty spares.
      spared: how much of the penalty they are spared.
      layer_keep: the fraction of channels that every group keeps, at least one.
      begin_step: when sparing begins; 40 % of the run.
      end_step: when the cut is made; 75 % of the run.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    `channels.attention_transfer` is the loss by which the authors recover the accuracy.

    >>> import jaxsparse
    >>> tx = jaxsparse.group_slimming(optax.sgd(0.1), 0.5, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, a bunch that matches no group, a negative `strength`.
    """
    check_strength("strength", strength)
    check_fraction("survivors", survivors)
    check_fraction("spared", spared)
    check_fraction("layer_keep", layer_keep)
    updates = _TIMING.updates(total_steps, begin_step, end_step)
    sparse = group_setup(sparsity, groups, "uniform", targets, seed, pack_masks)

    def gradient(step: Step):
        units, ws = Units(step.leaves), [v.w for v in step.views]
        found = units.scale_norms(ws)
        total = sum(x.size for x in found)
        large = selection.topk_masks(found, scale_count(total, survivors), together=True)
        on = step.count >= updates.begin
        slopes = [strength * (1 - jnp.where(on & m, spared, 0.0)) for m in large]
        return penalized(step.views, units.pulled(ws, slopes), step.count < updates.end)

    def cut(step: Step):
        units = Units(step.leaves)
        found = units.scale_norms([v.w for v in step.views])
        names = [leaf.path for leaf in units.leaves]
        kept = list(found)
        rates = dict(bunches or {})
        check_matched("bunches", rates, names)
        of = [next((p for p in rates if re.search(p, name)), None) for name in names]
        for pattern in dict.fromkeys(of):
            at = [i for i, p in enumerate(of) if p == pattern]
            rate = sparse.sparsity if pattern is None else rates[pattern]
            least = [max(1, int(scale_count(found[i].size, layer_keep))) for i in at]
            stay = no_less(kept_count(sum(found[i].size for i in at), rate), sum(least))
            masks = selection.topk_masks(
                [found[i] for i in at],
                stay,
                together=True,
                minimum=least,
                ties="hash",
                seed=salt(sparse.seed, step.count, str(pattern)),
            )
            for i, mask in zip(at, masks):
                kept[i] = mask
        return [m & k for m, k in zip(step.masks, units.at_weights(kept))]

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=cut,
        at=schedules.At((updates.end,)),
        gradient=gradient,
    )
