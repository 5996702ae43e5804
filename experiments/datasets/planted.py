"""Activations whose atoms are known: sparse positive combinations of a planted dictionary."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Planted:
    """`rows [tokens, width]` float32, and the atoms `[atoms, width]` of norm 1 that they are made of."""

    rows: np.ndarray
    atoms: np.ndarray


def planted(
    tokens: int,
    *,
    width: int,
    atoms: int,
    active: tuple[int, int],
    noise: float = 0.0,
    seed: int = 0,
) -> Planted:
    """Rows that are sums of `active[0]` to `active[1]` atoms, with coefficients uniform in [0.5, 1.5].

    Args:
      tokens: how many rows.
      width: of a row.
      atoms: of the dictionary, Gaussian directions.
      active: the least and the largest number of atoms of a row.
      noise: standard deviation of Gaussian noise on each entry.
      seed: of everything.

    Raises:
      ValueError: `active` is not within 1 and `atoms`.
    """
    least, most = active
    if not 1 <= least <= most <= atoms:
        raise ValueError(f"active={active}: give two numbers in order, from 1 to {atoms}")
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(atoms, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # The first `count` of a random order of atoms, for each row.
    order = np.argsort(rng.random((tokens, atoms)), axis=1)
    count = rng.integers(least, most + 1, (tokens, 1))
    code = np.where(order < count, rng.uniform(0.5, 1.5, (tokens, atoms)), 0.0)
    rows = code @ directions + noise * rng.normal(size=(tokens, width))
    return Planted(rows.astype(np.float32), directions.astype(np.float32))
