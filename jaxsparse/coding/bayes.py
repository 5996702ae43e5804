r"""Sparse Bayesian learning: every coefficient has its own prior variance, and most of them go to 0.

$y = A x + n$, $x_i \sim N(0, \gamma_i)$, $n \sim N(0, s I)$. The evidence is maximal where
$\log\det S + y^T S^{-1} y$ is minimal, $S = s I + A\,diag(\gamma) A^T$.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.coding.operators import check_matrix, check_positive, check_signals, check_steps

RULES = ("em", "fixed_point")


class Posterior(NamedTuple):
    """What `sbl` finds of each signal: the mean of its codes and their variances `[..., n]`, the prior variances
    `[..., n]` (the relevance of each atom), and the variance of the noise `[...]`."""

    mean: Array
    variance: Array
    gamma: Array
    noise: Array


def sbl(
    dictionary: Array,
    signals: Array,
    noise: Array | float,
    *,
    steps: Array | int = 100,
    rule: Literal["em", "fixed_point"] = "em",
    learn_noise: bool = False,
    prune: float = 1e-3,
) -> Posterior:
    r"""Sparse Bayesian learning. Each step has

    - E: $\mu = \Gamma A^T S^{-1} y$, $\Sigma_{ii} = \gamma_i - \gamma_i^2 a_i^T S^{-1} a_i$;
    - M, "em": $\gamma_i \leftarrow \mu_i^2 + \Sigma_{ii}$, which never raises the cost and is slow near 0;
      "fixed_point": $\gamma_i \leftarrow \mu_i^2 / (1 - \Sigma_{ii}/\gamma_i)$, far faster, and may raise it;
    - with `learn_noise`: $s \leftarrow (\|y - A\mu\|^2 + s\sum_i(1 - \Sigma_{ii}/\gamma_i))/m$. It collapses where the
      number of active atoms is near m.

    Systems are $m \times m$, never $n \times n$. Signals do not share variances.

    Args:
      dictionary: `[m, n]`, atoms in columns.
      signals: `[..., m]`.
      noise: $s$, or where it starts.
      steps: how many; may be traced.
      rule: "em" or "fixed_point".
      learn_noise: see above.
      prune: after the last step, variances below this fraction of the largest are 0, and so are their codes.

    Returns:
      A `Posterior`.

    Raises:
      ValueError: shapes that do not fit, noise that is not positive, an unknown rule, NaN in the signals.

    >>> found = sbl(jnp.eye(2), jnp.array([2.0, 0.1]), 0.04, steps=50, rule="fixed_point")
    >>> [f"{g:.2f}" for g in found.gamma]  # max(y^2 - noise, 0)
    ['3.96', '0.00']

    Source: Tipping, "Sparse Bayesian learning and the relevance vector machine", 2001; Wipf & Rao, 2004.
    """
    check_matrix(dictionary)
    signals = check_signals(dictionary, signals)
    check_positive("noise", noise)
    check_steps("steps", steps)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: use one of {', '.join(RULES)}")
    a = jnp.asarray(dictionary, signals.dtype)
    m, n = a.shape
    y = signals.reshape(-1, m)
    tiny = jnp.finfo(a.dtype).tiny

    def step(_, carry):
        gamma, s = carry
        mean, variance = _posterior(a, y, gamma, s)
        # 1 - Sigma_ii / gamma_i: how well the data determine the coefficient.
        known = gamma * _leverage(a, gamma, s)
        if rule == "em":
            new = mean**2 + variance
        else:
            new = jnp.where(known > tiny, mean**2 / jnp.maximum(known, tiny), 0)
        if learn_noise:
            rest = y - jnp.matmul(mean, a.T, precision="highest")
            s = (jnp.sum(rest**2, -1) + s * jnp.sum(known, -1)) / m
        return new, s

    start = (
        jnp.ones((y.shape[0], n), a.dtype),
        jnp.broadcast_to(jnp.asarray(noise, a.dtype).reshape(-1), y.shape[:1]),
    )
    gamma, s = jax.lax.fori_loop(0, steps, step, start)
    gamma = jnp.where(gamma < prune * jnp.max(gamma, -1, keepdims=True), 0, gamma)
    mean, variance = _posterior(a, y, gamma, s)
    shape = (*signals.shape[:-1], n)
    return Posterior(
        mean.reshape(shape), variance.reshape(shape), gamma.reshape(shape), s.reshape(shape[:-1])
    )


def sbl_cost(dictionary: Array, signals: Array, gamma: Array, noise: Array | float) -> Array:
    r"""$\log\det S + y^T S^{-1} y$ of each signal, what `sbl` minimises.

    Args:
      dictionary: `[m, n]`.
      signals: `[..., m]`.
      gamma: `[..., n]`.
      noise: $s$, a number or `[...]`.

    Returns:
      `[...]`.

    >>> round(float(sbl_cost(jnp.eye(1), jnp.array([2.0]), jnp.array([3.0]), 1.0)), 4)  # log 4 + 4 / 4
    2.3863
    """
    chol = jnp.linalg.cholesky(_covariance(dictionary, gamma, jnp.asarray(noise)))
    white = jax.scipy.linalg.solve_triangular(chol, signals[..., None], lower=True)[..., 0]
    logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)), -1)
    return logdet + jnp.sum(white**2, -1)


def _covariance(a: Array, gamma: Array, noise: Array) -> Array:
    """S `[..., m, m]`."""
    scaled = a * gamma[..., None, :]
    return jnp.matmul(scaled, a.T, precision="highest") + noise[..., None, None] * jnp.eye(
        a.shape[0], dtype=a.dtype
    )


def _whitened(a: Array, gamma: Array, noise: Array) -> tuple[Array, Array]:
    """The Cholesky factor C of S, and C^-1 A."""
    chol = jnp.linalg.cholesky(_covariance(a, gamma, noise))
    atoms = jnp.broadcast_to(a, (*chol.shape[:-2], *a.shape))
    return chol, jax.scipy.linalg.solve_triangular(chol, atoms, lower=True)


def _leverage(a: Array, gamma: Array, noise: Array) -> Array:
    """a_i^T S^-1 a_i `[..., n]`."""
    return jnp.sum(_whitened(a, gamma, noise)[1] ** 2, -2)


def _posterior(a: Array, y: Array, gamma: Array, noise: Array) -> tuple[Array, Array]:
    """Mean and variances of the codes."""
    chol, atoms = _whitened(a, gamma, noise)
    white = jax.scipy.linalg.solve_triangular(chol, y[..., None], lower=True)[..., 0]
    mean = gamma * jnp.einsum("bmn,bm->bn", atoms, white, precision="highest")
    variance = gamma * (1 - gamma * jnp.sum(atoms**2, -2))
    return mean, jnp.maximum(variance, 0)
