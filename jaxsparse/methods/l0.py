"""L0: a hard-concrete gate per group, trained by the expected number of groups that are not zero."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.engines import (
    Learner,
    Projection,
    Step,
    Units,
    check_inner,
    group_setup,
    is_concrete,
    straight_through,
)
from jaxsparse.engines.penalties import check_strength
from jaxsparse.leaves import SparseLeaves
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import GroupsLike, Scalar, Seed, StepCount, Targets

_TIMING = Timing()
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_BOUNDS = math.log(1e-2), math.log(1e2)


@register(
    "l0",
    reference="Louizos, Welling & Kingma, Learning sparse neural networks through L0 regularization, "
    "2018",
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="groups",
    gradients="all",
    exact_budget=False,
    timing=_TIMING,
)
def l0(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    groups: GroupsLike = None,
    strength: Scalar = 1e-6,
    decay: Scalar = 0.0,
    drop_rate: Scalar = 0.5,
    gates: optax.GradientTransformation | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each group with a gate z in [0, 1] that is exactly 0 with some probability, and learns it:

    $$z = clip(\bar s), \quad \bar s = 1.2\, \sigma((\log u - \log(1 - u) + a)/\beta) - 0.1, \quad \beta = 2/3,$$

    u uniform, drawn anew at every step for every group. The loss gets
    $\sum_g P(z_g \ne 0)(\lambda |g| + \frac12 d \|w_g\|^2)$ with $P(z \ne 0) = \sigma(a - \beta \log(0.1/1.1))$. The
    parameters handed out are z w; from `end_step` on z is the gate of the mean, $clip(1.2\, \sigma(a) - 0.1)$,
    and the masks stay.

    Of the groups of `channels.find` the gate multiplies what reads a channel, and so the channel itself,
    whatever norm and activation lie before it.

    Args:
      inner: the optimizer of the weights behind the gates.
      total_steps: the length of the run, in steps.
      groups: what lives and dies together: `channels.find(model, x)`, a structure, None: every output
        channel of a kernel.
      strength: $\lambda$ per weight, divided by the number of examples in the training set.
      decay: d, divided likewise.
      drop_rate: a starts at $\log((1 - p)/p)$ with this p: 0.2 for inputs and 0.5 elsewhere by the authors.
      gates: the optimizer of a; None: a second copy of `inner`. It is clipped to [log 0.01, log 100].
      end_step: when the gates stand still; 75 % of the run.
      targets: which leaves, by path; None: all that the groups name, or all kernels.
      seed: of the noise, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.l0(optax.adam(1e-3), total_steps=1000, strength=1e-5)

    Raises:
      ValueError: a step out of range, a negative `strength` or `decay`, a `drop_rate` not in (0, 1).
    """
    check_strength("strength", strength)
    check_strength("decay", decay)
    if is_concrete(drop_rate) and not 0 < float(drop_rate) < 1:
        raise ValueError(f"drop_rate={drop_rate}: must be in (0, 1)")
    end = _TIMING.updates(total_steps, None, end_step).end
    sparse = group_setup(
        None, groups, "uniform", targets, seed, pack_masks, sides=("in",), asks_sparsity=False
    )
    inner = check_inner(inner)
    optimizer = inner if gates is None else check_inner(gates)

    def gates_at(units: Units, tree: list[Array], count: Array) -> tuple[list[Array], list[Array]]:
        """The gates of the parameters that step `count` sees, and their derivatives in a."""
        rows = []
        for leaf, a in zip(units.leaves, tree):
            key = jax.random.key(leaf.salt(sparse.seed, count))
            u = jax.random.uniform(key, a.shape, jnp.float32, minval=1e-6, maxval=1 - 1e-6)
            noisy = lambda a, u=u: hard_concrete(a, u)
            late = count >= end
            value, slope = jax.jvp(noisy, (a,), (jnp.ones_like(a),))
            rows.append((jnp.where(late, hard_concrete(a), value), jnp.where(late, 0.0, slope)))
        return [z for z, _ in rows], [s for _, s in rows]

    def init(plan: SparseLeaves, zs):
        p = jnp.asarray(drop_rate, jnp.float32)
        start = jnp.log1p(-p) - jnp.log(p)
        tree = [jnp.full(leaf.shape, start) for leaf in Units(plan.leaves).leaves]
        return tree, optimizer.init(tree)

    def gradient(step: Step):
        units = Units(step.leaves)
        (tree, _), (zs, _) = step.aux, gates_at(units, step.aux[0], step.count)
        on = jnp.where(step.count < end, decay, 0.0)
        costs = units.at_weights([on * present(a) for a in tree], "sum")
        return [
            (f * v.g + c * v.w).astype(v.g.dtype)
            for f, c, v in zip(units.at_weights(zs), costs, step.views)
        ]

    def update(step: Step, plan: SparseLeaves, extra):
        tree, state = step.aux
        units, ws = Units(step.leaves), [v.w for v in step.views]
        zs, slopes = gates_at(units, tree, step.count)
        # Of a weight in two groups the other gate multiplies what this one sees.
        others = units.at_weights(zs)
        total = units.dots([o * v.g for o, v in zip(others, step.views)], ws)
        size, square = units.sizes(), units.dots(ws, ws)
        on, grads = step.count < end, []
        for a, z, s, d, n, q in zip(tree, zs, slopes, total, size, square):
            p = present(a)
            task = jnp.where(z > 0, s * d / jnp.where(z > 0, z, 1.0), 0.0)
            cost = p * (1 - p) * (strength * n + 0.5 * decay * q)
            grads.append(jnp.where(on, task + cost, 0.0).astype(a.dtype))
        found: Any = optimizer.update(grads, state, tree, **extra)
        moves, new = found
        moved = [jnp.clip(a + m.astype(a.dtype), *_BOUNDS) for a, m in zip(tree, moves)]
        return [jnp.where(on, b, a) for a, b in zip(tree, moved)], new

    def rule(step: Step) -> Projection:
        units, first = Units(step.leaves), any(v.m is None for v in step.views)
        zs, _ = gates_at(units, step.aux[0], step.count if first else step.count + 1)
        factors = units.at_weights(zs)
        return Projection([f > 0 for f in factors], scale=factors, aux=step.aux)

    return straight_through(inner, sparse, rule, gradient=gradient, learner=Learner(init, update))


def hard_concrete(a: Array, u: Array | None = None) -> Array:
    """The gate of a for uniform noise u; without noise that of the mean, and without the temperature.

    >>> [round(x, 4) for x in hard_concrete(jnp.array([0.0, 2.0, -3.0])).tolist()]
    [0.5, 0.957, 0.0]
    """
    s = jax.nn.sigmoid(a if u is None else (jnp.log(u) - jnp.log1p(-u) + a) / _BETA)
    return jnp.clip(s * (_HIGH - _LOW) + _LOW, 0.0, 1.0)


def present(a: Array) -> Array:
    """The probability that the gate of a is not 0.

    >>> [round(x, 4) for x in present(jnp.array([0.0, 2.0, -3.0])).tolist()]
    [0.8318, 0.9734, 0.1976]
    """
    return jax.nn.sigmoid(a - _BETA * math.log(-_LOW / _HIGH))
