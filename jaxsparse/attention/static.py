"""Patterns that do not depend on the data, as predictors, and the oracle that bounds all others.

`pallas_kernels.BlockMask` has the patterns themselves (`local`, `sinks`, `strided`, `bigbird`, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxsparse.attention import select
from jaxsparse.attention.layout import DEFAULT, Layout
from jaxsparse.attention.mass import block_mass
from jaxsparse.attention.predictor import Predictor, State, by_scores, dense_cost
from pallas_kernels import BlockMask, Grid
from pallas_kernels.block_sparse_attention.rules import Window


def static(
    pattern: Callable[[Grid], BlockMask], *, name: str = "static", layout: Layout = DEFAULT
) -> Predictor:
    """The predictor that returns a pattern of the grid. It is up to the pattern to be causal.

    >>> choose = static(lambda grid: BlockMask.bigbird(grid), layout=Layout(16, 16, causal=False))
    >>> int(choose(jnp.ones((1, 1, 160, 4)), jnp.ones((1, 1, 160, 4))).counts[0, 0]) > 0
    True
    """

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        return pattern(layout.grid(q.shape[2], k.shape[2]))

    return Predictor(name, run, layout, lambda sizes: 0.0)


def dense(*, layout: Layout = DEFAULT) -> Predictor:
    """Every visible block: what all others are compared with."""
    zero = Layout(layout.block_q, layout.block_kv, layout.causal)

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        grid = zero.grid(q.shape[2], k.shape[2])
        return zero.mask(jnp.asarray(zero.visible(grid)), grid)

    return Predictor("dense", run, zero, lambda sizes: 0.0)


def dense_below(choose: Predictor, kv_len: int) -> Predictor:
    """The predictor for at least so many keys, and every visible block for fewer: where a choice does not pay, or has no
    room for its forced blocks. Lengths are static, so each has one program. Measure where the two cross on the device.

    Raises:
      ValueError: a length below 1.

    >>> short = jnp.ones((1, 1, 32, 4))
    >>> choose = dense_below(oracle(density=0.1, layout=Layout(16, 16)), 512)
    >>> choose(short, short).counts
    Array([[3]], dtype=int32)
    """
    if kv_len < 1:
        raise ValueError(f"kv_len={kv_len} must be at least 1")
    every = dense(layout=choose.layout)

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        decodes = choose.page is not None and q.shape[2] == 1  # whose masks are of pages
        return (every if k.shape[2] < kv_len and not decodes else choose).run(q, k, v, state)

    cost = lambda sizes: choose.cost(sizes) if sizes.kv_len >= kv_len else 0.0
    return Predictor(choose.name, run, choose.layout, cost, choose.page)


def streaming(*, sinks: int = 4, window: int = 1024, layout: Layout = DEFAULT) -> Predictor:
    """The first keys and a sliding window (A-shape): Xiao et al., Efficient streaming language models with attention
    sinks, 2024. To the token; blocks only say what is read.

    Args:
      sinks: keys at the beginning, at least 1.
      window: the last so many keys, the own one included; at least 1.
      layout: block sizes and causality; its forced blocks are not used.

    >>> q = k = jnp.ones((1, 1, 64, 4))
    >>> seen = streaming(sinks=2, window=8, layout=Layout(16, 16))(q, k).to_dense()[0, 0]
    >>> int(seen[40].sum()), int(seen[5].sum())
    (10, 6)
    """
    if sinks < 1 or window < 1:
        raise ValueError(f"sinks={sinks}, window={window}: both must be at least 1")

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        grid = layout.grid(q.shape[2], k.shape[2])
        shift = grid.kv_len - grid.q_len if layout.causal else 0
        left, right = window - 1 - shift, 0 if layout.causal else window - 1
        near = BlockMask.of_rule(grid, Window(-(right + shift), left))
        mask = near | BlockMask.sinks(grid, num_keys=sinks)
        return mask & BlockMask.causal(grid, offset=shift) if layout.causal else mask

    return Predictor("streaming", run, layout, lambda sizes: 0.0)


def oracle(
    *,
    density: float | None = None,
    rule: select.Rule | None = None,
    layout: Layout = DEFAULT,
) -> Predictor:
    r"""The blocks with the largest true probability: with a number of blocks per row, nothing has more recall.

    Blocks of each row are ranked by $\sum_{i \in I, j \in J} p_{ij}$ of dense attention. It costs what dense attention
    costs and is there to be compared with.

    Args:
      density, rule: the budget, one of them; see `select`.
      layout: blocks.
    """

    def scores(q: Array, k: Array, state: State) -> Array:
        mass = block_mass(q, k, layout, lengths=state.lengths)
        return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)

    return by_scores("oracle", scores, select.rule_of(density, rule), layout, dense_cost)
