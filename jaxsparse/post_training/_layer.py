"""What every method on one layer shares: its result, masks within a budget, damped factors, errors.

A layer is a matrix `w` `[in, out]`, as Flax keeps it (papers on pruning write its transpose), and what
was seen of its inputs x: the Gram matrix `[in, in]`, the sum over tokens of x xᵀ, or its diagonal.
All outputs share it. With `v` in place of `w` the outputs change by

    error = sum over tokens of |(w - v)ᵀ x|² = trace((w - v)ᵀ gram (w - v)).

Everything is computed in float32 at the highest precision: with the bfloat16 passes that TPUs use by
default a Gram matrix is no longer positive definite.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import _counts, selection, structures
from jaxsparse.choose import check_sparsity
from jaxsparse.post_training._checks import check_layer
from jaxsparse.structures import NM, FanIn, Structure, Unstructured


class Pruned(NamedTuple):
    """A pruned layer.

    Attributes:
      weights: float32 `[in, out]`, zero outside of the mask.
      mask: bool `[in, out]`, the weights that are kept (one of them may be 0 all the same).
      damping: the multiple of the mean of the Gram matrix's diagonal that was added to it; None where
        nothing was inverted.
      permutation: int32 `[in]`; where given, `mask[permutation]` has the N:M structure.
      codes: int8 `[in, out]`, where the weights were quantized: `weights = codes * scales`, each row of
        scales for `in / groups` rows of codes.
      scales: float32 `[groups, out]`.
    """

    weights: Array
    mask: Array
    damping: Array | None = None
    permutation: Array | None = None
    codes: Array | None = None
    scales: Array | None = None


def matmul(a: Array, b: Array) -> Array:
    """The product in float32 at the highest precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def errors(gram: Array, difference: Array) -> Array:
    """The squared error of each output, `[out]`, of weights that differ by `difference`."""
    return jnp.sum(difference * matmul(gram, difference), axis=0)


def relative_error(gram: Array, w: Array, v: Array) -> Array:
    r"""trace((w - v)ᵀ gram (w - v)) / trace(wᵀ gram w): 0 for v = w, 1 for v = 0.

    >>> float(relative_error(jnp.eye(2), jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [4.0]])))
    0.36...
    """
    total = jnp.sum(errors(gram, w))
    return jnp.sum(errors(gram, w - v)) / jnp.where(total > 0, total, 1.0)


def kept_units(shape: tuple[int, ...], sparsity: float | None, structure: Structure) -> int:
    """Units that a layer keeps in each slice. Of `FanIn` every output loses floor(sparsity * in).

    Raises:
      ValueError: no sparsity where the structure fixes none, one outside of [0, 1), one at odds with an
        N:M structure, or one that leaves nothing.
    """
    sparsity = check_sparsity(sparsity, structure)
    fan_in = isinstance(structure, FanIn)
    kept = _counts.kept_count(shape[0] if fan_in else math.prod(shape), sparsity)
    units = int(kept if fan_in else structure.budget(shape, kept))
    if units < 1:
        raise ValueError(
            f"sparsity={sparsity} leaves nothing of a layer {shape} with structure={structure}; ask "
            "for less, or keep the layer dense with targets="
        )
    return units


def keep(scores: Array, sparsity: float | None, structure: Structure) -> Array:
    """The mask `[in, out]` with the structure that keeps the highest scores. `Unstructured()` ranks the
    whole layer, `FanIn()` the weights of each output, as Wanda does."""
    structure.check("w", scores.shape)
    units = kept_units(scores.shape, sparsity, structure)
    return structures.topk(structure, scores, jnp.int32(units))


def only(structure: Structure, method: str) -> Structure:
    """The structure, for methods that go through the inputs one by one.

    Raises:
      ValueError: one whose units are no single weights, or whose groups are not consecutive inputs.
    """
    inputs = isinstance(structure, NM) and structure.axis in (-2, 0) and not structure.strided
    if not inputs and not isinstance(structure, Unstructured | FanIn):
        raise ValueError(
            f"structure={structure}: {method} takes Unstructured(), FanIn() and NM(n, m) along "
            "inputs; 'magnitude', 'wanda' and 'ria' take any structure"
        )
    return structure


def prepare(w: Array, gram: Array) -> tuple[Array, Array]:
    """Weights and Gram matrix in float32, with features that were never active made harmless: their
    weights are 0 and their diagonal is 1. Where nothing was active (an expert without tokens) nothing is
    known: the Gram matrix is the identity, by which methods fall back on magnitudes."""
    check_layer(w, gram=gram)
    w, gram = w.astype(jnp.float32), gram.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    w = jnp.where(dead[:, None] & ~jnp.all(dead), 0.0, w)
    return w, gram + jnp.diag(jnp.where(dead, 1.0 - diagonal, 0.0))


def damped(gram: Array, fraction: float | Array) -> Array:
    """`gram` with `fraction` of the mean of its diagonal added to the diagonal."""
    mean = jnp.mean(jnp.diagonal(gram))
    return gram + fraction * mean * jnp.eye(gram.shape[0], dtype=gram.dtype)


def inverse_factor(gram: Array, damping: float = 0.01, tries: int = 8) -> tuple[Array, Array]:
    """The upper triangular U with Uᵀ U = (gram + damping)⁻¹, and the damping that it took.

    With L Lᵀ the matrix in reverse order, U is L⁻¹ in reverse order: one Cholesky factor and one triangular
    inverse, where the published code takes a factor, an inverse and a factor of that.
    Where the factor is not finite (few tokens, rounding) the damping grows tenfold until it is.

    Args:
      gram: `[n, n]`, symmetric.
      damping: as a fraction of the mean of the diagonal.
      tries: how often it may grow.

    Returns:
      U and the fraction that was used.
    """

    def factor(fraction):
        lower = jnp.linalg.cholesky(damped(gram, fraction)[::-1, ::-1], symmetrize_input=False)
        return _inverse_of_lower(lower)[::-1, ::-1]

    def failed(state):
        u, _, i = state
        return ~jnp.all(jnp.isfinite(u)) & (i <= tries)

    def attempt(state):
        _, fraction, i = state
        fraction = jnp.where(i > 0, jnp.maximum(10 * fraction, 1e-4), fraction)
        return factor(fraction), fraction, i + 1

    start = (jnp.full_like(gram, jnp.nan), jnp.float32(damping), 0)
    u, used, _ = jax.lax.while_loop(failed, attempt, start)
    return u, used


def _inverse_of_lower(a: Array) -> Array:
    """The inverse of a lower triangular matrix, by halves: all but small triangles are products."""
    n = a.shape[0]
    if n <= 256:
        eye = jnp.eye(n, dtype=a.dtype)
        return jnp.tril(jax.lax.linalg.triangular_solve(a, eye, left_side=True, lower=True))
    top, bottom = _inverse_of_lower(a[: n // 2, : n // 2]), _inverse_of_lower(a[n // 2 :, n // 2 :])
    left = -matmul(bottom, matmul(a[n // 2 :, : n // 2], top))
    return jnp.block([[top, jnp.zeros_like(left.T)], [left, bottom]])


def rank(x: Array) -> Array:
    """The place of each number among all in ascending order, ties by position: int32 `[n]`."""
    index = jnp.arange(x.shape[0])
    before = (x[:, None] < x) | ((x[:, None] == x) & (index[:, None] < index))
    return selection.count(before, axis=0)
