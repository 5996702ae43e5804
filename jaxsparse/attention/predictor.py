r"""`Predictor`: a function `(q, k, v, state) -> BlockMask` with a bound on what it costs.

Most predictors are a score of blocks and a rule of `select`; `by_scores` is that composition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsparse.attention import select
from jaxsparse.attention.layout import Layout, Sizes, check_heads, shared
from pallas_kernels import BlockMask

Scores = Callable[[Array, Array, "State"], Array]
Cost = Callable[[Sizes], float]


class State(NamedTuple):
    """What a predictor may read besides queries, keys and values. Layers fill in what they have.

    Attributes:
      params: parameters of a trained predictor, or what one carries from call to call.
      q, k: queries and keys before positions were applied, as `[batch, heads, length, dim]`.
      x: what the layer was given, `[batch, length, features]`.
      lengths: int `[batch]`: how much of each sequence is filled.
    """

    params: object = None
    q: Array | None = None
    k: Array | None = None
    x: Array | None = None
    lengths: Array | None = None


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Chooses blocks of keys. A function of q `[batch, heads, q_len, dim]`, k `[batch, kv_heads, kv_len, dim]`, v and
    a `State`.

    Attributes:
      name: of the method.
      run: the function.
      layout: its blocks.
      cost: floating-point operations of a choice at most, per sequence, from `Sizes`. Dense causal attention takes
        `dense_cost`.
      page: for one query against a cache (decoding), the keys of a page; None: it does not decode.
    """

    name: str
    run: Callable[[Array, Array, Array | None, State], BlockMask]
    layout: Layout
    cost: Cost
    page: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Layout):
            raise ValueError(f"layout={self.layout!r} must be a Layout, as Layout(64, 64)")

    def __call__(
        self, q: Array, k: Array, v: Array | None = None, state: State | None = None
    ) -> BlockMask:
        """The mask. Choices have no gradient.

        Raises:
          ValueError: shapes that do not fit, a budget below the forced blocks, a state without what it needs.
        """
        check_heads(q, k, v)
        if state is not None and not isinstance(state, State):
            raise ValueError(
                f"state is a {type(state).__name__}; give an attention.State(x=..., params=...)"
            )
        return self.run(q, k, v, State() if state is None else state)


def checked(choose: Predictor) -> Predictor:
    """The predictor.

    Raises:
      ValueError: it is something else, a function that makes one for instance.
    """
    if not isinstance(choose, Predictor):
        found = getattr(choose, "__name__", None) or type(choose).__name__
        raise ValueError(
            f"choose={found} must be a predictor, which attention.moba(density=0.1) for instance returns"
        )
    return choose


def by_scores(
    name: str, scores: Scores, rule: select.Rule, layout: Layout, cost: Cost
) -> Predictor:
    """The predictor that keeps the blocks that a rule takes from scores.

    Args:
      name: of the method.
      scores: function of q, k and the state that returns logits `[batch, heads or kv_heads, q_blocks, kv_blocks]`,
        -inf for what is not to be chosen. Rules of mass take their softmax.
      rule, layout: how many blocks, of what size.
      cost: of the scores.
    """

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        grid = layout.grid(q.shape[2], k.shape[2])
        logits = scores(q, k, state)
        sizes = (grid.q_blocks, grid.kv_blocks)
        if logits.shape[2:] != sizes or logits.shape[1] not in (q.shape[1], k.shape[1]):
            raise ValueError(
                f"scores of {name} have shape {logits.shape}; give [batch, {q.shape[1]} or {k.shape[1]} heads, "
                f"{sizes[0]} blocks of queries, {sizes[1]} of keys]"
            )
        if state.lengths is not None:
            logits = jnp.where(layout.filled(grid, state.lengths), logits, -jnp.inf)
        if layout.share:
            logits = shared(logits, k.shape[1], layout.visible(grid))
        return layout.mask(layout.choose(logits, rule, grid), grid, rule)

    return Predictor(name, run, layout, cost)


def dense_cost(sizes: Sizes) -> float:
    """Operations of dense causal attention, two products over half of the square."""
    return 2.0 * sizes.heads * sizes.q_len * sizes.kv_len * sizes.dim


def blocks_of(sizes: Sizes, layout: Layout) -> tuple[int, int]:
    """Blocks of queries and of keys."""
    grid = layout.grid(sizes.q_len, sizes.kv_len)
    return grid.q_blocks, grid.kv_blocks


def pooled_cost(sizes: Sizes, layout: Layout, passes: float = 2.0) -> float:
    """Operations of pooling every query and key, and of scores of all pairs of blocks with their selection (32 passes
    over the scores)."""
    nq, nk = blocks_of(sizes, layout)
    read = sizes.dim * (sizes.heads * sizes.q_len + sizes.kv_heads * sizes.kv_len)
    return passes * read + sizes.heads * nq * nk * (2 * sizes.dim + 32)
