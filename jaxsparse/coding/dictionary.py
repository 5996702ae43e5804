r"""Dictionaries learned from signals: $Y \approx Z D^T$ with few entries in each row of Z."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.greedy import omp
from jaxsparse.coding.operators import check_matrix, check_signals, check_steps


class Learned(NamedTuple):
    """A dictionary `[m, n]` with atoms of norm 1 in columns, and the codes `[samples, n]`."""

    dictionary: Array
    codes: Array


def ksvd(signals: Array, dictionary: Array, k: int, *, steps: int = 30, powers: int = 4) -> Learned:
    r"""K-SVD. Each step codes the signals by `omp`, then refits atom after atom (`refit_atoms`), puts the worst
    represented signal in place of an atom that nothing uses, and in place of one of two atoms with $|\cos| > 0.99$.

    Args:
      signals: `[samples, m]`.
      dictionary: where it starts `[m, n]`, such as n of the signals as columns; atoms are normalised.
      k: how many atoms a signal has.
      steps: how many.
      powers: power iterations for each rank-1 fit, see `refit_atoms`.

    Returns:
      The dictionary and its codes by `omp`.

    Raises:
      ValueError: k out of range, shapes that do not fit, NaN in the signals.

    >>> signals = jnp.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    >>> learned = ksvd(signals, jnp.array([[1.0, 0.2], [0.1, 1.0]]), 1, steps=3)
    >>> [f"{abs(v):.2f}" for v in learned.dictionary.ravel()]
    ['1.00', '0.00', '0.00', '1.00']

    Source: Aharon, Elad, Bruckstein, "K-SVD", 2006.
    """
    check_matrix(dictionary)
    signals = check_signals(dictionary, signals)
    if signals.ndim != 2 or not len(signals):
        raise ValueError(f"signals have shape {signals.shape}: give a matrix [samples, m]")
    check_count("k", k, most=min(dictionary.shape), arrays=True)
    check_steps("steps", steps)
    check_steps("powers", powers)

    def step(_, d):
        d, z = refit_atoms(signals, d, omp(d, signals, k), powers=powers)
        return _replace(signals, d, z)

    start = unit_columns(jnp.asarray(dictionary, signals.dtype))
    d = jax.lax.fori_loop(0, steps, step, start)
    return Learned(d, omp(d, signals, k))


def refit_atoms(signals: Array, dictionary: Array, codes: Array, *, powers: int = 4) -> Learned:
    r"""The second half of K-SVD, atom after atom: with E the residual without atom j on the signals that use
    it, $d_j, z_j$ become a rank-1 fit of E. It never increases $\|Y - Z D^T\|_F$, and keeps the support.

    The fit is by `powers` alternating steps from the atom as it is ($z = E d$, $d = E^T z / \|E^T z\|$): each lowers the
    error, and many of them are the singular value decomposition. One is the "approximate" K-SVD.

    Args:
      signals: `[samples, m]`.
      dictionary: `[m, n]`, atoms of norm 1.
      codes: `[samples, n]`; which entries are 0 stays.
      powers: how many alternating steps.

    Returns:
      The dictionary and the codes.

    >>> d, z = refit_atoms(jnp.array([[0.0, 2.0]]), jnp.array([[0.6], [0.8]]), jnp.array([[1.6]]))
    >>> [f"{v:.2f}" for v in (*d[:, 0], z[0, 0])]
    ['0.00', '1.00', '2.00']

    Source: Rubinstein, Zibulevsky, Elad, 2008, for the approximate variant.
    """
    uses = codes != 0

    def fit(j, carry):
        d, z, rest = carry
        use = uses[:, j]
        error = jnp.where(use[:, None], rest + z[:, j, None] * d[:, j], 0)
        atom = d[:, j]
        power = lambda _, atom: unit_columns(error.T @ (error @ atom), atom)
        atom = jax.lax.fori_loop(0, powers, power, atom)
        values = error @ atom
        # The atom of a signal that uses it stays in use, even at 0: the support is of `uses`.
        rest = jnp.where(use[:, None], error - values[:, None] * atom, rest)
        return d.at[:, j].set(atom), z.at[:, j].set(values), rest

    rest = signals - codes @ dictionary.T
    d, z, _ = jax.lax.fori_loop(0, dictionary.shape[1], fit, (dictionary, codes, rest))
    return Learned(d, z)


def unit_columns(x: Array, otherwise: Array | float = 0.0) -> Array:
    """Columns of norm 1; of zeros: what is given."""
    norm = jnp.linalg.norm(x, axis=0)
    return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1), otherwise)


def _replace(signals: Array, d: Array, z: Array) -> Array:
    """The signal that is worst represented in place of an unused atom, or of the later one of a pair; one after
    another, each signal once."""
    errors = jnp.sum((signals - z @ d.T) ** 2, -1)

    def visit(j, carry):
        d, errors = carry
        cosines = jnp.where(jnp.arange(d.shape[1]) < j, jnp.abs(d[:, j] @ d), 0)
        worst = jnp.argmax(errors)
        poor = (~jnp.any(z[:, j] != 0) | jnp.any(cosines > 0.99)) & (errors[worst] > 0)
        atom = jnp.where(poor, unit_columns(signals[worst], d[:, j]), d[:, j])
        return d.at[:, j].set(atom), errors.at[worst].set(jnp.where(poor, 0, errors[worst]))

    return jax.lax.fori_loop(0, d.shape[1], visit, (d, errors))[0]


def masked_loss(dictionary: Array, signals: Array, k: int, kept: Array) -> Array:
    r"""The masking objective: codes are found by `omp` on the kept coordinates, and the loss is the error on the
    others, $mean \|y_{M^c} - D_{M^c} \hat z\|^2$, $\hat z = OMP(D_M, y_M, k)$. Codes are constants for the gradient, so
    it is 0 in the rows of kept coordinates. Minimise it over random masks, and normalise the atoms after each step.

    With more atoms than the truth and with noise, the error of a reconstruction is lower for dictionaries that are wrong;
    what is predicted of coordinates that the codes have not seen is not.

    Args:
      dictionary: `[m, n]`, atoms in columns.
      signals: `[..., m]`.
      k: how many atoms a signal has.
      kept: which coordinates the codes see `[m]`, bool; about nine of ten.

    Returns:
      A scalar.

    Raises:
      ValueError: k out of range, shapes that do not fit, NaN in the signals.

    Differs from the authors' code: atoms are chosen by normalised correlations with what is kept of them.

    >>> d = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> float(masked_loss(d, jnp.array([0.0, 2.0, 3.0]), 1, jnp.array([True, True, False])))
    1.0

    Source: Chidambaram et al., "Hiding Data Helps: On the Benefits of Masking for Sparse Coding", 2023.
    """
    check_matrix(dictionary)
    signals = check_signals(dictionary, signals)
    if kept.shape != dictionary.shape[:1]:
        raise ValueError(
            f"kept has shape {kept.shape}: give one for each coordinate, {dictionary.shape[:1]}"
        )
    seen = jnp.where(kept[:, None], dictionary, 0)
    codes = omp(jax.lax.stop_gradient(seen), jnp.where(kept, signals, 0), k)
    rest = jnp.where(kept, 0, signals - codes @ dictionary.T)
    return jnp.mean(jnp.sum(rest**2, -1))
