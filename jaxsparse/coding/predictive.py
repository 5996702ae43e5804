r"""Predictive sparse decomposition: an encoder that learns to predict the codes.

$$L(y, z) = \|y - B z\|^2 + \lambda \|z\|_1 + \alpha \|z - F(y)\|^2, \qquad F(y) = g \odot \tanh(W y + b).$$

Source: Kavukcuoglu, Ranzato, LeCun, "Fast inference in sparse coding algorithms with applications to object
recognition", 2008. Only its abstract was read; the algorithm is as it is commonly told.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.coding.dictionary import unit_columns
from jaxsparse.coding.operators import (
    Operator,
    check_matrix,
    check_positive,
    check_signals,
    dense,
)
from jaxsparse.coding.proximal import fista


class Encoder(NamedTuple):
    r"""$F(y) = g \odot \tanh(W y + b)$: weight W `[atoms, m]`, bias b and gain g `[atoms]`."""

    weight: Array
    bias: Array
    gain: Array

    def __call__(self, signals: Array) -> Array:
        """`[..., m]` to `[..., atoms]`. Codes that it predicts are small, not zero."""
        return self.gain * jnp.tanh(signals @ self.weight.T + self.bias)


def psd_init(dictionary: Array) -> Encoder:
    """The encoder that starts at the dictionary transposed.

    >>> psd_init(jnp.eye(2))(jnp.zeros((3, 2))).shape
    (3, 2)
    """
    n = dictionary.shape[1]
    return Encoder(dictionary.T, jnp.zeros(n, dictionary.dtype), jnp.ones(n, dictionary.dtype))


def psd_codes(
    dictionary: Array,
    signals: Array,
    predicted: Array,
    strength: float,
    *,
    alpha: float = 1.0,
    steps: int = 100,
) -> Array:
    r"""$\arg\min_z L$ by FISTA from the prediction; with $\alpha = 0$ the LASSO, for large $\alpha$ the prediction.

    The loss has no $\frac12$: an orthonormal dictionary gives
    $(soft(B^T y + \alpha F, \lambda / 2)) / (1 + \alpha)$.

    Args:
      dictionary: B `[m, atoms]`.
      signals: y `[..., m]`.
      predicted: F(y) `[..., atoms]`.
      strength: $\lambda$.
      alpha: weight of the prediction, at least 0.
      steps: how many.

    Raises:
      ValueError: shapes that do not fit, a negative alpha or strength.

    >>> psd_codes(jnp.eye(2), jnp.array([2.0, 0.1]), jnp.zeros(2), 1.0, alpha=0.0).tolist()
    [1.5, 0.0]
    """
    check_matrix(dictionary)
    check_signals(dictionary, signals)
    check_positive("strength", strength, zero=True)
    check_positive("alpha", alpha, zero=True)
    if predicted.shape != (*signals.shape[:-1], dictionary.shape[1]):
        raise ValueError(
            f"predicted has shape {predicted.shape}: must be "
            f"{(*signals.shape[:-1], dictionary.shape[1])}, a code for each signal"
        )
    # Half of it is the LASSO of the dictionary above sqrt(alpha) I, of the signals above sqrt(alpha) F.
    op, m, root = dense(dictionary), dictionary.shape[0], jnp.sqrt(alpha)
    both = Operator(
        lambda z: jnp.concatenate([op.forward(z), root * z], -1),
        lambda r: op.adjoint(r[..., :m]) + root * r[..., m:],
        jnp.sqrt(op.norm**2 + alpha),
        m + op.columns,
        op.columns,
    )
    goal = jnp.concatenate([signals, root * predicted], -1)
    return fista(both, goal, strength / 2, steps=steps, init=predicted)


def psd_loss(
    parameters: tuple[Array, Encoder],
    signals: Array,
    strength: float,
    *,
    alpha: float = 1.0,
    steps: int = 100,
) -> Array:
    r"""The mean of $\|y - B z^*\|^2 + \alpha \|z^* - F(y)\|^2$ over signals, with the optimal codes held constant.

    Minimise it with any optimizer over `(dictionary, encoder)`, and normalise the atoms after each step
    (`unit_atoms`).

    >>> d = jnp.eye(2)
    >>> float(psd_loss((d, psd_init(d)), jnp.zeros((3, 2)), 0.1))
    0.0
    """
    dictionary, encoder = parameters
    predicted = encoder(signals)
    codes = psd_codes(dictionary, signals, predicted, strength, alpha=alpha, steps=steps)
    codes = jax.lax.stop_gradient(codes)
    fit = ((signals - codes @ dictionary.T) ** 2).sum(-1)
    return (fit + alpha * ((codes - predicted) ** 2).sum(-1)).mean()


def unit_atoms(dictionary: Array) -> Array:
    """The dictionary with columns of norm 1.

    >>> [f"{x:.1f}" for x in unit_atoms(jnp.array([[3.0], [4.0]])).ravel()]
    ['0.6', '0.8']
    """
    return unit_columns(dictionary)
