r"""AdaSpa: in a diffusion transformer the pattern hardly depends on the denoising step, so it is searched once or twice.

1. Steps of the warm-up are dense and keep their log-sum-exp L.
2. At a search step the mass of each block is $m_{IJ} = \sum e^{c\, q \cdot k - L_{old}}$ with the L of an earlier step,
   which changes little: no second pass for a new normaliser. The step itself is dense.
3. Rows keep the blocks of the most mass at a density; heads whose recall is low take blocks from heads whose recall is
   high (`budgets.by_recall`), the mean stays.
4. Other steps attend through the stored choice.

Source: Xia et al., Training-free and adaptive sparse attention for efficient long video generation, 2025; the rule in 3
is recalled, not verified, and there was no code to compare with. Text and video blocks are not treated apart.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxsparse.attention import budgets, select
from jaxsparse.attention.layout import Layout, Sizes, check_heads, group
from jaxsparse.attention.mass import block_mass
from jaxsparse.attention.predictor import Predictor, State, dense_cost
from pallas_kernels import BlockMask, block_sparse_attention

VIDEO = Layout(64, 64, causal=False, sinks=0, local=0)
"""Blocks of tokens of a video: no order, nothing forced."""


class AdaSpaState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      step: int32, how many steps were taken.
      lse: float32 `[batch, heads, q_len]`, of the last dense step.
      keep: bool `[batch, heads or kv_heads, q_blocks, kv_blocks]`.
    """

    step: Array
    lse: Array
    keep: Array


@dataclasses.dataclass(frozen=True)
class AdaSpa:
    """Attention over denoising steps; see the module.

    Args:
      density: of the blocks kept between searches.
      warm_up: dense steps at the beginning, at least 1.
      searches: steps at which the choice is made anew, the first of them `warm_up` or later.
      head_step: share of a row's budget that heads of low recall take from others; 0: all heads alike.
      layout: blocks; bidirectional as a rule, `Layout(causal=False)`.

    Raises:
      ValueError: a number out of range.

    >>> method = AdaSpa(density=0.5, warm_up=1, searches=(1,), layout=Layout(8, 8, causal=False, sinks=0, local=0))
    >>> q = k = v = jnp.ones((1, 2, 32, 4))
    >>> state = method.init(q, k)
    >>> for _ in range(3):
    ...     out, state = method.attend(q, k, v, state)
    >>> int(state.step), float(state.keep.mean())
    (3, 0.5)
    """

    density: float = 0.2
    warm_up: int = 2
    searches: tuple[int, ...] = (2,)
    head_step: float = 0.0
    layout: Layout = VIDEO

    def __post_init__(self) -> None:
        if self.warm_up < 1 or not self.searches or min(self.searches) < self.warm_up:
            raise ValueError(
                f"warm_up={self.warm_up}, searches={self.searches}: a dense step must come first, then a search"
            )
        if not 0 <= self.head_step < 1:
            raise ValueError(f"head_step={self.head_step} must lie in [0, 1)")
        select.density(self.density)

    def init(self, q: Array, k: Array) -> AdaSpaState:
        """The state before the first step; of q and k only shapes are read."""
        sizes = check_heads(q, k)
        grid = self.layout.grid(sizes.q_len, sizes.kv_len)
        heads = sizes.kv_heads if self.layout.share else sizes.heads
        keep = jnp.broadcast_to(
            self.layout.visible(grid), (q.shape[0], heads, grid.q_blocks, grid.kv_blocks)
        )
        lse = jnp.zeros(q.shape[:3], jnp.float32)
        return AdaSpaState(jnp.zeros((), jnp.int32), lse, keep)

    def search(self, q: Array, k: Array, lse: Array) -> Array:
        """The blocks of the most mass, with a log-sum-exp that may be that of an earlier step."""
        grid = self.layout.grid(q.shape[2], k.shape[2])
        visible, forced = self.layout.visible(grid), self.layout.forced(grid)
        mass = block_mass(q, k, self.layout, lse=lse)
        if self.layout.share:
            mass = group(mass, k.shape[1]).mean(2)
        rule = select.density(self.density)
        keep = select.keep(mass, rule, visible, forced)
        base = int(rule.counts(None, visible, forced).max())
        if step := int(self.head_step * base):
            recall = jnp.where(keep, mass, 0).sum(-1).mean(-1)
            more = budgets.by_recall(recall, base, step) - base
            number = jnp.asarray(rule.counts(None, visible, forced)) + more[..., None]
            keep = select.keep(mass, select.Rows(number), visible, forced)
        return keep

    def attend(self, q: Array, k: Array, v: Array, state: AdaSpaState) -> tuple[Array, AdaSpaState]:
        """One step: attention `[batch, heads, q_len, v_dim]`, and the state for the next. Under `jit` one program for all
        steps; dense steps read all blocks by their lists."""
        grid = self.layout.grid(q.shape[2], k.shape[2])
        searches = (state.step == jnp.asarray(self.searches)).any()
        dense = (state.step < self.warm_up) | searches
        now = jnp.where(dense, self.layout.visible(grid), state.keep)
        out, lse = block_sparse_attention(q, k, v, self.layout.mask(now, grid), return_lse=True)
        keep = lax.cond(searches, lambda: self.search(q, k, state.lse), lambda: state.keep)
        return out, AdaSpaState(state.step + 1, jnp.where(dense, lse, state.lse), keep)


def adaspa(*, density: float = 0.2, head_step: float = 0.0, layout: Layout = VIDEO) -> Predictor:
    """AdaSpa's choice as a predictor: of a `State(params=AdaSpaState)` the stored blocks, without one those of a search
    with the true log-sum-exp. Over denoising steps, `AdaSpa.attend` keeps the state."""
    method = AdaSpa(density=density, head_step=head_step, layout=layout)

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        if state.lengths is not None:
            raise ValueError("adaspa takes no lengths: videos of a batch have one length")
        grid = layout.grid(q.shape[2], k.shape[2])
        if isinstance(state.params, AdaSpaState):
            keep = state.params.keep
            if keep.shape[2:] != (grid.q_blocks, grid.kv_blocks):
                raise ValueError(
                    f"the state has {keep.shape[2]} by {keep.shape[3]} blocks, the layout cuts q and k into "
                    f"{grid.q_blocks} by {grid.kv_blocks}: use the layout and the lengths that made the state"
                )
            return layout.mask(keep, grid)
        full = layout.mask(jnp.asarray(layout.visible(grid)), grid)
        _, lse = block_sparse_attention(q, k, k if v is None else v, full, return_lse=True)
        return layout.mask(method.search(q, k, lse), grid)

    def cost(sizes: Sizes) -> float:
        return dense_cost(sizes)

    return Predictor("adaspa", run, layout, cost)
