"""DSR: one adaptive threshold for the network, and regrowth where weights survive."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsparse import selection
from jaxsparse.engines import (
    Step,
    apportion,
    by_layer,
    by_leaf,
    hold_masks,
    is_concrete,
    random_masks,
    refill,
)
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import REWIRING
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, Targets


@register(
    "dsr",
    reference="Mostafa & Wang, Parameter efficient training of deep convolutional neural networks by "
    "dynamic sparse reparameterization, 2019",
    structures="unstructured",
    timing=REWIRING,
)
def dsr(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    drop_fraction: Scalar = 0.1,
    threshold: Scalar = 1e-3,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""At every update, with H one threshold for the whole network and $N_p$ = `drop_fraction` of
    all kept weights:

    1. drop every kept |w| < H, but never the largest of a layer; P is their number;
    2. grow P weights in all, in each layer in proportion to the weights that survived there, at
       random positions that were not kept before;
    3. H is halved if P > 1.1 $N_p$ and doubled if P < 0.9 $N_p$.

    The budget moves to the layers that keep their weights; the total never changes.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1), over all sparse layers.
      total_steps: the length of the run, in steps.
      drop_fraction: $N_p$ as a fraction of the kept weights.
      threshold: H at the start.
      update_every: steps between updates; the authors lengthen it as they go (100 to 800).
      begin_step: the first update, at least 1; after `update_every` steps by default.
      end_step: no update after it; 75 % of the run by default.
      allocation: the budgets of layers: "uniform", "er", "erk", a mapping by path; at the start.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in: the split is by largest remainders with caps (theirs
    gives rounding errors to a random layer). Where all layers together have too few free positions
    (below half sparsity) those just dropped are used as well.

    >>> import jaxsparse
    >>> tx = jaxsparse.dsr(optax.sgd(0.1), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, a threshold that is not positive.
    """
    if is_concrete(threshold) and threshold <= 0:
        raise ValueError(f"threshold={threshold}: must be positive; it adapts by factors of 2")
    if is_concrete(drop_fraction) and not 0 < drop_fraction < 1:
        raise ValueError(f"drop_fraction={drop_fraction}: must be in (0, 1)")
    updates = REWIRING.updates(total_steps, begin_step, end_step, update_every)

    sparse = setup(
        sparsity,
        allocation=allocation,
        targets=targets,
        seed=seed,
        pack_masks=pack_masks,
        by_layer=True,
    )

    def rule(step: Step):
        height, leaves, held = step.aux, step.leaves, step.masks
        axes = [leaf.layer_axes for leaf in leaves]
        counts = lambda ms: by_layer([selection.count(m, axis=a) for m, a in zip(ms, axes)])
        width = [jnp.abs(v.w).astype(jnp.float32) for v in step.views]
        best = selection.topk_masks(width, [1] * len(leaves), where=held, axis=axes)
        keep = [m & ((x >= height) | b) for m, x, b in zip(held, width, best)]
        n, left = counts(held), counts(keep)
        sizes = by_layer(step.sizes)
        pruned = jnp.sum(n - left, dtype=jnp.int32)
        free = jnp.where(jnp.sum(sizes - n) >= pruned, sizes - n, sizes - left)
        grown = by_leaf(leaves, apportion(pruned, left.astype(jnp.float32), free))
        masks = refill(
            leaves,
            [x.units(k) for x, k in zip(leaves, keep)],
            grown,
            [(~m).astype(jnp.float32) for m in held],
            salts=step.salts(seed),
            inside=step.inside,
        )
        wanted = drop_fraction * jnp.sum(n).astype(jnp.float32)
        cut = pruned.astype(jnp.float32)
        factor = jnp.where(cut > 1.1 * wanted, 0.5, jnp.where(cut < 0.9 * wanted, 2.0, 1.0))
        return masks, height * factor

    return hold_masks(
        inner,
        sparse,
        init=random_masks(sparse),
        rule=rule,
        at=updates,
        gradient="kept",
        fresh="grown",
        aux=lambda _: jnp.asarray(threshold, jnp.float32),
    )
