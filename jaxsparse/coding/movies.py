r"""Movies from few measurements: a product of images and curves in time, tied to a denoised copy.

Source: Iskender, Klasky, Bresler, "RED-PSM: regularization by denoising of factorized low rank models for dynamic
imaging", 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxsparse.coding.operators import Operator, check_count, check_positive


class Movie(NamedTuple):
    """The factors, images `[rank, pixels]` and latent curves `[rank, knots]`, and the movie `[time, pixels]`
    with the denoised copy that it is tied to."""

    images: Array
    latent: Array
    movie: Array
    denoised: Array


def spline_matrix(knots: int, points: int) -> np.ndarray:
    """The natural cubic spline through values at `knots` even places, at `points` even places: a matrix
    `[points, knots]` whose rows sum to 1.

    >>> spline_matrix(3, 5)[2].tolist()
    [0.0, 1.0, 0.0]
    """
    check_count("knots - 2", knots - 2, knots)
    n = knots - 2  # second derivatives m at inner knots: m' + 4 m + m'' = 6 (y' - 2 y + y'')
    bends = np.zeros((knots, knots))
    system = 4 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)
    bends[1:-1] = np.linalg.solve(system, 6 * np.diff(np.eye(knots), 2, axis=0))
    at = np.linspace(0, knots - 1, points)
    left = np.minimum(at.astype(int), knots - 2)
    b = (at - left)[:, None]
    a, eye = 1 - b, np.eye(knots)
    curved = (a**3 - a) * bends[left] + (b**3 - b) * bends[left + 1]
    return a * eye[left] + b * eye[left + 1] + curved / 6


def red_psm(
    operator: Operator,
    measured: Array,
    denoise: Callable[[Array], Array],
    *,
    frames: int,
    rank: int = 6,
    knots: int = 9,
    coupling: float = 2e-4,
    strength: float = 2e-4,
    decay: float = 1e-6,
    learning_rate: float = 5e-3,
    steps: int = 200,
    inner_steps: int = 25,
    seed: int = 0,
) -> Movie:
    r"""With $f = \sum_k u_k \psi_k(t)$, curves $\psi$ splines of few knots, loops over

    1. some steps of Adam on images and knots: mean of $(R f - g)^2$, $+ \frac{\beta}{2}\|f - \bar f + \gamma\|^2$, plus small
       squares of the factors; f is cut off at 0;
    2. $\bar f \leftarrow (\lambda D(\bar f) + \beta (f + \gamma)) / (\lambda + \beta)$;
    3. $\gamma \leftarrow \gamma + f - \bar f$.

    Args:
      operator: R from movies `[frames * pixels]` to measurements.
      measured: g `[rows of R]`.
      denoise: D, of movies `[frames, pixels]`; made for their scale of intensity.
      frames: how many.
      rank: how many images.
      knots: of a curve, at least 3.
      coupling: $\beta$.
      strength: $\lambda$; 0: no denoising.
      decay: of the squares of both factors.
      learning_rate, inner_steps: of Adam.
      steps: rounds of 1 to 3.
      seed: of the factors.

    Returns:
      The factors and both movies.

    Raises:
      ValueError: measurements or frames that do not fit the operator, strengths out of range.

    The coupling is squared as in the paper; the released code takes the norm, which has another scale.

    >>> see_all = Operator(lambda x: x, lambda r: r, 1.0, 12, 12)
    >>> still = jnp.tile(jnp.array([1.0, 0.0, 2.0]), 4)
    >>> found = red_psm(see_all, still, lambda f: f, frames=4, rank=1, knots=3, learning_rate=0.05, steps=40)
    >>> bool(jnp.abs(found.movie.ravel() - still).max() < 0.05)
    True
    """
    if operator.columns % frames or measured.shape != (operator.rows,):
        raise ValueError(
            f"measured has shape {measured.shape} and frames={frames} for an operator of {operator.rows} "
            f"measurements of {operator.columns} numbers: one does not fit"
        )
    check_positive("coupling", coupling)
    check_positive("strength", strength, zero=True)
    pixels = operator.columns // frames
    spline = jnp.asarray(spline_matrix(knots, frames), measured.dtype)
    keys = jax.random.split(jax.random.key(seed))
    normal = lambda key, shape: jax.random.normal(key, shape, measured.dtype) * 0.1
    factors = normal(keys[0], (rank, pixels)), 1 + normal(keys[1], (rank, knots))
    adam = optax.adam(learning_rate)

    def product(factors):
        images, latent = factors
        return jnp.maximum(jnp.matmul((latent @ spline.T).T, images, precision="highest"), 0)

    def loss(factors, copy, gamma):
        f = product(factors)
        fit = ((operator.forward(f.ravel()) - measured) ** 2).mean()
        tie = coupling / 2 * ((f - copy + gamma) ** 2).sum()
        images, latent = factors
        return fit + tie + decay * ((images**2).mean() + ((latent @ spline.T) ** 2).mean())

    def inner(carry, _):
        factors, state, copy, gamma = carry
        updates, state = adam.update(jax.grad(loss)(factors, copy, gamma), state, factors)
        return (optax.apply_updates(factors, updates), state, copy, gamma), None

    def outer(_, carry):
        (factors, state, copy, gamma), _ = jax.lax.scan(inner, carry, length=inner_steps)
        f = product(factors)
        copy = (strength * denoise(copy) + coupling * (f + gamma)) / (strength + coupling)
        return factors, state, copy, gamma + f - copy

    zeros = jnp.zeros((frames, pixels), measured.dtype)
    start = factors, adam.init(factors), product(factors), zeros
    factors, _, copy, _ = jax.lax.fori_loop(0, steps, outer, start)
    return Movie(factors[0], factors[1], product(factors), copy)
