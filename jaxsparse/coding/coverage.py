r"""Choosing a few of many so that they cover the rest: facility location, a submodular function.

$f(S) = \sum_t \max_{i \in S} s_{it}$ for similarities $s \ge 0$: of calibration samples, of blocks. Greedy choice has
at least $1 - 1/e$ of the best value of k elements (Nemhauser, Wolsey, Fisher, 1978); one pass over a stream at least
half.

Source of the pass: Badanidiyuru, Mirzasoleiman, Karbasi, Krause, "Streaming submodular maximization: massive data
summarization on the fly", 2014, the static rule under Banihashem et al., "Dynamic constrained submodular
optimization with polylogarithmic update time", 2023. The dynamic data structure of the latter, which serves insertions
and deletions in polylogarithmic time, is not here: intricate, and no user of masks needs it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.operators import check_positive


def coverage(similarity: Array, chosen: Array) -> Array:
    """f of the rows that `chosen` (bool `[items]`) marks; 0 of none.

    >>> float(coverage(jnp.array([[1.0, 0.0], [0.5, 2.0]]), jnp.array([False, True])))
    2.5
    """
    return jnp.where(chosen[:, None], similarity, 0).max(0).sum()


def cover_greedily(similarity: Array, k: int) -> Array:
    """k items, one after the other, each with the largest gain; of equal ones the first.

    Args:
      similarity: s `[items, targets]`, not negative.
      k: how many.

    Returns:
      Their numbers in the order of choice, int32 `[k]`.

    Raises:
      ValueError: k out of range, negative similarities.

    >>> cover_greedily(jnp.array([[1.0, 0.0], [0.5, 2.0], [0.4, 1.9]]), 2).tolist()
    [1, 0]
    """
    check_count("k", k, most=similarity.shape[0], arrays=True)
    check_positive("similarity", similarity, zero=True)

    def step(carry, _):
        covered, taken = carry
        gain = jnp.maximum(similarity - covered, 0).sum(1)
        best = jnp.argmax(jnp.where(taken, -1.0, gain)).astype(jnp.int32)
        return (jnp.maximum(covered, similarity[best]), taken.at[best].set(True)), best

    start = jnp.zeros_like(similarity[0]), jnp.zeros(similarity.shape[0], bool)
    return jax.lax.scan(step, start, length=k)[1]


def cover_stream(similarity: Array, k: int, *, epsilon: float = 0.1) -> Array:
    r"""At most k items by one pass in the order of the rows: an item is taken where its gain is at least
    $\tau / 2k$, for guesses $\tau$ of the best value, side by side; the best of them is returned.

    Args:
      similarity: s `[items, targets]`, not negative.
      k: how many at most.
      epsilon: guesses grow by this ratio from the largest value of one item to k times that.

    Returns:
      bool `[items]`: a set of at least $(\frac12 - \epsilon)$ of the best value, for any order.

    Raises:
      ValueError: k out of range, epsilon or similarities that are not positive.

    >>> cover_stream(jnp.array([[1.0, 0.0], [0.5, 2.0], [0.4, 1.9]]), 2).tolist()
    [True, True, False]
    """
    check_count("k", k, most=similarity.shape[0], arrays=True)
    check_positive("epsilon", epsilon)
    check_positive("similarity", similarity, zero=True)
    guesses = 1 + math.ceil(math.log(max(k, 1)) / math.log1p(epsilon))
    best = similarity.sum(1).max() * (1 + epsilon) ** jnp.arange(guesses)

    def one_pass(guess):
        def step(carry, row):
            covered, count = carry
            gain = jnp.maximum(row - covered, 0).sum()
            take = (gain >= guess / (2 * k)) & (count < k)
            return (jnp.where(take, jnp.maximum(covered, row), covered), count + take), take

        start = jnp.zeros_like(similarity[0]), jnp.zeros((), jnp.int32)
        (covered, _), taken = jax.lax.scan(step, start, similarity)
        return covered.sum(), taken

    values, taken = jax.vmap(one_pass)(best)
    return taken[jnp.argmax(values)]
