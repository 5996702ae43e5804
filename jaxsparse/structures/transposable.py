"""N:M masks that are N:M in both directions, so that a product and its transpose are both sparse."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse import selection
from jaxsparse.structures.base import Shape, Structure

_EXACT_UP_TO = 4


@dataclasses.dataclass(frozen=True)
class TransposableNM(Structure):
    """At most n of each m consecutive weights along the inputs, and along the outputs: see
    `transposable_nm_mask`. It is no ranking of units but an assignment, chosen anew by every method
    that keeps the best scores; methods that exchange weights one by one (RigL) refuse it.

    >>> TransposableNM(2, 4).sparsity
    0.5

    Raises:
      ValueError: n not in 1 to m; a layer whose last two sides m does not divide.
    """

    n: int
    m: int
    ranks: ClassVar[bool] = False

    def __post_init__(self):
        if not 1 <= self.n <= self.m:
            raise ValueError(f"TransposableNM({self.n}, {self.m}): need 1 <= n <= m")

    def check(self, path: str, shape: Shape) -> None:
        if len(shape) < 2 or shape[-2] % self.m or shape[-1] % self.m:
            raise ValueError(
                f"structure={self}: m={self.m} must divide the last two sides of {path!r}, which has "
                f"shape {shape}; keep it dense with targets=[({path!r}, False)]"
            )

    def pool(self, x: Array) -> Array:
        raise ValueError(
            f"structure={self}: its masks are not ranked weight by weight; use a method that chooses "
            "masks anew (magnitude, static, prune, ...)"
        )

    def slices(self, shape: Shape) -> int:
        return math.prod(shape) // self.m

    def budget(self, shape: Shape, kept):
        """Per group, rounded up: a ramp towards n:m tightens m, m-1, ..., n."""
        return -(-kept // self.slices(shape))

    def assign(self, scores: Array, kept, *, where: Array | None, ties: str, seed) -> Array:
        x = jnp.abs(scores).astype(jnp.float32)
        if ties == "hash":  # noise that decides between equal sums alone
            noise = jax.random.uniform(jax.random.key(seed), x.shape)
            x = x + noise * jnp.where(jnp.max(x) > 0, 1e-6 * jnp.max(x), 1.0)
        x = x if where is None else jnp.where(where, x, 0.0)
        if isinstance(kept, int):
            mask = transposable_nm_mask(x, min(kept, self.m), self.m)
        else:
            each = [
                functools.partial(transposable_nm_mask, n=n, m=self.m) for n in range(1, self.m + 1)
            ]
            mask = lax.switch(jnp.clip(kept, 1, self.m) - 1, each, x)
        return mask if where is None else mask & where

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m


@functools.cache
def _patterns(n: int, m: int) -> np.ndarray:
    """All m x m patterns with n ones in every row and column, [patterns, m, m]."""
    rows = [np.isin(np.arange(m), c) for c in itertools.combinations(range(m), n)]
    found = [np.stack(p) for p in itertools.product(rows, repeat=m)]
    return np.stack([p for p in found if (p.sum(axis=0) == n).all()])


def transposable_nm_mask(scores: Any, n: int, m: int) -> Array:
    """The mask of `[..., rows, columns]` that keeps at most `n` of each `m` consecutive entries of a
    row, and at most `n` of each `m` consecutive entries of a column.

    Each m x m block is a problem of its own. Up to m = 4 the best pattern with exactly n per row and
    column is found by comparing all of them (90 for 2:4); beyond that entries are taken greedily, from the
    largest down, while their row and column have room, which keeps at least half of the best
    possible sum (Hubara et al., Accelerated sparse neural training: a provable and efficient method
    to find N:M transposable masks, 2021) and may leave a few rows with less than n.

    Args:
      scores: not negative, `[..., rows, columns]`; both are multiples of m.
      n, m: 1 <= n <= m.

    >>> mask = transposable_nm_mask(jnp.arange(16.0).reshape(4, 4), 2, 4)
    >>> mask.sum(axis=0).tolist(), mask.sum(axis=1).tolist()
    ([2, 2, 2, 2], [2, 2, 2, 2])

    As a structure of methods it is `TransposableNM(n, m)`.

    Raises:
      ValueError: n not in 1 to m, sides that m does not divide.
    """
    scores = lax.stop_gradient(jnp.asarray(scores))
    if not 1 <= n <= m:
        raise ValueError(f"n={n}, m={m}: need 1 <= n <= m")
    if scores.ndim < 2 or scores.shape[-2] % m or scores.shape[-1] % m:
        raise ValueError(f"scores has shape {scores.shape}: m={m} must divide its last two sides")
    *lead, rows, cols = scores.shape
    tiles = scores.reshape(*lead, rows // m, m, cols // m, m)
    blocks = jnp.moveaxis(tiles, -3, -2).reshape(-1, m, m)
    kept = _best(blocks, n, m) if m <= _EXACT_UP_TO else _greedy(blocks, n, m)
    kept = jnp.moveaxis(kept.reshape(*lead, rows // m, cols // m, m, m), -3, -2)
    return kept.reshape(scores.shape)


def _best(blocks: Array, n: int, m: int) -> Array:
    patterns = jnp.asarray(_patterns(n, m))
    values = jnp.einsum(
        "bij,pij->bp", blocks.astype(jnp.float32), patterns.astype(jnp.float32), precision="highest"
    )
    return patterns[jnp.argmax(values, axis=-1)]


def _greedy(blocks: Array, n: int, m: int) -> Array:
    """One entry per block and turn: the largest whose row and column have room."""

    def turn(_, kept):
        row = selection.count(kept, axis=2, keepdims=True) < n
        col = selection.count(kept, axis=1, keepdims=True) < n
        return kept | selection.topk_mask(blocks, 1, where=~kept & row & col, axis=(1, 2))

    return lax.fori_loop(0, n * m, turn, jnp.zeros(blocks.shape, bool))
