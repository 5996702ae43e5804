"""`prune`: from a trained model to a narrower one in one call, to a budget of channels, parameters or operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse import selection
from jaxsparse._checks import check_count
from jaxsparse._counts import kept_count
from jaxsparse.channels.adapt import adapt, is_array
from jaxsparse.channels.groups import Groups, groups_of
from jaxsparse.channels.importance import Normalization, Reduction, Score, ScoreName, importance
from jaxsparse.channels.keep import best
from jaxsparse.channels.shrink import Report, Shrunk, shrink

Target = Literal["channels", "params", "flops"]
Allocation = Literal["uniform", "global"]
_LEVELS = 1 << 16


def prune(
    model: object,
    inputs: object,
    sparsity: float,
    *,
    score: ScoreName | Score = "magnitude",
    allocation: Allocation = "uniform",
    target: Target = "channels",
    groups: Groups | None = None,
    opt_state: chex.ArrayTree | None = None,
    params: chex.ArrayTree | None = None,
    grads: chex.ArrayTree | Callable[[object], chex.ArrayTree] | None = None,
    reduction: Reduction = "mean",
    normalization: Normalization = "mean",
    round_to: int = 1,
    steps: int = 1,
    tolerance: float = 0.01,
    edit: Callable[[object], object] | None = None,
    seed: int = 0,
) -> Shrunk:
    """Removes the channels that are worth least, without training.

    Args:
      model: a module, or a function of `(params, *inputs)`, or a Linen module.
      inputs: an example input, or a tuple of them.
      sparsity: how much of `target` goes, in [0, 1): of the channels that may go, or of the parameters or operations
        of the whole model.
      score, reduction, normalization: what a channel is worth; see `channels.importance`.
      allocation: "uniform" takes the same share of every group, "global" ranks the channels of all groups together.
      target: what the budget counts.
      groups: the channels that may go; by default all of `channels.find`.
      opt_state: an optimizer's state or an `nnx.Optimizer`, to be cut as well.
      params: the parameters, where `model` is a function or a Linen module.
      grads: gradients of the parameters for scores that need them; for several steps a function of the model (of the
        parameters, where `model` is a function).
      round_to: widths are multiples of this where the old width allows.
      steps: in how many equal parts of the budget to go, with new scores in each.
      tolerance: how far what is left may be from the budget, as a share of all.
      edit: see `shrink`.
      seed: of `score="random"`.

    Returns:
      What `shrink` returns; `kept` has the old numbers, `report` compares with the model that was given.

    Raises:
      ValueError: an argument out of range, a budget that widths cannot meet, and what `find` and `shrink` raise.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 3, rngs=nnx.Rngs(1)))
    >>> small = prune(model, jnp.ones((2, 4)), 0.5, target="flops")
    >>> small.report.flops
    (896, 448)
    """
    _check(sparsity, allocation, target, steps, tolerance)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if groups is None:
        own = isinstance(model, nnx.Module) or any(map(is_array, jax.tree.leaves(model)))
        if params is None and not own:
            raise ValueError(
                "params: a function or a Linen module needs its parameters; give params="
            )
        first = groups_of(adapt(model, inputs, params))
    elif isinstance(groups, Groups):
        first = groups
    else:
        raise ValueError(f"groups: give what channels.find returned, not {type(groups).__name__}")
    if sparsity > 0:
        first.check_some(f"sparsity={sparsity}")
    if steps > 1 and first.model.kind == "linen":
        raise ValueError(
            f"steps={steps}: a Linen module must be built again before it runs with the new sizes; call prune for each "
            "step, with the module of that size"
        )
    goal_of = lambda step: sparsity * step / steps
    now, names, kept = first, tuple(first), {n: np.arange(g.width) for n, g in first.items()}
    small = None
    for step in range(1, steps + 1):
        current = model if small is None else small.model
        tree = params if small is None else small.params
        slopes = grads(current if tree is None else tree) if callable(grads) else grads
        worth = importance(
            current,
            now,
            params=tree,
            score=score,
            grads=slopes,
            reduction=reduction,
            normalization=normalization,
            seed=seed,
        )
        budget = _Budget(now, first, worth, target, allocation, round_to)
        keep = budget.reach(goal_of(step), tolerance)
        small = shrink(
            current,
            now,
            opt_state if small is None else small.opt_state,
            params=tree,
            keep=keep,
            exact=False,
            edit=edit,
        )
        kept = {
            name: at[small.kept[name]] if name in small.kept else at for name, at in kept.items()
        }
        if step < steps:
            now = groups_of(adapt(small.model, inputs, small.params if tree is not None else None))
            now = now.only(names)
    assert small is not None
    return dataclasses.replace(small, kept=kept, report=_report(first, small, kept))


@dataclasses.dataclass
class _Budget:
    """Widths of the groups `now` whose cost is a share of that of the groups `first`."""

    now: Groups
    first: Groups
    worth: Mapping[str, np.ndarray]
    target: Target
    allocation: Allocation
    round_to: int

    def cost(self, counts: Mapping[str, int]) -> int:
        if self.target == "channels":
            return sum(counts.values())
        return self.now.parameters(counts) if self.target == "params" else self.now.flops(counts)

    def whole(self) -> int:
        if self.target == "channels":
            return sum(self.first.widths.values())
        return self.first.parameters() if self.target == "params" else self.first.flops()

    def reach(self, sparsity: float, tolerance: float) -> dict[str, np.ndarray]:
        """The channels to keep, for a cost of `(1 - sparsity)` of the whole."""
        whole = self.whole()
        goal = int(kept_count(whole, sparsity))
        low, high = 0, _LEVELS if self.allocation == "uniform" else sum(self.now.widths.values())
        while low < high:  # the least level that costs no more than the goal
            middle = (low + high) // 2
            if self.cost(self.widths(middle)) <= goal:
                high = middle
            else:
                low = middle + 1
        choices = [self.widths(level) for level in (low, max(low - 1, 0))]
        counts = self._refined(min(choices, key=lambda c: abs(self.cost(c) - goal)), goal)
        missed = abs(self.cost(counts) - goal)
        if missed > tolerance * whole:
            raise ValueError(
                f"sparsity={sparsity}: a budget of {goal} {self.target} was asked for; widths in multiples of "
                f"{self.round_to}, at least one each, come to {self.cost(counts)} at best. Change sparsity, round_to or "
                f"groups, or give tolerance={missed / whole:.2g}"
            )
        return {name: best(self.worth[name], count) for name, count in counts.items()}

    def widths(self, level: int) -> dict[str, int]:
        """The widths when this many of `_LEVELS` parts of every group, or this many channels of all, go."""
        if self.allocation == "uniform":
            counts = {n: g.width - g.width * level // _LEVELS for n, g in self.now.items()}
        else:
            names = list(self.now)
            left = max(sum(self.now.widths.values()) - level, len(names))
            scores = [jnp.asarray(self.worth[name], jnp.float32) for name in names]
            masks = selection.topk_masks(scores, left, together=True, minimum=[1] * len(names))
            counts = {name: int(np.asarray(mask).sum()) for name, mask in zip(names, masks)}
        return {name: self._allowed(name, counts) for name in counts}

    def _allowed(self, name: str, counts: Mapping[str, int]) -> int:
        """A multiple of `round_to`, at least one, as many as in tied groups."""
        group = self.now[name]
        if any(other not in self.now for other in group.tied):
            return group.width
        count = max(1, *(counts[other] for other in (name, *group.tied)))
        return min(group.width, -(-count // self.round_to) * self.round_to)

    def _refined(self, counts: dict[str, int], goal: int) -> dict[str, int]:
        """Steps of single groups towards the goal, as long as one of them comes nearer."""
        while True:
            found, gap = counts, abs(self.cost(counts) - goal)
            for name, group in self.now.items():
                for change in (-self.round_to, self.round_to):
                    wanted = counts[name] + change
                    if not 1 <= wanted <= group.width or any(o not in self.now for o in group.tied):
                        continue
                    trial = counts | {other: wanted for other in (name, *group.tied)}
                    if abs(self.cost(trial) - goal) < gap:
                        found, gap = trial, abs(self.cost(trial) - goal)
            if found is counts:
                return counts
            counts = found


def _report(first: Groups, small: Shrunk, kept: Mapping[str, np.ndarray]) -> Report:
    counts = {name: len(at) for name, at in kept.items()}
    return dataclasses.replace(
        small.report,
        before=first.widths,
        after=counts,
        parameters=(first.parameters(), first.parameters(counts)),
        flops=(first.flops(), first.flops(counts)),
    )


def _check(sparsity: float, allocation: str, target: str, steps: int, tolerance: float) -> None:
    if isinstance(sparsity, str | bool | None) or np.ndim(sparsity) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r}: must be in [0, 1)")
    if allocation not in ("uniform", "global"):
        raise ValueError(f"allocation={allocation!r}: use 'uniform' or 'global'")
    if target not in ("channels", "params", "flops"):
        raise ValueError(f"target={target!r}: use 'channels', 'params' or 'flops'")
    check_count("steps", steps)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: must not be negative")
