r"""MoBA: every query goes to the blocks whose mean key agrees with it best.

$g_{t,c} = q_t \cdot \bar k_c$ for blocks c before the query's own, which is always among the k chosen; later blocks never
are. No parameters, so a model can change between this and full attention at any time.

With `block_q=1` each query routes for itself, as published. With larger blocks of queries, their mean decides for all of
them (a variant, which is what a tile of a matrix unit wants): $\bar q_I \cdot \bar k_c$.

Source: Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, 2025. Differs from the authors' code in: heads
that share keys share a choice (`Layout(share=False)` for one per head); the first block is kept as a sink unless
`Layout(sinks=0)`, which is the published rule.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxsparse.attention import pool, select
from jaxsparse.attention.layout import DEFAULT, Layout, group
from jaxsparse.attention.predictor import Predictor, State, by_scores, pooled_cost


def moba(
    *,
    density: float | None = None,
    rule: select.Rule | None = None,
    layout: Layout = DEFAULT,
) -> Predictor:
    """Blocks by pooled queries and keys; see the module.

    Args:
      density, rule: the budget, one of them: `attention.top_k(3)` is the published form, own block included.
      layout: blocks of queries and keys.

    Returns:
      The predictor.

    >>> q = k = jnp.zeros((1, 1, 32, 2)).at[:, :, 8:16].set(1.0).at[:, :, 24:].set(1.0)
    >>> mask = moba(rule=select.top_k(2), layout=Layout(8, 8, sinks=0))(q, k)
    >>> (mask.codes[0, 0] != 0).astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    def scores(q: Array, k: Array, state: State) -> Array:
        mean_q = pool.mean(q, layout.block_q, state.lengths)
        if layout.share:
            mean_q = group(mean_q, k.shape[1]).mean(2)
        mean_k = pool.mean(k, layout.block_kv, state.lengths)
        if not layout.share:
            mean_k = jnp.repeat(mean_k, q.shape[1] // k.shape[1], axis=1)
        return jnp.einsum("bhid,bhjd->bhij", mean_q, mean_k, precision="highest")

    cost = lambda sizes: pooled_cost(sizes, layout)
    return by_scores("moba", scores, select.rule_of(density, rule), layout, cost)
