"""WGSEF: the convex envelope of "at most k groups", as a proximal step after every update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules
from jaxsparse.engines import (
    Units,
    all_kept,
    followed_by,
    group_setup,
    hold_masks,
    keep_best_units,
)
from jaxsparse.engines.penalties import check_strength
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing()
_TINY = jnp.finfo(jnp.float32).tiny


@register(
    "wgsef",
    reference="Refael, Arbel & Huleihel, Learning k-level structured sparse neural networks using group "
    "envelope regularization, 2024",
    dynamics="gradual",
    structures="groups",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def wgsef(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    strength: Scalar = 1e-3,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""After every step $w \leftarrow prox_{\lambda S_k}(w)$, where

    $$S_k(w) = \tfrac12 \min_u \sum_j \frac{\|w_j\|^2}{u_j}, \quad 0 \le u_j \le 1, \quad \sum_j u_j \le k$$

    is the tightest convex function below $\frac12\|w\|^2$ on weights of at most k groups: half the squared
    $\ell_1$ norm of their norms for k = 1, half the squared $\ell_2$ norm for all. A small $\lambda$ leaves more
    than k groups; `end_step` cuts to exactly k.

    Args:
      inner: the optimizer of the weights, without decay: $\lambda$ shrinks kept groups, too.
      sparsity: 1 - k/n for every group, in [0, 1).
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel.
      strength: $\lambda$, the strength times the learning rate.
      end_step: when the cut is made; 75 % of the run. The proximal step then ends.
      allocation: the budgets of groups: "uniform", a mapping by path.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    After Adam it is not the proximal step in Adam's metric.

    >>> import jaxsparse
    >>> tx = jaxsparse.wgsef(optax.sgd(0.1), 0.5, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, a negative `strength`, a global ranking.
    """
    check_strength("strength", strength)
    updates = _TIMING.updates(total_steps, None, end_step)
    sparse = group_setup(sparsity, groups, allocation, targets, seed, pack_masks, by_layer=True)

    def prox(units: Units, ws, vs, count: Array):
        on = count < updates.end
        factors = [
            jnp.where(on, envelope_factors(n, k, strength), 1.0)
            for n, k in zip(units.norms(vs), units.budgets(sparse))
        ]
        return [(f * v).astype(v.dtype) for f, v in zip(units.at_weights(factors), vs)]

    return hold_masks(
        followed_by(inner, prox, sparse),
        sparse,
        init=all_kept,
        rule=keep_best_units(Units.norms, sparse),
        at=schedules.At((updates.end,)),
    )


def envelope_factors(norms: Array, k, strength: Scalar, weights: Scalar | Array = 1.0) -> Array:
    r"""What the proximal step of $\lambda S_k$ multiplies groups of these norms with.

    Args:
      norms: $\|v_j\|$, of any shape; one ranking.
      k: how many groups.
      strength: $\lambda$.
      weights: $d_j$ of $\frac12 \sum_j d_j \|w_j\|^2$.

    Returns:
      $u_j/(u_j + \lambda d_j)$ with $u_j = clip(\|v_j\| \sqrt{\lambda d_j}/\eta - \lambda d_j, 0, 1)$ and
      $\eta$ such that they sum to k; where at most k groups are not 0, $1/(1 + \lambda d_j)$.

    >>> v = jnp.array([3.0, 2.0, 1.0, 0.5])
    >>> [round(x, 4) for x in (v * envelope_factors(v, 2, 1.0)).tolist()]
    [1.5, 1.0, 0.0, 0.0]
    """
    lam = jnp.asarray(strength, jnp.float32) * jnp.asarray(weights, jnp.float32)
    reach = norms * jnp.sqrt(lam)
    share = lambda eta: jnp.clip(reach / eta - lam, 0, 1)
    top = jnp.max(reach) / jnp.maximum(jnp.min(lam), _TINY) + _TINY  # all shares are 0 there
    u = jnp.where(jnp.sum(norms > 0) <= k, jnp.ones(()), share(_level(share, k, top)))
    return jnp.where(lam == 0, 1.0, u / (u + jnp.where(lam == 0, 1.0, lam)))


def envelope(norms: Sequence[float] | Array, k: int, weights: Scalar | Array = 1.0) -> Array:
    r"""$S_k$ of groups of these norms: $u_j = min(1, a_j/\eta)$ with $a_j = \sqrt{d_j} \|w_j\|$.

    >>> [round(float(envelope(jnp.ones(4), k)), 3) for k in (1, 2, 4)]
    [8.0, 4.0, 2.0]
    """
    a = jnp.sqrt(jnp.asarray(weights, jnp.float32)) * jnp.asarray(norms, jnp.float32)
    share = lambda eta: jnp.minimum(a / eta, 1.0)
    top = jnp.sum(a) / k + _TINY
    u = jnp.where(jnp.sum(a > 0) <= k, 1.0, share(_level(share, k, top)))
    return 0.5 * jnp.sum(jnp.where(a > 0, a * a / jnp.where(u > 0, u, 1.0), 0.0))


def _level(share: Callable[[Array], Array], k, top: Array) -> Array:
    """The eta up to `top` at which the shares, which fall with it, sum to k."""

    def halve(_, bounds):
        low, high = bounds
        middle = jnp.sqrt(low * high)
        more = jnp.sum(share(middle)) > k
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    return jax.lax.fori_loop(0, 60, halve, (jnp.maximum(top * 1e-12, _TINY), top))[1]
