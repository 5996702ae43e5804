"""Turbo-VBI: a Bayesian prior whose support is clustered, inferred by variational steps and message passing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.scipy.special import digamma, gammaln

from jaxsparse.engines import (
    Learner,
    Projection,
    Step,
    check_inner,
    is_concrete,
    straight_through,
    when,
)
from jaxsparse.engines.setup import setup
from jaxsparse.leaves import SparseLeaves
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import AFTER_ONE_INTERVAL
from jaxsparse.typing import Scalar, Seed, StepCount, Targets

_TIMING = AFTER_ONE_INTERVAL
Prior = tuple[float, float]


class Posterior(NamedTuple):
    """What is inferred of a leaf besides the means: the log of the deviations, the mean precision, the
    probability of the support (1 until it is inferred), the same as it enters the precision (the density
    until then), and the probability without what the weight itself says of it."""

    log_sigma: Array
    precision: Array
    support: Array
    mixing: Array
    extrinsic: Array


@register(
    "turbo_vbi",
    reference="Xia, Tsang & Lau, Structured Bayesian compression for deep neural networks based on the "
    "turbo-VBI approach, 2023",
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="unstructured",
    gradients="all",
    exact_budget=False,
    timing=_TIMING,
)
def turbo_vbi(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    examples: int = 60_000,
    active: Prior = (1.0, 1.0),
    inactive: Prior = (1.0, 1e-5),
    stay: Scalar = 0.9,
    density: Scalar = 0.5,
    sigma: Scalar = 1e-2,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Three layers of prior: $w \sim N(0, 1/\rho)$; $\rho \sim Gamma(a, b)$ where the support s is 1 and
    $Gamma(\bar a, \bar b)$, of huge precision, where it is 0; and s a Markov chain along every row and every
    column of a kernel, so that what survives is clustered. With $q(w) = N(\mu, \sigma^2)$:

    - every step: $\mu$ and $\log \sigma$ move along the gradient of the loss plus $KL/N$;
    - every `update_every` steps: $q(\rho)$ and $q(s)$ in closed form, then forward-backward passes along the
      chains give the support its new prior. Weights whose support is less likely than not are zero.

    Parameters are drawn from q(w) in training; from `end_step` on they are $\mu$ within the last support.

    Args:
      inner: the optimizer of $\mu$ and, by a second copy, of $\log \sigma$.
      total_steps: the length of the run, in steps.
      examples: N, the number of examples in the training set: the weight of the prior is 1/N.
      active: the prior of the precision within the support, (a, b).
      inactive: that outside of it, $(\bar a, \bar b)$, of mean precision $\bar a/\bar b$.
      stay: the probability that a neighbour has the same support, in [0.5, 1); 0.5 is no chain.
      density: the share of the support of every chain at its start, in (0, 1).
      sigma: the first $\sigma$.
      update_every: steps between two updates of the support.
      begin_step: the first of them; one interval after the start.
      end_step: the last; 75 % of the run.
      targets: which leaves, by path; None: all kernels.
      seed: of the noise, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.turbo_vbi(optax.adam(1e-3), total_steps=1000, examples=60_000)

    Raises:
      ValueError: a step out of range, a probability out of range, a prior or `examples` not positive.
    """
    for name, value, least in (("stay", stay, 0.5), ("density", density, 1e-6)):
        if is_concrete(value) and not least <= float(value) < 1:
            raise ValueError(f"{name}={value}: must be in [{least:g}, 1)")
    if min(*active, *inactive) <= 0 or examples < 1:
        raise ValueError(
            f"active={active}, inactive={inactive}, examples={examples}: give positive numbers"
        )
    updates = _TIMING.updates(total_steps, begin_step, end_step, update_every)
    sparse = setup(targets=targets, seed=seed, pack_masks=pack_masks, asks_sparsity=False)
    optimizer = check_inner(inner)

    def noise(step: Step, count: Array) -> list[Array]:
        on = count < updates.end
        keys = [jax.random.key(leaf.salt(sparse.seed, count)) for leaf in step.leaves]
        draws = [jax.random.normal(k, v.w.shape, jnp.float32) for k, v in zip(keys, step.views)]
        return [jnp.where(on, x, 0.0) for x in draws]

    def init(plan: SparseLeaves, zs):
        found = [start(z, sigma, active, density) for z in zs]
        return found, optimizer.init([p.log_sigma for p in found])

    def gradient(step: Step):
        on = step.count < updates.end
        return [
            jnp.where(v.m | on, v.g + jnp.where(on, p.precision * v.w / examples, 0.0), 0.0).astype(
                v.g.dtype
            )
            for v, p in zip(step.views, step.aux[0])
        ]

    def learn(step: Step, plan: SparseLeaves, extra):
        found, state = step.aux
        on, grads = step.count < updates.end, []
        for v, p, e in zip(step.views, found, noise(step, step.count)):
            deviation = jnp.exp(p.log_sigma)
            task = v.g.astype(jnp.float32) * e * deviation
            cost = (p.precision * deviation**2 - 1) / examples
            grads.append(jnp.where(on, task + cost, 0.0).astype(p.log_sigma.dtype))
        logs = [p.log_sigma for p in found]
        updated: Any = optimizer.update(grads, state, logs, **extra)
        moves, state = updated
        logs = [jnp.where(on, x + m.astype(x.dtype), x) for x, m in zip(logs, moves)]
        found = [p._replace(log_sigma=x) for p, x in zip(found, logs)]
        infer = lambda posts, mus: [
            support_update(p, mu, active, inactive, stay, density) for p, mu in zip(posts, mus)
        ]
        fires = updates.fires(step.count)
        return when(fires, infer, found, [v.w for v in step.views]), state

    def rule(step: Step) -> Projection:
        found, first = step.aux[0], any(v.m is None for v in step.views)
        count = step.count if first else step.count + 1
        masks = [p.support >= 0.5 for p in found]
        # What is handed out is scale * mu; a draw mu + sigma e is mu * (1 + sigma e / mu).
        rows = zip(step.views, found, noise(step, count))
        scale = [1 + jnp.exp(p.log_sigma) * e / _away(v.w) for v, p, e in rows]
        return Projection(masks, scale=scale, aux=step.aux)

    return straight_through(inner, sparse, rule, gradient=gradient, learner=Learner(init, learn))


def _away(mu: Array) -> Array:
    """mu, but not so near 0 that dividing by it overflows."""
    wide = mu.astype(jnp.float32)
    return jnp.where(jnp.abs(wide) < 1e-20, 1e-20, wide)


def start(mu: Array, sigma: Scalar, active: Prior, density: Scalar) -> Posterior:
    """The first posterior of a leaf: everything is in the support."""
    full = lambda value: jnp.full(mu.shape, value, jnp.float32)
    return Posterior(
        log_sigma=jnp.log(full(sigma)),
        precision=full(active[0] / active[1]),
        support=full(1.0),
        mixing=full(density),
        extrinsic=full(density),
    )


def support_update(
    posterior: Posterior, mu: Array, active: Prior, inactive: Prior, stay: Scalar, density: Scalar
) -> Posterior:
    r"""$q(\rho)$, then $q(s)$, then the chains.

    $q(\rho) = Gamma(\tilde a, \tilde b)$ with $\tilde a = \pi a + (1 - \pi) \bar a + \frac12$ and
    $\tilde b = \pi b + (1 - \pi) \bar b + (\mu^2 + \sigma^2)/2$, where $\pi$ is the support's probability; the odds of s
    are $\pi_e C(a, b) / ((1 - \pi_e) C(\bar a, \bar b))$ with the extrinsic $\pi_e$ and
    $\log C(a, b) = a \log b - \log\Gamma(a) + (a - 1) E[\ln \rho] - b E[\rho]$.
    """
    pi = posterior.mixing
    mix = lambda x, y: pi * x + (1 - pi) * y
    square = mu.astype(jnp.float32) ** 2 + jnp.exp(2 * posterior.log_sigma)
    shape = mix(active[0], inactive[0]) + 0.5
    rate = mix(active[1], inactive[1]) + square / 2
    mean, log_mean = shape / rate, digamma(shape) - jnp.log(rate)

    def log_c(a: float, b: float) -> Array:
        one, other = jnp.float32(a), jnp.float32(b)
        return one * jnp.log(other) - gammaln(one) + (one - 1) * log_mean - other * mean

    evidence = log_c(*active) - log_c(*inactive)
    extrinsic = chain_messages(evidence, stay, density)
    odds = evidence + jnp.log(extrinsic) - jnp.log1p(-extrinsic)
    support = jax.nn.sigmoid(odds)
    return Posterior(posterior.log_sigma, mean, support, support, extrinsic)


def chain_messages(evidence: Array, stay: Scalar, density: Scalar) -> Array:
    r"""What the neighbours say of the support of every weight, its own evidence left out.

    Args:
      evidence: the log odds of the support that the weights give, `[..., in, out]`; a vector is one chain.
      stay: the probability that a neighbour in the chain has the same support.
      density: the probability of the support at the start of a chain.

    Returns:
      Probabilities in (0, 1). Of kernels the messages along columns enter those along rows, and the
      other way round, once: an approximation, since rows and columns form loops.
    """
    if evidence.ndim < 2:
        return jax.nn.sigmoid(_chain(evidence, stay, density))
    matrix = evidence.reshape(-1, evidence.shape[-1])
    down = _chain(matrix, stay, density)
    across = _chain((matrix + down).T, stay, density).T
    down = _chain(matrix + across, stay, density)
    # The two share the prior of one weight, which must count once.
    share = jnp.asarray(density, jnp.float32)
    odds = down + across - (jnp.log(share) - jnp.log1p(-share))
    return jnp.clip(jax.nn.sigmoid(odds), 1e-6, 1 - 1e-6).reshape(evidence.shape)


def _chain(evidence: Array, stay: Scalar, density: Scalar) -> Array:
    """Log odds of every place of chains along the first axis, from all others: forward and backward."""
    stay, density = jnp.asarray(stay, jnp.float32), jnp.asarray(density, jnp.float32)
    prior = jnp.log(density) - jnp.log1p(-density)
    # Stationary with this density, the mean of the probabilities of staying as given.
    leave_one = (1 - stay) * 2 * (1 - density)
    leave_zero = (1 - stay) * 2 * density

    def ahead(message, here):
        """The odds at the next place, from those of this one."""
        p = jax.nn.sigmoid(message + here)
        one = p * (1 - leave_one) + (1 - p) * leave_zero
        new = jnp.log(one) - jnp.log1p(-one)
        return new, message

    def behind(message, here):
        """What the places after say: likelihood ratios, without a prior."""
        p = jax.nn.sigmoid(message + here)
        one = (1 - leave_one) * p + leave_one * (1 - p)
        zero = leave_zero * p + (1 - leave_zero) * (1 - p)
        return jnp.log(one) - jnp.log(zero), message

    first, evidence = jnp.full(evidence.shape[1:], prior), evidence.astype(jnp.float32)
    _, forward = jax.lax.scan(ahead, first, evidence)
    _, backward = jax.lax.scan(
        behind, jnp.zeros(evidence.shape[1:], jnp.float32), evidence, reverse=True
    )
    return forward + backward
