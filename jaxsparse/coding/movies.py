r"""Movies from few measurements: a product of images and curves in time, tied to a denoised copy; or a movie of small
variation and low rank, apart from gross errors.

Sources: Iskender, Klasky, Bresler, "RED-PSM: regularization by denoising of factorized low rank models for dynamic
imaging", 2024; Tan, Qing, Xu, "Robust depth linear error decomposition with double total variation and nuclear norm for
dynamic MRI reconstruction", 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.low_rank import singular_soft
from jaxsparse.coding.operators import Operator, check_positive, check_signals
from jaxsparse.coding.thresholds import soft


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
    check_count("knots", knots, 3)
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


class Cleaned(NamedTuple):
    """A movie and the errors that were found in it, both `[frames, rows, columns]`."""

    movie: Array
    errors: Array


def rdledm(
    operator: Operator,
    measured: Array,
    shape: tuple[int, int, int],
    *,
    space: float = 0.01,
    time: float = 0.01,
    low_rank: tuple[float, float, float] = (0.1, 0.0, 0.0),
    error: float | None = 0.03,
    steps: int = 300,
) -> Cleaned:
    r"""$\min_{X, E} \frac12\|R(X + E) - y\|^2 + \lambda_s TV_s(X) + \lambda_t TV_t(X)
    + \sum_i \mu_i \|X_{(i)}\|_* + \eta\|E\|_1$

    with the total variation over rows and columns, $TV_s$, and over frames, $TV_t$, both by absolute values of
    differences, and $X_{(i)}$ the movie as a matrix with axis i as its rows. Primal-dual steps, with the differences D of X:

    1. $X^+ = X - \tau(R^T(R(X + E) - y) + D^T p + \sum_i N_i)$,
       $E^+ = soft(E - \tau R^T(R(X + E) - y), \tau\eta)$;
    2. $p \leftarrow clip(p + \sigma D(2X^+ - X), \pm\lambda)$;
    3. $N_i \leftarrow N_i + \sigma(2X^+ - X)$ with its singular values cut off at $\mu_i$,

    where $1/\tau = \|R\|^2 + \sigma\|K\|^2$, half the constant of the gradient and the squared norm of all that is dual.

    Args:
      operator: R from movies `[frames * rows * columns]` to measurements.
      measured: y `[rows of R]`.
      shape: (frames, rows, columns).
      space, time: $\lambda_s, \lambda_t$.
      low_rank: $\mu$ for frames, rows and columns; the frames' matrix has a frame in each row. Terms of 0 cost nothing.
      error: $\eta$; None: no errors, $E = 0$. As a part of the movie one wrong pixel costs $4\lambda_s + 2\lambda_t$ and
        more: an $\eta$ above that finds none.
      steps: how many.

    Returns:
      Both parts.

    Raises:
      ValueError: shapes that do not fit the operator, negative weights, measurements that are not finite.

    The paper's abstract names the terms; weights, the norm of the errors and the unfoldings of its two nuclear norms are
    chosen here.

    >>> see_all = Operator(lambda x: x, lambda r: r, 1.0, 8, 8)
    >>> movie = jnp.array([[0.0, 0.0], [0.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> found = rdledm(see_all, movie.ravel(), (4, 2, 1), space=0.0, time=1.0, low_rank=(0.0, 0.0, 0.0), error=None)
    >>> [round(float(x), 3) for x in found.movie[:, 0, 0]]
    [0.5, 0.5, 3.5, 3.5]

    Source of the steps: Condat, "A primal-dual splitting method for convex optimization", 2013.
    """
    if len(shape) != 3 or int(np.prod(shape)) != operator.columns:
        raise ValueError(
            f"shape={shape}: give (frames, rows, columns) with {operator.columns} pixels in all"
        )
    check_signals(operator, measured)
    if measured.ndim != 1:
        raise ValueError(f"measured has shape {measured.shape}: give one movie's, [measurements]")
    weights = {"space": space, "time": time, "low_rank": np.asarray(low_rank)}
    for name, value in weights.items() if error is None else {**weights, "error": error}.items():
        check_positive(name, value, zero=True)
    used = [axis for axis, mu in enumerate(low_rank) if mu > 0]
    bounds = (time, space, space)
    difference = lambda x: [jnp.diff(x, axis=axis) for axis in range(3)]

    def adjoint(p):
        """D^T of a difference along each axis."""
        pad = lambda axis: [(1, 1) if a == axis else (0, 0) for a in range(3)]
        return sum(-jnp.diff(jnp.pad(v, pad(axis)), axis=axis) for axis, v in enumerate(p))

    def cut(v, axis):
        """Singular values of a movie as a matrix, cut off."""
        moved = jnp.moveaxis(v, axis, 0)
        matrix = moved.reshape(shape[axis], -1)
        rest = matrix - singular_soft(matrix, low_rank[axis])
        return jnp.moveaxis(rest.reshape(moved.shape), 0, axis)

    square = jnp.maximum(jnp.asarray(operator.norm, measured.dtype) ** 2, 1e-12)
    norm = 12.0 + len(used)  # of D and the copies of X, squared
    sigma = square / norm
    tau = 1 / (square + sigma * norm)

    def step(_, carry):
        x, errors, p, duals = carry
        rest = operator.forward((x + errors).ravel()) - measured
        slope = operator.adjoint(rest).reshape(shape)
        new = x - tau * (slope + adjoint(p) + sum(duals, jnp.zeros_like(x)))
        if error is not None:
            errors = soft(errors - tau * slope, tau * error)
        ahead = 2 * new - x
        p = [
            jnp.clip(v + sigma * d, -bound, bound)
            for v, d, bound in zip(p, difference(ahead), bounds)
        ]
        duals = [cut(v + sigma * ahead, axis) for v, axis in zip(duals, used)]
        return new, errors, p, duals

    zeros = jnp.zeros(shape, measured.dtype)
    start = zeros, zeros, difference(zeros), [zeros for _ in used]
    movie, errors, _, _ = jax.lax.fori_loop(0, steps, step, start)
    return Cleaned(movie, errors)
