r"""Sparse representations of texts: what it costs to search them, and a dense form of fixed shape.

A text is a vector $w \ge 0$ over a vocabulary; two are compared by their inner product.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.selection import topk_indices


def term_weights(logits: Array, mask: Array, *, twice: bool = False) -> Array:
    r"""$w_j = \max_t \log(1 + relu(l_{tj}))$ over the tokens of each text; `twice` takes $\log(1 + \cdot)$ once more,
    which compresses sizes, so that a penalty acts on how many there are.

    Args:
      logits: `[texts, tokens, terms]`.
      mask: bool `[texts, tokens]`, False for padding.
      twice: of the l0 variant.

    Returns:
      `[texts, terms]`.

    Source: Formal, Lassance, Piwowarski, Clinchant, "SPLADE v2", 2021; Shen, Geng, Yang, "Exploring l0
    sparsification for inference-free sparse retrievers", 2025.

    >>> [[round(float(w), 3) for w in term_weights(jnp.array([[[1.0, -2.0], [5.0, 3.0]]]), jnp.array([[True, False]]))[0]]]
    [[0.693, 0.0]]
    """
    w = jnp.log1p(jax.nn.relu(logits))
    w = jnp.log1p(w) if twice else w
    return jnp.where(mask[..., None], w, 0).max(-2)


def search_cost(weights: Array, *, above: int = 0) -> Array:
    r"""FLOPS, $\sum_j \big(\frac1n \sum_i m_i |w_{ij}|\big)^2$: the expected work of a search, small where
    texts use different terms. $m_i$ is 0, without gradient, for texts of at most `above` nonzeros: those are sparse
    enough. Give all texts of the global batch.

    Args:
      weights: `[texts, terms]`.
      above: t; 0: all texts count.

    Raises:
      ValueError: weights that are no matrix, a negative t.

    Source: Paria et al., "Minimizing FLOPs to learn efficient sparse representations", 2020; with the mask: Shen,
    Geng, Yang, 2025.

    >>> float(search_cost(jnp.eye(8))), float(search_cost(jnp.ones((8, 1))))
    (0.125, 1.0)
    """
    if weights.ndim != 2:
        raise ValueError(f"weights have shape {weights.shape}: give [texts, terms]")
    if above < 0:
        raise ValueError(f"above={above}: use at least 0 nonzeros")
    dense = jax.lax.stop_gradient((weights != 0).sum(1, keepdims=True) > above)
    return (jnp.where(dense, jnp.abs(weights), 0).mean(0) ** 2).sum()


class Sliced(NamedTuple):
    """Of each slice of the vocabulary the largest value and its place in the slice (int32), `[..., slices]`."""

    values: Array
    places: Array


def slice_terms(weights: Array, slices: int) -> Sliced:
    """Cuts the vocabulary into slices of every so-manyth term, and keeps one term of each: a vector of fixed
    shape. Neighbouring terms go to different slices, since they occur together.

    Args:
      weights: `[..., terms]`, not negative.
      slices: M, which divides the terms (leave the first few out where it does not).

    Raises:
      ValueError: slices that do not divide the terms.

    Source: Lin, Lin, "Densifying sparse representations for passage retrieval by representational slicing", 2021.

    >>> found = slice_terms(jnp.array([0.0, 2.0, 3.0, 1.0]), 2)
    >>> found.values.tolist(), found.places.tolist()
    ([3.0, 2.0], [1, 0])
    """
    terms = weights.shape[-1]
    if slices < 1 or terms % slices:
        raise ValueError(f"slices={slices}: must divide the {terms} terms")
    cut = weights.reshape(*weights.shape[:-1], terms // slices, slices)
    return Sliced(cut.max(-2), cut.argmax(-2).astype(jnp.int32))


def gated_inner_product(query: Sliced, texts: Sliced) -> Array:
    r"""$\sum_m v^q_m v^d_m 1[i^q_m = i^d_m]$ of one query `[slices]` and texts `[..., slices]`: never above the inner
    product of the vectors, and equal to it where no slice had two nonzeros.

    >>> q = slice_terms(jnp.array([0.0, 2.0, 3.0, 0.0]), 2)
    >>> float(gated_inner_product(q, slice_terms(jnp.array([0.0, 1.0, 0.0, 4.0]), 2)))
    0.0
    """
    return jnp.where(query.places == texts.places, query.values * texts.values, 0).sum(-1)


def local_codes(dictionary: Array, signals: Array, k: int, *, ridge: float = 1e-4) -> Array:
    r"""Codes on the k nearest atoms: $\min_c \|y - A_k c\|^2 + \epsilon \|c\|^2$ with $\sum c = 1$, zero elsewhere.

    Args:
      dictionary: A `[m, n]`.
      signals: y `[..., m]`.
      k: how many atoms.
      ridge: $\epsilon$, as a share of the trace of each small system.

    Raises:
      ValueError: k out of range.

    Source: Wang et al., "Locality-constrained linear coding for image classification", 2010, the fast variant.

    >>> local_codes(jnp.array([[0.0, 1.0, 5.0]]), jnp.array([0.25]), 2).round(2).tolist()
    [0.75, 0.25, 0.0]
    """
    check_count("k", k, most=dictionary.shape[1], arrays=True)
    flat = signals.reshape(-1, signals.shape[-1])

    def one(y):
        distance = ((dictionary - y[:, None]) ** 2).sum(0)
        near, _ = topk_indices(-distance, k)
        z = dictionary[:, near].T - y  # [k, m]
        gram = jnp.matmul(z, z.T, precision="highest")
        trace = jnp.trace(gram)
        trace = jnp.where(trace > 0, trace, 1)  # the signal is each of these atoms
        small = gram + ridge * trace * jnp.eye(k, dtype=gram.dtype)
        c = jnp.linalg.solve(small, jnp.ones(k, gram.dtype))
        return jnp.zeros(dictionary.shape[1], gram.dtype).at[near].set(c / c.sum())

    codes = jax.vmap(one)(flat)
    return codes.reshape(*signals.shape[:-1], dictionary.shape[1])
