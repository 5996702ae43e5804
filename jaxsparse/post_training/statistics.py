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
      rows: `[tokens, in]`, the tokens themselves, from `Tokens`.
      gradients: `[samples, in, out]` of a loss with respect to the layer, where the method asks for them:
        `prune` adds them.
    """

    count: Array
    sum: Array
    squares: Array
    gram: Array | None = None
    rows: Array | None = None
    gradients: Array | None = None


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


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens themselves besides the sums of `Gram`: for small sets of data.

    >>> Tokens()(jnp.ones((1, 3, 2))).rows.shape
    (1, 3, 2)
    """

    def __call__(self, rows: Array) -> Inputs:
        return Gram()(rows)._replace(rows=rows.astype(jnp.float32))


def add(a: Inputs | None, b: Inputs) -> Inputs:
    """The statistic of the tokens of both: sums add, tokens and gradients stand one after the other.

    >>> one = Norms()(jnp.ones((1, 3, 2)))
    >>> float(add(one, one).count[0])
    6.0
    """
    if a is None:
        return b
    joined = {
        name: jnp.concatenate([getattr(a, name), getattr(b, name)], axis=1)
        for name in ("rows", "gradients")
        if getattr(a, name) is not None
    }
    bare = lambda x: x._replace(rows=None, gradients=None)
    return jax.tree.map(jnp.add, bare(a), bare(b))._replace(**joined)
