r"""Movement pruning: keep the weights that move away from zero, by scores that sum up their movement."""

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
    is_concrete,
    keep_scored,
    score_learner,
    straight_through,
)
from jaxsparse.engines.penalties import check_strength
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.selection import kept_count
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets

# Warm-up, and twice as long at the end, of a warm-up of a tenth of the run.
_TIMING = Timing(begin=10, end=80)
_REFERENCE = "Sanh, Wolf & Rush, Movement pruning: adaptive sparsity by fine-tuning, 2020"


def _visible(view, _) -> Array:
    return jnp.where(view.m, view.g, jnp.zeros((), view.g.dtype))


@register(
    "movement",
    reference=_REFERENCE,
    keeps_raw=True,
    gradients="all",
    dynamics="projected",
    dense_phase="dense before begin_step, sparser on a cubic curve until end_step",
    starts_dense=True,
    timing=_TIMING,
)
def movement(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    scores: optax.GradientTransformation | None = None,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z \odot topk(S)$, where S, 0 at first, is trained by

    $$\frac{\partial L}{\partial S} = g \odot z,$$

    g the gradient at p: with plain gradient descent S is $-\eta_S \sum_t g_t z_t$, and grows where a weight
    moves away from zero. A weight that is small now and grows is kept, a large one that shrinks is not. Pruned
    weights stand still, and return with their value when their score does.

    Args:
      inner: the optimizer of the weights.
      sparsity: the final one, in [0, 1); may be left out with an N:M structure.
      total_steps: the length of the run, in steps.
      scores: the optimizer of S; None: a second copy of `inner`. The authors take Adam at 0.01; from S = 0 on
        the learning rate of Adam alone changes no ranking.
      begin_step: where the cubic ramp starts; after 10 % of the run by default.
      end_step: where it ends; 80 % of the run by default.
      structure: allowed patterns of zeros; the scores of a unit (a block) add up.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, which at S = 0 are all, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in that a block has a score of each of its weights: their sum is the
    authors' score under gradient descent; Adam scales each by itself.

    >>> import jaxsparse
    >>> tx = jaxsparse.movement(optax.adamw(3e-5), 0.85, total_steps=10_000)

    Raises:
      ValueError: a sparsity or a step out of range.
    """
    updates = _TIMING.updates(total_steps, begin_step, end_step)
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    ramp = schedules.cubic(updates.begin, updates.end)
    return straight_through(
        inner,
        sparse,
        keep_scored(sparse, ramp=ramp),
        pull_back=_visible,
        moves=lambda step: step.masks,
        learner=score_learner(scores or inner),
    )


@register(
    "soft_movement",
    reference=_REFERENCE,
    controls_sparsity=False,
    keeps_raw=True,
    gradients="all",
    dynamics="projected",
    structures="unstructured",
    exact_budget=False,
    dense_phase="dense before begin_step",
    starts_dense=True,
    timing=_TIMING,
)
def soft_movement(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    strength: Scalar = 100.0,
    threshold: Scalar = 0.1,
    scores: optax.GradientTransformation | None = None,
    minimum: float = 0.005,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Movement pruning with a threshold: $p = z \odot 1[\sigma(S) > \tau(t)]$, and scores that a penalty
    $\lambda(t)\, \overline{\sigma(S)}$ (the mean over all scores of the network) pulls down. Both $\tau$ and
    $\lambda$ rise on a cubic curve, $\lambda$ in proportion to $\tau$; how sparse each layer becomes is found.

    Args:
      inner: the optimizer of the weights.
      total_steps: the length of the run, in steps.
      strength: $\lambda$ at the end; more is sparser.
      threshold: $\tau$ at the end, in (0, 1).
      scores: the optimizer of S; None: a second copy of `inner`. S has to cross $\sigma^{-1}(\tau)$ within the
        run: the authors take Adam at 0.01, far above the learning rate of the weights.
      minimum: the fraction of each layer that is kept in any case, the highest scores.
      begin_step: where the ramps start; after 10 % of the run by default.
      end_step: where they end; 80 % of the run by default.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.soft_movement(optax.adamw(3e-5), total_steps=10_000, scores=optax.adam(0.01))

    Raises:
      ValueError: a step out of range, a negative strength, a threshold or minimum out of range.
    """
    check_strength("strength", strength)
    if is_concrete(threshold) and not 0 < float(threshold) < 1:
        raise ValueError(f"threshold={threshold}: must be in (0, 1)")
    if not 0 < minimum <= 1:
        raise ValueError(f"minimum={minimum}: must be in (0, 1]")
    updates = _TIMING.updates(total_steps, begin_step, end_step)
    sparse = setup(asks_sparsity=False, targets=targets, seed=seed, pack_masks=pack_masks)
    ramp = schedules.cubic(updates.begin, updates.end)
    optimizer = check_inner(scores or inner)
    plain = score_learner(optimizer)

    def update(step: Step, plan, extra):
        tree, state = step.aux
        number = sum(leaf.size for leaf in plan.leaves)
        slopes = []
        for v, s in zip(step.views, plan.take(tree)):
            gate = jax.nn.sigmoid(s)
            pull = strength * ramp(step.count) / number * gate * (1 - gate)
            slopes.append(v.g.astype(jnp.float32) * v.w.astype(jnp.float32) + pull)
        found = optimizer.update(plan.scatter(slopes), state, tree, **extra)
        return optax.apply_updates(tree, found[0]), found[1]

    def rule(step: Step) -> Projection:
        trained = jax.tree.leaves(step.aux[0])
        least = [kept_count(leaf.layer_size, 1 - minimum) for leaf in step.leaves]
        axes = [leaf.layer_axes for leaf in step.leaves]
        salts = [leaf.salt(seed) for leaf in step.leaves]
        floor = selection.topk_masks(trained, least, axis=axes, ties="hash", seed=salts)
        at = threshold * ramp(step.count)
        masks = [(jax.nn.sigmoid(s) > at) | m for s, m in zip(trained, floor)]
        return Projection(masks, aux=step.aux)

    return straight_through(
        inner,
        sparse,
        rule,
        pull_back=_visible,
        moves=lambda step: step.masks,
        learner=Learner(plain.init, update),
    )
