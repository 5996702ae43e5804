r"""SpargeAttn: blocks by pooled queries and keys, where pooling can be trusted.

1. Keys are smoothed, $k \leftarrow k - \mathrm{mean}_t k$, which no softmax over keys sees.
2. A block can be predicted if its rows are alike: mean cosine of all pairs above $\theta$.
3. $s_{ij} = \bar q_i \cdot \bar k_j / \sqrt d$ for blocks of keys that can be predicted; softmax over them; a rule of mass
   that stops before $\tau$, or a share of the blocks.
4. Rows of queries and columns of keys that cannot be predicted are kept whole, outside the budget: the safety net.

The second stage, which skips products with values inside the kernel where a block's maximum lies far below the running
one, is `skip_below=` of `attend` and of `pallas_kernels.block_sparse_attention`, for any mask.

Source: Zhang et al., SpargeAttn: accurate sparse attention accelerating any model inference, 2025, and its code. The 8-bit
products are not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.attention import pool, select
from jaxsparse.attention.layout import DEFAULT, Layout, group, shared
from jaxsparse.attention.measure import relative_error
from jaxsparse.attention.predictor import Predictor, State, pooled_cost
from pallas_kernels import BlockMask, block_sparse_attention


def sparge(
    *,
    density: float | None = None,
    rule: select.Rule | None = None,
    similarity: float = -0.1,
    layout: Layout = DEFAULT,
) -> Predictor:
    r"""Blocks by pooled scores, with the test of self-similarity; see the module.

    Args:
      density, rule: the budget, one of them: `top_p(0.98, rule="stop_before")` with `similarity=0.6` is the older call
        of the authors, a share of one half with -0.1 the recommended one. Kept rows and columns of step 4 come on top.
      similarity: $\theta$; negative: every block can be predicted; above 1: none, which is dense attention.
      layout: blocks; the authors' are 128 by 64. Give `sinks=0, local=0` for the authors' forced blocks: none.

    Returns:
      The predictor. Its lists have room for all blocks where `similarity` may keep any of them (from 0 on), unless
      `layout.capacity` is given.

    >>> q = k = jax.random.normal(jax.random.key(0), (1, 1, 64, 8))
    >>> sparge(density=0.8, similarity=2.0, layout=Layout(16, 16))(q, k).counts  # nothing alike: dense
    Array([[10]], dtype=int32)
    """
    how = select.rule_of(density, rule)

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        grid = layout.grid(q.shape[2], k.shape[2])
        logits, extra = sparge_scores(q, k, similarity, layout, state.lengths)
        there = layout.filled(grid, state.lengths)
        logits, extra = jnp.where(there, logits, -jnp.inf), extra & there
        if layout.share:
            logits = shared(logits, k.shape[1], layout.visible(grid))
            extra = group(extra, k.shape[1]).any(2)
        keep = layout.choose(logits, how, grid) | extra
        return layout.mask(keep, grid, how if similarity < 0 else None)

    cost = lambda sizes: pooled_cost(sizes, layout, passes=8)
    return Predictor("sparge", run, layout, cost)


def sparge_scores(
    q: Array, k: Array, similarity: float, layout: Layout, lengths: Array | None = None
) -> tuple[Array, Array]:
    """Logits of blocks, -inf for blocks of keys that cannot be predicted, and the blocks that are kept for that; float32
    and bool `[batch, heads, q_blocks, kv_blocks]`."""
    heads, kv_heads = q.shape[1], k.shape[1]
    repeat = lambda x: jnp.repeat(x, heads // kv_heads, axis=1)
    mean_q, mean_k = pool.mean(q, layout.block_q, lengths), pool.mean(k, layout.block_kv, lengths)
    # Smoothed keys are never made: the mean of k - c is that of k, less c.
    centre = pool.mean(k, k.shape[2], lengths)
    logits = jnp.einsum("bhid,bhjd->bhij", mean_q, repeat(mean_k - centre), precision="highest")
    logits = logits / q.shape[-1] ** 0.5
    if similarity < 0:  # every block can be predicted
        return logits, jnp.zeros(logits.shape, bool)
    alike_q = pool.self_similarity(q, layout.block_q, lengths) > similarity
    alike_k = pool.self_similarity(k, layout.block_kv, lengths, centre) > similarity
    alike_k = repeat(alike_k)[:, :, None]
    kept = ~alike_q[..., None] | ~alike_k
    return jnp.where(alike_k, logits, -jnp.inf), kept


def tune_sparge(
    samples: Sequence[tuple[Array, Array, Array]],
    *,
    similarities: Sequence[float] = (-1.0, 0.2, 0.4, 0.6, 0.8),
    masses: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    error: float = 0.07,
    layout: Layout = DEFAULT,
) -> list[tuple[float, float]]:
    r"""Per head, the sparsest $(\theta, \tau)$ whose relative error $\sum|o' - o| / \sum|o|$ stays below a bound.

    Args:
      samples: q, k, v of calibration prompts, of one layer.
      similarities, masses: what is tried, each pair of them.
      error: the bound on the mean over the samples; the authors' is 0.07.
      layout: blocks. Choices are per query head here.

    Returns:
      A pair per query head. Where none stays below the bound, (2, 1): dense.

    Raises:
      ValueError: nothing to try, or nothing to try it on.
    """
    import dataclasses

    if not samples or not similarities or not masses:
        raise ValueError(
            "samples, similarities and masses must not be empty: nothing could be compared"
        )
    each = dataclasses.replace(layout, share=False)
    dense = [
        block_sparse_attention(q, k, v, each.mask(jnp.asarray(each.visible(g)), g))
        for q, k, v in samples
        for g in [each.grid(q.shape[2], k.shape[2])]
    ]
    heads = samples[0][0].shape[1]
    best: list[tuple[float, tuple[float, float]]] = [(float("inf"), (2.0, 1.0))] * heads
    for theta in similarities:
        for tau in masses:
            choose = sparge(
                rule=select.top_p(tau, rule="stop_before"), similarity=theta, layout=each
            )
            run = jax.jit(lambda q, k, v, choose=choose: _try(choose, q, k, v))
            kept, errors = jnp.zeros(heads), jnp.zeros(heads)
            for (q, k, v), want in zip(samples, dense):
                out, counts = run(q, k, v)
                kept += counts.mean(0) / len(samples)
                errors += relative_error(out, want).mean(0) / len(samples)
            for h in range(heads):
                if float(errors[h]) < error and float(kept[h]) < best[h][0]:
                    best[h] = (float(kept[h]), (theta, tau))
    return [pair for _, pair in best]


def _try(choose: Predictor, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    mask = choose(q, k)
    return block_sparse_attention(q, k, v, mask), mask.counts
