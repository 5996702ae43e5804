"""Runs that average siblings: sparse model soups and SWAMP."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tickets.folder import load, save
from experiments.tickets.problem import Trains
from experiments.tickets.rounds import density
from jaxsparse import tickets


class Phase(NamedTuple):
    """One phase: density, accuracies of the members [seeds, members] and of their mean [seeds]."""

    density: float
    members: list[list[float]]
    soup: list[float]


def _spread(tree: Any, members: int) -> Any:
    """A tree [seeds, ...] repeated to [seeds, members, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x[:, None], members, axis=1), tree)


def _mean(tree: Any) -> Any:
    """The mean over the members; of counts and other integers the first."""
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.mean(axis=1) if floats(x) else x[:, 0], tree)


def sparse_soups(
    problem: Trains,
    *,
    sparsity: float,
    phases: int,
    members: int,
    seeds: Sequence[int],
    retrain_from: int = 0,
    folder: pathlib.Path | None = None,
) -> list[Phase]:
    r"""Phases of: prune the $1 - (1 - S)^{1/n}$ part of what is left by magnitude over all layers, retrain `members`
    copies with other orders of the data from step `retrain_from` of the schedule on, average them, estimate
    statistics of norms anew; the average is pruned next.

    Args:
      problem: see `make_problem`.
      sparsity: S, at the end.
      phases: n.
      members: copies in a soup; with 1 it is iterative magnitude pruning with retraining.
      seeds: runs at once.
      retrain_from: the step at which the schedule of a retraining begins; later is shorter.
      folder: where each phase is saved; a run with the same folder goes on after the last one.

    Returns:
      The phases.

    (Zimmer, Spiegel & Pokutta, Sparse model soups, 2024.)
    """
    fraction = 1 - (1 - sparsity) ** (1 / phases)
    keys = jnp.asarray(seeds)
    begin = jax.jit(jax.vmap(lambda s: problem.train(problem.init(s), s, 0, retrain_from).state))
    early: Any = begin(keys) if retrain_from else jax.jit(jax.vmap(problem.init))(keys)
    finish = jax.jit(
        jax.vmap(lambda state, s: problem.train(state, s, retrain_from, problem.steps).state)
    )
    masks = jax.tree.map(lambda m: jnp.ones((len(keys), *m.shape), bool), problem.ones)
    facts = {"sparsity": sparsity, "phases": phases, "members": members, "steps": problem.steps}
    facts |= {"seeds": list(map(int, seeds)), "retrain_from": retrain_from}
    found, saved = load(folder, facts, Phase, (early.params, masks))
    if saved is None:
        params = finish(early, keys).params
    else:
        params, masks = saved

    @jax.jit
    @jax.vmap
    @jax.vmap
    def retrain(state, masks, order):
        end = problem.train(problem.with_masks(state, masks), order, retrain_from, problem.steps)
        return end.state, problem.evaluate(end.state.params, end.state.stats)["accuracy"]

    @jax.jit
    @jax.vmap
    def judge(params, stats, seed):
        stats = problem.recalibrate(params, stats, seed)
        return problem.evaluate(params, stats)["accuracy"]

    cut = jax.jit(jax.vmap(lambda p, m: tickets.prune_round(p, m, fraction)))
    for phase in range(len(found), phases):
        masks = cut(params, masks)
        copies = _spread(early._replace(params=params), members)
        order = keys[:, None] + 7919 * (phase + 1) + 104_729 * jnp.arange(members)
        ends, accuracy = retrain(copies, _spread(masks, members), order)
        params, stats = _mean(ends.params), _mean(ends.stats)
        soup = judge(params, stats, keys)
        found.append(
            Phase(density(masks), np.asarray(accuracy).tolist(), np.asarray(soup).tolist())
        )
        save(folder, facts, found, (params, masks))
    return found


def swamp(
    problem: Trains,
    *,
    levels: int,
    particles: int,
    seeds: Sequence[int],
    rewind_to: int,
    average_from: int | None,
    fraction: float = 0.2,
    single_until: int = 0,
    folder: pathlib.Path | None = None,
) -> list[Phase]:
    """Iterative magnitude pruning in which each level trains several particles of the ticket, averages the last part
    of each run (SWA) and the particles, and takes the next mask from that average.

    Args:
      problem: with `constant_from`, so that the learning rate of the averaged part does not fall.
      levels: rounds of pruning after the dense one.
      particles: runs of a level, with other orders of the data; 1 without `average_from` is IMP exactly.
      seeds: runs at once.
      rewind_to: the step whose state all levels start from.
      average_from: the first step of SWA; None: the last weights.
      fraction: of the weights that are left, pruned by each level.
      single_until: so many first levels have one particle only (SWAMP+), for at low sparsity particles may not share
        a valley.
      folder: where each level is saved; a run with the same folder goes on after the last one.

    Returns:
      A phase per level; the members' accuracies are of their averages over time.

    (Choi, Lee, Nam & Lee, Sparse weight averaging with multiple particles for iterative magnitude pruning, 2024.)
    """
    keys = jnp.asarray(seeds)
    begin = jax.jit(jax.vmap(lambda s: problem.train(problem.init(s), s, 0, rewind_to).state))
    early: Any = begin(keys) if rewind_to else jax.jit(jax.vmap(problem.init))(keys)
    masks = jax.tree.map(lambda m: jnp.ones((len(keys), *m.shape), bool), problem.ones)

    @jax.jit
    @jax.vmap
    @jax.vmap
    def particle(state, masks, order):
        state = problem.with_masks(state, masks)
        end = problem.train(state, order, rewind_to, problem.steps, average_from)
        mean = end.state.params if average_from is None else end.mean
        stats = problem.recalibrate(mean, end.state.stats)
        return mean, stats, problem.evaluate(mean, stats)["accuracy"]

    @jax.jit
    @jax.vmap
    def judge(params, stats):
        return problem.evaluate(params, problem.recalibrate(params, stats))["accuracy"]

    cut = jax.jit(jax.vmap(lambda p, m: tickets.prune_round(p, m, fraction)))
    facts = {"particles": particles, "rewind_to": rewind_to, "average_from": average_from}
    facts |= {"fraction": fraction, "single_until": single_until, "steps": problem.steps}
    facts |= {"seeds": list(map(int, seeds))}
    found, saved = load(folder, facts, Phase, (early.params, masks))
    params, masks = saved if saved is not None else (early.params, masks)
    for level in range(len(found), levels + 1):
        number = 1 if level < single_until else particles
        if level:
            masks = cut(params, masks)
        order = keys[:, None] + 104_729 * jnp.arange(number)
        means, stats, accuracy = particle(_spread(early, number), _spread(masks, number), order)
        params = _mean(means)
        soup = judge(params, _mean(stats))
        found.append(
            Phase(density(masks), np.asarray(accuracy).tolist(), np.asarray(soup).tolist())
        )
        save(folder, facts, found, (params, masks))
    return found
