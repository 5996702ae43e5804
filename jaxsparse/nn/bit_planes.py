r"""CSQ: weights as signed bits, whose values and whose number per layer are found by sigmoids that harden."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


def plane_values(bits: int) -> Array:
    """What the bits of a weight are worth, the first the most: $2^{n-1-i}/(2^n - 1)$; all together 1.

    >>> (7 * plane_values(3)).tolist()
    [4.0, 2.0, 1.0]
    """
    return 2.0 ** jnp.arange(bits - 1, -1, -1) / (2**bits - 1)


def split_bits(w: Array, bits: int) -> tuple[Array, Array, Array]:
    """The scale max |w|, and the bits of the positive and of the negative part of w rounded to so many bits.

    >>> scale, positive, negative = split_bits(jnp.array([7.0, -5.0]), 3)
    >>> float(scale), positive.tolist(), negative.tolist()
    (7.0, [[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 0, 1]])
    """
    scale = jnp.max(jnp.abs(w))
    levels = 2**bits - 1
    whole = jnp.round(jnp.abs(w) / jnp.where(scale > 0, scale, 1.0) * levels).astype(jnp.int32)
    digits = (whole[..., None] >> jnp.arange(bits - 1, -1, -1)) & 1
    sign = jnp.sign(w)[..., None]
    return scale, jnp.where(sign > 0, digits, 0), jnp.where(sign < 0, digits, 0)


class BitPlaneLinear(nnx.Module):
    r"""$y = xW + b$ with

    $$W = s \sum_i (f(p_i) - f(n_i))\, e_i\, f(M_i), \qquad f(u) = \sigma(\beta u),$$

    $p_i$, $n_i$ the logits of the bits of the positive and negative part, $e_i$ what bit i is worth, and M one switch
    for each bit plane of the layer, 0 at first. The temperature $\beta$ rises from 1 (`csq_temperature`); where
    `hard_planes` is set planes are 1[M > 0], with `hard_bits` bits are, too. Add `csq_loss` of all layers to the loss.

    Args:
      linear: the trained layer that it starts from; the logits of a bit are its value less 1/2.
      bits: n.

    This differs from the authors' code in that bits start at ±1/2, so that a soft bit of 1 is as far from the
    middle as one of 0; the values $e_i$ are constants and not trained.

    Source: Xiao et al., "CSQ: growing mixed-precision quantization scheme with bi-level continuous sparsification",
    2023.

    >>> layer = BitPlaneLinear(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), bits=4)
    >>> layer(jnp.ones((5, 3))).shape, layer.bits_kept
    ((5, 2), 4)

    Raises:
      ValueError: not a linear layer, or fewer bits than 1.
    """

    def __init__(self, linear: nnx.Linear, *, bits: int = 8):
        if not isinstance(linear, nnx.Linear):
            raise ValueError(f"linear: {type(linear).__name__} is not an nnx.Linear")
        if bits < 1:
            raise ValueError(f"bits={bits}: must be at least 1")
        scale, positive, negative = split_bits(linear.kernel[...], bits)
        self.positive = nnx.Param(positive - 0.5)
        self.negative = nnx.Param(negative - 0.5)
        self.planes = nnx.Param(jnp.zeros(bits))
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])
        self.scale = nnx.Variable(scale)
        self.temperature = nnx.Variable(jnp.float32(1.0))
        self.hard_planes, self.hard_bits = False, False

    @property
    def gates(self) -> Array:
        """The switches, f(M) or 1[M > 0], `[bits]`."""
        m = self.planes[...]
        if self.hard_planes:
            return (m > 0).astype(m.dtype)
        return jax.nn.sigmoid(self.temperature[...] * m)

    @property
    def bits_kept(self) -> int:
        """How many planes are on: those whose gate is at least 1/2 (hard: above)."""
        return int(jnp.sum(self.gates >= 0.5))

    @property
    def weight(self) -> Array:
        """W, `[in, out]`."""
        if self.hard_bits:
            soft = lambda u: (u > 0).astype(u.dtype)
        else:
            soft = lambda u: jax.nn.sigmoid(self.temperature[...] * u)
        signed = soft(self.positive[...]) - soft(self.negative[...])
        return self.scale[...] * (signed @ (plane_values(signed.shape[-1]) * self.gates))

    def __call__(self, x: Array) -> Array:
        y = x @ self.weight.astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def next_round(self, start: float = 0.0) -> None:
        r"""Begins another round of hardening: $M \leftarrow \min(\beta M, M_0)$, so that winners return to the gate
        of the start and losers stay low; the temperature goes back to 1."""
        self.planes[...] = jnp.minimum(self.temperature[...] * self.planes[...], start)
        self.temperature[...] = jnp.float32(1.0)


def csq_temperature(step: Array | int, steps: int, final: float = 200.0) -> Array:
    r"""$\beta = \beta_{end}^{t/T}$: 1 at the start, `final` at step T.

    >>> [round(float(csq_temperature(t, 10, 100.0)), 4) for t in (0, 5, 10)]
    [1.0, 10.0, 100.0]
    """
    return jnp.float32(final) ** (jnp.asarray(step, jnp.float32) / steps)


def csq_loss(
    layers: Sequence[BitPlaneLinear], target_bits: float, *, weight: float = 0.01
) -> Array:
    r"""$\lambda (r - b/n) \sum f(M_i)$ over the planes of all layers, r the fraction of gates of at least 1/2, which is
    not differentiated: above the target gates shrink, below it they grow. Every plane counts the same, whatever the
    size of its layer.

    Args:
      layers: the layers, all with n bits.
      target_bits: b, on average.
      weight: $\lambda$.

    Raises:
      ValueError: no layers.

    >>> layer = BitPlaneLinear(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), bits=4)
    >>> float(csq_loss([layer], 3.0, weight=1.0))  # (1 - 3/4) * 4 * 1/2
    0.5
    """
    if not layers:
        raise ValueError("layers: there are none")
    gates = jnp.concatenate([layer.gates for layer in layers])
    bits = layers[0].planes[...].size
    used = jax.lax.stop_gradient(jnp.mean(gates >= 0.5))
    return weight * (used - target_bits / bits) * jnp.sum(gates)
