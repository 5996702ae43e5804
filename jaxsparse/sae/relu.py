r"""ReLU autoencoders with an L1 penalty, and the two that mend its bias: JumpReLU and Gated.

Sources: Bricken et al. 2023 and the update of April 2024; Rajamanoharan et al. 2024 (JumpReLU) and 2024
(Gated); Anthropic, "Circuits updates, January 2025", for JumpReLU's gradient of inputs. Differs from public code in: the
step function of JumpReLU acts on z, not on f, and its threshold is trained itself, not its logarithm, which does not move
under Adam; the auxiliary loss of Gated stops the gradient of the decoder.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsparse.sae.scaffold import SAE, check_weight


class ReLU(SAE):
    r"""$f = \max(z, 0)$ with the penalty $\lambda\,\mathrm{mean}_b\sum_i f_{bi}$.

    Args:
      d_model, d_sae, d_out, skip, dead_after, rngs: as of `SAE`.
      l1: the weight of the penalty.
      variant: "classic" wants atoms of norm 1 (`unit_norm_decoder`). "april" weighs each $f_i$ by
        $\|d_i\|$ and leaves norms free; it is invariant to their scale.

    >>> model = ReLU(4, 16, l1=0.1, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 4))).shape
    (2, 4)
    """

    atom_norm = 0.1

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        l1: float = 0.1,
        variant: Literal["classic", "april"] = "classic",
        d_out: int | None = None,
        skip: bool = False,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        if variant not in ("classic", "april"):
            raise ValueError(f'variant={variant!r}: give "classic" or "april"')
        super().__init__(d_model, d_sae, d_out=d_out, skip=skip, dead_after=dead_after, rngs=rngs)
        check_weight("l1", l1)
        self.l1, self.variant = l1, variant

    def activate(self, z: Array) -> Array:
        return jax.nn.relu(z)

    def penalty(self, z: Array, f: Array) -> Array:
        if self.variant == "april":
            f = f * self.atom_sizes()
        return self.l1 * jnp.mean(jnp.sum(f, axis=-1))

    def atom_sizes(self) -> Array:
        """The norm of each atom `[F]`."""
        return jnp.linalg.norm(self.W_dec[...], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump_relu(z: Array, threshold: Array, bandwidth: float, inputs: bool = False) -> Array:
    r"""$z\,[z > \theta]$, with $\partial f/\partial\theta := -\frac{\theta}{\epsilon} K((z-\theta)/\epsilon)$,
    K the rectangle on (-1/2, 1/2); the gradient of z is $[z > \theta]$, and with `inputs` the negative of that of
    $\theta$ besides.

    >>> jump_relu(jnp.array([0.4, 0.6]), jnp.array([0.5, 0.5]), 0.1).tolist()
    [0.0, 0.6...]
    """
    return jnp.where(z > threshold, z, 0.0)


def _near(z, threshold, bandwidth):
    return jnp.where(jnp.abs(z - threshold) < bandwidth / 2, 1.0 / bandwidth, 0.0)


def _to_threshold(g, threshold):
    """The sum of a cotangent over the batch, in the shape of the threshold."""
    return jnp.sum(g, axis=tuple(range(g.ndim - threshold.ndim))).astype(threshold.dtype)


def _jump_backward(bandwidth, inputs, saved, g):
    z, threshold = saved
    estimate = (threshold * _near(z, threshold, bandwidth) * g).astype(z.dtype)
    through = jnp.where(z > threshold, g, 0.0)
    return through + estimate if inputs else through, _to_threshold(-estimate, threshold)


jump_relu.defvjp(lambda z, t, b, i: (jump_relu(z, t, b, i), (z, t)), _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def step(z: Array, threshold: Array, bandwidth: float, inputs: bool = False) -> Array:
    r"""$[z > \theta]$, with $-\frac1\epsilon K((z-\theta)/\epsilon)$ as the gradient of $\theta$, and none of z, or
    with `inputs` the negative of that.

    >>> step(jnp.array([0.4, 0.6]), jnp.array([0.5, 0.5]), 0.1).tolist()
    [0.0, 1.0]
    """
    return (z > threshold).astype(z.dtype)


def _step_backward(bandwidth, inputs, saved, g):
    z, threshold = saved
    estimate = (_near(z, threshold, bandwidth) * g).astype(z.dtype)
    return estimate if inputs else jnp.zeros_like(z), _to_threshold(-estimate, threshold)


step.defvjp(lambda z, t, b, i: (step(z, t, b, i), (z, t)), _step_backward)


class JumpReLU(SAE):
    r"""$f = z\,[z > \theta]$ with a learned threshold per latent, and an L0 penalty trained directly.

    The threshold is a parameter in float32. An optimizer may push it below 0: it counts as 0 then, and
    its gradient is that of a threshold at 0.

    Args:
      l0: the weight of the penalty.
      target_l0: None penalises $\lambda L_0$; a number penalises $\lambda (L_0/\text{target} - 1)^2$.
      threshold: where all thresholds start.
      bandwidth: the width of the rectangle. Scale the inputs to unit mean square, `input_scale`, for these defaults.
      straight_through: what the penalty's gradient reaches. "all": encoder and biases too, through pre-activations
        near their threshold, so that a target is reached in hundreds of steps. "threshold": thresholds alone, as
        published; Adam moves them by a learning rate in a step at most, and a narrow rectangle seldom sees a
        pre-activation, so that this takes hundreds of thousands of steps.
      pre_act: the weight of the loss that revives dead latents,
        $\mathrm{mean}_b \sum_{i\ \text{dead}} \max(\theta_i - z_i, 0)\,\|d_i\|$.
      d_model, d_sae, d_out, skip, dead_after, rngs: as of `SAE`.

    >>> model = JumpReLU(4, 16, l0=0.01, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 4))).shape
    (2, 4)
    """

    thresholds = ("b_enc", "b_dec", "threshold")

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        l0: float = 1e-2,
        target_l0: float | None = None,
        threshold: float = 0.1,
        bandwidth: float = 0.5,
        straight_through: Literal["all", "threshold"] = "all",
        pre_act: float = 0.0,
        d_out: int | None = None,
        skip: bool = False,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, d_sae, d_out=d_out, skip=skip, dead_after=dead_after, rngs=rngs)
        check_weight("l0", l0)
        check_weight("pre_act", pre_act)
        positive = {"threshold": threshold, "bandwidth": bandwidth, "target_l0": target_l0}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: give a positive number")
        if straight_through not in ("all", "threshold"):
            raise ValueError(f'straight_through={straight_through!r}: give "all" or "threshold"')
        self.inputs = straight_through == "all"
        self.l0, self.target_l0, self.bandwidth, self.pre_act = l0, target_l0, bandwidth, pre_act
        self.threshold = nnx.Param(jnp.full(d_sae, threshold, jnp.float32))

    def theta(self) -> Array:
        """Thresholds as they are used, at least 0 `[F]`."""
        raw = self.threshold[...]
        return raw + jax.lax.stop_gradient(jax.nn.relu(raw) - raw)

    def activate(self, z: Array) -> Array:
        return jump_relu(z, self.theta(), self.bandwidth, self.inputs)

    def penalty(self, z: Array, f: Array) -> Array:
        l0 = jnp.mean(jnp.sum(step(z, self.theta(), self.bandwidth, self.inputs), axis=-1))
        return self.l0 * (l0 if self.target_l0 is None else (l0 / self.target_l0 - 1) ** 2)

    def auxiliary(self, z: Array, error: Array, target: Array) -> Array:
        if not self.pre_act:
            return jnp.zeros((), z.dtype)
        short = jax.nn.relu(self.theta() - z) * jnp.linalg.norm(self.W_dec[...], axis=-1)
        return self.pre_act * jnp.mean(jnp.sum(jnp.where(self.dead, short, 0.0), axis=-1))


class Gated(SAE):
    r"""One path says which latents are on, another how large they are; L1 is on the gate alone.

    $e = (x - b_\mathrm{dec}) W_\mathrm{enc}$, $\pi = e + b_\mathrm{gate}$,
    $f = [\pi > 0]\,\max(e^{r} e + b_\mathrm{mag}, 0)$, and the loss adds
    $\lambda\sum_i \max(\pi_i, 0)$ and $\|y - \max(\pi, 0)\,\mathrm{sg}(W_\mathrm{dec}) - \mathrm{sg}(b_\mathrm{dec})\|^2$.

    Args:
      l1: the weight of the gate's penalty; weighed by the norms of atoms, which may be 1.
      d_model, d_sae, d_out, skip, dead_after, rngs: as of `SAE`.

    >>> model = Gated(4, 16, l1=0.1, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 4))).shape
    (2, 4)
    """

    thresholds = ("b_enc", "b_dec", "b_mag")

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        l1: float = 0.1,
        d_out: int | None = None,
        skip: bool = False,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, d_sae, d_out=d_out, skip=skip, dead_after=dead_after, rngs=rngs)
        check_weight("l1", l1)
        self.l1 = l1
        self.r = nnx.Param(jnp.zeros(d_sae))
        self.b_mag = nnx.Param(jnp.zeros(d_sae))

    def activate(self, z: Array) -> Array:
        """z holds the gate's pre-activations: b_enc is the bias of the gate."""
        e = z - self.b_enc[...]
        size = jax.nn.relu(jnp.exp(self.r[...]) * e + self.b_mag[...])
        return jnp.where(z > 0, size, 0.0)

    def penalty(self, z: Array, f: Array) -> Array:
        gate = jax.nn.relu(z) * jnp.linalg.norm(self.W_dec[...], axis=-1)
        return self.l1 * jnp.mean(jnp.sum(gate, axis=-1))

    def loss(
        self, x: Array, target: Array | None = None, *, warmup: Array | float = 1.0
    ) -> tuple[Array, dict[str, Array]]:
        loss, metrics = super().loss(x, target, warmup=warmup)
        y = self._check_batch(x, target)
        frozen = jax.lax.stop_gradient
        guess = jax.nn.relu(self.pre_activations(x)) @ frozen(self.W_dec[...])
        guess = guess + frozen(self.b_dec[...])
        if self.W_skip is not None:
            guess = guess + x @ frozen(self.W_skip[...])
        auxiliary = jnp.mean(jnp.sum((y - guess) ** 2, axis=-1))
        return loss + auxiliary, metrics | {"auxiliary": auxiliary}

    def jump_thresholds(self) -> Array:
        r"""The thresholds $b_\mathrm{mag} - e^{r} b_\mathrm{gate}$ `[F]` of the JumpReLU that this is
        wherever they are not negative, with pre-activations $e^{r} e + b_\mathrm{mag}$."""
        return self.b_mag[...] - jnp.exp(self.r[...]) * self.b_enc[...]
