r"""Magnitude pruning: the baseline that knows no data.

Keeps the largest $|w_{ij}|$, over the whole layer by default (as the published baselines do), or of each
output with `structure=FanIn()`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse.post_training._layer import Pruned, keep
from jaxsparse.structures import Structure


def magnitude_core(
    w: Array, sparsity: float | None = None, *, structure: Structure | str | None = None
) -> Pruned:
    """Keeps the largest weights of a layer.

    Args:
      w: `[in, out]`.
      sparsity: the fraction of zeros, in [0, 1); may be left out with an N:M structure.
      structure: any; by default the whole layer is ranked.

    Returns:
      The pruned layer.

    >>> magnitude_core(jnp.array([[1.0, -4.0], [3.0, 2.0]]), 0.5).weights.tolist()
    [[0.0, -4.0], [3.0, 0.0]]

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure)
    w = w.astype(jnp.float32)
    mask = keep(jnp.abs(w), sparsity, structure)
    return Pruned(jnp.where(mask, w, 0.0), mask)
