"""SR-STE: N:M sparsity from scratch, with a pull on pruned weights."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxsparse import scores
from jaxsparse.engines import Projection, keep_best, straight_through
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StructureLike, Targets


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
    sparsity: Scalar | None = None,
    *,
    decay: Scalar = 2e-4,
    structure: StructureLike = "2:4",
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z \odot m$ with m the N largest |z| of each group of M, and the gradient

    $$g + \lambda\,(1 - m) \odot z$$

    for z: straight-through, plus a decay of the pruned weights that keeps the mask from flickering.
    `decay=0` is plain straight-through.

    Args:
      inner: the optimizer of z, any optax transformation.
      sparsity: may be left out: an N:M structure fixes it. Other structures need it.
      decay: $\lambda$; it is added to the gradient, so `inner` scales it by the learning rate.
      structure: groups run along the inputs by default.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.sr_ste(optax.sgd(0.1), structure=jaxsparse.structures.NM(1, 4))

    Raises:
      ValueError: a sparsity that contradicts the structure, groups that do not divide, a negative
        decay.
    """
    if isinstance(decay, float | int) and decay < 0:
        raise ValueError(f"decay={decay}: must not be negative; it shrinks pruned raw weights")
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    rule = keep_best(scores.magnitude, sparse)

    def pull_back(v, _):
        return v.g + decay * jnp.where(v.m, jnp.zeros((), v.w.dtype), v.w)

    return straight_through(
        inner,
        sparse,
        lambda step: Projection(rule(step)),
        pull_back=pull_back,
        raw_dtype=raw_dtype,
    )
