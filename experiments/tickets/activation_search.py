"""SAFS: the activation of each layer of a pruned network by late-acceptance hill climbing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """The best activations, their score, and the score of the best after each step."""

    names: tuple[str, ...]
    score: float
    history: list[float]


def late_acceptance(
    evaluate: Callable[[tuple[str, ...]], float],
    start: Sequence[str],
    candidates: Sequence[str],
    *,
    steps: int,
    length: int = 3,
    seed: int = 0,
) -> Found:
    """Late-acceptance hill climbing over one name for each layer. A move gives one layer another activation and
    exchanges those of two layers; it is taken if it is no worse than now, or than it was `length` steps ago.

    Args:
      evaluate: a number that is higher for better networks: the validation accuracy after a short training from the
        pruned network, with scales frozen at 1. Each choice is evaluated once.
      start: the first choice, usually "relu" everywhere.
      candidates: names, such as `jaxsparse.nn.CANDIDATES`.
      steps: moves.
      length: of the memory; the authors take 3.
      seed: of the moves.

    Returns:
      The best that was seen; never worse than the start.

    (Loni et al., Learning activation functions for sparse neural networks, 2023.)

    >>> score = lambda names: sum(n == "gelu" for n in names)
    >>> late_acceptance(score, ["relu"] * 3, ["relu", "gelu", "tanh"], steps=60).names
    ('gelu', 'gelu', 'gelu')

    Raises:
      ValueError: no layers, fewer than two candidates.
    """
    if not start or len(candidates) < 2:
        raise ValueError(f"start={list(start)}, candidates={list(candidates)}: too few of them")
    rng = np.random.default_rng(seed)
    known: dict[tuple[str, ...], float] = {}

    def score(names: tuple[str, ...]) -> float:
        if names not in known:
            known[names] = float(evaluate(names))
        return known[names]

    now = best = tuple(start)
    memory, history = [score(now)] * length, []
    for step in range(steps):
        move = list(now)
        at = int(rng.integers(len(move)))
        move[at] = str(rng.choice([c for c in candidates if c != move[at]]))
        i, j = rng.integers(len(move), size=2)
        move[i], move[j] = move[j], move[i]
        new = tuple(move)
        if score(new) >= min(score(now), memory[step % length]):
            now = new
        if score(now) > score(best):
            best = now
        memory[step % length] = score(now)
        history.append(score(best))
    return Found(best, score(best), history)
