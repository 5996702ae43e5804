r"""Optimal transport with entropy: plans whose rows and columns sum to what is given.

The plan of potentials x, y is $P = \exp(\eta(-C + x 1^T + 1 y^T) - 1)$; they maximise the concave dual
$f = -\frac1\eta \sum P + r^T x + c^T y$, whose gradient is how far the sums of P are from r and c.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.sparse.linalg import cg

from jaxsparse._control import is_concrete
from jaxsparse.coding.operators import check_positive
from jaxsparse.selection import topk_mask


class Transport(NamedTuple):
    """Potentials x `[m]` and y `[n]`, how many steps were taken (int32), and the largest error of a sum."""

    x: Array
    y: Array
    steps: Array
    error: Array


def transport_plan(found: Transport, cost: Array, eta: float) -> Array:
    r"""$P = \exp(\eta(-C + x 1^T + 1 y^T) - 1)$, `[m, n]`.

    >>> cost = jnp.zeros((2, 2))
    >>> found = sinkhorn(cost, jnp.array([0.5, 0.5]), jnp.array([0.5, 0.5]), 1.0)
    >>> transport_plan(found, cost, 1.0).tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    return jnp.exp(eta * (found.x[:, None] + found.y - cost) - 1)


def sinkhorn(
    cost: Array,
    rows: Array,
    columns: Array,
    eta: float,
    *,
    steps: int = 1000,
    tolerance: float = 0.0,
) -> Transport:
    r"""Sinkhorn's sweeps in the log domain: x such that rows sum to r, then y such that columns sum to c.

    Args:
      cost: C `[m, n]`.
      rows: r `[m]`, positive.
      columns: c `[n]`, positive, with the sum of r.
      eta: 1 / temperature.
      steps: how many sweeps at most.
      tolerance: of the largest error of a sum of P, where it ends before.

    Raises:
      ValueError: shapes that do not fit, sums that are not positive or differ, eta that is not positive.

    Source: Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", 2013.

    >>> found = sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.ones(2), jnp.ones(2), 2.0)
    >>> float(found.error) < 1e-6
    True
    """
    cost, rows, columns = _checked(cost, rows, columns, eta)
    log_r, log_c = jnp.log(rows), jnp.log(columns)

    def sweep(carry):
        _, y, step, _ = carry
        x = (log_r + 1 - jax.nn.logsumexp(eta * (y - cost), axis=1)) / eta
        y = (log_c + 1 - jax.nn.logsumexp(eta * (x[:, None] - cost), axis=0)) / eta
        found = Transport(x, y, step + 1, jnp.zeros((), cost.dtype))
        return found._replace(error=_error(found, cost, rows, columns, eta))

    count, error = jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, cost.dtype)
    start = Transport(jnp.zeros_like(rows), jnp.zeros_like(columns), count, error)
    more = lambda found: (found.steps < steps) & (found.error > tolerance)
    return jax.lax.while_loop(more, sweep, start)


def sinkhorn_newton(
    cost: Array,
    rows: Array,
    columns: Array,
    eta: float,
    *,
    warmup: int = 20,
    steps: int = 100,
    density: float | None = None,
    tolerance: float = 0.0,
    cg_steps: int | None = None,
) -> Transport:
    r"""A few sweeps, then Newton steps with a sparse Hessian.

    Near the solution P is nearly sparse. The negative Hessian is
    $H = \eta \begin{pmatrix} diag(P1) & P \\ P^T & diag(P^T 1)\end{pmatrix}$; its P is replaced by its largest entries, the
    diagonals stay whole, which keeps the matrix diagonally dominant. $M d = \nabla f$ is solved by conjugate gradients
    on these entries, and d is shortened until f rises by $10^{-4}$ of what it promises.

    Args:
      cost, rows, columns, eta: as of `sinkhorn`.
      warmup: sweeps before; from a cold start Newton's steps fail.
      steps: Newton steps at most.
      density: the share of P's entries that is kept; 2/n by default.
      tolerance: of the largest error of a sum of P, where it ends before.
      cg_steps: conjugate gradient steps at most for each Newton step; m + n by default.

    Returns:
      As `sinkhorn`; `steps` counts both kinds.

    Raises:
      ValueError: as `sinkhorn`; a density out of (0, 1].

    Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, "Accelerating Sinkhorn algorithm with
    sparse Newton iterations", 2024; re-derived, as public copies have the sign of the step wrong.

    >>> found = sinkhorn_newton(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.ones(2), jnp.ones(2), 2.0, warmup=2, steps=5)
    >>> float(found.error) < 1e-6
    True
    """
    m, n = cost.shape
    density = 2 / n if density is None else density
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: use a share in (0, 1]")
    cost, rows, columns = _checked(cost, rows, columns, eta)
    start = sinkhorn(cost, rows, columns, eta, steps=warmup, tolerance=tolerance)
    kept = min(m * n, math.ceil(density * m * n))

    def objective(z):
        log_p = eta * (z[:m, None] + z[m:] - cost) - 1
        return rows @ z[:m] + columns @ z[m:] - jnp.exp(log_p).sum() / eta

    def step(found: Transport) -> Transport:
        z = jnp.concatenate([found.x, found.y])
        p = transport_plan(found, cost, eta)
        gradient = jnp.concatenate([rows - p.sum(1), columns - p.sum(0)])
        at = jnp.nonzero(topk_mask(p, kept), size=kept)
        values, diagonal = p[at], jnp.concatenate([p.sum(1), p.sum(0)])

        def hessian(v):
            upper = jnp.zeros(m, v.dtype).at[at[0]].add(values * v[m:][at[1]])
            lower = jnp.zeros(n, v.dtype).at[at[1]].add(values * v[:m][at[0]])
            return eta * (diagonal * v + jnp.concatenate([upper, lower]))

        inverse = 1 / (eta * diagonal)
        direction, _ = cg(
            hessian, gradient, tol=1e-10, maxiter=cg_steps or m + n, M=lambda v: inverse * v
        )
        slope, before = gradient @ direction, objective(z)
        short = lambda a: (objective(z + a * direction) < before + 1e-4 * a * slope) & (a > 1e-9)
        length = jax.lax.while_loop(short, lambda a: a / 2, jnp.ones((), z.dtype))
        z = z + length * direction
        found = Transport(z[:m], z[m:], found.steps + 1, found.error)
        return found._replace(error=_error(found, cost, rows, columns, eta))

    more = lambda found: (found.steps < start.steps + steps) & (found.error > tolerance)
    return jax.lax.while_loop(more, step, start)


def _error(found: Transport, cost: Array, rows: Array, columns: Array, eta: float) -> Array:
    p = transport_plan(found, cost, eta)
    return jnp.maximum(jnp.abs(p.sum(1) - rows).max(), jnp.abs(p.sum(0) - columns).max())


def _checked(cost: Array, rows: Array, columns: Array, eta: float) -> tuple[Array, Array, Array]:
    """The three in one floating type, float32 at least."""
    if cost.ndim != 2 or (*rows.shape, *columns.shape) != cost.shape:
        raise ValueError(
            f"cost has shape {cost.shape}, rows {rows.shape}, columns {columns.shape}: "
            "give [m, n], [m] and [n]"
        )
    check_positive("eta", eta)
    check_positive("rows", rows)
    check_positive("columns", columns)
    if is_concrete(rows) and is_concrete(columns):
        r, c = float(np.asarray(rows).sum()), float(np.asarray(columns).sum())
        if abs(r - c) > 1e-4 * max(r, c):
            raise ValueError(f"rows sum to {r:g} and columns to {c:g}: they must be equal")
    dtype = jnp.promote_types(jnp.result_type(cost, rows, columns), jnp.float32)
    return cost.astype(dtype), rows.astype(dtype), columns.astype(dtype)
