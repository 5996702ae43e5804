"""What is kept of the inputs of a layer: sums over tokens.

Sums add: over batches, over calls of a shared module, over resumed runs, and over devices (a batch that
is sharded over devices is summed by the compiler; inside `shard_map` use `jax.lax.psum`). Whoever wants
means divides by the count in the end.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array


class Inputs(NamedTuple):
    """Sums over the tokens x that entered a layer, in float32; `[stack, ...]` where layers or experts
    share a parameter.

    Attributes:
      count: `[]`, tokens that are not zero everywhere.
      sum: `[in]`, of x.
      squares: `[in]`, of x².
      gram: `[in, in]`, of x xᵀ; None from `Norms`.
    """

    count: Array
    sum: Array
    squares: Array
    gram: Array | None = None


class Statistic(Protocol):
    """What `calibrate` keeps: a function of tokens, whose results add."""

    def __call__(self, rows: Array) -> Inputs:
        """The statistic of tokens `[stack, tokens, in]`, padding tokens set to zero."""
        ...


@dataclasses.dataclass(frozen=True)
class Norms:
    """Sums of x and x²: a few numbers for each input.

    >>> Norms()(jnp.array([[[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])).squares.tolist()
    [[10.0, 4.0]]
    """

    def __call__(self, rows: Array) -> Inputs:
        x = rows.astype(jnp.float32)
        seen = jnp.any(x != 0, axis=-1)
        return Inputs(jnp.sum(seen, axis=-1, dtype=jnp.float32), jnp.sum(x, 1), jnp.sum(x * x, 1))


@dataclasses.dataclass(frozen=True)
class Gram:
    """Sums of x xᵀ besides those of `Norms`, in float32 at the highest precision.

    >>> Gram()(jnp.array([[[1.0, 2.0]]])).gram.tolist()
    [[[1.0, 2.0], [2.0, 4.0]]]
    """

    def __call__(self, rows: Array) -> Inputs:
        x = rows.astype(jnp.float32)
        gram = jnp.einsum("sti,stj->sij", x, x, precision=jax.lax.Precision.HIGHEST)
        return Norms()(x)._replace(gram=gram, squares=jnp.diagonal(gram, axis1=1, axis2=2))


def add(a: Inputs | None, b: Inputs) -> Inputs:
    """The statistic of the tokens of both.

    >>> one = Norms()(jnp.ones((1, 3, 2)))
    >>> float(add(one, one).count[0])
    6.0
    """
    return b if a is None else jax.tree.map(jnp.add, a, b)
