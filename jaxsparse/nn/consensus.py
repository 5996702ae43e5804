r"""Gates on channels that depend on the input in training, and agree on one sub-network in the end."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class GateMean(nnx.Intermediate):
    """The mean decisions of the gates of a batch, `[features]`."""


class ConsensusGate(nnx.Module):
    r"""Multiplies channels with gates in {0, 1}: a linear head on the mean of the input over space, rounded, with
    the gradient of the sigmoid. The mean decision of the batch, $\bar g_c$, is left in `self.mean`; add
    `consensus_loss` of all gates to the loss. When it serves (`use_consensus=True`) every channel has the gate
    that the running mean of the decisions rounds to, whatever the input: a static mask, `self.mask`.

    Args:
      features: channels of the input.
      momentum: of the running mean.
      use_consensus: whether gates are those of the consensus.
      rngs: of the head; its bias starts at 1, gates open.

    Source: Zhi et al., "Learning a consensus sub-network with polarization regularization and one pass training",
    2023; form of the head and losses as we read them.

    >>> gate = ConsensusGate(3, rngs=nnx.Rngs(0))
    >>> gate(jnp.ones((2, 5, 3))).shape, gate.mean.get_value().shape
    ((2, 5, 3), (3,))
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.9,
        use_consensus: bool = False,
        rngs: nnx.Rngs,
    ):
        self.head = nnx.Linear(
            features, features, bias_init=nnx.initializers.constant(1.0), rngs=rngs
        )
        self.momentum, self.use_consensus = momentum, use_consensus
        self.running = nnx.BatchStat(jnp.ones(features))
        self.mean = GateMean(jnp.ones(features))

    @property
    def mask(self) -> Array:
        """Which channels the consensus keeps, bool `[features]`."""
        return self.running.get_value() > 0.5

    def __call__(self, x: Array) -> Array:
        """Channels last; `[batch, *space, features]`."""
        if self.use_consensus:
            return jnp.where(self.mask, x, jnp.zeros((), x.dtype))
        pooled = x.mean(axis=tuple(range(1, x.ndim - 1)))
        soft = jax.nn.sigmoid(self.head(pooled))
        hard = (soft > 0.5).astype(soft.dtype)
        gates = soft + jax.lax.stop_gradient(hard - soft)
        mean = gates.mean(axis=0)
        self.mean.set_value(mean)
        old = self.running.get_value()
        decided = jax.lax.stop_gradient(mean)
        self.running.set_value(self.momentum * old + (1 - self.momentum) * decided)
        return x * jnp.expand_dims(gates, tuple(range(1, x.ndim - 1))).astype(x.dtype)


def consensus_loss(
    means: Sequence[Array], kept: float, *, sparsity: float = 1.0, polarization: float = 1.0
) -> Array:
    r"""$a\,(\bar g - d)^2 + b\, \overline{\bar g_c (1 - \bar g_c)}$ over the gates of all layers: the first asks for the
    density d, the second is 0 where all inputs agree.

    Args:
      means: the mean decisions of every layer, `[features]` each.
      kept: d, the fraction of channels to keep.
      sparsity: a.
      polarization: b.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: no gates, `kept` not in (0, 1].

    >>> float(consensus_loss([jnp.array([1.0, 0.0])], 0.5)), float(consensus_loss([jnp.array([0.5, 0.5])], 0.5))
    (0.0, 0.25)
    """
    if not means:
        raise ValueError(
            "means: there are none; give the means of the gates, [gate.mean.get_value()]"
        )
    if not 0 < kept <= 1:
        raise ValueError(f"kept={kept}: must be in (0, 1]")
    number = sum(m.size for m in means)
    total = lambda f: sum((jnp.sum(f(m)) for m in means), jnp.zeros(())) / number
    return sparsity * (total(lambda m: m) - kept) ** 2 + polarization * total(lambda m: m * (1 - m))
