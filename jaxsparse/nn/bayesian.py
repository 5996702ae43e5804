r"""Layers with a posterior of every weight: Gaussian means and scales, and variational dropout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class BayesianLinear(nnx.Module):
    r"""$y = x\mu + \sqrt{x^2 \sigma^2 + 10^{-8}}\, \epsilon + b$ with $\sigma = softplus(\rho)$ in training (the local
    reparameterisation: noise for every output of every example); $x\mu + b$ in evaluation. Where $\rho = 0$ the
    weight is pruned: it has no variance. `jaxsparse.ssvi` trains such layers sparse.

    Args:
      in_features: size of the last axis of x.
      out_features: size of the last axis of y.
      sigma: at the start.
      rngs: of the means, N(0, 0.01^2) by default as in the authors' code, and the stream `noise`.

    Source: Li, Miao, Qiu & Zhang, "Training Bayesian neural networks with sparse subspace variational inference",
    2024; Kingma, Salimans & Welling, "Variational dropout and the local reparameterization trick", 2015.

    >>> layer = BayesianLinear(3, 2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 3))).shape, round(float(layer.sigma[0, 0]), 6)
    ((4, 2), 0.0006)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sigma: float = 6e-4,
        mean_scale: float = 0.01,
        rngs: nnx.Rngs,
    ):
        shape = in_features, out_features
        self.mu = nnx.Param(mean_scale * jax.random.normal(rngs.params(), shape))
        self.rho = nnx.Param(jnp.full(shape, math.log(math.expm1(sigma))))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.rngs, self.deterministic = rngs, False

    @property
    def sigma(self) -> Array:
        """The standard deviations, exactly 0 where a weight is pruned."""
        rho = self.rho[...]
        return jnp.where(rho == 0, 0.0, jax.nn.softplus(rho))

    def __call__(self, x: Array) -> Array:
        mean = x @ self.mu[...] + self.bias[...]
        if self.deterministic:
            return mean
        spread = jnp.sqrt((x * x) @ (self.sigma * self.sigma) + 1e-8)
        return mean + spread * jax.random.normal(self.rngs.noise(), mean.shape, mean.dtype)

    def kl(self, prior: float = 0.005) -> Array:
        r"""$KL(q \| N(0, \sigma_0^2))$, summed over the weights that are not pruned.

        Args:
          prior: $\sigma_0$.
        """
        live, sigma = self.rho[...] != 0, self.sigma
        safe = jnp.where(live, sigma, 1.0)
        each = jnp.log(prior / safe) + (safe**2 + self.mu[...] ** 2) / (2 * prior**2) - 0.5
        return jnp.sum(jnp.where(live, each, 0.0))


_K1, _K2, _K3 = 0.63576, 1.8732, 1.48695


def dropout_kl(log_alpha: Array) -> Array:
    r"""The divergence of a weight's posterior $N(w, \alpha w^2)$ from the log-uniform prior, by its usual fit:
    $-[k_1 \sigma(k_2 + k_3 \log\alpha) - \frac12 \log(1 + \alpha^{-1}) - k_1]$.

    >>> [round(float(v), 4) for v in dropout_kl(jnp.array([-8.0, 0.0, 3.0]))]
    [4.6359, 0.4312, 0.0254]
    """
    fit = _K1 * jax.nn.sigmoid(_K2 + _K3 * log_alpha) - 0.5 * jax.nn.softplus(-log_alpha) - _K1
    return -fit


class VariationalDropoutLinear(nnx.Module):
    r"""Gaussian dropout with a noise level of every weight: $w \sim N(\theta, \alpha \theta^2)$, parametrised by
    $\theta$ and $\log \sigma^2 = \log(\alpha\theta^2)$. In training the noise is added at the outputs (local
    reparameterisation); add `layer.kl() / number of examples` to the loss, with a weight that rises from 0. In
    evaluation weights with $\log \alpha \ge$ `threshold` are exactly 0 in the product; `layer.mask` tells them.

    Args:
      in_features: size of the last axis of x.
      out_features: size of the last axis of y.
      threshold: 3: noise of 20 times the weight's square.
      clip: bounds of $\log \alpha$.
      rngs: of the kernel, and the stream `noise`.

    Source: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks", 2017.

    >>> layer = VariationalDropoutLinear(3, 2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 3))).shape, bool(layer.mask.all())
    ((4, 2), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        threshold: float = 3.0,
        clip: float = 8.0,
        rngs: nnx.Rngs,
    ):
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (in_features, out_features))
        self.kernel = nnx.Param(kernel)
        self.log_variance = nnx.Param(jnp.full_like(kernel, -10.0))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.threshold, self.clip = threshold, clip
        self.rngs, self.deterministic = rngs, False

    @property
    def log_alpha(self) -> Array:
        r"""$\log \sigma^2 - \log \theta^2$, clipped; `[in, out]`."""
        square = jnp.maximum(self.kernel[...] ** 2, 1e-16)
        return jnp.clip(self.log_variance[...] - jnp.log(square), -self.clip, self.clip)

    @property
    def mask(self) -> Array:
        """The weights that are kept, bool `[in, out]`: for `jaxsparse.static(masks=...)`."""
        return self.log_alpha < self.threshold

    def kl(self) -> Array:
        """`dropout_kl`, summed over the weights."""
        return jnp.sum(dropout_kl(self.log_alpha))

    def __call__(self, x: Array) -> Array:
        w = self.kernel[...]
        if self.deterministic:
            return x @ jnp.where(self.mask, w, 0.0) + self.bias[...]
        variance = jnp.exp(self.log_alpha) * w * w
        spread = jnp.sqrt((x * x) @ variance + 1e-8)
        mean = x @ w + self.bias[...]
        return mean + spread * jax.random.normal(self.rngs.noise(), mean.shape, mean.dtype)
