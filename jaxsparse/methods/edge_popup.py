r"""Edge-Popup: the weights stay random, and a score of each decides which of them are the network."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.engines import View, keep_scored, nan_moves, score_learner, straight_through
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StructureLike, Targets


@register(
    "edge_popup",
    reference="Ramanujan et al., What's hidden in a randomly weighted neural network?, 2020",
    keeps_raw=True,
    gradients="all",
    dynamics="projected",
)
def edge_popup(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    scores: optax.GradientTransformation | None = None,
    first_scores: Literal["random", "weights"] = "random",
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""$p = z_0 \odot topk(|S|)$: the weights $z_0$ never move; their scores are trained by

    $$\frac{\partial L}{\partial S} = g \odot z_0 \odot sign(S)$$

    straight through the choice, g the gradient at p. Best from weights $\pm\sqrt{2/n_{in}}$
    (`signed_constant`), and without biases and scales of norms: those that there are train with `inner`.

    Args:
      inner: the optimizer of the dense leaves; `optax.set_to_zero()` freezes them.
      sparsity: the fraction of zeros in [0, 1); half of the weights is the authors' best.
      scores: the optimizer of S; None: a second copy of `inner`. The authors take SGD with momentum 0.9,
        learning rate 0.1 and cosine decay.
      first_scores: "random": uniform up to $1/\sqrt{n_{in}}$; "weights": in proportion to the weights, which begins
        at the largest magnitudes (HYDRA's start, for trained weights).
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random first scores and of ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in: 1. dense leaves train, where theirs has none; 2. `sparsity` is the
    fraction that is zero, where their `prune_rate` is the fraction that is kept.

    >>> import jaxsparse
    >>> tx = jaxsparse.edge_popup(optax.sgd(0.1, momentum=0.9), 0.5)

    Raises:
      ValueError: a sparsity out of range, unknown first scores.
    """
    if first_scores not in ("random", "weights"):
        raise ValueError(f"first_scores={first_scores!r}: use 'random' or 'weights'")
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)

    def start(view: View) -> Array:
        shape = view.leaf.layer_shape
        bound = 1 / math.sqrt(max(math.prod(shape[:-1]), 1))
        if first_scores == "weights":
            w = view.w.astype(jnp.float32)
            return w * bound / jnp.maximum(jnp.max(jnp.abs(w)), jnp.finfo(jnp.float32).tiny)
        key = jax.random.key(view.leaf.salt(seed))
        return jax.random.uniform(key, view.w.shape, jnp.float32, -bound, bound)

    learner = score_learner(scores or inner, start, lambda slope, s: slope * jnp.sign(s))
    rule = keep_scored(sparse, jnp.abs)
    return straight_through(inner, sparse, rule, moves=nan_moves, learner=learner)


def signed_constant(density: float = 1.0) -> jax.nn.initializers.Initializer:
    r"""The initialiser $\pm\sqrt{2 / (d\, n_{in})}$, signs at random: for a network of which the part d of the
    weights is kept and none is trained.

    Args:
      density: d; 1: the constant of the dense network.

    >>> w = signed_constant()(jax.random.key(0), (8, 4))
    >>> sorted(set(w.ravel().tolist()))
    [-0.5, 0.5]

    Raises:
      ValueError: a density that is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: must be in (0, 1]")

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        size = math.sqrt(2 / (density * max(math.prod(shape[:-1]), 1)))
        return size * jax.random.rademacher(key, shape, dtype)

    return init
