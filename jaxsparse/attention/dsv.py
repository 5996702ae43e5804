r"""DSV: low-rank predictors of scores, trained beside a model in training; heads turn sparse when it pays.

Phase 1, dense: projections $P_q, P_k$ `[features, heads, r]` learn from $x$, without a gradient into it, that
$(x P_q)(x P_k)^T$ ranks keys as $q k^T$ does; the loss is $1 - \cos$ of both, centred in each row, since softmax sees no
constant. The sparsity of a head is one minus the smallest share of keys that holds a mass of its attention
(`head_sparsity`).

Phase 2: a head whose sparsity makes sparse attention cheaper than dense reads the blocks of keys with the best predicted
scores, one choice for the neighbouring queries of a block (so tiles stay dense; top-k per query is not tile friendly). The
predictors are trained on at intervals, with an optimizer of their own.

Source: Tan et al., DSV: exploiting dynamic sparsity to accelerate large-scale video DiT training, 2025. Its loss and
cost model are recalled, not verified; what is here is derived. `budgets.balance` spreads heads over devices.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsparse.attention import pool, select
from jaxsparse.attention.layout import BIDIRECTIONAL, Layout, Sizes, group
from jaxsparse.attention.mass import sample_scores
from jaxsparse.attention.measure import sampled_rows
from jaxsparse.attention.predictor import Predictor, State, pooled_cost
from pallas_kernels import BlockMask


class LowRank(nnx.Module):
    """$P_q$ and $P_k$ of one layer.

    Args:
      features: of the layer's input.
      heads: of the predictor: the layer's query heads, or its heads of keys.
      rank: r, much smaller than the head's size.
      rngs: for the parameters.

    >>> model = LowRank(16, 2, 4, rngs=nnx.Rngs(0))
    >>> [y.shape for y in model(jnp.ones((1, 8, 16)))]
    [(1, 2, 8, 4), (1, 2, 8, 4)]
    """

    def __init__(self, features: int, heads: int, rank: int, *, rngs: nnx.Rngs):
        if min(features, heads, rank) < 1:
            raise ValueError(f"features={features}, heads={heads}, rank={rank} must be positive")
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=2, batch_axis=(1,))
        make = lambda: nnx.Param(init(rngs.params(), (features, heads, rank), jnp.float32))
        self.query, self.key = make(), make()

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Low-rank queries and keys `[batch, heads, length, rank]`; no gradient into x."""
        if x.ndim != 3 or x.shape[2] != self.query.shape[0]:
            raise ValueError(
                f"x has shape {x.shape}; give [batch, length, {self.query.shape[0]}], the layer's input"
            )
        x = lax.stop_gradient(x)
        make = lambda p: jnp.einsum("btf,fhr->bhtr", x, p[...])
        return make(self.query), make(self.key)


def dsv_loss(
    model: LowRank, x: Array, q: Array, k: Array, *, rows: int = 64, causal: bool = False
) -> Array:
    r"""$1 - \cos(\hat s_i, s_i)$, the mean over sampled queries i and heads; $s_i$ centred over the keys seen.

    Args:
      model: the predictor.
      x: the layer's input `[batch, length, features]`.
      q, k: what attention sees, `[batch, heads, length, dim]`; no gradient into them.
      rows: how many queries are compared.
      causal: queries see no later keys.
    """
    at = sampled_rows(q.shape[2], rows)
    low_q, low_k = model(x)
    groups = low_q.shape[1]
    if q.shape[1] % groups or k.shape[1] not in (groups, q.shape[1]) and groups % k.shape[1]:
        raise ValueError(f"the predictor has {groups} heads, q {q.shape[1]}, k {k.shape[1]}")
    q = lax.stop_gradient(group(q, groups).mean(2))
    k = lax.stop_gradient(jnp.repeat(k, groups // k.shape[1], axis=1))
    scores = functools.partial(jnp.einsum, "bhqd,bhkd->bhqk", preferred_element_type=jnp.float32)
    s, guess = scores(q[:, :, at], k), scores(low_q[:, :, at], low_k)
    seen = jnp.ones(s.shape[-2:], bool)
    if causal:
        seen = jnp.arange(s.shape[-1]) <= at[:, None]

    def centred(y: Array) -> Array:
        number = seen.sum(-1, keepdims=True).astype(jnp.float32)
        return jnp.where(seen, y - jnp.where(seen, y, 0).sum(-1, keepdims=True) / number, 0)

    a, b = centred(guess), centred(s)
    # A row with one visible key is constant: nothing to rank.
    size = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    cosine = jnp.sum(a * b, -1) / jnp.sqrt(jnp.maximum(size, 1e-12))
    return jnp.mean(1 - jnp.where(size > 0, cosine, 1.0))


def head_sparsity(
    q: Array, k: Array, *, mass: float = 0.9, rows: int = 64, causal: bool = False
) -> Array:
    """One minus the smallest share of visible keys that holds a mass, the mean over the last queries, float32
    `[batch, heads]`.

    >>> x = jnp.zeros((1, 1, 10, 2))
    >>> round(float(head_sparsity(x, x, rows=1)[0, 0]), 3)
    0.1
    """
    p = sample_scores(q, k, rows, causal=causal)
    number = select.mass_count(p, mass - 1e-6, "reach")  # sums of float32 round
    kv_len, n = k.shape[2], p.shape[2]
    seen = np.arange(kv_len - n + 1, kv_len + 1) if causal else np.full(n, kv_len)
    return 1 - (number.astype(jnp.float32) / seen.astype(np.float32)).mean(-1)


def pays(sparsity: Array, head_dim: int, rank: int, *, overhead: float = 1.0) -> Array:
    r"""Whether sparse attention is cheaper than dense for a head: $(1 - s) \cdot \text{overhead} + \frac{r}{2 d} < 1$.

    Operations of the predictor (one product of rank r) and of kept keys (two of size d) over those of dense attention.
    `overhead` is what a kept block costs more than a dense one on the device at hand: measure it.
    """
    return (1 - sparsity) * overhead + rank / (2 * head_dim) < 1


def dsv(
    *,
    density: float | None = None,
    rule: select.Rule | None = None,
    model: LowRank | None = None,
    sparse_heads: Array | np.ndarray | None = None,
    layout: Layout = BIDIRECTIONAL,
) -> Predictor:
    """Blocks by low-rank scores, in heads that have turned sparse; see the module.

    Args:
      density, rule: the budget of a sparse head, one of them.
      model: of the layer; None: it comes with the call, as `State(params=model)`. `State.x` is the layer's input.
      sparse_heads: bool `[heads of the model]`, traced or not: the heads of phase 2; the others read everything. None:
        all. Lists have room for all blocks unless `layout.capacity` is given.
      layout: blocks.

    Returns:
      The predictor.
    """
    how = select.rule_of(density, rule)

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        found = state.params if model is None else model
        if not isinstance(found, LowRank) or state.x is None:
            raise ValueError(
                "dsv needs a predictor and the layer's input: State(params=LowRank(...), x=x)"
            )
        low_q, low_k = found(state.x)
        heads = low_q.shape[1]
        if heads not in (q.shape[1], k.shape[1]) or low_q.shape[2] != q.shape[2]:
            raise ValueError(
                f"the predictor has {heads} heads and x {low_q.shape[2]} positions; q has shape {q.shape}, k {k.shape}: "
                "give the heads of one of them, and the layer's whole input"
            )
        grid = layout.grid(q.shape[2], k.shape[2])
        mean_q = pool.mean(low_q, layout.block_q, state.lengths)
        mean_k = pool.mean(low_k, layout.block_kv, state.lengths)
        logits = jnp.einsum("bhir,bhjr->bhij", mean_q, mean_k)
        keep = layout.choose(logits, how, grid, state.lengths)
        if sparse_heads is not None:
            sparse = jnp.asarray(sparse_heads)
            if sparse.shape != (heads,) or sparse.dtype != bool:
                raise ValueError(
                    f"sparse_heads has shape {sparse.shape} and dtype {sparse.dtype}; give booleans [{heads}], one for "
                    "each head of the predictor"
                )
            keep = keep | ~sparse[:, None, None]
        if layout.share and keep.shape[1] > k.shape[1]:
            keep = group(keep, k.shape[1]).any(2)
        return layout.mask(
            keep, grid, how if sparse_heads is None and keep.shape[1] == logits.shape[1] else None
        )

    def cost(sizes: Sizes) -> float:
        return pooled_cost(sizes, layout)

    return Predictor("dsv", run, layout, cost)
