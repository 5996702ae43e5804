r"""Unrolled solvers: a fixed number of ISTA-like layers whose matrices, thresholds or scalars are learned.

Each has its initial parameters (a plain tree of arrays) and a function of parameters and signals; train them with any
optimizer of optax on $\sum\|x_K - x^*\|^2$. The number of layers is the length of the parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._counts import scale_count
from jaxsparse.coding.operators import check_matrix, check_positive, check_signals, dense
from jaxsparse.coding.thresholds import select_soft, soft


class Lista(NamedTuple):
    """$W$ `[layers, n, n]`, $B$ `[layers, m, n]`, thresholds `[layers]`."""

    w: Array
    b: Array
    theta: Array


class Coupled(NamedTuple):
    """$W$ `[layers, m, n]`, thresholds `[layers]`."""

    w: Array
    theta: Array


class Alista(NamedTuple):
    """Step sizes and thresholds `[layers]`."""

    gamma: Array
    theta: Array


class Hyper(NamedTuple):
    """The three scalars of HyperLISTA: of the threshold, of the momentum, of the support."""

    c1: Array | float = 0.02
    c2: Array | float = 0.01
    c3: Array | float = 0.02


def lista_init(dictionary: Array, strength: Array | float, layers: int) -> Lista:
    r"""Parameters with which `lista` is `layers` steps of ISTA: $B = A/L$, $W = I - A^T A/L$, $\theta = \lambda/L$.

    Args:
      dictionary: `[m, n]`, atoms in columns.
      strength: $\lambda$.
      layers: how many.

    Raises:
      ValueError: not a matrix, a negative strength, no layers.

    >>> lista_init(jnp.eye(2), 0.1, 3).w.shape
    (3, 2, 2)
    """
    _check_layers(layers)
    check_positive("strength", strength, zero=True)
    a, lipschitz = dictionary, dense(dictionary).norm ** 2
    w = jnp.eye(a.shape[1], dtype=a.dtype) - a.T @ a / lipschitz
    repeat = lambda x: jnp.repeat(jnp.asarray(x, a.dtype)[None], layers, 0)
    return Lista(repeat(w), repeat(a / lipschitz), repeat(strength / lipschitz))


def lista(params: Lista, signals: Array) -> Array:
    r"""LISTA: $x_{k+1} = soft(W_k x_k + B_k^T y, \theta_k)$, negative thresholds counting as 0.

    Args:
      params: of `lista_init`, or trained.
      signals: `[..., m]`.

    Returns:
      The codes `[..., n]`.

    >>> [f"{x:.2f}" for x in lista(lista_init(jnp.eye(2), 0.5, 3), jnp.array([2.0, 0.1]))]
    ['1.50', '0.00']

    Source: Gregor & LeCun, "Learning fast approximations of sparse coding", 2010.
    """

    def layer(x, p):
        return soft(x @ p.w.T + signals @ p.b, jnp.maximum(p.theta, 0)), None

    zero = jnp.zeros((*signals.shape[:-1], params.w.shape[-1]), signals.dtype)
    return jax.lax.scan(layer, zero, params)[0]


def coupled_init(dictionary: Array, strength: Array | float, layers: int) -> Coupled:
    r"""Parameters with which `lista_cpss` without selection is ISTA: $W = A/L$, $\theta = \lambda/L$.

    Args:
      dictionary: `[m, n]`, atoms in columns.
      strength: $\lambda$.
      layers: how many.

    Raises:
      ValueError: not a matrix, a negative strength, no layers.

    >>> coupled_init(jnp.eye(2), 0.1, 3).theta.shape
    (3,)
    """
    start = lista_init(dictionary, strength, layers)
    return Coupled(start.b, start.theta)


def lista_cpss(
    params: Coupled, dictionary: Array, signals: Array, *, p: float = 0.012, p_max: float = 0.13
) -> Array:
    r"""LISTA with coupled weights and support selection: $x_{k+1} = ss(x_k + W_k^T(y - A x_k), \theta_k, p_k)$, where the
    $p_k = \min(k p, p_{max})$ of the coordinates that are largest are not shrunk (`select_soft`). `p=0` is LISTA-CP.

    Args:
      params: of `coupled_init`, or trained.
      dictionary: `[m, n]`, atoms in columns.
      signals: `[..., m]`.
      p: the fraction that is added in each layer.
      p_max: the largest fraction.

    Returns:
      The codes `[..., n]`.

    Raises:
      ValueError: signals that do not fit.

    >>> a = jnp.eye(2)
    >>> x = lista_cpss(coupled_init(a, 0.5, 3), a, jnp.array([2.0, 0.1]), p=0.5, p_max=0.5)
    >>> [f"{v:.1f}" for v in x]
    ['2.0', '0.0']

    Source: Chen, Liu, Wang, Yin, "Theoretical linear convergence of unfolded ISTA", 2018.
    """
    check_signals(dictionary, signals)
    n = dictionary.shape[1]
    zero = jnp.zeros((*signals.shape[:-1], n), signals.dtype)

    def layer(x, inputs):
        w, theta, k = inputs
        return select_soft(x + (signals - x @ dictionary.T) @ w, jnp.maximum(theta, 0), k), None

    sizes = _support_sizes(params.theta.shape[0], n, p, p_max)
    return jax.lax.scan(layer, zero, (params.w, params.theta, sizes))[0]


def analytic_weights(dictionary: Array) -> Array:
    r"""The $W$ that minimises $\|W^T A\|_F$ with $w_j^T a_j = 1$, in closed form:
    $w_j = M^{-1} a_j / (a_j^T M^{-1} a_j)$, $M = A A^T$.

    Args:
      dictionary: `[m, n]` of full row rank, atoms in columns.

    Returns:
      $W$ `[m, n]`.

    Raises:
      ValueError: not a matrix, more rows than columns.

    >>> w = analytic_weights(jnp.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]))
    >>> [f"{v:.2f}" for v in w[:, 0]]
    ['1.00', '-0.29']

    Source: Liu, Chen, Wang, Yin, "ALISTA", 2019, for the problem; its code solves it by projected gradients.
    """
    check_matrix(dictionary)
    m, n = dictionary.shape
    if m > n:
        raise ValueError(
            f"dictionary has shape {dictionary.shape}: analytic weights need as many atoms as rows"
        )
    solved = jnp.linalg.solve(dictionary @ dictionary.T, dictionary)
    return solved / jnp.sum(dictionary * solved, 0)


def alista_init(layers: int, theta: float = 0.4, decay: float = 0.8) -> Alista:
    r"""$\gamma_k = 1$ and $\theta_k = \theta \cdot decay^k$, which converge without training on easy problems.

    Args:
      layers: how many.
      theta: the first threshold.
      decay: the factor from layer to layer.

    Raises:
      ValueError: no layers.

    >>> [f"{t:.2f}" for t in alista_init(2).theta]
    ['0.40', '0.32']
    """
    _check_layers(layers)
    return Alista(jnp.ones(layers), theta * decay ** jnp.arange(layers))


def alista(
    params: Alista,
    dictionary: Array,
    weights: Array,
    signals: Array,
    *,
    p: float = 0.012,
    p_max: float = 0.13,
) -> Array:
    r"""ALISTA: $x_{k+1} = ss(x_k - \gamma_k W^T(A x_k - y), \theta_k, p_k)$ with one analytic W; two scalars a layer are
    all that is learned.

    Args:
      params: of `alista_init`, or trained.
      dictionary: `[m, n]`, atoms in columns.
      weights: $W$ `[m, n]`, of `analytic_weights`.
      signals: `[..., m]`.
      p: the fraction of coordinates that each layer adds to those that are not shrunk.
      p_max: the largest fraction.

    Returns:
      The codes `[..., n]`.

    Raises:
      ValueError: signals that do not fit.

    >>> x = alista(alista_init(30), jnp.eye(2), jnp.eye(2), jnp.array([2.0, 0.0]))
    >>> [f"{v:.1f}" for v in x]
    ['2.0', '0.0']

    Source: Liu, Chen, Wang, Yin, "ALISTA: Analytic weights are as good as learned weights in LISTA", 2019.
    """
    w = params.gamma[:, None, None] * weights
    return lista_cpss(Coupled(w, params.theta), dictionary, signals, p=p, p_max=p_max)


def hyperlista(
    params: Hyper, dictionary: Array, weights: Array, signals: Array, *, layers: int = 16
) -> Array:
    r"""HyperLISTA: ALISTA with momentum, its thresholds and support sizes computed from the iterate. With
    $r = A x - y$: $v = x - W^T r + \beta(x - x_{prev})$, $x^+ = ss(v, \theta, p)$,

    $\theta = c_1 \|A^+ r\|_1$, $\beta = c_2 \|x\|_0$, $p = clip(c_3 \log(\|A^+ y\|_1 / \|A^+ r\|_1), 0, 1)$, the support being the
    $\lfloor p n \rfloor$ largest. It commutes with scalings of the signals. Three scalars are tuned, by a grid or by gradients
    (of $c_1$ and $c_2$; $c_3$ only counts).

    Args:
      params: $c_1, c_2, c_3$.
      dictionary: `[m, n]`, atoms in columns.
      weights: $W$ `[m, n]`, of `analytic_weights`.
      signals: `[..., m]`.
      layers: how many.

    Returns:
      The codes `[..., n]`.

    Raises:
      ValueError: signals that do not fit, no layers.

    Differs from the authors' code: $\gamma = 1$, which suits a W of unit diagonal; theirs is an option.

    >>> a = jnp.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
    >>> hyperlista(Hyper(), a, analytic_weights(a), jnp.zeros(2), layers=3).tolist()
    [0.0, 0.0, 0.0]

    Source: Chen et al., "Hyperparameter tuning is all you need for LISTA", 2021.
    """
    check_signals(dictionary, signals)
    _check_layers(layers)
    n = dictionary.shape[1]
    c1, c2, c3 = params
    inverse = jnp.linalg.pinv(dictionary)
    tiny = jnp.finfo(signals.dtype).tiny
    size = lambda r: jnp.sum(jnp.abs(r @ inverse.T), -1, keepdims=True)
    whole = size(signals)

    def layer(carry, _):
        x, before = carry
        r = x @ dictionary.T - signals
        left = size(r)
        beta = c2 * jnp.sum(x != 0, -1, keepdims=True)
        v = x - r @ weights + beta * (x - before)
        p = jnp.clip(c3 * jnp.log(jnp.maximum(whole, tiny) / jnp.maximum(left, tiny)), 0, 1)
        k = scale_count(n, jax.lax.stop_gradient(p[..., 0]))
        return (select_soft(v, c1 * left, k), x), None

    zero = jnp.zeros((*signals.shape[:-1], n), signals.dtype)
    return jax.lax.scan(layer, (zero, zero), length=layers)[0][0]


def nmse(codes: Array, truth: Array) -> Array:
    r"""$10 \log_{10}(\sum\|x - x^*\|^2 / \sum\|x^*\|^2)$ in dB, over the whole batch: not a mean of decibels.

    Args:
      codes: `[..., n]`.
      truth: `[..., n]`.

    Returns:
      A scalar.

    >>> round(float(nmse(jnp.array([0.9]), jnp.array([1.0]))), 1)
    -20.0
    """
    return 10 * jnp.log10(jnp.sum((codes - truth) ** 2) / jnp.sum(truth**2))


def _support_sizes(layers: int, n: int, p: float, p_max: float) -> Array:
    """How many coordinates are not shrunk in each layer."""
    sizes = [scale_count(n, min((layer + 1) * p, p_max)) for layer in range(layers)]
    return jnp.array(sizes, jnp.int32)


def _check_layers(layers: int) -> None:
    if layers < 1:
        raise ValueError(f"layers={layers}: use at least 1")
