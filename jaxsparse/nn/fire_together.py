r"""FTWT: filters that a layer computes for this input only, foretold from its input by a small head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array


class GateLoss(nnx.Intermediate):
    """The loss of the head for the last batch, a scalar."""


def strong_filters(out: Array, keep: float, *, rule: Literal["mass", "uniform"] = "mass") -> Array:
    r"""Which filters fire for each example, from the outputs of the layer themselves.

    With $a_f$ the largest |out| of filter f over positions: "mass" keeps the largest a while their share of the sum is
    at most r, at least one filter; r = 1 all with a share above $10^{-5}$. "uniform" keeps the r part of largest a,
    but none that is 0.

    Args:
      out: `[batch, *space, filters]`, after the activation.
      keep: r, in (0, 1].
      rule: see above.

    Returns:
      bool `[batch, filters]`.

    >>> strong_filters(jnp.array([[4.0, 3.0, 2.0, 1.0]]), 0.7).tolist()
    [[True, True, False, False]]

    Raises:
      ValueError: r out of range, an unknown rule.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: must be in (0, 1]")
    if rule not in ("mass", "uniform"):
        raise ValueError(f"rule={rule!r}: use 'mass' or 'uniform'")
    a = jnp.max(jnp.abs(out.astype(jnp.float32)), axis=tuple(range(1, out.ndim - 1)))
    share = a / jnp.maximum(jnp.sum(a, axis=-1, keepdims=True), 1e-30)
    if rule == "mass" and keep == 1:
        return share > 1e-5
    mine, other = share[:, :, None], share[:, None, :]
    index = jnp.arange(a.shape[-1])
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    if rule == "uniform":
        number = math.ceil(keep * a.shape[-1] - 1e-9)
        return (jnp.sum(before, axis=-1) < number) & (share > 1e-5)
    with_mine = jnp.sum(jnp.where(before, other, 0.0), axis=-1) + share
    first = jnp.sum(before, axis=-1) == 0
    return ((with_mine <= keep + 1e-6) | first) & (share > 0)


class FiringGate(nnx.Module):
    r"""Keeps the filters of a layer that its input makes strong: $out \odot g(x)$ with g in {0, 1} per example and
    filter, rounded from the sigmoid of a linear head on the pooled input, straight through.

    The head learns from the layer's own outputs (`strong_filters`), by a loss of its own that stands in `gate.loss`
    after each call: binary cross entropy, the mean over the batch and the sum over filters. Add `firing_loss` of all
    gates to the task's loss; the authors leave it out after half of the run. With `decoupled` the head sees the input
    without a gradient, so that the two losses train different weights.

    Masks are applied to what was computed. It gets faster when a kernel computes the kept filters only, which this
    library has not; `gate.kept` says how much that would save.

    Args:
      in_features: channels of the layer's input.
      features: filters, channels of its output.
      keep: r of `strong_filters`.
      rule: its rule.
      decoupled: see above.
      rngs: of the head, whose bias starts at `bias`.
      bias: 1: gates begin open.

    Source: Elkerdawy et al., "Fire together wire together: a dynamic pruning approach with self-supervised mask
    prediction", 2022. This differs from the authors' code in that at least one filter is kept.

    >>> gate = FiringGate(3, 8, keep=0.9, rngs=nnx.Rngs(0))
    >>> x, out = jnp.ones((2, 5, 5, 3)), jnp.ones((2, 5, 5, 8))
    >>> gate(x, out).shape, gate.loss.get_value().shape
    ((2, 5, 5, 8), ())
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        keep: float = 0.9,
        rule: Literal["mass", "uniform"] = "mass",
        decoupled: bool = True,
        bias: float = 1.0,
        rngs: nnx.Rngs,
    ):
        start = nnx.initializers.constant(bias)
        self.head = nnx.Linear(in_features, features, bias_init=start, rngs=rngs)
        self.keep, self.decoupled = keep, decoupled
        self.rule: Literal["mass", "uniform"] = rule
        self.loss = GateLoss(jnp.zeros(()))
        self.kept = GateLoss(jnp.ones(()))

    def logits(self, x: Array) -> Array:
        """What the head says of each filter, `[batch, features]`."""
        seen = jax.lax.stop_gradient(x) if self.decoupled else x
        return self.head(seen.mean(axis=tuple(range(1, x.ndim - 1))))

    def __call__(self, x: Array, out: Array) -> Array:
        """The layer's input `[batch, *space, in_features]` and its output `[batch, *space, features]`."""
        logits = self.logits(x)
        soft = jax.nn.sigmoid(logits)
        hard = (soft > 0.5).astype(soft.dtype)
        gates = soft + jax.lax.stop_gradient(hard - soft)
        if self.decoupled:  # the task's loss leaves the head alone
            gates = hard
        truth = jax.lax.stop_gradient(strong_filters(out, self.keep, rule=self.rule))
        each = optax.sigmoid_binary_cross_entropy(logits, truth.astype(logits.dtype))
        self.loss.set_value(jnp.mean(jnp.sum(each, axis=-1)))
        self.kept.set_value(jnp.mean(hard))
        return out * jnp.expand_dims(gates, tuple(range(1, out.ndim - 1))).astype(out.dtype)


def firing_loss(gates: Sequence[FiringGate]) -> Array:
    """The mean over layers of the losses of their heads, after a forward pass.

    Raises:
      ValueError: no gates.
    """
    if not gates:
        raise ValueError("gates: there are none")
    return jnp.mean(jnp.stack([gate.loss.get_value() for gate in gates]))
