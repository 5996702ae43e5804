r"""How sparsity is split over the layers of a model: rules that see shapes, outliers, or a loss.

`ECoFLaP` (Sung, Yoon & Bansal, ECoFLaP: efficient coarse-to-fine layer-wise pruning, ICLR 2024) asks how
much the loss feels each kernel, with forward passes alone,

    p = mean over batches and draws of |loss(w + ε z) - loss(w - ε z)| / 2ε,   z normal,

sums over the kernels of a block, and gives each block weights in proportion to its sum, between a least
density and 1. (The authors' correction of rounding adds where it should subtract; here counts are exact.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxsparse import _counts, allocations, structures
from jaxsparse.leaves import Leaf
from jaxsparse.post_training import program
from jaxsparse.post_training.calibration import Stream
from jaxsparse.post_training.owl import OWL
from jaxsparse.post_training.program import Kernel
from jaxsparse.post_training.statistics import Inputs, Norms
from jaxsparse.structures import Structure
from jaxsparse.typing import AllocationLike

Losses = Callable[[Sequence[Any]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class ECoFLaP:
    """An allocation for `prune`, which needs its `loss`.

    Args:
      epsilon: ε.
      draws: of z for each kernel.
      most: how far the sparsity of a block may be above that of all.
      per_weight: divide what the loss feels of a block by its size.
      seed: of z.
    """

    epsilon: float = 1e-3
    draws: int = 1
    most: float = 0.1
    per_weight: bool = False
    seed: int = 0

    def felt(self, losses: Losses, kernel: Kernel, params: Sequence[Any], number: int) -> float:
        """p of one kernel, from `losses(params)`, one for each batch."""
        leaf = params[kernel.view.leaf]
        w, total = kernel.take(leaf), 0.0
        for draw in range(self.draws):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), number), draw)
            z = jax.random.normal(key, w.shape, w.dtype)
            ends = []
            for sign in (1.0, -1.0):
                moved = list(params)
                moved[kernel.view.leaf] = kernel.put(leaf, w + sign * self.epsilon * z)
                ends.append(np.asarray(losses(moved), np.float64))
            total += float(np.mean(np.abs(ends[0] - ends[1]))) / (2 * self.epsilon)
        return total / self.draws

    def sparsities(
        self, felt: Sequence[float], sizes: Sequence[int], sparsity: float
    ) -> list[float]:
        """The sparsities of blocks.

        >>> ECoFLaP(most=0.5).sparsities([1.0, 3.0], [100, 100], 0.5)
        [0.75, 0.25]
        """
        scores = [f / n for f, n in zip(felt, sizes)] if self.per_weight else list(felt)
        highest = min(sparsity + self.most, 1.0)
        least = [n - int(_counts.scale_count(n, highest)) for n in sizes]
        keep = sum(sizes) - int(_counts.scale_count(sum(sizes), sparsity))
        kept = water_fill(scores, sizes, keep, least)
        return [(n - k) / n for n, k in zip(sizes, kept)]


def water_fill(
    scores: Sequence[float], sizes: Sequence[int], keep: int, least: Sequence[int]
) -> list[int]:
    """How many weights each block keeps: `least` first, what is left in proportion to scores, no more than it has.

    Args:
      scores: of the blocks, not negative.
      sizes: weights of each.
      keep: weights that all keep together.
      least: weights that each keeps at least.

    Returns:
      Integers that add up to `keep`.

    Raises:
      ValueError: a budget below what is kept at least, or above all weights.

    >>> water_fill([1.0, 8.0], [10, 10], 12, [1, 1])
    [2, 10]
    """
    if not sum(least) <= keep <= sum(sizes):
        raise ValueError(
            f"keep={keep}: blocks keep at least {sum(least)} and have {sum(sizes)} weights; change "
            "sparsity or most"
        )
    kept = list(least)
    while rest := keep - sum(kept):
        free = [i for i in range(len(kept)) if kept[i] < sizes[i]]
        weight = {i: max(float(scores[i]), 0.0) for i in free}
        if not sum(weight.values()) > 0:
            weight = {i: float(sizes[i]) for i in free}
        total = math.fsum(weight.values())
        shares = {i: rest * w / total for i, w in weight.items()}
        full = [i for i in free if shares[i] >= sizes[i] - kept[i]]
        if full:
            for i in full:
                kept[i] = sizes[i]
            continue
        whole = {i: math.floor(x) for i, x in shares.items()}
        order = sorted(free, key=lambda i: (whole[i] - shares[i], i))
        for place, i in enumerate(order):
            kept[i] += whole[i] + (place < rest - sum(whole.values()))
    return kept


def knapsack(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    budget: int,
    buckets: int = 10_000,
) -> list[int]:
    """For each layer the level by which all errors together are least within a budget of costs.

    Dynamic programming over costs, counted in their greatest common divisor and, where that is more than
    `buckets` for the budget, in equal buckets, rounded up, so that the budget is never passed. Exact without
    buckets: rounding may refuse choices that spend the budget to the last.

    Args:
      errors: of each layer at each of its levels.
      costs: of the same, not negative.
      budget: of all layers together.
      buckets: in which costs are counted.

    Returns:
      The index of the level of each layer.

    Raises:
      ValueError: a budget that the cheapest levels exceed.

    >>> knapsack([[0.0, 1.0], [0.0, 5.0]], [[3, 1], [3, 1]], 4)
    [1, 0]
    """
    common = math.gcd(*(int(c) for row in costs for c in row)) or 1
    unit = common * max(1, -(-(budget // common) // buckets))
    prices = [[-(-int(c) // unit) for c in row] for row in costs]
    room = budget // unit
    if sum(min(row) for row in prices) > room:
        raise ValueError(
            f"budget={budget}: the cheapest levels cost {sum(min(row) for row in costs)} (in {buckets} buckets "
            f"{unit * sum(min(row) for row in prices)}); give more"
        )
    best = np.zeros(room + 1)
    chosen = []
    for row, price in zip(errors, prices):
        tried = np.full((len(row), room + 1), np.inf)
        for level, (error, cost) in enumerate(zip(row, price)):
            if cost <= room:
                tried[level, cost:] = best[: room + 1 - cost] + error
        chosen.append(tried.argmin(0))
        best = tried.min(0)
    left, levels = room, []
    for choice, price in zip(reversed(chosen), reversed(prices)):
        level = int(choice[left])
        levels.append(level)
        left -= price[level]
    return levels[::-1]


def of_kernels(
    stream: Stream,
    params: Sequence[Any],
    allocation: AllocationLike | str | OWL | ECoFLaP,
    sparsity: float,
    structure: Structure | None,
    blocks: str | None,
    losses: Losses | None,
) -> Mapping[str, float | None]:
    """The sparsity of each kernel of a stream, which is left before its first block."""
    kernels = stream.kernels
    shapes = {k.name: k.shape(params[k.view.leaf]) for k in kernels}
    if structure is not None and structure.sparsity is not None:
        return dict.fromkeys(shapes, sparsity)
    named = {"owl": OWL(), "ecoflap": ECoFLaP()}
    rule: Any = named.get(allocation, allocation) if isinstance(allocation, str) else allocation
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(program.block_of(kernel, blocks), []).append(kernel)
    sizes = [sum(math.prod(shapes[k.name]) for k in group) for group in groups.values()]
    if isinstance(rule, OWL | ECoFLaP):
        if isinstance(rule, OWL):
            norms = _norms(stream, params)
            signs = [rule.outliers(_layers(group, params, norms)) for group in groups.values()]
        elif losses is None:
            raise ValueError(
                f"loss: allocation={allocation!r} asks how much a loss feels each block; give "
                "loss=lambda outputs, batch: a number"
            )
        else:
            number = {k.name: i for i, k in enumerate(kernels)}
            signs = [
                sum(rule.felt(losses, k, params, number[k.name]) for k in group)
                for group in groups.values()
            ]
        found = rule.sparsities(signs, sizes, sparsity)
        return {k.name: s for group, s in zip(groups.values(), found) for k in group}
    rule = allocations.resolve(rule)
    if isinstance(rule, allocations.Global):
        raise ValueError(
            f"allocation={allocation!r}: layers are pruned one after the other; give a rule of shapes, a "
            "mapping from path patterns to sparsities, 'owl' or 'ecoflap'"
        )
    leaves = [
        Leaf(i, k.name, shapes[k.name][1:], 0, structure or structures.Unstructured())
        for i, k in enumerate(kernels)
    ]
    return dict(zip(shapes, rule.sparsities(leaves, sparsity)))


def _norms(stream: Stream, params: Sequence[Any]) -> dict[str, Inputs]:
    """What enters all kernels of the dense model."""
    found: dict[str, Inputs] = {}
    for at in range(len(stream.segments)):
        stats, gave = stream.statistics(at, params, Norms())
        found |= stats
        if len(found) == len(stream.kernels):
            break
        stream.advance(at, gave)
    stream.restart()
    return found


def _layers(group: Sequence[Kernel], params: Sequence[Any], norms: Mapping[str, Inputs]) -> list:
    return [
        (w, s) for k in group for w, s in zip(k.take(params[k.view.leaf]), norms[k.name].squares)
    ]
