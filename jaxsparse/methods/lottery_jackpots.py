r"""Lottery jackpots: pretrained weights stay, and only the mask is searched, with ever fewer swaps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules, selection
from jaxsparse.engines import (
    Learner,
    Projection,
    Step,
    check_inner,
    keep_best,
    nan_moves,
    score_learner,
    straight_through,
    unless_nan,
)
from jaxsparse.engines.setup import setup
from jaxsparse.engines.step import views
from jaxsparse.methods.registry import register
from jaxsparse.selection import scale_count
from jaxsparse.typing import AllocationLike, Scalar, ScalarOrSchedule, Seed, StepCount, Targets


@register(
    "lottery_jackpots",
    reference="Zhang et al., Lottery jackpots exist in pre-trained models, 2023",
    keeps_raw=True,
    gradients="all",
    dynamics="projected",
    structures="unstructured",
)
def lottery_jackpots(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    scores: optax.GradientTransformation | None = None,
    rate: ScalarOrSchedule | None = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z_0 \odot m$ with pretrained weights $z_0$ that never move. The mask starts at the largest
    magnitudes; scores S, 1 where kept and 0.99 elsewhere at first, are trained by $g \odot z_0$. At each step
    the top-k of S of each layer would bring c weights in and take c out; of these only the
    $\lceil r(t)\, c \rceil$ of highest, and of lowest, score are exchanged, with $r(t) = (1 - t/T)^4$.

    Args:
      inner: the optimizer of the dense leaves; `optax.set_to_zero()` freezes them, as the authors do.
      sparsity: the fraction of zeros in [0, 1).
      total_steps: T, the length of the run, in steps.
      scores: the optimizer of S; None: a second copy of `inner`. The authors take SGD with learning rate 0.1,
        momentum 0.9, cosine decay and a weight decay, which pulls S, too.
      rate: r, a number in [0, 1] or a schedule; None: as above; 1: plain top-k of S.
      allocation: the budgets of layers, of the first mask: "global" ranks magnitudes over all layers.
      targets: which leaves are sparse, by path; None: all kernels (the authors leave the last dense).
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in: 1. r falls, where a ceil in theirs makes it 1 at all steps;
    2. dense leaves train by default. Running statistics of norms have to be estimated anew, as they do in
    any training mode.

    >>> import jaxsparse
    >>> tx = jaxsparse.lottery_jackpots(optax.set_to_zero(), 0.9, total_steps=1000, scores=optax.sgd(0.1))

    Raises:
      ValueError: a sparsity or a length out of range.
    """
    schedules.check_length(total_steps)
    sparse = setup(sparsity, None, allocation, targets, seed, pack_masks)
    by_size = keep_best("magnitude", sparse)
    fraction = schedules.inverse_power(1.0, total_steps, power=4) if rate is None else rate
    limit = fraction if callable(fraction) else schedules.constant(fraction)
    optimizer = check_inner(scores or inner)
    plain = score_learner(optimizer)

    def init(plan, zs):
        masks = by_size(Step(jnp.int32(0), views(plan, zs)))
        tree = plan.scatter([jnp.where(m, 1.0, 0.99).astype(jnp.float32) for m in masks])
        return tree, optimizer.init(tree)

    def rule(step: Step) -> Projection:
        if any(v.m is None for v in step.views):
            return Projection(by_size(step), aux=step.aux)
        trained = jax.tree.leaves(step.aux[0])
        masks = exchange(step.masks, trained, limit(step.count))
        return Projection(unless_nan(step, trained, masks), aux=step.aux)

    return straight_through(
        inner, sparse, rule, moves=nan_moves, learner=Learner(init, plain.update)
    )


def exchange(masks: list[Array], scores: list[Array], rate: Scalar) -> list[Array]:
    r"""Masks in which the $\lceil r\, c \rceil$ best swaps of each leaf are made, of the c between them and the
    top-k of the scores.

    >>> m, s = jnp.array([True, True, False, False]), jnp.array([0.1, 0.2, 0.9, 0.8])
    >>> exchange([m], [s], 1.0)[0].tolist(), exchange([m], [s], 0.5)[0].tolist()
    ([False, False, True, True], [False, True, True, False])
    """
    kept = [selection.count(m) for m in masks]
    best = selection.topk_masks(scores, kept)
    enter = [b & ~m for b, m in zip(best, masks)]
    leave = [m & ~b for b, m in zip(best, masks)]
    counts = [selection.count(x) for x in enter]
    number = [c - scale_count(c, 1 - rate) for c in counts]  # ceil(r c)
    come = selection.topk_masks(scores, number, where=enter)
    go = selection.topk_masks([-s for s in scores], number, where=leave)
    return [(m | i) & ~o for m, i, o in zip(masks, come, go)]
