"""SNFS, sparse momentum: growth by momentum, and a budget that moves to the layers that need it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxsparse import selection
from jaxsparse._counts import scale_count
from jaxsparse.engines import Step, apportion, by_layer, by_leaf, hold_masks, momentum, refill
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register
from jaxsparse.methods._timing import AFTER_ONE_INTERVAL


@register(
    "snfs",
    reference="Dettmers & Zettlemoyer, Sparse networks from scratch: faster training without losing "
    "performance, 2019",
    structures="unstructured",
    gradients="all",
    needs_momentum=True,
)
def snfs(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    total_steps: Any,
    drop_fraction: Any = 0.5,
    update_every: Any = 100,
    begin_step: Any = None,
    end_step: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Drops the smallest |w| of each layer and grows where the momentum M is largest; how many a
    layer grows is its share of the mean |M| of kept weights. The total never changes.

    The inner optimizer sees the dense gradient, so that pruned weights have a momentum, too. At an
    update, with $v_l$ the mean |M| of the kept weights of layer l, normalised to sum 1:

    1. layer l drops the $\lceil \rho_l n_l \rceil$ smallest |w| of its $n_l$ kept weights; $\rho_l =
       \rho$, or min($\rho$, sparsity of l) if that is below 0.2 and $v_l > 1/L$;
    2. the R weights dropped in all are split in proportion to v, at most 99 % of its free
       positions to any layer;
    3. each layer grows its part where |M| is largest among all positions not kept.

    Args:
      inner: the optimizer of the weights; it must keep a momentum (SGD with momentum, Adam, ...;
        for Adam M is $\mu / (\sqrt\nu + 10^{-8})$).
      sparsity: the fraction of zeros in [0, 1), over all sparse layers.
      total_steps: the length of the run, in steps.
      drop_fraction: $\rho$ at the start of a cosine to 0.005, or a schedule.
      update_every: steps between updates; the authors take an epoch.
      begin_step, end_step: the first update (`update_every`) and the last (75 % of the run).
      allocation: the split at the start.
      targets, seed, pack_masks: see the guide of options.

    This differs from the authors' code in: 1. the split is by largest remainders with caps, exact
    where theirs rounds and steers the budget back later; what a full layer cannot take goes to the
    others in proportion, theirs equally; 2. masks start with exact counts, not with a coin per
    weight. RigL's "SNFS" has no redistribution.

    >>> import jaxsparse
    >>> tx = jaxsparse.snfs(optax.sgd(0.1, momentum=0.9), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, an inner optimizer without momentum.
    """
    sparsity = recipe.sparsity_of(sparsity, None)
    updates = AFTER_ONE_INTERVAL.updates(total_steps, begin_step, end_step, update_every)
    fraction = recipe.drop_schedule(drop_fraction, updates.end, final=0.005)
    start = recipe.random_masks(allocation, sparsity, seed)

    def init(step: Step):
        momentum(step)  # an inner optimizer that has none is an error at once
        return start(step)

    def rule(step: Step):
        wanted = [jnp.abs(m).astype(jnp.float32) for m in momentum(step)]
        ones = [v.leaf.counts(v.m) for v in step.views]
        total = [
            jnp.sum(jnp.where(v.m, x, 0.0), axis=v.leaf.layer_axes)
            for v, x in zip(step.views, wanted)
        ]
        n = by_layer(ones)
        sizes = by_layer(
            [jnp.full(leaf.stack_shape, leaf.layer_size, jnp.int32) for leaf in step.leaves]
        )
        share = by_layer(total) / jnp.maximum(n, 1).astype(jnp.float32)
        share = share / jnp.maximum(jnp.sum(share), 1e-30)

        sparse = (sizes - n).astype(jnp.float32) / sizes.astype(jnp.float32)
        rho = fraction(step.count)
        eager = (sparse < 0.2) & (share > 1.0 / share.size)
        rho = jnp.where(eager, jnp.minimum(rho, sparse), rho)
        dropped = n - scale_count(n, 1.0 - rho)  # rounded up
        room = sizes - n + dropped
        caps = scale_count(room, 0.99)
        caps = jnp.where(jnp.sum(caps) < jnp.sum(dropped), room, caps)  # nearly dense networks
        grown = by_leaf(step.leaves, apportion(jnp.sum(dropped), share, caps))
        keep = selection.topk_masks(
            [v.leaf.pool(jnp.abs(v.w)) for v in step.views],
            by_leaf(step.leaves, n - dropped),
            where=[v.leaf.units(v.m) for v in step.views],
            axis=[v.leaf.axes for v in step.views],
        )
        return refill(step.leaves, keep, grown, wanted, salts=step.salts(seed))

    return hold_masks(
        inner,
        recipe.plan_for(targets, None),
        init=init,
        rule=rule,
        at=updates,
        gradient="dense",
        pack_masks=pack_masks,
    )
