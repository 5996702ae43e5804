"""Rounds of training and pruning: lottery tickets by iterative magnitude pruning, their controls, and the folder
in which a run that was stopped is found again."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.task import State
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
    another seed at step `rewind_to`'s schedule, the control of the ticket's weights.

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
    found, final, masks = _load(folder, facts, early)

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
        _save(folder, facts, found, final, masks)
        if on_level is not None:
            on_level(now, final)
    return Rounds(found, early, final)


def density(masks: Any) -> float:
    """The part of the weights that masks keep, over all leaves (and seeds)."""
    return masking.count_kept(masks) / sum(m.size for m in jax.tree.leaves(masks))


# -- The folder --------------------------------------------------------------------------------------


def save_tree(path: pathlib.Path, tree: Any) -> None:
    """Writes the leaves of a tree of arrays; the file is there whole, or not at all."""
    arrays: dict[str, Any] = {
        f"{i:05d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))
    }
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    os.replace(part, path)


def load_tree(path: pathlib.Path, like: Any) -> Any:
    """The tree that was saved, in the structure of `like`.

    Raises:
      ValueError: other leaves than `like` has.
    """
    leaves, treedef = jax.tree.flatten(like)
    with np.load(path) as found:
        arrays = [found[name] for name in sorted(found.files)]
    shapes = [(np.shape(x), np.asarray(x).dtype) for x in leaves]
    if [(a.shape, a.dtype) for a in arrays] != shapes:
        raise ValueError(f"{path}: it holds the state of another model or optimizer")
    return treedef.unflatten([jnp.asarray(a) for a in arrays])


def _save(folder, facts, found, final, masks) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    last = len(found) - 1
    save_tree(folder / f"level_{last}.npz", (final, masks))
    text = json.dumps({"facts": facts, "levels": [level._asdict() for level in found]}, indent=1)
    part = folder / "rounds.part.json"
    part.write_text(text + "\n")
    os.replace(part, folder / "rounds.json")
    for old in range(last):  # the last state is enough to go on
        (folder / f"level_{old}.npz").unlink(missing_ok=True)


def _load(folder, facts, early) -> tuple[list[Level], Any, Any]:
    file = None if folder is None else folder / "rounds.json"
    if file is None or not file.exists():
        return [], early, None
    saved = json.loads(file.read_text())
    if saved["facts"] != facts:
        raise ValueError(
            f"{file} holds a run with {saved['facts']}, not {facts}; give another folder"
        )
    found = [Level(**row) for row in saved["levels"]]
    masks = early.opt_state.masks
    final, masks = load_tree(file.parent / f"level_{len(found) - 1}.npz", (early, masks))
    return found, final, masks


def retrain(
    problem: Trains, state: State, masks: Any, order: Any, start: int
) -> tuple[State, dict[str, Array]]:
    """One network under masks from a state at step `start` to the end, and its numbers."""
    end = problem.train(problem.with_masks(state, masks), order, start, problem.steps)
    return end.state, problem.evaluate(end.state.params, end.state.stats)
