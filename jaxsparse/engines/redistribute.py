"""Budgets that move between layers while the network trains, the total staying exact."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import selection
from jaxsparse.leaves import Leaf


def by_layer(values: Sequence[Array]) -> Array:
    """One vector over all layers of all leaves, from one value per layer of each leaf."""
    return jnp.concatenate([jnp.ravel(v) for v in values])


def by_leaf(leaves: Sequence[Leaf], vector: Array) -> list[Array]:
    """The inverse of `by_layer`: `[layers]` of each leaf, a scalar of one that is no stack."""
    ends = [sum(leaf.layers for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    return [
        vector[end - leaf.layers : end].reshape((leaf.layers,) if leaf.lead else ())
        for leaf, end in zip(leaves, ends)
    ]


def apportion(total, shares: Array, caps: Array) -> Array:
    """Integers in proportion to `shares` that sum to exactly `total` and do not exceed `caps`.

    What a capped entry cannot take goes to the others, in proportion again; then each has the floor
    of its quota and the largest remainders get what is left. Shares that are not positive numbers
    are served last; if the caps do not hold `total`, all are filled.

    >>> apportion(10, jnp.array([2.0, 1.0, 1.0]), jnp.array([9, 9, 9])).tolist()
    [5, 3, 2]
    >>> apportion(10, jnp.array([2.0, 1.0, 1.0]), jnp.array([2, 9, 9])).tolist()
    [2, 4, 4]
    """
    caps = jnp.asarray(caps, jnp.int32)
    total = jnp.minimum(jnp.asarray(total, jnp.int32), jnp.sum(caps, dtype=jnp.int32))
    shares = jnp.where(jnp.isfinite(shares) & (shares > 0), shares, 0.0).astype(jnp.float32)

    def quotas(full):
        rest = (total - jnp.sum(caps, where=full, dtype=jnp.int32)).astype(jnp.float32)
        weight = jnp.where(full, 0.0, shares)
        return rest * (weight / jnp.maximum(jnp.sum(weight), 1e-30))

    def saturate(state):
        full, _ = state
        grown = full | (quotas(full) >= caps.astype(jnp.float32))
        return grown, jnp.any(grown != full)

    full, _ = jax.lax.while_loop(lambda s: s[1], saturate, (caps <= 0, jnp.bool_(True)))
    quota = quotas(full)
    # A hair below the quota: float32 must not hand out more than there is.
    given = jnp.where(full, caps, jnp.floor(quota * (1 - 2.0**-16)).astype(jnp.int32))

    def hand_out(given):
        left, open_ = total - jnp.sum(given, dtype=jnp.int32), given < caps
        each = jnp.maximum(left // jnp.maximum(jnp.sum(open_, dtype=jnp.int32), 1), 1)
        served = selection.topk_mask(quota - given.astype(jnp.float32), left, where=open_)
        return given + jnp.where(served, jnp.minimum(each, caps - given), 0)

    return jax.lax.while_loop(lambda g: jnp.sum(g) < total, hand_out, given)
