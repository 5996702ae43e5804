r"""Saliencies of second order, for any quadratic model of the loss around trained weights.

    loss(w + d) - loss(w) ≈ ½ dᵀ F d

Optimal brain damage (LeCun et al., 1989) takes the diagonal of F: removing q costs F_qq w_q² / 2. Optimal
brain surgery (Hassibi & Stork, 1992) lets the others answer: it costs w_q² / (2 [F⁻¹]_qq), and for a set Q
½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q. WoodFisher (Singh & Alistarh, 2020) and M-FAC (Frantar et al., 2021) take the
empirical Fisher information of m gradients, F = λ I + (1/m) Gᵀ G, whose inverse needs m x m matrices only:

    F⁻¹ x = (x - Gᵀ (m λ I + G Gᵀ)⁻¹ G x) / λ.

Gradients must be those of single examples (or of small batches), at the weights that are pruned.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.post_training._layer import matmul


def obd_saliency(w: Array, diagonal: Array) -> Array:
    """F_qq w_q² / 2 for every weight."""
    return diagonal * jnp.square(w) / 2


def obs_saliency(w: Array, inverse_diagonal: Array) -> Array:
    """w_q² / (2 [F⁻¹]_qq) for every weight."""
    return jnp.square(w) / (2 * inverse_diagonal)


def obs_remove(w: Array, inverse: Array, removed: Array) -> Array:
    """The weights after a set of them is removed and all others have answered.

    Args:
      w: `[n]`.
      inverse: `[n, n]`, F⁻¹.
      removed: bool `[n]`.

    Returns:
      `[n]`, exactly 0 where removed: w - F⁻¹ E_Q ([F⁻¹]_QQ)⁻¹ w_Q.

    >>> obs_remove(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.5], [0.5, 1.0]]),
    ...            jnp.array([True, False])).tolist()
    [0.0, 1.5]
    """
    both = removed[:, None] & removed
    square = jnp.where(both, inverse, jnp.eye(w.shape[0], dtype=inverse.dtype))
    answer = jnp.linalg.solve(square, jnp.where(removed, w, 0.0))
    return jnp.where(removed, 0.0, w - matmul(inverse, answer))


class InverseFisher(NamedTuple):
    """F⁻¹ of F = damping I + (1/m) Gᵀ G, never formed: (I - halfᵀ half) / damping, `half` `[m, n]`.

    >>> fisher = inverse_fisher(jnp.array([[2.0, 0.0]]), damping=1.0)
    >>> fisher.diagonal().tolist(), fisher(jnp.ones(2)).tolist()
    ([0.2..., 1.0], [0.2..., 1.0])
    """

    half: Array
    damping: Array

    def __call__(self, x: Array) -> Array:
        """F⁻¹ x for x `[n]`."""
        return (x - matmul(self.half.T, matmul(self.half, x))) / self.damping

    def diagonal(self) -> Array:
        """The diagonal of F⁻¹, `[n]`."""
        return (1.0 - jnp.sum(jnp.square(self.half), axis=0)) / self.damping


def inverse_fisher(gradients: Array, damping: float | Array = 1e-5) -> InverseFisher:
    """The inverse of the empirical Fisher information.

    Args:
      gradients: `[m, n]`, one row for each example.
      damping: λ, outside of the mean over examples.

    Returns:
      A function of vectors `[n]`, with its diagonal.
    """
    m = gradients.shape[0]
    # Eigenvectors, not a Cholesky factor: G Gᵀ is singular where samples are more than weights.
    values, vectors = jnp.linalg.eigh(matmul(gradients, gradients.T))
    scale = jax.lax.rsqrt(jnp.maximum(values, 0.0) + m * damping)
    return InverseFisher(scale[:, None] * matmul(vectors.T, gradients), jnp.asarray(damping))
