r"""Wanda++ (Yang et al., Pruning large language models via regional gradients, ACL Findings 2025).

Wanda's norm of the input, with the gradient of the *block* beside it:

    score_ij = |w_ij| (α G_ij / mean(G) + |x_i| / mean(|x|)),
    G_ij = sqrt(mean over samples of (d |f(x)| / d w_ij)²),

f a decoder block, so that no gradient passes more than one block. Before the weights are pruned for good
a block may be tuned (`rounds`): in each round its kernels are pruned, and one pass of RMSprop over the
samples draws what it gives towards what the dense block gave, all weights free to move.

This differs from the unofficial code: 1. both terms are divided by their means over the layer, by which α
does not depend on the number of tokens; 2. weights are ranked within outputs whatever the structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_layer
from jaxsparse.post_training._layer import Pruned, keep
from jaxsparse.post_training.calibration import Stream
from jaxsparse.post_training.gradients import distance
from jaxsparse.structures import FanIn, Structure


def wanda_plus_plus_core(
    w: Array,
    squares: Array,
    gradients: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    alpha: float = 1.0,
) -> Pruned:
    """Keeps, of each output, the weights of largest |w| (α gradient + norm of input).

    Args:
      w: `[in, out]`.
      squares: `[in]`, the sum over tokens of each input squared.
      gradients: `[samples, in, out]`, of the norm of what the block gives.
      sparsity: the fraction of zeros, in [0, 1).
      structure: any; by default `FanIn()`.
      alpha: α; at 0 the mask is Wanda's.

    Returns:
      The pruned layer.

    >>> wanda_plus_plus_core(jnp.array([[1.0], [2.0]]), jnp.ones(2), jnp.array([[[9.0], [0.0]]]), 0.5).mask.tolist()
    [[True], [False]]

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure or FanIn())
    check_layer(w, squares=squares, gradients=gradients)
    w = w.astype(jnp.float32)
    slope = jnp.sqrt(jnp.mean(jnp.square(gradients.astype(jnp.float32)), axis=0))
    squares = squares.astype(jnp.float32)
    norms = jnp.sqrt(jnp.where(jnp.any(squares > 0), squares, 1.0))[:, None]
    relative = lambda x: x / jnp.maximum(jnp.mean(x), 1e-30)
    mask = keep(jnp.abs(w) * (alpha * relative(slope) + relative(norms)), sparsity, structure)
    return Pruned(jnp.where(mask, w, 0.0), mask)


def tune_block(
    stream: Stream,
    at: int,
    params: list[Any],
    wanted: Sequence[Sequence[Any]],
    pruned: Callable[[list[Any]], list[Any]],
    *,
    rounds: int = 0,
    learning_rate: float = 3e-7,
    decay: float = 0.99,
) -> list[Any]:
    """The parameters with the kernels of a block moved so that it stands pruning better.

    Args:
      stream: at the entrance of segment `at`.
      params: of the model.
      wanted: what the dense block gave, for each batch.
      pruned: the parameters with this block pruned, from what the block sees now.
      rounds: of pruning and tuning.
      learning_rate, decay: of RMSprop.

    Returns:
      The parameters, dense.
    """
    check_count("rounds", rounds, 0)
    leaves = sorted({k.view.leaf for k in stream.segments[at].kernels})
    for _ in range(rounds):
        params = pruned(params)
        means = {leaf: jnp.zeros(params[leaf].shape) for leaf in leaves}
        for i in range(len(stream.batches)):
            slopes = stream.slopes(at, i, params, distance, wanted[i])
            params = list(params)
            for leaf in leaves:
                g = slopes[leaf].astype(jnp.float32)
                means[leaf] = decay * means[leaf] + (1 - decay) * jnp.square(g)
                step = learning_rate * g / (jnp.sqrt(means[leaf]) + 1e-8)
                params[leaf] = (params[leaf] - step).astype(params[leaf].dtype)
    return params
