r"""Decay of the weights that the loss does not care about: regularisation of irrelevant weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.engines.penalties import check_strength
from jaxsparse.leaves import find
from jaxsparse.typing import ScalarOrSchedule, Targets

Relevance = Callable[[Array], Array]


class DecayState(NamedTuple):
    """The number of updates, and the running mean of |g| at the decayed leaves (None: it is not kept)."""

    count: Array
    size: Any


def selective_decay(
    decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    *,
    irrelevance: Relevance = lambda g: jnp.exp(-g),
    smoothing: float = 0.9,
    relative: bool = True,
    targets: Targets = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds $-\eta \lambda w\, h(|g|)$ to the updates of the optimizer before it, with h falling from h(0) = 1: a weight
    whose loss gradient is small decays, one that matters trains as it would without a decay. Iterated with a cut of
    what has become tiny (`tickets.prune_within`).

    To stand after an optimizer, which it gives the raw gradients as the extra argument `grad`:

        tx = optax.chain(optax.adam(1e-3), selective_decay(1e-4, 1e-3))
        updates, state = tx.update(grads, state, params, grad=grads)

    Args:
      decay: $\lambda$, or a schedule.
      learning_rate: $\eta$, that of the optimizer, or its schedule.
      irrelevance: h; `lambda g: jnp.maximum(0, 1 - g)` and `lambda g: g < 0.1` are others.
      smoothing: of the running mean of |g|, for the noise of batches keeps |g| from 0; 0: that of the batch.
      relative: divide |g| by its root mean square over the leaf, so that h does not depend on the scale of the loss.
      targets: which leaves, by path; None: all kernels.

    (Bonetta, Ribero & Cancelliere, Regularization-based pruning of irrelevant weights in deep neural architectures,
    2023; we know the abstract: the form of h, the running mean and the relative size are ours.)

    >>> tx = optax.chain(optax.sgd(1.0), selective_decay(0.5, 1.0, smoothing=0.0, relative=False))
    >>> params, g = {"kernel": jnp.array([[4.0]])}, {"kernel": jnp.array([[0.0]])}
    >>> tx.update(g, tx.init(params), params, grad=g)[0]["kernel"].tolist()
    [[-2.0]]

    Raises:
      ValueError: a negative decay, a smoothing not in [0, 1), no parameters or gradients at an update.
    """
    if not callable(decay):
        check_strength("decay", decay)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing}: must be in [0, 1)")
    at: Callable = lambda value, count: value(count) if callable(value) else value

    def init(params):
        plan = find(params, targets)
        zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in plan] if smoothing else None
        return DecayState(jnp.zeros((), jnp.int32), None if zeros is None else plan.scatter(zeros))

    def update(updates, state, params=None, *, grad=None, **extra):
        if params is None or grad is None:
            raise ValueError(
                "update needs parameters and gradients: tx.update(grads, state, params, grad=grads)"
            )
        plan = find(params, targets)
        ws, us = plan.take(params), plan.gradients(updates, params)
        sizes = [jnp.abs(g).astype(jnp.float32) for g in plan.gradients(grad, params)]
        kept = None
        if smoothing:
            rows = zip(plan.take(state.size), sizes)
            kept = [smoothing * old + (1 - smoothing) * new for old, new in rows]
            fix = 1 - smoothing ** (jnp.asarray(state.count, jnp.float32) + 1)
            sizes = [s / fix for s in kept]
        if relative:
            tiny = jnp.finfo(jnp.float32).tiny
            sizes = [s / jnp.sqrt(jnp.maximum(jnp.mean(s * s), tiny)) for s in sizes]
        pace = at(learning_rate, state.count) * at(decay, state.count)
        out = [
            u - (pace * irrelevance(s).astype(jnp.float32) * w).astype(u.dtype)
            for u, s, w in zip(us, sizes, ws)
        ]
        size = None if kept is None else plan.scatter(kept)
        count = jnp.asarray(optax.safe_increment(state.count))
        return plan.put(updates, out), DecayState(count, size)

    return optax.GradientTransformationExtraArgs(init, update)
