r"""Lottery tickets without gradients: evolution strategies on the weights that a mask keeps, and pruning by the
ratio of mean to spread of the search distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import selection
from jaxsparse.targets import named_leaves


class Mapper(NamedTuple):
    """A tree under masks and the vector of the weights that they keep."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        """The number of weights that are searched."""
        return sum(p.size for p in self.places)

    def flat(self, tree: Any) -> Array:
        """The weights that are kept, in order."""
        leaves = self.treedef.flatten_up_to(tree)
        return jnp.concatenate([jnp.ravel(x)[p] for x, p in zip(leaves, self.places)])

    def tree(self, vector: Array) -> Any:
        """The tree with zeros elsewhere."""
        ends = np.cumsum([p.size for p in self.places])[:-1]
        leaves = [
            jnp.zeros(int(np.prod(s)), vector.dtype).at[p].set(x).reshape(s)
            for s, p, x in zip(self.shapes, self.places, jnp.split(vector, ends))
        ]
        return self.treedef.unflatten(leaves)


def mapper(params: Any, masks: Any) -> Mapper:
    """The mapper of a tree of masks (None: the leaf is searched whole)."""
    leaves, treedef = jax.tree.flatten(params)
    held = treedef.flatten_up_to(masks)
    places = tuple(
        np.arange(x.size) if m is None else np.flatnonzero(np.asarray(m))
        for x, m in zip(leaves, held)
    )
    return Mapper(treedef, tuple(x.shape for x in leaves), places)


class Searched(NamedTuple):
    """The search distribution at the end: means and standard deviations, vectors; the fitness of the mean after
    every generation."""

    mean: Array
    sigma: Array
    fitness: Array


def snes(
    fitness: Callable[[Array, Array], Array],
    mean: Array,
    *,
    sigma: float,
    population: int,
    generations: int,
    seed: int = 0,
    rate: float = 1.0,
    sigma_rate: float | None = None,
) -> Searched:
    r"""Separable natural evolution strategy. With $x_k = m + \sigma z_k$, z standard normal, and utilities u by rank,

    $$m \leftarrow m + \eta\, \sigma \sum_k u_k z_k, \qquad
      \sigma \leftarrow \sigma \exp(\tfrac{\eta_\sigma}{2} \sum_k u_k (z_k^2 - 1)).$$

    Args:
      fitness: `(x, key) -> number`, higher is better; the key is of the generation (a batch of data).
      mean: the start.
      sigma: the first standard deviation, of every coordinate.
      population: candidates in a generation.
      generations: how many.
      seed: of everything.
      rate: $\eta$.
      sigma_rate: $\eta_\sigma$; None: $(3 + \log n) / (5 \sqrt n)$.

    (Wierstra et al., Natural evolution strategies, 2014.)
    """
    n = mean.size
    pace = (3 + np.log(n)) / (5 * np.sqrt(n)) if sigma_rate is None else sigma_rate
    ranks = np.maximum(0, np.log(population / 2 + 1) - np.log(np.arange(1, population + 1)))
    utilities = jnp.asarray(ranks / ranks.sum() - 1 / population, jnp.float32)

    def generation(carry, i):
        m, s = carry
        draw, batch = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        z = jax.random.normal(draw, (population, n))
        scores = jax.vmap(lambda x: fitness(x, batch))(m + s * z)
        z = z[jnp.argsort(-scores)]
        m = m + rate * s * (utilities @ z)
        s = s * jnp.exp(0.5 * pace * (utilities @ (z * z - 1)))
        return (m, s), fitness(m, batch)

    start = mean, jnp.full(n, sigma)
    (m, s), found = jax.lax.scan(generation, start, jnp.arange(generations))
    return Searched(m, s, found)


def prune_search(
    masks: Any, mean: Any, sigma: Any, fraction: float, *, by: Literal["ratio", "size"] = "ratio"
) -> Any:
    r"""The masks of the next level: the part of the kept weights with the smallest $|m| / \sigma$ goes ("size": the
    smallest |m|), over all leaves that have masks.

    Args:
      masks: a tree, None at leaves that are not pruned (biases).
      mean, sigma: trees of the parameters' shape; where a mask has a zero they are not read.
      fraction: in (0, 1).
      by: see above.
    """
    held, treedef = jax.tree.flatten(masks)
    pick = lambda tree: [x for _, x in _at(masks, tree)]
    means, spreads = pick(mean), pick(sigma)
    worth = [
        jnp.abs(m) / jnp.where(k, s, 1.0) if by == "ratio" else jnp.abs(m)
        for m, s, k in zip(means, spreads, held)
    ]
    alive = sum(int(jnp.sum(k)) for k in held)
    left = alive - int(np.ceil(fraction * alive - 1e-9))
    return treedef.unflatten(selection.topk_masks(worth, left, where=held, together=True))


def _at(masks: Any, tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree where there are masks."""
    known = {path for path, m in named_leaves(masks) if m is not None}
    return [(path, x) for path, x in named_leaves(tree) if path in known]


class Level(NamedTuple):
    """A level: density, and the fitness of the mean at its end."""

    density: float
    fitness: float


def tickets_without_gradients(
    fitness: Callable[[Any, Array], Array],
    params: Any,
    masks: Any,
    *,
    levels: int,
    fraction: float = 0.2,
    sigma: float = 0.05,
    population: int = 64,
    generations: int = 200,
    by: Literal["ratio", "size"] = "ratio",
    seed: int = 0,
) -> tuple[list[Level], Any]:
    r"""Levels of search and pruning: the strategy runs on the weights that are left, which begin at their first
    values; then the part of smallest $|m|/\sigma$ goes.

    Args:
      fitness: `(params, key) -> number`, higher is better.
      params: the initial network.
      masks: a tree, None at leaves that are not pruned.
      levels, fraction: of pruning.
      sigma, population, generations, seed: of `snes`.
      by: "ratio", or "size" as the baseline.

    Returns:
      The levels, and the last masks.

    This differs from the authors' code in that the spread is the standard deviation, in all places.

    (Lange & Sprekeler, Lottery tickets in evolutionary optimization: on sparse backpropagation-free trainability,
    2023.)
    """
    found: list[Level] = []
    total = sum(m.size for m in jax.tree.leaves(masks))
    for level in range(levels + 1):
        to = mapper(params, masks)
        run = jax.jit(
            lambda mean, to=to: snes(
                lambda x, key: fitness(to.tree(x), key),
                mean,
                sigma=sigma,
                population=population,
                generations=generations,
                seed=seed,
            )
        )
        end = run(to.flat(params))
        kept = sum(int(m.sum()) for m in jax.tree.leaves(masks))
        found.append(Level(kept / total, float(jnp.mean(end.fitness[-10:]))))
        if level < levels:
            masks = prune_search(masks, to.tree(end.mean), to.tree(end.sigma), fraction, by=by)
    return found, masks


__all__: Sequence[str] = [
    "Level",
    "Mapper",
    "Searched",
    "mapper",
    "prune_search",
    "snes",
    "tickets_without_gradients",
]
