"""The backward masks of two-view methods: N:M along the outputs, in the order of the weights or in
another one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse.leaves import Leaf
from jaxsparse.structures import NM
from jaxsparse.typing import StructureLike


def pattern(structure: StructureLike) -> tuple[NM, NM]:
    """The forward structure (groups along the inputs) and the backward one (along the outputs).

    Raises:
      ValueError: not an N:M structure along the inputs.
    """
    kind = structures.parse(structure) if isinstance(structure, str) else structure
    if not isinstance(kind, NM) or kind.axis != -2 or kind.strided:
        raise ValueError(
            f"structure={structure!r}: two-view methods need NM(n, m), groups of consecutive "
            "inputs; the backward view takes the same n:m along the outputs"
        )
    return kind, NM(kind.n, kind.m, axis=-1)


def along_outputs(leaf: Leaf, kind: NM, w: Array, *, where: Any = None, order: Any = None) -> Array:
    """b: the n largest |w| in each group of m outputs, among those of the mask `where`; groups are
    formed in `order` (`[*stacked, out]`), and b comes back in the weights' own."""
    score = jnp.abs(w)
    if order is None:
        return leaf.with_structure(kind).best(score, kind.n, where=where)
    index = jnp.broadcast_to(aligned(leaf, order), w.shape)
    b = grouped(leaf, kind, score, where, index)
    return jnp.put_along_axis(jnp.zeros_like(b), index, b, axis=-1, inplace=False)


def grouped(leaf: Leaf, kind: NM, score: Array, where: Any, index: Array) -> Array:
    """b with the outputs in the order `index`, of the weights' shape."""
    there = None if where is None else jnp.take_along_axis(where, index, -1)
    score = jnp.take_along_axis(score, index, -1)
    return leaf.with_structure(kind).best(score, kind.n, where=there)


def aligned(leaf: Leaf, order: Array) -> Array:
    """`[*stacked, out]` as `[*stacked, 1, ..., out]`."""
    between = (1,) * (len(leaf.layer_shape) - 1)
    return order.reshape(*order.shape[:-1], *between, order.shape[-1])
