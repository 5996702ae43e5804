r"""RIA (Zhang et al., Plug-and-play: an efficient post-training pruning method, ICLR 2024).

    score_ij = (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * |x_i|^a

the share of a weight in its output and in its input, times a tempered norm of the input. For N:M the
inputs can be permuted such that groups lose little: dealt to groups in the order of their importance,
then exchanged between groups, one place of all groups at a time, by an optimal assignment.

The N:M structure then holds in the permuted order alone: whoever wants it in memory must permute the
inputs at run time, or absorb the permutation in the layer before.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import selection, structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_layer
from jaxsparse.post_training._layer import Pruned, keep, only, rank
from jaxsparse.structures import NM, Structure


def ria_scores(w: Array, squares: Array, power: float = 0.5) -> Array:
    """Relative importance times the tempered norms of inputs; sums of zero count as 1."""
    size = jnp.abs(w.astype(jnp.float32))
    share = lambda axis: size / _nonzero(jnp.sum(size, axis=axis, keepdims=True))
    squares = squares.astype(jnp.float32)
    norms = jnp.sqrt(jnp.where(jnp.any(squares > 0), squares, 1.0))
    return (share(0) + share(1)) * norms[:, None] ** power


def ria_core(
    w: Array,
    squares: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    power: float = 0.5,
    permute: bool = False,
    rounds: int = 1,
) -> Pruned:
    """Keeps the weights of largest relative importance times activation.

    Args:
      w: `[in, out]`.
      squares: `[in]`, the sum over tokens of each input squared.
      sparsity: the fraction of zeros, in [0, 1).
      structure: any; by default the whole layer is ranked, as the authors do.
      power: the exponent a of the norms.
      permute: search a permutation of the inputs, for `NM(n, m)`.
      rounds: times that every place is assigned anew.

    Returns:
      The pruned layer in the order of `w`; with `permute`, its permutation.

    >>> ria_core(jnp.array([[1.0, 9.0], [1.0, 1.0]]), jnp.ones(2), 0.5).mask.tolist()
    [[False, True], [True, False]]

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have; `permute` without N:M.
    """
    structure = structures.resolve(structure)
    check_layer(w, squares=squares)
    check_count("rounds", rounds)
    w = w.astype(jnp.float32)
    scores = ria_scores(w, squares, power)
    if not permute:
        mask = keep(scores, sparsity, structure)
        return Pruned(jnp.where(mask, w, 0.0), mask)
    if not isinstance(structure, NM):
        raise ValueError(f"permute=True: permutes for NM(n, m), not for structure={structure}")
    only(structure, "ria(permute=True)").check("w", w.shape)
    order = permute_inputs(scores, structure, rounds)
    mask = keep(scores[order], sparsity, structure)
    mask = jnp.zeros_like(mask).at[order].set(mask)
    return Pruned(jnp.where(mask, w, 0.0), mask, permutation=order)


def permute_inputs(scores: Array, structure: NM, rounds: int = 1) -> Array:
    """A permutation of the inputs by which N:M retains a large sum of scores.

    Args:
      scores: `[in, out]`.
      structure: along inputs.
      rounds: times that every place is assigned anew; the retained sum never falls.

    Returns:
      int32 `[in]`: the inputs in their new order.
    """
    groups, m = scores.shape[0] // structure.m, structure.m
    place = rank(jnp.sum(scores, axis=1))
    column, slot = place % groups, place // groups
    group = jnp.where(slot % 2 == 0, column, groups - 1 - column)  # there and back, as a snake
    order = (
        jnp.zeros(scores.shape[0], jnp.int32)
        .at[group * m + slot]
        .set(jnp.arange(scores.shape[0], dtype=jnp.int32))
    )
    for t in [*range(m)] * rounds:
        order = _assign_slot(order.reshape(groups, m), scores, structure.n, t).reshape(-1)
    return order


def retained(scores: Array, order: Array, structure: NM) -> Array:
    """The sum of the scores that N:M keeps of the inputs in this order."""
    return jnp.sum(jnp.where(keep(scores[order], None, structure), scores[order], 0.0))


@functools.partial(jax.jit, static_argnames=("n",))
def _assign_slot(order: Array, scores: Array, n: int, t: int | Array) -> Array:
    """Exchanges the inputs at place `t` of all groups; `order` is `[groups, m]`."""
    members = scores[order]  # [groups, m, out]

    def value(candidate):  # of an input, in the place t of each group
        placed = members.at[:, t].set(candidate)
        best = selection.topk_mask(placed, n, axis=1)
        return jnp.sum(jnp.where(best, placed, 0.0), axis=(1, 2))

    gains = jax.lax.map(value, members[:, t])  # [from, to]
    came, went = optax.assignment.hungarian_algorithm(-gains)
    exchanged = jnp.zeros_like(order[:, t]).at[went].set(order[came, t])
    better = jnp.sum(gains[came, went]) > jnp.trace(gains)
    return order.at[:, t].set(jnp.where(better, exchanged, order[:, t]))


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1.0)
