r"""Scores that are trained beside the weights: Edge-Popup, movement pruning, lottery jackpots.

The network is $p = z \odot m$ with m the weights of highest score S. The gradient of S goes straight
through the choice: with g the gradient at p,

$$\frac{\partial L}{\partial S} = g \odot z,$$

dense and without a second backward pass. Both parts are arguments of `straight_through`, whose raw
weights are z:

    straight_through(inner, sparse, keep_scored(sparse), learner=score_learner(optax.sgd(0.01)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.choose import choose
from jaxsparse.engines._checks import check_inner, sharded_as
from jaxsparse.engines.setup import Setup
from jaxsparse.engines.step import Step, any_nan, views
from jaxsparse.engines.straight_through import Learner, Projection
from jaxsparse.leaves import SparseLeaves
from jaxsparse.schedules import Schedule
from jaxsparse.scores import View


def zero_scores(view: View) -> Array:
    """S = 0 at the start, float32."""
    return jnp.zeros(view.w.shape, jnp.float32)


def score_learner(
    optimizer: optax.GradientTransformation,
    start: Callable[[View], Array] = zero_scores,
    pull_back: Callable[[Array, Array], Array] | None = None,
) -> Learner:
    r"""S, one score of every weight, trained by its own optimizer.

    The scores are the `aux` of the state: `(tree of S, state of the optimizer)`.

    Args:
      optimizer: of S; its learning rate is not that of the weights.
      start: S at `init`, from a view of the weights.
      pull_back: `(g * z, S) -> gradient` of S; None: g * z as it is. Edge-Popup ranks by |S|, and
        has `lambda d, s: d * jnp.sign(s)`.

    >>> from jaxsparse.engines import straight_through
    >>> from jaxsparse.engines.setup import setup
    >>> sparse = setup(0.5)
    >>> movement = straight_through(  # S is the sum of -0.1 g z: those that grow are kept
    ...     optax.sgd(0.0), sparse, keep_scored(sparse), learner=score_learner(optax.sgd(0.1)))
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> state = movement.init(params)
    >>> updates, state = movement.update({"kernel": jnp.array([[-3.0], [1.0]])}, state, params)
    >>> (params["kernel"] + updates["kernel"]).ravel().tolist()
    [1.0, 0.0]
    """
    optimizer = check_inner(optimizer)

    def init(plan: SparseLeaves, zs):
        rows = zip(views(plan, zs), zs)
        scores = plan.scatter([sharded_as(start(v), z) for v, z in rows])
        return scores, optimizer.init(scores)

    def update(step: Step, plan: SparseLeaves, extra):
        tree, state = step.aux
        slopes = []
        for v, s in zip(step.views, plan.take(tree)):
            slope = v.g.astype(jnp.float32) * v.w.astype(jnp.float32)
            slopes.append(slope if pull_back is None else pull_back(slope, s))
        deltas, state = optimizer.update(plan.scatter(slopes), state, tree, **extra)
        return optax.apply_updates(tree, deltas), state

    return Learner(init, update)


def keep_scored(
    setup: Setup,
    worth: Callable[[Array], Array] | None = None,
    ramp: Schedule | None = None,
) -> Callable[[Step], Projection]:
    """The rule that keeps the weights of highest `worth(S)` at the sparsity `ramp(step) * setup.sparsity`.

    Args:
      setup: structure, allocation and final sparsity; equal scores are ranked by its seed.
      worth: of the scores, such as `jnp.abs`; None: S itself.
      ramp: the part of the way that is gone, 0 to 1; None: all of it.
    """

    def rule(step: Step) -> Projection:
        tree, _ = step.aux
        scores = jax.tree.leaves(tree)
        masks = choose(
            step.leaves,
            scores if worth is None else [worth(s) for s in scores],
            setup.allocation,
            setup.sparsity,
            fraction=1.0 if ramp is None else ramp(step.count),
            ties="hash",
            seed=setup.seed,
        )
        return Projection(unless_nan(step, scores, masks), aux=step.aux)

    return rule


def unless_nan(step: Step, scores: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    """The masks, or those so far where a score is NaN, which ranks nowhere."""
    if any(v.m is None for v in step.views):
        return list(masks)
    bad = any_nan([], scores)
    return [jnp.where(bad, v.m, m) for v, m in zip(step.views, masks)]


def nan_moves(step: Step) -> list[Array]:
    """What may move of weights that never do: where the gradient is NaN, so that it shows in them."""
    return [jnp.isnan(v.g) for v in step.views]
