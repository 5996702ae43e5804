r"""EvoPress (Sieberling et al., EvoPress: optimal dynamic model compression via evolutionary search, ICML
2025): how sparse each layer is, by a small search that measures whole models.

Errors of layers do not add up to the error of a model. So every layer is pruned beforehand at levels
..., -1, 0, 1, ... whose counts of zeros differ by one fixed number of *weights* (`level_database`): one
level up in a layer and one level down in another leave the budget as it was, whatever their sizes. The
search (`evolve`) begins with all layers at level 0 and goes on from the best:

1. each of the offspring makes min(u, v) exchanges, u and v drawn from 1 to `exchanges`: a random layer one
   level down, a random layer one level up;
2. all are measured on little data, the best of them on more, and so on; the parent joins the last round;
3. the best of that round is the next parent.

Within a round all are measured on the same data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _counts, structures
from jaxsparse.choose import check_sparsity
from jaxsparse.post_training import _registry, models
from jaxsparse.post_training._layer import Pruned, errors
from jaxsparse.post_training.calibration import Stream, TokenMask, finite, finite_weights
from jaxsparse.post_training.program import Kernel
from jaxsparse.post_training.statistics import Gram
from jaxsparse.structures import Structure
from jaxsparse.typing import Targets

Levels = tuple[int, ...]
Fitness = Callable[[Levels, int, int], float]
"""`fitness(levels, generation, round)`: less is better."""


@dataclasses.dataclass(frozen=True)
class Database:
    """Every layer of a model at several sparsities.

    Attributes:
      names: of the kernels, in the order of their use: that of levels.
      levels: for each kernel the levels that exist, ascending.
      errors: for each kernel the squared error of its outputs at each of its levels.
      zeros: likewise how many weights are zero.
    """

    names: tuple[str, ...]
    levels: tuple[tuple[int, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    zeros: tuple[tuple[int, ...], ...]
    _weights: tuple[dict[int, np.ndarray], ...] = dataclasses.field(repr=False)
    _kernels: tuple[Kernel, ...] = dataclasses.field(repr=False)
    _model: models.Model = dataclasses.field(repr=False)

    def params(self, levels: Sequence[int]) -> Any:
        """The parameters with each kernel at its level.

        Raises:
          ValueError: a level that is not there, another number of levels than kernels.
        """
        if len(levels) != len(self.names):
            raise ValueError(
                f"levels: {len(levels)} for {len(self.names)} kernels; give one for each"
            )
        leaves, tree = jax.tree.flatten(self._model.params)
        for name, kernel, level, there in zip(self.names, self._kernels, levels, self._weights):
            if level not in there:
                raise ValueError(f"levels: {name!r} has no level {level}; it has {sorted(there)}")
            leaf = kernel.view.leaf
            leaves[leaf] = kernel.put(leaves[leaf], jnp.asarray(there[level]))
        return tree.unflatten(leaves)

    def model(self, levels: Sequence[int]) -> Any:
        """The model with each kernel at its level."""
        return self._model.rebuild(self.params(levels))

    @property
    def uniform(self) -> Levels:
        """All kernels at level 0."""
        return (0,) * len(self.names)


def level_database(
    model: Any,
    batches: Iterable[Any],
    method: str | _registry.Method = "sparsegpt",
    *,
    sparsity: float,
    step: int,
    levels: Sequence[int] = tuple(range(-4, 5)),
    structure: Structure | str | None = None,
    targets: Targets = None,
    mask: TokenMask | None = None,
    forward: models.Forward | None = None,
    blocks: str | None = None,
    **options: Any,
) -> Database:
    """Prunes every kernel at several sparsities, from what it sees in the dense model.

    Args:
      model, batches, method, structure, targets, mask, forward, blocks, **options: as for `prune`; methods
        that read gradients are not taken.
      sparsity: of level 0.
      step: the weights by which neighbouring levels of a kernel differ, the same for all kernels.
      levels: which are made; those that a kernel is too small for are left out.

    Returns:
      The database, with dense arrays on the host.

    Raises:
      ValueError: what `prune` raises, a method that cannot count by weights (give it
        `structure=Unstructured()`).
    """
    method = _registry.resolve(method)
    if method.gradients or method.rows:
        raise ValueError(f"method={method.name!r}: levels are made from Gram matrices or norms")
    if step < 1 or 0 not in levels:
        raise ValueError(f"step={step}, levels={list(levels)}: a positive number, levels with 0")
    kind = None if structure is None else structures.resolve(structure)
    check_sparsity(sparsity, kind)
    whole = models.of(model, forward)
    stream = Stream(whole, batches, targets, mask, blocks)
    params = jax.tree.leaves(whole.params)
    rows = []
    for at, segment in enumerate(stream.segments):
        seen, gave = stream.statistics(at, params, Gram())
        for kernel in segment.kernels:
            x = seen[kernel.name]
            finite(kernel.name, x)
            finite_weights(kernel.name, params[kernel.view.leaf])
            w = kernel.take(params[kernel.view.leaf]).astype(jnp.float32)
            first = _counts.scale_count(w[0].size, sparsity)
            found: dict[int, tuple[np.ndarray, float, int]] = {}
            for level in sorted(levels):
                zeros = first + level * step
                if not 0 <= zeros < w[0].size:
                    continue
                layers = [
                    _one(method, kind, w[i], jax.tree.map(lambda a, i=i: a[i], x), zeros, options)
                    for i in range(len(w))
                ]
                lost = sum(
                    float(jnp.sum(errors(g, a - p.weights)))
                    for a, g, p in zip(w, _grams(x.gram), layers)
                )
                weights = np.stack([np.asarray(p.weights) for p in layers])
                found[level] = weights, lost, zeros * len(layers)
            rows.append((kernel, found))
        stream.advance(at, gave)
    of = lambda i: tuple(tuple(v[i] for v in found.values()) for _, found in rows)
    return Database(
        tuple(kernel.name for kernel, _ in rows),
        tuple(tuple(found) for _, found in rows),
        of(1),
        of(2),
        tuple({level: v[0] for level, v in found.items()} for _, found in rows),
        tuple(kernel for kernel, _ in rows),
        whole,
    )


def _grams(gram) -> Any:
    assert gram is not None
    return gram


def _one(method, kind, w, x, zeros: int, options: Mapping[str, Any]) -> Pruned:
    found = method.core(w, *method.what(x), zeros / w.size, structure=kind, **options)
    made = int(found.mask.size - jnp.sum(found.mask))
    if made != zeros:
        raise ValueError(
            f"structure={kind}: {method.name!r} makes {made} zeros where a level has {zeros}; levels are "
            "counted in single weights, give structure=Unstructured()"
        )
    return found


def evolve(
    levels: Sequence[Sequence[int]],
    fitness: Fitness,
    *,
    generations: int = 100,
    offspring: int = 16,
    survivors: Sequence[int] = (4, 1),
    exchanges: int = 3,
    seed: int = 0,
) -> tuple[Levels, list[float]]:
    """The levels of layers by which a model is fittest, under the budget of all layers at level 0.

    Args:
      levels: for each layer those that exist, 0 among them; `Database.levels`.
      fitness: `fitness(levels, generation, round)`, less is better; round `r` of a generation uses the same
        data for all, more of it than round `r - 1`.
      generations: of the search.
      offspring: of each.
      survivors: how many are left after each round, 1 in the end.
      exchanges: the most of one child.
      seed: of the search.

    Returns:
      The levels, which add up to 0, and the fitness of the best of each generation.

    Raises:
      ValueError: a layer without level 0, survivors that do not end with 1.
    """
    if not survivors or survivors[-1] != 1 or list(survivors) != sorted(survivors, reverse=True):
        raise ValueError(f"survivors={list(survivors)}: give falling numbers that end with 1")
    if missing := [i for i, row in enumerate(levels) if 0 not in row]:
        raise ValueError(f"levels: layer {missing[0]} has no level 0, where the search begins")
    rng = np.random.default_rng(seed)
    exist = [set(row) for row in levels]
    parent: Levels = (0,) * len(levels)
    history = []
    for generation in range(generations):
        pool = {_child(parent, exist, exchanges, rng) for _ in range(offspring)} - {parent}
        ranked = sorted(pool)
        for round_, count in enumerate(survivors):
            last = round_ == len(survivors) - 1
            tried = [*ranked, parent] if last else ranked
            values = [fitness(child, generation, round_) for child in tried]
            order = np.argsort(np.asarray(values), kind="stable")
            ranked = [tried[i] for i in order[:count]]
            if last:
                history.append(values[order[0]])
        parent = ranked[0]
    return parent, history


def _child(parent: Levels, exist: Sequence[set[int]], exchanges: int, rng) -> Levels:
    child = list(parent)
    for _ in range(int(min(rng.integers(1, exchanges + 1, 2)))):
        down = [i for i, level in enumerate(child) if level - 1 in exist[i]]
        up = [i for i, level in enumerate(child) if level + 1 in exist[i]]
        if not down or not up:
            break
        a, b = int(rng.choice(down)), int(rng.choice(up))
        if a != b:
            child[a] -= 1
            child[b] += 1
    return tuple(child)
