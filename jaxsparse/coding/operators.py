"""Linear maps that solvers take: dense dictionaries, or functions with their adjoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import selection
from jaxsparse._checks import check_count
from jaxsparse._control import is_concrete

Map = Callable[[Array], Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["norm"],
    meta_fields=["forward", "adjoint", "rows", "columns"],
)
@dataclasses.dataclass(frozen=True)
class Operator:
    r"""A linear map $A$ from codes `[..., columns]` to signals `[..., rows]`.

    Args:
      forward: $x \mapsto A x$ over the last axis, for any leading axes.
      adjoint: $r \mapsto A^T r$ over the last axis.
      norm: an upper bound of the spectral norm $\|A\|_2$. A bound that is too small makes proximal
        gradient steps diverge; `dense` finds one for a matrix, `norm_bound` for functions.
      rows: the length of a signal.
      columns: the number of atoms.

    >>> twice = Operator(lambda x: 2 * x, lambda r: 2 * r, 2.0, 3, 3)
    >>> twice.forward(jnp.ones(3)).tolist()
    [2.0, 2.0, 2.0]
    """

    forward: Map
    adjoint: Map
    norm: Array | float
    rows: int
    columns: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix", "norm"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Dense:
    """An `Operator` that is a matrix `[rows, columns]`, with an upper bound of its spectral norm.
    Products are taken in full precision on every device."""

    matrix: Array
    norm: Array

    @property
    def rows(self) -> int:
        return self.matrix.shape[0]

    @property
    def columns(self) -> int:
        return self.matrix.shape[1]

    def forward(self, x: Array) -> Array:
        return jnp.matmul(x, self.matrix.T, precision="highest")

    def adjoint(self, r: Array) -> Array:
        return jnp.matmul(r, self.matrix, precision="highest")


Dictionary = Array | Dense | Operator


def dense(matrix: Array) -> Dense:
    r"""A matrix as an operator. Its norm is $1.001 \sqrt{\lambda_{max}}$ of the smaller of the two Gram
    matrices: solved for exactly, as the lower bound of a power iteration would make solvers diverge.

    Solvers take matrices as well; call this once where many calls share a matrix.

    Args:
      matrix: `[rows, columns]`, atoms in columns.

    Raises:
      ValueError: not a matrix, no rows or columns, not a float, NaN.

    >>> round(float(dense(jnp.diag(jnp.array([3.0, 1.0]))).norm), 3)
    3.003
    """
    check_matrix(matrix)
    matrix = jnp.asarray(matrix)
    m, n = matrix.shape
    small = matrix if m <= n else matrix.T
    gram = jnp.matmul(small, small.T, precision="highest")
    norm = 1.001 * jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[-1], 0))
    return Dense(matrix, norm)


def as_operator(dictionary: Dictionary) -> Dense | Operator:
    """What solvers use: operators as they are, matrices by `dense`.

    >>> as_operator(jnp.eye(2)).columns
    2
    """
    if isinstance(dictionary, Dense | Operator):
        return dictionary
    return dense(dictionary)


def norm_bound(
    forward: Map, adjoint: Map, columns: int, *, steps: int = 50, seed: int = 0
) -> Array:
    r"""An estimate of $\|A\|_2$ for functions, by power iteration on $A^T A$, with 5% on top.

    The iteration itself converges from below; the margin covers what is left after `steps` of it for
    spectra that are not adversarial.

    Args:
      forward: $A$ over the last axis.
      adjoint: $A^T$ over the last axis.
      columns: the length of a code.
      steps: how many iterations.
      seed: of the vector that it starts from.

    >>> bool(norm_bound(lambda x: 2 * x, lambda r: 2 * r, 4) >= 2)
    True
    """

    def step(_, v):
        v = adjoint(forward(v))
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

    v = jax.lax.fori_loop(0, steps, step, jax.random.normal(jax.random.key(seed), (columns,)))
    return 1.05 * jnp.linalg.norm(forward(v))


def has_non_finite(x: Array) -> bool:
    """Whether an array that is known has NaN or infinite entries; False of a traced one. One number reaches
    the host, not the array.

    >>> has_non_finite(jnp.array([1.0, jnp.nan])), has_non_finite(jnp.ones(3))
    (True, False)
    """
    if not is_concrete(x):
        return False
    with jax.ensure_compile_time_eval():  # a known array in a traced function
        return bool(_non_finite(x))


@jax.jit
def _non_finite(x: Array) -> Array:
    return selection.count(~jnp.isfinite(x)) > 0


def check_matrix(matrix: Array) -> None:
    """Raises unless it is a float matrix with at least one row and one column, finite if it is known."""
    if isinstance(matrix, Dense | Operator) or not hasattr(matrix, "ndim"):
        raise ValueError(
            f"dictionary is of type {type(matrix).__name__}: give a matrix [signal, atoms] here; "
            "operators are for ista, fista, iht, omp and gradient_pursuit"
        )
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"dictionary has shape {matrix.shape}: give a matrix [signal, atoms] with at least one atom"
        )
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise ValueError(f"dictionary has dtype {matrix.dtype}: cast it to a float")
    if has_non_finite(matrix):
        raise ValueError("dictionary has NaN or infinite entries: mend its atoms first")


def check_signals(op: Dense | Operator | Array, signals: Array) -> Array:
    """Signals as an array. Raises unless they are floats, end in the rows of the dictionary, and are finite if
    they are known."""
    rows = op.rows if isinstance(op, Dense | Operator) else op.shape[0]
    if not hasattr(signals, "ndim"):
        raise ValueError(
            f"signals are of type {type(signals).__name__}: give an array [..., {rows}]"
        )
    if not jnp.issubdtype(signals.dtype, jnp.inexact):
        raise ValueError(f"signals have dtype {signals.dtype}: cast them to a float")
    if signals.ndim == 0 or signals.shape[-1] != rows:
        raise ValueError(
            f"signals have shape {signals.shape} and the dictionary {rows} rows: the last axis of "
            "the signals must be that long"
        )
    if has_non_finite(signals):
        raise ValueError("signals have NaN or infinite entries: remove or mask them first")
    return jnp.asarray(signals)


def check_codes(op: Dense | Operator, signals: Array, codes: Array) -> None:
    """Raises unless codes are those of the signals."""
    shape = (*signals.shape[:-1], op.columns)
    if codes.shape != shape:
        raise ValueError(f"codes have shape {codes.shape}: those of these signals have {shape}")


def check_steps(name: str, value: Array | int) -> None:
    """Raises unless a number of steps that is known is an integer that is not negative."""
    if is_concrete(value) and np.ndim(value):
        raise ValueError(f"{name}={value!r}: give one integer for all signals")
    check_count(name, value, 0, arrays=True)


def check_strength(strength: Array | float, signals: Array, *, each: int = 1) -> None:
    """Raises if a known strength is negative, or not a number for all, or one (or `each`) for each signal."""
    check_positive("strength", strength, zero=True)
    found, most = np.shape(strength), (*signals.shape[:-1], each)
    if len(found) > len(most) or any(a not in (1, b) for a, b in zip(found[::-1], most[::-1])):
        raise ValueError(
            f"strength has shape {found}: give a number, or one for each signal, {(*most[:-1], 1)}"
        )


def check_positive(name: str, value: Array | float, *, zero: bool = False) -> None:
    """Raises if a known value is negative (or 0, unless `zero`)."""
    if not is_concrete(value):
        return
    known = np.asarray(value)  # not jnp: under `jit` its results would be traced
    if not (known >= 0 if zero else known > 0).all():
        raise ValueError(f"{name}={value}: use {'at least 0' if zero else 'a positive value'}")
