"""Top-KAST: forward with the largest weights, gradients for a larger set around them."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxsparse import masking, scores
from jaxsparse.engines import Projection, Step, is_concrete, keep_best, refresh, straight_through
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets


@register(
    "top_kast",
    reference="Jayakumar et al., Top-KAST: top-k always sparse training, 2020",
    keeps_raw=True,
    dynamics="projected",
)
def top_kast(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    backward_sparsity: Scalar | None = None,
    decay: Scalar = 1e-4,
    update_every: StepCount = 1,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z \odot A$ with A the largest |z| at the sparsity, while the gradient moves the larger
    set $B \supseteq A$, the largest |z| at `backward_sparsity`; nothing outside B moves.

    The gradient that the inner optimizer sees on B is

    $$g + \lambda z \cdot \begin{cases}1 & A\\ 1/D & B \setminus A\end{cases}$$

    with D the density of A in the layer: a weight must earn its place in A.

    Args:
      inner: the optimizer of z. Its momentum does not move weights outside B.
      sparsity: of the forward pass, in [0, 1); may be left out with an N:M structure.
      backward_sparsity: of the set that has gradients, at most `sparsity`; by default half way
        between dense and that in logarithms, $1 - \sqrt{1 - S}$; 0: straight-through for all. With
        an N:M structure B is unstructured.
      decay: $\lambda$.
      update_every: steps between two rankings (the authors take 1 to 100).
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    Public sources disagree on the factor of B without A: here it is the 1/D of the paper, not 1/S
    or D as in third-party code. The raw weights are stored dense.

    >>> import jaxsparse
    >>> tx = jaxsparse.top_kast(optax.sgd(0.1), 0.9, backward_sparsity=0.5)

    Raises:
      ValueError: a sparsity out of range, `backward_sparsity` above `sparsity`, a negative decay.
    """
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    forward = sparse.sparsity
    if is_concrete(decay) and decay < 0:
        raise ValueError(f"decay={decay}: must not be negative; it makes weights earn their place")
    if is_concrete(update_every) and update_every < 1:
        raise ValueError(f"update_every={update_every}: must be at least 1")
    if backward_sparsity is None:
        concrete = isinstance(forward, float)
        backward_sparsity = (
            1.0 - (1.0 - forward) ** 0.5 if concrete else 1.0 - jnp.sqrt(1.0 - forward)
        )
    elif is_concrete(backward_sparsity, forward) and not 0 <= backward_sparsity <= forward:
        raise ValueError(
            f"backward_sparsity={backward_sparsity}: must be in [0, sparsity={forward}]; the set with "
            "gradients contains the one of the forward pass"
        )
    in_forward = keep_best(scores.magnitude, sparse)
    in_backward = keep_best(scores.magnitude, sparse.replace(sparsity=backward_sparsity))

    def wider(step: Step):
        """B: without the structure, and never without what A holds."""
        free = [v.replace(leaf=v.leaf.with_structure(None)) for v in step.views]
        return in_backward(Step(step.count, free))

    def rule(step: Step) -> Projection:
        due = (step.count % update_every == 0) | (step.count == 0)
        a = refresh(due, in_forward, step)
        held = [None] * len(a) if step.aux is None else [masking.unpack(m) for m in step.aux]
        views = [v.replace(m=m) for v, m in zip(step.views, held)]
        b = [x | y for x, y in zip(a, refresh(due, wider, Step(step.count, views)))]
        return Projection(a, aux=[masking.pack(m) for m in b])

    def pull_back(v, _):
        axes = v.leaf.layer_axes
        density = jnp.mean(v.m, axis=axes, keepdims=True, dtype=jnp.float32)
        factor = jnp.where(v.m, 1.0, 1.0 / jnp.maximum(density, 1e-9)).astype(v.w.dtype)
        return v.g + (decay * factor * v.w).astype(v.g.dtype)

    return straight_through(
        inner,
        sparse,
        rule,
        pull_back=pull_back,
        moves=lambda step: [masking.unpack(m) for m in step.aux],
        raw_dtype=raw_dtype,
    )
