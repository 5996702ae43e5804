r"""Sparse Bayesian learning where dictionary and support are Kronecker products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.coding.operators import check_matrix, check_positive


class KroneckerPosterior(NamedTuple):
    """The mean of the codes `[n_1, ..., n_d]`, and the factors of their variances, of `[n_1]` to `[n_d]`."""

    mean: Array
    gammas: list[Array]


def kronecker_sbl(
    dictionaries: Sequence[Array],
    signal: Array,
    noise: Array | float,
    *,
    steps: int = 50,
    inner: int = 5,
    prune: float = 1e-2,
) -> KroneckerPosterior:
    r"""`sbl` by EM for $A = A_1 \otimes \dots \otimes A_d$ with tied variances $\gamma = g_1 \otimes \dots \otimes g_d$: the
    sum of the $n_j$ hyper-parameters in place of their product.

    E: with $A_j\,diag(g_j) A_j^T = U_j P_j U_j^T$, $S^{-1} = U\,diag(1/(s + P_1 \otimes \dots))\,U^T$: no large matrix is formed.
    M: $\Lambda = \mu^2 + diag(\Sigma)$, then $\sum\log\gamma + \Lambda/\gamma$ is lowered by `inner` rounds of
    $g_1[i] \leftarrow mean_{jk}\, \Lambda_{ijk}/(g_2[j]\,g_3[k])$ and so on; all but the last are kept at norm 1.

    Args:
      dictionaries: $A_1$ `[m_1, n_1]` to $A_d$.
      signal: `[m_1, ..., m_d]`; `vmap` for more of them.
      noise: $s$.
      steps: how many.
      inner: rounds of each M step.
      prune: at the end, entries of $g_j$ below this fraction of its largest are 0, and so are their codes.

    Returns:
      A `KroneckerPosterior`.

    Raises:
      ValueError: a signal whose shape is not that of the rows, noise that is not positive.

    >>> eye = jnp.eye(2)
    >>> y = jnp.array([[2.0, 0.0], [0.0, 0.0]])
    >>> [f"{x:.1f}" for x in kronecker_sbl([eye, eye], y, 0.01).mean.ravel()]
    ['2.0', '0.0', '0.0', '0.0']

    Source: He & Joseph, "Bayesian algorithms for Kronecker-structured sparse vector recovery", 2024 (alternating
    minimisation).
    """
    for a in dictionaries:
        check_matrix(a)
    check_positive("noise", noise)
    rows = tuple(a.shape[0] for a in dictionaries)
    if signal.shape != rows:
        raise ValueError(f"signal has shape {signal.shape}: the dictionaries have rows {rows}")

    def posterior(gammas):
        pairs = [jnp.linalg.eigh(a @ (g[:, None] * a.T)) for a, g in zip(dictionaries, gammas)]
        rotated = [u.T @ a for (_, u), a in zip(pairs, dictionaries)]
        spread = noise + jnp.maximum(_outer([p for p, _ in pairs]), 0)
        gamma = _outer(gammas)
        white = _modes([u.T for _, u in pairs], signal) / spread
        mean = gamma * _modes([b.T for b in rotated], white)
        leverage = _modes([b.T**2 for b in rotated], 1 / spread)
        return mean, jnp.maximum(gamma - gamma**2 * leverage, 0)

    def step(_, gammas):
        mean, variance = posterior(gammas)
        return tie(mean**2 + variance, gammas, inner=inner)

    start = [jnp.ones(a.shape[1], signal.dtype) for a in dictionaries]
    gammas = jax.lax.fori_loop(0, steps, step, start)
    gammas = [jnp.where(g < prune * jnp.max(g), 0, g) for g in gammas]
    return KroneckerPosterior(posterior(gammas)[0], gammas)


def tie(moments: Array, gammas: Sequence[Array], *, inner: int = 5) -> list[Array]:
    r"""The M step of `kronecker_sbl`: factors that lower $\sum\log\gamma + \Lambda/\gamma$, at whose minimum
    $\sum\Lambda/\gamma$ is the number of entries.

    Args:
      moments: $\Lambda$ `[n_1, ..., n_d]`.
      gammas: where they start.
      inner: how many rounds.

    >>> g = tie(jnp.array([[2.0, 4.0], [4.0, 8.0]]), [jnp.ones(2), jnp.ones(2)])
    >>> f"{g[0][1] * g[1][1]:.2f}"
    '8.00'
    """
    tiny = jnp.finfo(moments.dtype).tiny
    safe = lambda g: jnp.maximum(g, jnp.sqrt(tiny))

    def sweep(_, factors):
        factors = list(factors)
        for j in range(len(factors)):
            weights = [jnp.ones_like(g) if i == j else 1 / safe(g) for i, g in enumerate(factors)]
            scaled = moments
            for i, w in enumerate(weights):
                scaled = scaled * w.reshape([-1 if i == a else 1 for a in range(len(factors))])
            factors[j] = jnp.mean(scaled, [i for i in range(len(factors)) if i != j])
        for j in range(len(factors) - 1):
            norm = safe(jnp.linalg.norm(factors[j]))
            factors[j], factors[-1] = factors[j] / norm, factors[-1] * norm
        return factors

    return jax.lax.fori_loop(0, inner, sweep, list(gammas))


def _outer(vectors: Sequence[Array]) -> Array:
    return functools.reduce(jnp.multiply.outer, vectors)


def _modes(matrices: Sequence[Array], tensor: Array) -> Array:
    """Each matrix applied to its axis."""
    for axis, a in enumerate(matrices):
        product = jnp.tensordot(a, tensor, axes=(1, axis), precision="highest")
        tensor = jnp.moveaxis(product, 0, axis)
    return tensor
