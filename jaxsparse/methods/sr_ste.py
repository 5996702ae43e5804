"""SR-STE: N:M sparsity from scratch, with a pull on pruned weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxsparse import scores, structures
from jaxsparse.engines import Projection, keep_best, straight_through
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register


@register(
    "sr_ste",
    reference="Zhou et al., Learning N:M fine-grained structured sparse neural networks from "
    "scratch, 2021",
    keeps_raw=True,
    gradients="all",
    dynamics="projected",
)
def sr_ste(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    decay: Any = 2e-4,
    structure: Any = structures.NM(2, 4),  # noqa: B008 - a frozen value
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    raw_dtype: Any = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z \odot m$ with m the N largest |z| of each group of M, and the gradient

    $$g + \lambda\,(1 - m) \odot z$$

    for z: straight-through, plus a decay of the pruned weights that keeps the mask from flickering.
    `decay=0` is plain straight-through.

    Args:
      inner: the optimizer of z.
      sparsity: may be left out: an N:M structure fixes it. Other structures need it.
      decay: $\lambda$; it is added to the gradient, so `inner` scales it by the learning rate.
      structure: groups run along the inputs by default.
      allocation, targets, seed, pack_masks: see the guide of options.
      raw_dtype: the dtype of z; see `magnitude_ste`.

    >>> import jaxsparse
    >>> tx = jaxsparse.sr_ste(optax.sgd(0.1), structure=jaxsparse.structures.NM(1, 4))

    Raises:
      ValueError: a sparsity that contradicts the structure, groups that do not divide, a negative
        decay.
    """
    if isinstance(decay, float | int) and decay < 0:
        raise ValueError(f"decay={decay}: must not be negative; it shrinks pruned raw weights")
    rule = keep_best(
        scores.magnitude, recipe.allocation_of(allocation),
        recipe.sparsity_of(sparsity, structure), seed=seed,
    )  # fmt: skip

    def pull_back(v, _):
        return v.g + decay * jnp.where(v.m, jnp.zeros((), v.w.dtype), v.w)

    return straight_through(
        inner,
        recipe.plan_for(targets, structure),
        lambda step: Projection(rule(step)),
        pull_back=pull_back,
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
    )
