r"""Delta activations: outputs quantised in learned steps, so that from frame to frame few of them change."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class DeltaLoss(nnx.Intermediate):
    """The penalty on the changes of the last batch, a scalar."""


@jax.custom_vjp
def quantize(x: Array, step: Array) -> Array:
    r"""$q = \theta\, round(relu(x)/\theta)$. Its gradient in x is that of the ReLU. In $\theta$ it is
    $-round(x/\theta)$, the authors' choice: with an l1 loss on changes it makes steps larger. `quantize_exact` has the
    gradient of the straight-through estimator.

    Args:
      x: `[..., channels]`.
      step: $\theta > 0$, broadcast against x.

    >>> quantize(jnp.array([0.1, 0.6, 0.7, 1.3]), jnp.float32(0.5)).tolist()
    [0.0, 0.5, 0.5, 1.5]
    """
    return step * jnp.round(jax.nn.relu(x) / step)


def _forward(x, step):
    steps = jnp.round(jax.nn.relu(x) / step)
    return step * steps, (x, step, steps)


def _backward(kept, g):
    x, step, steps = kept
    return jnp.where(x > 0, g, 0.0), _like(-steps * g, step)


def _like(total: Array, step: Array) -> Array:
    """A gradient summed to the shape of the step."""
    extra = total.ndim - step.ndim
    total = jnp.sum(total, axis=tuple(range(extra)))
    axes = tuple(i for i, n in enumerate(step.shape) if n == 1 and total.shape[i] != 1)
    return jnp.sum(total, axis=axes, keepdims=True).astype(step.dtype)


quantize.defvjp(_forward, _backward)


def quantize_exact(x: Array, step: Array) -> Array:
    r"""As `quantize`, with the straight-through gradient in $\theta$, $round(x/\theta) - x/\theta$.

    >>> g = jax.grad(lambda s: quantize_exact(jnp.float32(0.6), s))(jnp.float32(0.5))
    >>> round(float(g), 4)  # 1 - 1.2
    -0.2
    """
    ratio = jax.nn.relu(x) / step
    return step * (ratio + jax.lax.stop_gradient(jnp.round(ratio) - ratio))


class DeltaActivation(nnx.Module):
    r"""ReLU in steps of $\theta = |threshold|$, one per channel and trained. After a call on frames
    `[batch, time, ..., channels]` `layer.loss` holds $rate \cdot n_{out} \cdot \overline{|q_t - q_{t-1}|}$ without the first
    frame: add it to the loss. A linear layer without a bias on the deltas, summed up over time, is the layer on q: an
    accelerator that skips zeros computes the changes only.

    Args:
      features: channels.
      rate: of the penalty.
      outputs: $n_{out}$, how many products a change of one value costs (the fan-out of the next layer).
      output: "value": q, for training; "delta": changes, the first frame from 0.
      bias: added before the quantisation; layers between a delta and its sum must have none of their own.
      exact: the straight-through gradient of the step, in place of the authors'.
      first: $\theta$ at the start.

    Source: Yousefzadeh & Sifalakis, "Training for temporal sparsity in deep neural networks, application in video
    processing", 2021.

    >>> layer = DeltaActivation(1, first=0.5, output="delta")
    >>> layer(jnp.array([0.1, 0.6, 0.7, 1.3]).reshape(1, 4, 1)).ravel().tolist()
    [0.0, 0.5, 0.0, 1.0]

    Raises:
      ValueError: a first step that is not positive, an unknown output.
    """

    def __init__(
        self,
        features: int,
        *,
        rate: float = 1.0,
        outputs: int = 1,
        output: Literal["value", "delta"] = "value",
        bias: bool = False,
        exact: bool = False,
        first: float = 0.1,
    ):
        if not first > 0:
            raise ValueError(f"first={first}: a step must be positive")
        if output not in ("value", "delta"):
            raise ValueError(f"output={output!r}: use 'value' or 'delta'")
        self.threshold = nnx.Param(jnp.full(features, first))
        self.bias = nnx.Param(jnp.zeros(features)) if bias else None
        self.rate, self.outputs, self.output, self.exact = rate, outputs, output, exact
        self.loss = DeltaLoss(jnp.zeros(()))

    def __call__(self, x: Array) -> Array:
        if self.bias is not None:
            x = x + self.bias[...]
        rule = quantize_exact if self.exact else quantize
        q = rule(x, jnp.abs(self.threshold[...]).astype(x.dtype))
        changes = jnp.diff(q, axis=1)
        self.loss.set_value(self.rate * self.outputs * jnp.mean(jnp.abs(changes)))
        if self.output == "value":
            return q
        return jnp.concatenate([q[:, :1], changes], axis=1)


def running_sum(deltas: Array) -> Array:
    """The values behind deltas `[batch, time, ...]`, in float32 for the sum drifts.

    >>> running_sum(jnp.array([[0.0, 0.5, 0.0, 1.0]])).tolist()
    [[0.0, 0.5, 0.5, 1.5]]
    """
    return jnp.cumsum(deltas.astype(jnp.float32), axis=1).astype(deltas.dtype)
