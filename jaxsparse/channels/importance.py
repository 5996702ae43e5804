"""What a channel is worth: a number for every channel of every group, from its weights in all members."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import chex
import numpy as np

from jaxsparse.channels.adapt import adapt
from jaxsparse.channels.collect import Member
from jaxsparse.channels.groups import Groups
from jaxsparse.channels.keep import aliases, per_channel
from jaxsparse.targets import named_leaves

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
ScoreName = Literal["magnitude", "taylor", "fisher", "batch_norm", "random"]
Reduction = Literal["mean", "sum", "max"]
Normalization = Literal["mean", "lamp", "none"]

_SCORES: dict[str, Score] = {
    "magnitude": lambda w, g: w * w,
    "taylor": lambda w, g: w * g,
    "fisher": lambda w, g: (w * g) ** 2,
    "batch_norm": lambda w, g: np.abs(w),
}
_NEED_GRADIENTS = ("taylor", "fisher")


def importance(
    model: object,
    groups: Groups,
    *,
    params: chex.ArrayTree | None = None,
    score: ScoreName | Score = "magnitude",
    grads: chex.ArrayTree | None = None,
    reduction: Reduction = "mean",
    normalization: Normalization = "mean",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    r"""The importance of every channel.

    In each member, which is the channel's slice of one leaf, the score is summed over the slice: $\sum w^2$
    ("magnitude"), $|\sum w g|$ ("taylor"), $\sum (w g)^2$ ("fisher"). The members of a channel are reduced to one
    number, and the numbers of a group are normalised, so that groups can be compared: divided by their mean, or by
    the sum of those that are no smaller ("lamp"). Biases and statistics do not count. "batch_norm" is $|\gamma|$
    alone, "random" is uniform.

    Args:
      model: what `find` was given.
      groups: the groups that it found.
      params: for functions and Linen modules the parameters now; by default those that `find` saw.
      score: a name, or a function of a leaf and its gradient (a zero without gradients) of the shape of the leaf.
      grads: gradients of all parameters, as a tree like them.
      reduction: of the members of a channel.
      normalization: of the channels of a group.
      seed: of "random".

    Returns:
      float64 [width], by group.

    Raises:
      ValueError: an unknown name, no gradients where they are needed, no scale of a norm in a group.
    """
    for argument, value, known in (
        ("reduction", reduction, ("mean", "sum", "max")),
        ("normalization", normalization, ("mean", "lamp", "none")),
    ):
        if value not in known:
            raise ValueError(f"{argument}={value!r}: use one of {', '.join(known)}")
    if not callable(score) and score not in (*_SCORES, "random"):
        raise ValueError(
            f"score={score!r}: use one of {', '.join(_SCORES)}, random, or a function of (w, g)"
        )
    if score == "random":
        rng = np.random.default_rng(seed)
        return {name: rng.random(group.width) for name, group in groups.items()}
    if grads is None and score in _NEED_GRADIENTS:
        raise ValueError(f"grads: score={score!r} needs gradients of the parameters; give grads=")
    if params is None and groups.model.kind in ("function", "linen"):
        params = groups.model.params
    named = adapt(model, groups.model.args, params).named()
    leaves = {p: np.asarray(x, np.float64) for p, x in named if p in groups.trained}
    slopes = _gradients(groups, grads, leaves)
    rule = score if callable(score) else _SCORES[score]
    found = {}
    for name, group in groups.items():
        counted = [
            m for m in group.members if m.path in leaves and _counts(m, score == "batch_norm")
        ]
        if not counted:
            what = "no scale of a norm" if score == "batch_norm" else "no floating-point parameter"
            raise ValueError(
                f"score={score!r}: {what} belongs to group {name!r}, which has {groups.untrained(group)}; leave it "
                "out with groups.without, or name its channels with shrink(keep=)"
            )
        rows = []
        for member in counted:
            values = rule(leaves[member.path], slopes.get(member.path, np.zeros(())))
            row = per_channel(member, values, group.width)
            rows.append(np.abs(row) if score == "taylor" else row)
        stacked = np.stack(rows)
        total = {"mean": stacked.mean(0), "sum": stacked.sum(0), "max": stacked.max(0)}[reduction]
        found[name] = _normalized(total, normalization)
    return found


def _counts(member: Member, scales_only: bool) -> bool:
    last = member.path.rpartition("/")[2]
    scale = member.side == "with" and last in ("scale", "weight", "gamma")
    return scale if scales_only else scale or member.side in ("out", "in")


def _gradients(
    groups: Groups, grads: chex.ArrayTree | None, leaves: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    if grads is None:
        return {}
    paths = aliases(groups)
    found = {paths[p]: np.asarray(g, np.float64) for p, g in named_leaves(grads) if p in paths}
    wrong = [p for p in leaves if p not in found or found[p].shape != leaves[p].shape]
    if wrong:
        raise ValueError(
            f"grads: no gradient of the shape of {wrong[0]!r}; give those of all parameters"
        )
    return found


def _normalized(total: np.ndarray, how: Normalization) -> np.ndarray:
    if how == "mean":
        mean = total.mean()
        return total / mean if mean > 0 else total
    if how == "lamp":
        return np.array([x / max(total[total >= x].sum(), np.finfo(float).tiny) for x in total])
    return total
