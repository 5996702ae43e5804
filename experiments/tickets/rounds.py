"""Rounds of training and pruning: lottery tickets by iterative magnitude pruning, their controls, and the folder
in which a run that was stopped is found again."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.task import State
from experiments.tickets.folder import load, save
from experiments.tickets.problem import Trains
from jaxsparse import masking, tickets

Restart = Literal["weights", "learning_rate", "reinit"]


class Level(NamedTuple):
    """One round: its number, the density of the masks that were trained under, and per seed the accuracy, the
    test loss and the training loss."""

    level: int
    density: float
    accuracy: list[float]
    loss: list[float]
    train_loss: list[float]


class Rounds(NamedTuple):
    """The levels so far; states at the rewind point and at the end of the last level, one for each seed."""

    levels: list[Level]
    early: State
    final: State


# (weights at the start of the round, at its end, masks) -> masks; for one seed
Prune = Callable[[Any, Any, Any], Any]


def by_magnitude(fraction: float = 0.2, *, activate: float = 0.0) -> Prune:
    """The rule of iterative magnitude pruning, with selective activation (AP) if asked; see
    `tickets.prune_round`."""
    return lambda start, end, masks: tickets.prune_round(
        end, masks, fraction, start=start if activate else None, activate=activate
    )


def rounds(
    problem: Trains,
    *,
    levels: int,
    seeds: Sequence[int],
    rewind_to: int = 0,
    restart: Restart = "weights",
    prune: Prune | None = None,
    control: Callable[[Any, int], Any] | None = None,
    folder: pathlib.Path | None = None,
    on_level: Callable[[Level, State], Any] | None = None,
) -> Rounds:
    r"""Trains, prunes, goes back, and trains again, for many seeds at once.

    1. Train `rewind_to` steps; keep the state $s_k$: weights, statistics of norms, slots and schedule of the
       optimizer, the place in the data.
    2. Level 0: train to the end. Level L: prune the weights at the end of level L - 1, go back, train to the end.

    Going back is, by `restart`: "weights": to $s_k$ with the new masks, the lottery ticket; "learning_rate": the
    final weights, with schedule, slots and data of $s_k$ (Renda, Frankle & Carbin, 2020); "reinit": a network of
    another seed at step `rewind_to`'s schedule, the control of the ticket's weights. Fine-tuning is "learning_rate" with
    a late `rewind_to`.

    Args:
      problem: see `make_problem`.
      levels: how often it is pruned.
      seeds: of initial weights and orders of data; their number is that of runs.
      rewind_to: k, in steps.
      restart: see above.
      prune: the rule; None: `by_magnitude(0.2)`.
      control: changes the masks of every level before they are trained under (a shuffle within layers), from
        masks and the number of the level; those that the next level prunes are not changed.
      folder: where each level is saved; a run with the same folder goes on after the last one.
      on_level: called after each level with its numbers and its final states.

    Returns:
      The levels, and the states.

    This differs from the authors' code (open_lth) in that slots of the optimizer are rewound too, where theirs
    begin anew.

    (Frankle & Carbin, The lottery ticket hypothesis, 2019; Frankle et al., Linear mode connectivity and the lottery
    ticket hypothesis, 2020.)

    Raises:
      ValueError: a rewind point beyond the run, an unknown `restart`, a folder of another run.
    """
    if not 0 <= rewind_to < problem.steps:
        raise ValueError(f"rewind_to={rewind_to}: must be in 0..{problem.steps - 1}")
    if restart not in ("weights", "learning_rate", "reinit"):
        raise ValueError(f"restart={restart!r}: use 'weights', 'learning_rate' or 'reinit'")
    rule = by_magnitude() if prune is None else prune
    keys = jnp.asarray(seeds)
    start = jax.jit(jax.vmap(lambda s: problem.train(problem.init(s), s, 0, rewind_to).state))
    early: Any = jax.jit(jax.vmap(problem.init))(keys) if rewind_to == 0 else start(keys)
    facts = {"seeds": list(map(int, seeds)), "rewind_to": rewind_to, "restart": restart}
    facts["steps"] = problem.steps
    found, saved = load(folder, facts, Level, (early, early.opt_state.masks))
    final, masks = saved if saved is not None else (early, None)

    @jax.jit
    @jax.vmap
    def run(state, masks, seed):
        state = problem.with_masks(state, masks)
        end = problem.train(state, seed, rewind_to, problem.steps)
        numbers = problem.evaluate(end.state.params, end.state.stats)
        return end.state, (numbers["accuracy"], numbers["loss"], end.loss)

    cut = jax.jit(jax.vmap(rule))
    for level in range(len(found), levels + 1):
        if level == 0:
            masks = jax.tree.map(lambda m: jnp.ones((len(keys), *m.shape), bool), problem.ones)
        else:
            masks = cut(early.params, final.params, masks)
        back = early
        if level and restart == "learning_rate":
            back = early._replace(params=final.params)
        if level and restart == "reinit":
            back = early._replace(params=jax.vmap(problem.init)(keys + 1_000_003).params)
        held = masks if control is None else jax.vmap(lambda m, n=level: control(m, n))(masks)
        final, numbers = run(back, held, keys)
        now = Level(level, density(held), *(np.asarray(x).tolist() for x in numbers))
        found.append(now)
        save(folder, facts, found, (final, masks))
        if on_level is not None:
            on_level(now, final)
    return Rounds(found, early, final)


def density(masks: Any) -> float:
    """The part of the weights that masks keep, over all leaves (and seeds)."""
    return masking.count_kept(masks) / sum(m.size for m in jax.tree.leaves(masks))
