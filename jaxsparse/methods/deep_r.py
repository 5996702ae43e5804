"""Deep R: connections of fixed sign that die when they cross zero, and random ones in their place."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxsparse import masking
from jaxsparse.choose import unit_budgets
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
from jaxsparse.engines.step import any_nan
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, Targets


@register(
    "deep_r",
    reference="Bellec et al., Deep rewiring: training very sparse deep networks, 2018",
    structures="unstructured",
)
def deep_r(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    l1: Scalar = 1e-5,
    noise: Scalar = 1e-5,
    scope: Literal["layer", "global"] = "layer",
    allocation: AllocationLike = "erk",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Every position has a sign $\sigma$ for good. A kept weight $w = \sigma \theta$ moves by

    $$g + \alpha \sigma + c\, \nu, \qquad \nu \sim N(0, 1)$$

    through the inner optimizer; when $\theta$ falls below 0 the connection dies, and a dormant
    position of its layer, drawn at random, starts at $\theta = 10^{-12}$: exactly as many weights as
    asked for are kept after every step. Connections that die in the same step are drawn only where
    a layer has no other dormant position.

    Args:
      inner: the optimizer of the weights: SGD without momentum is the method, with which a step is
        $-\eta g - \eta\alpha\sigma - \eta c\nu$.
      sparsity: the fraction of zeros in [0, 1).
      l1: $\alpha$, which drives connections towards their death.
      noise: c as in the authors' code; the theory has $c = \sqrt{2T/\eta}$ at temperature T.
      scope: "layer": a connection is replaced in its layer. "global": the number of connections of
        the network is fixed; where one is replaced is drawn, each layer with its part of the budget
        at the start.
      allocation: the budgets of layers: "uniform", "er", "erk", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of masks, noise and new connections, an integer.
      pack_masks: store masks as one bit per weight.

    The signs are those of the parameters given to `init` (seeded where these are 0), kept as one bit
    per weight; the state of a weight that dies starts anew. The soft variant, in which dormant
    weights walk at random and no number of connections can be asked for, is not offered.

    >>> import jaxsparse
    >>> tx = jaxsparse.deep_r(optax.sgd(0.05), sparsity=0.9)

    Raises:
      ValueError: a sparsity out of range, a negative `l1` or `noise`, another `scope`.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r}: use 'layer' or 'global'")
    if is_concrete(l1, noise) and (l1 < 0 or noise < 0):
        raise ValueError(f"l1={l1}, noise={noise}: must not be negative")
    sparse = setup(
        sparsity,
        allocation=allocation,
        targets=targets,
        seed=seed,
        pack_masks=pack_masks,
        by_layer=True,
    )

    def draw(v, count, stream):
        salt = v.leaf.salt(seed, count) ^ jnp.uint32(stream)
        return jax.random.key(jax.lax.bitcast_convert_type(salt, jnp.int32))

    def initial_signs(step: Step):
        signs = []
        for v in step.views:
            coin = jax.random.bernoulli(draw(v, 0, 1), shape=v.w.shape)
            signs.append(masking.pack(jnp.where(v.w == 0, coin, v.w > 0)))
        return signs

    def signs_of(step: Step):
        return [
            jnp.where(s.unpack(), 1.0, -1.0).astype(v.w.dtype) for v, s in zip(step.views, step.aux)
        ]

    def seen(step: Step):
        out = []
        for v, sign in zip(step.views, signs_of(step)):
            walk = jax.random.normal(draw(v, step.count, 2), v.w.shape, jnp.float32)
            g = v.g + (l1 * sign).astype(v.g.dtype) + (noise * walk).astype(v.g.dtype)
            out.append(jnp.where(v.m, g, jnp.zeros((), g.dtype)))
        return out

    def spread(step: Step, lost, alive):
        """As many new connections as were lost, over all layers: exact, and on average in proportion
        to their budgets."""
        shares = by_layer(unit_budgets(step.leaves, sparse.allocation, sparse.sparsity)).astype(
            jnp.float32
        )
        total, start = jnp.sum(lost), jax.random.uniform(draw(step.views[0], step.count, 3))
        ends = jnp.floor(total * jnp.cumsum(shares) / jnp.sum(shares) + start).astype(jnp.int32)
        drawn = jnp.diff(jnp.minimum(ends, total).at[-1].set(total), prepend=0)
        sizes = by_layer(step.sizes)
        free = sizes - alive
        fit = jnp.minimum(drawn, free)
        return fit + apportion(total - jnp.sum(fit), shares, free - fit)

    def settle(step: Step):
        views, signs = step.views, signs_of(step)
        calm = ~any_nan([], [v.w for v in views])
        counts = lambda ms: [v.leaf.counts(m) for v, m in zip(views, ms)]
        alive = [v.m & ~((v.w * sign <= 0) & calm) for v, sign in zip(views, signs)]
        left = counts(alive)
        lost = [n - k for n, k in zip(counts(step.masks), left)]
        if scope == "global":
            lost = by_leaf(step.leaves, spread(step, by_layer(lost), by_layer(left)))
        # A position that dies in this step stands at w, and w + (epsilon - w) would round to 0: those
        # that were dormant before it are drawn while there are any.
        masks = refill(
            step.leaves,
            [v.leaf.units(a) for v, a in zip(views, alive)],
            lost,
            [(~v.m).astype(jnp.float32) for v in views],
            salts=step.salts(seed),
            inside=step.inside,
        )
        newborn = lambda w: jnp.asarray(max(1e-12, float(jnp.finfo(w.dtype).tiny)), w.dtype)
        rows = zip(views, alive, signs)
        return masks, [jnp.where(a, v.w, sign * newborn(v.w)) for v, a, sign in rows]

    return hold_masks(
        inner,
        sparse,
        init=random_masks(sparse),
        gradient=seen,
        after=settle,
        fresh="grown",
        aux=initial_signs,
    )
