r"""Stochastic gates as modules, and gradients through gates: exact by enumeration, unbiased, and biased.

Of n independent Bernoulli gates m with logits a the gradient of $E_m[L(m)]$ is a sum over $2^n$ masks
(`enumerated_gradient`): an oracle for small n. `score_function_gradient` is unbiased, with less variance by a
baseline; `straight_through_gradient` is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsparse.methods.l0 import hard_concrete, present

_BOUNDS = math.log(1e-2), math.log(1e2)


class HardConcreteGate(nnx.Module):
    r"""Multiplies the channels of its input with gates in [0, 1] that are exactly 0 with some probability:

    $$z = clip(1.2\, \sigma((\log u - \log(1 - u) + a)/\beta) - 0.1), \quad \beta = 2/3,$$

    u uniform, one draw per call and channel in training; in evaluation $clip(1.2\,\sigma(a) - 0.1)$. Add
    `gate.penalty(...) / number of examples` to the loss, and call `gate.clamp()` after each step of the optimizer.
    `jaxsparse.l0` is the same as an optimizer, for gates on groups of weights.

    Args:
      features: channels, the last axis of the input.
      drop_rate: a starts near $\log((1 - p)/p)$ with this p, with a deviation of 0.01.
      rngs: of a, and the stream `noise`.

    Source: Louizos, Welling & Kingma, "Learning sparse neural networks through L0 regularization", 2018.

    >>> gate = HardConcreteGate(4, rngs=nnx.Rngs(0))
    >>> gate(jnp.ones((2, 4))).shape, gate.mask.tolist()
    ((2, 4), [True, True, True, True])

    Raises:
      ValueError: a `drop_rate` not in (0, 1).
    """

    def __init__(self, features: int, *, drop_rate: float = 0.5, rngs: nnx.Rngs):
        if not 0 < drop_rate < 1:
            raise ValueError(f"drop_rate={drop_rate}: must be in (0, 1)")
        start = math.log1p(-drop_rate) - math.log(drop_rate)
        noise = jax.random.normal(rngs.params(), (features,))
        self.logits = nnx.Param(start + 0.01 * noise)
        self.rngs, self.deterministic = rngs, False

    def __call__(self, x: Array) -> Array:
        """`[..., features]`."""
        if self.deterministic:
            return x * hard_concrete(self.logits[...]).astype(x.dtype)
        u = jax.random.uniform(
            self.rngs.noise(), self.logits[...].shape, minval=1e-6, maxval=1 - 1e-6
        )
        return x * hard_concrete(self.logits[...], u).astype(x.dtype)

    @property
    def mask(self) -> Array:
        """The channels that are not 0 in evaluation, bool `[features]`."""
        return hard_concrete(self.logits[...]) > 0

    def penalty(
        self, strength: float = 1.0, *, decay: float = 0.0, norms: Array | None = None
    ) -> Array:
        r"""$\sum_j P(z_j \ne 0)(\lambda + \frac12 d\, \|w_j\|^2)$.

        Args:
          strength: $\lambda$, times the weights of a channel where these are to be counted.
          decay: d.
          norms: $\|w_j\|^2$ of the weights behind each gate, `[features]`, where there is a decay.
        """
        cost = strength + (0.5 * decay * norms if norms is not None else 0.0)
        return jnp.sum(present(self.logits[...]) * cost)

    def clamp(self) -> None:
        """Keeps a within [log 0.01, log 100], beyond which a gate hardly has a gradient."""
        self.logits[...] = jnp.clip(self.logits[...], *_BOUNDS)


Loss = Callable[[Array], Array]


def enumerated_gradient(loss: Loss, logits: Array) -> Array:
    r"""$\partial E_m[L(m)] / \partial a$ for independent gates with $P(m_i = 1) = \sigma(a_i)$: a sum over all masks.

    Args:
      loss: from gates, float32 `[n]` of zeros and ones, to a number.
      logits: a, `[n]`, at most 16 of them.

    >>> enumerated_gradient(lambda m: m[0] * m[1], jnp.zeros(2)).tolist()  # p0 p1 at 1/2: slopes 1/4 * 1/2
    [0.125, 0.125]

    Raises:
      ValueError: more than 16 gates.
    """
    n = logits.shape[0]
    if n > 16:
        raise ValueError(f"logits: {n} gates have {2**n} masks; give at most 16")
    masks = ((jnp.arange(2**n)[:, None] >> jnp.arange(n)) & 1).astype(jnp.float32)
    values = jax.lax.map(loss, masks)

    def expected(a):
        p = jax.nn.sigmoid(a)
        return jnp.sum(values * jnp.prod(jnp.where(masks == 1, p, 1 - p), axis=1))

    return jax.grad(expected)(logits)


def _draw(logits: Array, key: Array, samples: int) -> Array:
    p = jax.nn.sigmoid(logits)
    return jax.random.bernoulli(key, p, (samples, *logits.shape)).astype(jnp.float32)


def score_function_gradient(
    loss: Loss,
    logits: Array,
    key: Array,
    samples: int,
    *,
    baseline: Literal["none", "leave_one_out"] = "leave_one_out",
) -> Array:
    r"""The unbiased estimate $\frac1K \sum_k (L(m_k) - b_k)(m_k - p)$, with $b_k$ 0, or the mean of the other losses.

    Args:
      loss: as for `enumerated_gradient`; it need not be differentiable.
      logits: `[n]`.
      key: of the draws.
      samples: K; 2 or more for a baseline.
      baseline: see above.

    >>> g = score_function_gradient(lambda m: m.sum(), jnp.zeros(3), jax.random.key(0), 2000)
    >>> bool(jnp.all(jnp.abs(g - 0.25) < 0.03))
    True

    Raises:
      ValueError: one sample with a baseline.
    """
    if baseline == "leave_one_out" and samples < 2:
        raise ValueError(f"samples={samples}: a baseline of the others needs at least 2")
    masks = _draw(logits, key, samples)
    values = jax.lax.map(loss, masks)
    if baseline == "leave_one_out":
        values = values - (jnp.sum(values) - values) / (samples - 1)
    return jnp.mean(values[:, None] * (masks - jax.nn.sigmoid(logits)), axis=0)


def straight_through_gradient(loss: Loss, logits: Array, key: Array, samples: int) -> Array:
    r"""The biased estimate $\frac1K \sum_k L'(m_k)\, \sigma'(a)$: the gradient at the draw, as if it were its
    probability. It is exact where the loss is linear in each gate.

    >>> g = straight_through_gradient(lambda m: m.sum(), jnp.zeros(3), jax.random.key(0), 4)
    >>> g.tolist()
    [0.25, 0.25, 0.25]
    """
    masks = _draw(logits, key, samples)
    p = jax.nn.sigmoid(logits)
    return jnp.mean(jax.lax.map(jax.grad(loss), masks), axis=0) * p * (1 - p)
