r"""Wanda (Sun et al., A simple and effective pruning approach for large language models, ICLR 2024).

Keeps the largest $|w_{ij}| \cdot \lVert x_i \rVert_2$ of each output, the norm over all tokens of
calibration; kept weights stay as they are. Its square is the saliency of optimal brain surgery when the
Gram matrix is replaced by its diagonal. Comparing within outputs matters: over the whole layer
(`structure=Unstructured()`) language models lose much more.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse.post_training._checks import check_layer
from jaxsparse.post_training._layer import Pruned, kept_units
from jaxsparse.structures import FanIn, Structure


def wanda_scores(w: Array, squares: Array) -> Array:
    """|w_ij| times the norm of input i; where no input was ever active, |w_ij|."""
    squares = squares.astype(jnp.float32)
    norms = jnp.sqrt(jnp.where(jnp.any(squares > 0), squares, 1.0))
    return jnp.abs(w.astype(jnp.float32)) * norms[:, None]


def wanda_core(
    w: Array,
    squares: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
) -> Pruned:
    """Keeps, of each output, the weights with the largest |w| times norm of their input.

    Args:
      w: `[in, out]`.
      squares: `[in]`, the sum over tokens of each input squared; a constant factor changes nothing.
      sparsity: the fraction of zeros, in [0, 1); every output loses floor(sparsity * in) weights.
      structure: any; by default `FanIn()`, which ranks the weights of each output.

    Returns:
      The pruned layer.

    >>> wanda_core(jnp.array([[1.0], [2.0]]), jnp.array([9.0, 1.0]), 0.5).weights.tolist()
    [[1.0], [0.0]]

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure or FanIn())
    check_layer(w, squares=squares)
    structure.check("w", w.shape)
    return Pruned(
        *_prune(w, squares, jnp.int32(kept_units(w.shape, sparsity, structure)), structure)
    )


@functools.partial(jax.jit, static_argnames=("structure",))
def _prune(w: Array, squares: Array, units: Array, structure: Structure) -> tuple[Array, Array]:
    """Compiled as one: the scores are read by the selection as they are made."""
    w = w.astype(jnp.float32)
    mask = structures.topk(structure, wanda_scores(w, squares), units)
    return jnp.where(mask, w, 0.0), mask
