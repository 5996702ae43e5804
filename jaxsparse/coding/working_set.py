r"""The LASSO by working sets: for each signal a small problem of the atoms that matter, then a look at all of them.

Solvers of `proximal` multiply with every atom in every step. Once most entries are zero that is wasted: here a round
solves $\min \frac12\|A_S x_S - y\|^2 + \lambda\|x_S\|_1$ for a set S of few atoms, on their inner products
$A_S^T A_S$, and two products with the whole dictionary say which atoms are missing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.operators import (
    Dense,
    Operator,
    check_positive,
    check_signals,
    check_steps,
    check_strength,
)
from jaxsparse.coding.proximal import _light, gap_of
from jaxsparse.coding.thresholds import soft
from jaxsparse.selection import topk_indices


class Certified(NamedTuple):
    """Codes `[..., n]`, and their duality gap `[...]`: how far each objective is above its minimum at most."""

    codes: Array
    gap: Array


def working_set(
    dictionary: Array | Dense,
    signals: Array,
    strength: Array | float,
    *,
    size: int = 64,
    rounds: int = 4,
    sweeps: int = 8,
) -> Certified:
    r"""The LASSO $\min_x \frac12\|A x - y\|^2 + \lambda\|x\|_1$ of many signals whose codes are short. A round

    1. takes as S the atoms in use, then those of least $(1 - |a_j^T \theta|) / \|a_j\|$, the distance of a dual feasible
       $\theta = r / \max(\lambda, \|A^T r\|_\infty)$ from the constraint of an atom, with the residual $r = y - A x$;
    2. gathers $A_S^T A_S$ of each signal and sweeps over its coordinates: $q = A_S^T r$,
       $x_j^+ = soft(q_j + \|a_j\|^2 x_j, \lambda) / \|a_j\|^2$, $q \leftarrow q - (x_j^+ - x_j) A_S^T a_j$;
    3. computes the residual and its products with all atoms anew.

    **A code with more than `size` nonzeros is not found**, nor one that needs more rounds: the gap of such a signal stays
    large. Look at it, and give those signals a larger size, or to `fista` with these codes as `init`.

    Args:
      dictionary: `[m, n]`, atoms in columns. An operator has no inner products to gather.
      signals: `[..., m]`.
      strength: $\lambda > 0$, a number or one for each signal `[..., 1]`.
      size: atoms in a set, all of them if there are fewer; about twice the nonzeros that are expected. It costs
        $size^2$ numbers of memory for each signal.
      rounds: how many; may be traced.
      sweeps: of coordinate descent in a round; may be traced.

    Returns:
      The codes, with exact zeros, and their duality gaps. Rounding limits a gap to about the precision of the dtype times
      $\|y\|^2$.

    Raises:
      ValueError: shapes that do not fit, a strength or size that is not positive, negative rounds or sweeps, an
        operator, NaN in the signals.

    >>> found = working_set(jnp.eye(3), jnp.array([2.0, 0.1, -1.0]), 0.5, size=2)
    >>> found.codes.tolist(), float(found.gap) < 1e-6
    ([1.5, 0.0, -0.5], True)
    >>> float(working_set(jnp.eye(3), jnp.array([2.0, 0.1, -1.0]), 0.5, size=1).gap) > 0.1
    True

    Source: Massias, Gramfort, Salmon, "Celer: a fast solver for the Lasso with dual extrapolation", 2018, for the
    priorities, and Johnson & Guestrin, "Blitz", 2015. Differs from both in: 1. sets have a fixed size, and grow in no
    round; 2. no dual extrapolation, no pruning by a bound; 3. fixed rounds and sweeps in place of tolerances.
    """
    op = _light(dictionary)
    if isinstance(op, Operator):
        raise ValueError("dictionary is of type Operator: give a matrix; functions have fista")
    check_count("size", size)
    signals = check_signals(op, signals)
    check_positive("strength", strength)
    check_strength(strength, signals)
    check_steps("rounds", rounds)
    check_steps("sweeps", sweeps)
    op = Dense(op.matrix.astype(signals.dtype), op.norm)
    y = signals.reshape(-1, op.rows)
    full = jnp.broadcast_to(jnp.asarray(strength, y.dtype), (*signals.shape[:-1], 1))
    bound = full.reshape(-1, 1)
    m = min(size, op.columns)
    gram = op.adjoint(op.matrix.T)
    square = jnp.diagonal(gram)

    def sweep(x, correlation, chosen):
        """Codes `[B, n]` after coordinate descent on the sets `[B, m]`; within, signals are the last axis."""
        products = gram[chosen.T[:, None, :], chosen.T[None, :, :]]
        length = square[chosen].T
        safe = jnp.where(length > 0, length, 1)
        take = lambda values: jnp.take_along_axis(values, chosen, 1).T

        def coordinate(i, carry):
            x, q = carry
            j = i % m
            new = soft(q[j] + length[j] * x[j], bound[:, 0]) / safe[j]
            return x.at[j].set(new), q - (new - x[j]) * products[j]

        found, _ = jax.lax.fori_loop(0, sweeps * m, coordinate, (take(x), take(correlation)))
        rows = jnp.arange(len(y))[:, None]
        return jnp.zeros_like(x).at[rows, chosen].set(found.T, unique_indices=True)

    def step(_, carry):
        x, _, correlation = carry
        largest = jnp.maximum(bound, jnp.abs(correlation).max(-1, keepdims=True))
        distance = (1 - jnp.abs(correlation) / largest) / jnp.sqrt(
            square
        )  # inf of an atom of zeros
        chosen, _ = topk_indices(jnp.where(x != 0, 1.0, -distance), m)
        x = sweep(x, correlation, chosen)
        rest = y - op.forward(x)
        return x, rest, op.adjoint(rest)

    start = jnp.zeros((len(y), op.columns), y.dtype), y, op.adjoint(y)
    codes, rest, correlation = jax.lax.fori_loop(0, rounds, step, start)
    gap = gap_of(y, rest, correlation, codes, bound[:, 0])
    return Certified(
        codes.reshape(*signals.shape[:-1], op.columns), gap.reshape(signals.shape[:-1])
    )
