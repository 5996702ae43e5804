r"""Greedy solvers of $\min \|A x - y\|^2$ s.t. $\|x\|_0 \le k$, for a batch of signals at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular

from jaxsparse._checks import check_count
from jaxsparse.coding.operators import (
    Dense,
    Dictionary,
    Operator,
    check_positive,
    check_signals,
)
from jaxsparse.coding.proximal import _light


def omp(
    dictionary: Dictionary,
    signals: Array,
    k: int,
    *,
    tolerance: Array | float = 0.0,
    norms: Array | None = None,
) -> Array:
    r"""Orthogonal matching pursuit. k times: $j = \arg\max |a_j^T r| / \|a_j\|$ over atoms that are not chosen,
    then $r = y - A_S w$ with $w = \arg\min \|y - A_S w\|$.

    All signals take their steps together. A QR factorisation of the chosen atoms grows by one column a step
    (Gram-Schmidt, done twice), so a step costs one product with the adjoint and the residual is orthogonal to all chosen
    atoms to rounding. The support is found exactly if $k < (1 + 1/\mu)/2$, with $\mu$ the largest cosine of two atoms.

    Args:
      dictionary: `[m, n]`, atoms in columns, or an operator.
      signals: `[..., m]`.
      k: how many atoms at most, from 1 to min(m, n).
      tolerance: a signal takes no more atoms once $\|r\|$ is at most this.
      norms: norms of the atoms of an operator `[n]`; None: those of the matrix, 1 for operators.

    Returns:
      The codes `[..., n]`, at most k entries each: fewer once the residual is 0 or the tolerance is reached.

    Raises:
      ValueError: k out of range, shapes that do not fit, NaN in the signals, a negative tolerance.

    >>> omp(jnp.eye(3), jnp.array([1.0, 3.0, -2.0]), 2).tolist()
    [0.0, 3.0, -2.0]

    Source: Pati, Rezaiifar, Krishnaprasad, 1993; Tropp & Gilbert, 2007.
    """
    op, y = _flat(dictionary, signals, norms)
    check_count("k", k, most=min(op.rows, op.columns), arrays=True)
    check_positive("tolerance", tolerance, zero=True)
    batch, dtype = y.shape[0], y.dtype
    inverse = _inverse_norms(op, norms, dtype)
    eps = jnp.finfo(dtype).eps
    # Below this there is nothing left to explain: what is left is rounding.
    least = jnp.maximum(jnp.asarray(tolerance, dtype), 10 * eps * jnp.linalg.norm(y, axis=-1))

    def step(i, carry):
        r, q, upper, chosen, free = carry
        score = jnp.where(free, jnp.abs(op.adjoint(r)) * inverse, -1)
        j = jnp.argmax(score, -1)
        atom = _atoms(op, j, dtype)
        part = jnp.einsum("bkm,bm->bk", q, atom, precision="highest")
        rest = atom - jnp.einsum("bk,bkm->bm", part, q, precision="highest")
        again = jnp.einsum("bkm,bm->bk", q, rest, precision="highest")
        rest = rest - jnp.einsum("bk,bkm->bm", again, q, precision="highest")
        length = jnp.linalg.norm(rest, axis=-1)
        full = jnp.linalg.norm(atom, axis=-1)
        take = (jnp.linalg.norm(r, axis=-1) > least) & (length > 100 * eps * full)
        column = jnp.where(take[:, None], part + again, 0)
        upper = upper.at[:, :, i].set(column).at[:, i, i].set(jnp.where(take, length, 1))
        new = jnp.where(take, 1 / jnp.where(take, length, 1), 0)[:, None] * rest
        r = r - new * jnp.sum(new * r, -1, keepdims=True)
        free = free & ~(jax.nn.one_hot(j, op.columns, dtype=bool) & take[:, None])
        chosen = chosen.at[:, i].set(jnp.where(take, j, op.columns).astype(jnp.int32))
        return r, q.at[:, i].set(new), upper, chosen, free

    start = (
        y,
        jnp.zeros((batch, k, op.rows), dtype),
        jnp.zeros((batch, k, k), dtype),
        jnp.zeros((batch, k), jnp.int32),
        jnp.ones((batch, op.columns), bool),
    )
    _, q, upper, chosen, _ = jax.lax.fori_loop(0, k, step, start)
    # Gram-Schmidt lets the coordinates be read from y: for a step not taken, q is 0.
    right = jnp.einsum("bkm,bm->bk", q, y, precision="highest")
    weights = solve_triangular(upper, right[..., None])[..., 0]
    codes = jnp.zeros((batch, op.columns + 1), dtype)
    codes = codes.at[jnp.arange(batch)[:, None], chosen].set(weights)[:, :-1]
    return codes.reshape(*signals.shape[:-1], op.columns)


def gradient_pursuit(
    dictionary: Dictionary,
    signals: Array,
    k: int,
    *,
    nonnegative: bool = False,
    norms: Array | None = None,
) -> Array:
    r"""Gradient pursuit: as `omp`, with one exact line search in place of the refit.

    k times: add $j = \arg\max a_j^T r / \|a_j\|$ (its magnitude, unless `nonnegative`) to S; $g = A_S^T r$ on S, $c = A g$;
    $x \leftarrow x + \frac{\langle c, r\rangle}{\langle c, c\rangle} g$, and its negative entries to 0 if `nonnegative`.

    One pair of products a step and no solve. The result is an under-solved least squares: its residual is that of `omp` or larger.

    Args:
      dictionary: `[m, n]`, atoms in columns, or an operator.
      signals: `[..., m]`.
      k: how many atoms at most, from 1 to n.
      nonnegative: codes that are at least 0, as those of a sparse autoencoder.
      norms: norms of the atoms of an operator `[n]`; None: those of the matrix, 1 for operators.

    Returns:
      The codes `[..., n]`, at most k entries each.

    Raises:
      ValueError: k out of range, shapes that do not fit, NaN in the signals.

    >>> gradient_pursuit(jnp.eye(3), jnp.array([1.0, 3.0, -2.0]), 1).tolist()
    [0.0, 3.0, 0.0]

    Source: Blumensath & Davies, "Gradient pursuits", 2008; for dictionaries of autoencoders `grad_pursuit.py` of
    dictionary_learning.
    """
    op, y = _flat(dictionary, signals, norms)
    check_count("k", k, most=op.columns, arrays=True)
    inverse = _inverse_norms(op, norms, y.dtype)

    def step(_, carry):
        x, r, chosen = carry
        slope = op.adjoint(r)
        score = (slope if nonnegative else jnp.abs(slope)) * inverse
        best = jnp.argmax(jnp.where(chosen, -jnp.inf, score), -1)
        gain = jnp.take_along_axis(score, best[:, None], -1) > 0
        chosen = chosen | (jax.nn.one_hot(best, op.columns, dtype=bool) & gain)
        g = jnp.where(chosen, slope, 0)
        c = op.forward(g)
        power = jnp.sum(c * c, -1, keepdims=True)
        x = (
            x
            + jnp.where(
                power > 0, jnp.sum(c * r, -1, keepdims=True) / jnp.where(power > 0, power, 1), 0
            )
            * g
        )
        x = jnp.maximum(x, 0) if nonnegative else x
        return x, y - op.forward(x), chosen

    x = jnp.zeros((y.shape[0], op.columns), y.dtype)
    x, _, _ = jax.lax.fori_loop(0, k, step, (x, y, jnp.zeros(x.shape, bool)))
    return x.reshape(*signals.shape[:-1], op.columns)


def _flat(
    dictionary: Dictionary, signals: Array, norms: Array | None
) -> tuple[Dense | Operator, Array]:
    """The operator, and the signals as one batch `[signals, m]`."""
    op = _light(dictionary)
    signals = check_signals(op, signals)
    if norms is not None and norms.shape != (op.columns,):
        raise ValueError(f"norms have shape {norms.shape}: give one for each atom, {(op.columns,)}")
    if isinstance(op, Dense):
        op = Dense(op.matrix.astype(signals.dtype), op.norm)
    return op, signals.reshape(-1, op.rows)


def _inverse_norms(op: Dense | Operator, norms: Array | None, dtype: jnp.dtype) -> Array:
    """1 / norm of each atom; 0 for atoms of zeros, which are never worth a step."""
    if norms is None:
        if not isinstance(op, Dense):
            return jnp.ones(op.columns, dtype)
        known = jnp.sqrt(jnp.sum(op.matrix**2, 0))
    else:
        known = norms
    return jnp.where(known > 0, 1 / jnp.where(known > 0, known, 1), 0).astype(dtype)


def _atoms(op: Dense | Operator, j: Array, dtype: jnp.dtype) -> Array:
    """Atom j of each signal `[signals, m]`."""
    if isinstance(op, Dense):
        return op.matrix.T[j]
    return op.forward(jax.nn.one_hot(j, op.columns, dtype=dtype))
