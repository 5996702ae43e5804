r"""OBD, WoodFisher and M-FAC: pruning by a quadratic model of the loss, from gradients of samples.

With g_i the gradients of m samples with respect to a layer, the empirical Fisher information is
F = λ I + (1/m) Σ g_i g_iᵀ, and a removal costs

    OBD (LeCun et al., 1989):        F_qq w_q² / 2, others stay as they are
    WoodFisher (Singh & Alistarh, 2020), M-FAC (Frantar et al., 2021):   w_q² / (2 [F⁻¹]_qq),
        and the others move by  - Σ over the removed of (w_q / [F⁻¹]_qq) F⁻¹ e_q.

WoodFisher takes the inverse of diagonal blocks, M-FAC that of the whole layer, which is never formed. The
update is a sum of answers to single removals and ignores how these interact; therefore M-FAC removes in
`steps`, the density falling geometrically, with the inverse of what is left in each.

Fewer gradients than a block has weights say little: F⁻¹ is then I/λ but for m directions, [F⁻¹]_qq is nearly
the same for all, and the ranking nearly that of magnitudes. Give samples by the hundred; with few, OBD, which is
F's diagonal alone, ranks better.

This differs from the authors' code in: 1. layers are pruned one after the other to a sparsity each, not
ranked together; 2. the inverse comes from a Cholesky factor of m x m, not from the recursion over samples.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import _counts, structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_damping, check_layer
from jaxsparse.post_training._layer import Pruned, keep, kept_units
from jaxsparse.post_training.obs import inverse_fisher, obd_saliency, obs_saliency
from jaxsparse.structures import Structure


def obd_core(
    w: Array,
    gradients: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
) -> Pruned:
    """Optimal brain damage: keeps the weights of largest (mean of g²) w² / 2; the largest of all, where every
    gradient is zero (an expert without tokens).

    Args:
      w: `[in, out]`.
      gradients: `[samples, in, out]`, of the loss of single samples (not of their mean).
      sparsity: the fraction of zeros, in [0, 1).
      structure: any; by default the whole layer is ranked.

    Returns:
      The pruned layer, kept weights as they were.

    >>> obd_core(jnp.array([[1.0], [2.0]]), jnp.array([[[3.0], [1.0]]]), 0.5).weights.tolist()
    [[1.0], [0.0]]

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure)
    check_layer(w, gradients=gradients)
    w = w.astype(jnp.float32)
    fisher = jnp.mean(jnp.square(gradients.astype(jnp.float32)), axis=0)
    fisher = jnp.where(jnp.any(fisher > 0), fisher, 1.0)
    mask = keep(obd_saliency(w, fisher), sparsity, structure)
    return Pruned(jnp.where(mask, w, 0.0), mask)


def woodfisher_core(
    w: Array,
    gradients: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    damping: float = 0.01,
    block: int | None = 2000,
    steps: int = 1,
    update: float = 1.0,
) -> Pruned:
    """Removes what costs least by the inverse Fisher information, and moves the others.

    Args:
      w: `[in, out]`.
      gradients: `[samples, in, out]`, of the loss of single samples or small batches.
      sparsity: the fraction of zeros, in [0, 1).
      structure: any; by default the whole layer is ranked. N:M takes one step.
      damping: λ, as a fraction of the mean of the gradients' squares.
      block: weights of a diagonal block, in the order of the layer; None for the layer as one.
      steps: in which weights are removed.
      update: how far the others move: 1 as derived, 0 not at all.

    Returns:
      The pruned layer.

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have; no step.
    """
    structure = structures.resolve(structure)
    structure.check("w", w.shape)
    check_layer(w, gradients=gradients)
    check_damping(damping)
    check_count("steps", steps)
    if block is not None:
        check_count("block", block)
    units = kept_units(w.shape, sparsity, structure)
    whole = units if structure.sparsity is not None else kept_units(w.shape, 0.0, structure)
    size = w.size if block is None else min(block, w.size)
    rows = gradients.astype(jnp.float32).reshape(gradients.shape[0], -1)
    ridge = jnp.maximum(damping * jnp.mean(jnp.square(rows)), 1e-30)
    w, left = w.astype(jnp.float32), jnp.ones(w.shape, bool)
    for step in range(1, 2 if structure.sparsity is not None else steps + 1):
        # Between all and the units of the end in equal ratios; the end exactly.
        share = (units / whole) ** (step / steps)
        now = units if step == steps else max(units, _counts.scale_count(whole, share))
        w, left = _remove(w, rows, left, jnp.int32(now), ridge, update, structure, size)
    return Pruned(w, left, damping=jnp.float32(damping))


@functools.partial(jax.jit, static_argnames=("structure", "size"))
def _remove(w, gradients, left, units, damping, update, structure: Structure, size: int):
    extra = -w.size % size
    flat = lambda x: jnp.pad(x.reshape(x.shape[0], -1), ((0, 0), (0, extra))).reshape(
        x.shape[0], -1, size
    )
    active = flat(left[None])[0]
    blocks = jnp.where(active[:, None], flat(gradients).swapaxes(0, 1), 0.0)
    inverse = jax.vmap(inverse_fisher, in_axes=(0, None))(blocks, damping)
    # Rounding may take the diagonal of an inverse below its least value, 1 / (λ + F_qq).
    least = 1.0 / (damping + jnp.mean(jnp.square(blocks), axis=1))
    diagonal = jnp.maximum(jax.vmap(lambda f: f.diagonal())(inverse), least)
    unflat = lambda x: x.reshape(-1)[: w.size].reshape(w.shape)
    scores = jnp.where(left, obs_saliency(w, unflat(diagonal)), -1.0)
    mask = structures.topk(structure, scores, units)
    pushed = jnp.where(active & ~flat(mask[None])[0], flat(w[None])[0] / diagonal, 0.0)
    moved = w - update * unflat(jax.vmap(lambda f, x: f(x))(inverse, pushed))
    return jnp.where(mask, moved, 0.0), mask
