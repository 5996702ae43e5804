r"""SSVI: a Gaussian posterior on a fixed number of weights, whose support is rewired as in RigL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules, scores
from jaxsparse.engines import Step, hold_masks, keep_best, swap
from jaxsparse.engines.setup import setup
from jaxsparse.methods.timing import REWIRING
from jaxsparse.typing import AllocationLike, Scalar, ScalarOrSchedule, Seed, StepCount, Targets

Worth = Literal["snr", "mean", "size", "ratio"]


def folded_normal(mu: Array, sigma: Array) -> tuple[Array, Array]:
    r"""$E|w|$ and the signal-to-noise ratio $E|w| / \sqrt{Var |w|}$ of $w \sim N(\mu, \sigma^2)$:
    $E|w| = \mu\, erf(a) + \sigma \sqrt{2/\pi}\, e^{-a^2}$ with $a = \mu / (\sigma\sqrt 2)$.

    The ratio has the floor 1.3236 at $\mu = 0$.

    >>> [round(float(x), 4) for x in folded_normal(jnp.float32(0.5), jnp.float32(1.0))]
    [0.8956, 1.3382]
    """
    safe = jnp.where(sigma > 0, sigma, 1.0)
    a = mu / (safe * math.sqrt(2))
    mean = mu * jax.scipy.special.erf(a) + safe * math.sqrt(2 / math.pi) * jnp.exp(-a * a)
    mean = jnp.where(sigma > 0, mean, jnp.abs(mu))
    variance = jnp.maximum(sigma**2 + mu**2 - mean**2, 0.0)
    tiny = jnp.finfo(jnp.float32).tiny
    return mean, jnp.where(variance > 0, mean / jnp.sqrt(jnp.maximum(variance, tiny)), jnp.inf)


_WORTH: dict[str, Callable[[Array, Array], Array]] = {
    "snr": lambda mu, sigma: folded_normal(mu, sigma)[1],
    "mean": lambda mu, sigma: folded_normal(mu, sigma)[0],
    "size": lambda mu, _: jnp.abs(mu),
    "ratio": lambda mu, sigma: jnp.abs(mu) / jnp.where(sigma > 0, sigma, 1.0),
}


def ssvi(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    score: Worth = "snr",
    grown: Literal["mean", "small"] = "mean",
    drop_fraction: ScalarOrSchedule = 0.3,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse subspace variational inference: pairs of leaves `mu` and `rho` (the posterior
    $N(\mu, softplus(\rho)^2)$, as `jaxsparse.nn.BayesianLinear` has them) share one mask. At an update the
    weights of lowest score under the posterior go, and as many come where the gradient of $\mu$ is largest,
    those just dropped included. A pruned weight has $\mu = \rho = 0$ exactly, and no variance.

    Args:
      inner: the optimizer of both.
      sparsity: the fraction of zeros in [0, 1).
      total_steps: the length of the run, in steps.
      score: of a weight w under its posterior: "snr", $E|w| / \sqrt{Var|w|}$; "mean", $E|w|$; "size", $|\mu|$;
        "ratio", $|\mu|/\sigma$.
      grown: the $\rho$ of a grown weight: "mean" of those that are kept in its layer, or "small"
        ($\sigma = 10^{-6}$); its $\mu$ is 0.
      drop_fraction: the start of a cosine, or a schedule.
      update_every: steps between two updates.
      begin_step: the first update; after `update_every` steps by default.
      end_step: no update after it; 75 % of the run by default.
      allocation: the budgets of layers: "uniform", "er", "erk", or a mapping by path.
      targets: which leaves are sparse; None: those named `mu` and `rho`.
      seed: of the first masks and of ties, an integer.
      pack_masks: store masks as one bit per weight.

    It is not in `METHODS`, whose contracts are for any network: this one needs layers with a posterior.

    (Li, Miao, Qiu & Zhang, Training Bayesian neural networks with sparse subspace variational inference, 2024.)

    >>> import jaxsparse
    >>> tx = jaxsparse.ssvi(optax.sgd(0.01, momentum=0.9), 0.9, total_steps=10_000)

    Raises:
      ValueError: a sparsity, fraction or step out of range; at `init` a `mu` without its `rho`.
    """
    if score not in _WORTH or grown not in ("mean", "small"):
        raise ValueError(
            f"score={score!r}, grown={grown!r}: use one of {sorted(_WORTH)}, and 'mean' or 'small'"
        )
    updates = REWIRING.updates(total_steps, begin_step, end_step, update_every)
    named = lambda path, leaf: path.rpartition("/")[2] in ("mu", "rho") and jnp.ndim(leaf) > 1
    chosen = named if targets is None else targets
    sparse = setup(sparsity, None, allocation, chosen, seed, pack_masks, by_layer=True)
    fraction = schedules.drop_fraction(drop_fraction, updates.end)
    draw = keep_best(scores.random, sparse)

    def both(step: Step, masks: list[Array]) -> list[Array]:
        """The masks of all leaves from those of the means."""
        of = dict(zip([path for path, _, _ in pairs(step)], masks))
        return [of[v.leaf.path.rpartition("/")[0]] for v in step.views]

    def init(step: Step) -> list[Array]:
        means = Step(step.count, [v for _, v, _ in pairs(step)], inside=None)
        return both(step, draw(means))

    def rule(step: Step) -> list[Array]:
        found = pairs(step)
        worth = []
        for _, mean, raw in found:
            x = _WORTH[score](mean.w, jnp.where(mean.m, jax.nn.softplus(raw.w), 0.0))
            worth.append(jnp.where(jnp.isnan(x), 0.0, x))
        masks = swap(
            [v.leaf for _, v, _ in found],
            [v.m for _, v, _ in found],
            worth,
            [jnp.abs(v.g) for _, v, _ in found],
            fraction(step.count),
            salts=[v.leaf.salt(seed, step.count) for _, v, _ in found],
        )
        return both(step, masks)

    def first_values(step: Step) -> list[Array]:
        of = {}
        for path, mean, raw in pairs(step):
            kept = jnp.maximum(jnp.sum(mean.m), 1)
            middle = jnp.sum(jnp.where(mean.m, raw.w, 0.0)) / kept
            rho = middle if grown == "mean" else math.log(math.expm1(1e-6))
            of[path] = jnp.full(raw.w.shape, rho, raw.w.dtype)
        return [
            of[v.leaf.path.rpartition("/")[0]]
            if v.leaf.path.endswith("rho")
            else jnp.zeros(v.w.shape, v.w.dtype)
            for v in step.views
        ]

    return hold_masks(
        inner,
        sparse,
        init=init,
        rule=rule,
        at=updates,
        on_update="replace",
        fresh="grown",
        grow_init=first_values,
    )


def pairs(step: Step) -> list:
    """The path of each layer with the views of its mean and of its raw scale.

    Raises:
      ValueError: a leaf without its other half.
    """
    of: dict[str, dict] = {}
    for v in step.views:
        path, _, name = v.leaf.path.rpartition("/")
        of.setdefault(path, {})[name] = v
    for path, halves in of.items():
        if set(halves) != {"mu", "rho"} or halves["mu"].w.shape != halves["rho"].w.shape:
            raise ValueError(
                f"params: {path!r} has {sorted(halves)}; a posterior has leaves 'mu' and 'rho' of one shape"
            )
    return [(path, halves["mu"], halves["rho"]) for path, halves in of.items()]
