r"""Matrices of low rank from some of their entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count


def complete(
    matrix: Array, known: Array, rank: int, *, steps: int = 30, ridge: float = 0.0
) -> tuple[Array, Array]:
    r"""Alternating least squares on $\|P_\Omega(U V^T - M)\|_F^2$: V row by row with U orthonormal, then U.

    Starts from the leading singular vectors of $P_\Omega(M)$. All rows are solved together, by masked normal equations;
    U is orthogonalised between half-steps. The error never increases (without ridge).

    Args:
      matrix: M `[m, n]`; its unknown entries are not read.
      known: $\Omega$ `[m, n]`, bool.
      rank: of the result, from 1 to min(m, n).
      steps: how many sweeps.
      ridge: added to the diagonal of each system: give some where a row has fewer known entries than the rank.

    Returns:
      U `[m, rank]` and V `[n, rank]`, the matrix is about $U V^T$.

    Raises:
      ValueError: a rank out of range, a mask of another shape.

    >>> known = jnp.array([[True, True], [True, False]])
    >>> u, v = complete(jnp.array([[1.0, 2.0], [2.0, 0.0]]), known, 1)
    >>> [f"{x:.2f}" for x in (u @ v.T).ravel()]
    ['1.00', '2.00', '2.00', '4.00']

    Source: Gu, Song, Yin, Zhang, "Low rank matrix completion via robust alternating minimization in nearly linear
    time", 2024; here with exact solves.
    """
    if matrix.ndim != 2 or known.shape != matrix.shape:
        raise ValueError(
            f"known has shape {known.shape} and the matrix {matrix.shape}: give a mask of it"
        )
    check_count("rank", rank, most=min(matrix.shape), arrays=True)
    seen = jnp.where(known, matrix, 0)
    mask = known.astype(matrix.dtype)
    tiny = jnp.finfo(matrix.dtype).eps

    def solve(factor, values, weights):
        gram = jnp.einsum("ij,jk,jl->ikl", weights, factor, factor, precision="highest")
        # Enough for a row without entries, too little to be seen elsewhere.
        gram = gram + (ridge + tiny**2) * jnp.eye(rank, dtype=factor.dtype)
        return jnp.linalg.solve(gram, (values @ factor)[..., None])[..., 0]

    def step(_, carry):
        u, _ = carry
        u = jnp.linalg.qr(u)[0]
        v = jnp.linalg.qr(solve(u, seen.T, mask.T))[0]
        u = solve(v, seen, mask)
        return u, v

    u = jnp.linalg.svd(seen, full_matrices=False)[0][:, :rank]
    return jax.lax.fori_loop(0, steps, step, (u, jnp.zeros((matrix.shape[1], rank), u.dtype)))
