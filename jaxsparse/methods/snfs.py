"""SNFS, sparse momentum: growth by momentum, and a budget that moves to the layers that need it."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsparse import schedules, selection
from jaxsparse.engines import (
    Step,
    apportion,
    by_layer,
    by_leaf,
    hold_masks,
    momentum,
    random_masks,
    refill,
)
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import AFTER_ONE_INTERVAL
from jaxsparse.selection import scale_count
from jaxsparse.typing import AllocationLike, Scalar, ScalarOrSchedule, Seed, StepCount, Targets


@register(
    "snfs",
    reference="Dettmers & Zettlemoyer, Sparse networks from scratch: faster training without losing "
    "performance, 2019",
    structures="unstructured",
    gradients="all",
    needs_momentum=True,
    timing=AFTER_ONE_INTERVAL,
)
def snfs(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    drop_fraction: ScalarOrSchedule = 0.5,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
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
      begin_step: the first update, at least 1; after `update_every` steps by default.
      end_step: no update after it; 75 % of the run by default.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path;
        at the start.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in: 1. the split is by largest remainders with caps, exact
    where theirs rounds and steers the budget back later; what a full layer cannot take goes to the
    others in proportion, theirs equally; 2. masks start with exact counts, not with a coin per
    weight. RigL's "SNFS" has no redistribution.

    >>> import jaxsparse
    >>> tx = jaxsparse.snfs(optax.sgd(0.1, momentum=0.9), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range, an inner optimizer without momentum.
    """
    sparse = setup(
        sparsity, allocation=allocation, targets=targets, seed=seed, pack_masks=pack_masks
    )
    updates = AFTER_ONE_INTERVAL.updates(total_steps, begin_step, end_step, update_every)
    fraction = schedules.drop_fraction(drop_fraction, updates.end, final=0.005)
    start = random_masks(sparse)

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
        sizes = by_layer(step.sizes)
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
        return refill(step.leaves, keep, grown, wanted, salts=step.salts(seed), inside=step.inside)

    return hold_masks(
        inner,
        sparse,
        init=init,
        rule=rule,
        at=updates,
        gradient="dense",
    )
