r"""SeerAttention: a small gate that learns, from the model's own attention, which blocks it looks at.

1. Queries before positions are pooled by means, keys by maximum, minimum and mean; a linear map per head; rotary
   positions of the blocks' first tokens; $\hat A = \mathrm{softmax}(Q_g K_g^T / \sqrt w)$ over the visible blocks.
2. The target is the largest probability in each block of true attention, its rows divided by their sums
   (`seer_target`; computed block row by block row, without the whole matrix).
3. Only the gate is trained, on $KL(\text{target} \,\|\, \hat A)$.
4. Blocks with $\hat A$ above a threshold, or a share of them, are read.

Source: Gao et al., SeerAttention: learning intrinsic sparse attention in your LLMs, 2024, and its code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsparse.attention import pool, select
from jaxsparse.attention.layout import BLOCKS_64, Layout
from jaxsparse.attention.mass import block_mass
from jaxsparse.attention.predictor import Predictor, State, by_scores, pooled_cost


class SeerGate(nnx.Module):
    """The gate of one layer: logarithms of $\\hat A$.

    Args:
      heads, kv_heads, head_dim: of the layer.
      width: of the gate; None: head_dim.
      rope_base: of the rotary positions of blocks; None for none.
      layout: blocks (the authors': 64 by 64) and causality.
      rngs: for the parameters.

    >>> gate = SeerGate(2, 1, 8, layout=Layout(4, 4), rngs=nnx.Rngs(0))
    >>> log_a = gate(jnp.ones((1, 2, 12, 8)), jnp.ones((1, 1, 12, 8)))
    >>> log_a.shape, jnp.exp(log_a[0, 0, 0]).tolist()
    ((1, 2, 3, 3), [1.0, 0.0, 0.0])
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        width: int | None = None,
        rope_base: float | None = 10000.0,
        layout: Layout = BLOCKS_64,
        rngs: nnx.Rngs,
    ):
        width = head_dim if width is None else width
        if width < 1 or (rope_base is not None and width % 2):
            raise ValueError(f"width={width} must be positive, and even with rotary positions")
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        make = lambda *shape: nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.query, self.key = make(heads, head_dim, width), make(kv_heads, 3 * head_dim, width)
        self.rope_base, self.layout = rope_base, layout

    def __call__(self, q: Array, k: Array, lengths: Array | None = None) -> Array:
        """float32 `[batch, heads, q_blocks, kv_blocks]` of q and k before positions; -inf where nothing is visible."""
        layout = self.layout
        heads, kv_heads, dim = self.query.shape[0], self.key.shape[0], self.query.shape[1]
        if (q.shape[1], k.shape[1], q.shape[3], k.shape[3]) != (heads, kv_heads, dim, dim):
            raise ValueError(
                f"q has shape {q.shape} and k {k.shape}; the gate is for {heads} heads of queries and {kv_heads} of keys, "
                f"of size {dim}"
            )
        pooled_q = pool.mean(q, layout.block_q, lengths)
        parts = [f(k, layout.block_kv, lengths) for f in (pool.maximum, pool.minimum, pool.mean)]
        pooled_k = jnp.concatenate([jnp.where(jnp.isfinite(x), x, 0) for x in parts], -1)
        pooled_q = jnp.einsum("bhnd,hdw->bhnw", pooled_q, self.query[...])
        pooled_k = jnp.einsum("bhnd,hdw->bhnw", pooled_k, self.key[...])
        grid = layout.grid(q.shape[2], k.shape[2])
        if self.rope_base is not None:
            q0, _, k0, _ = layout.bounds(grid)
            pooled_q = rotary(pooled_q, q0[:, 0], self.rope_base)
            pooled_k = rotary(pooled_k, k0, self.rope_base)
        pooled_k = jnp.repeat(pooled_k, q.shape[1] // k.shape[1], axis=1)
        logits = jnp.einsum("bhid,bhjd->bhij", pooled_q, pooled_k) / pooled_q.shape[-1] ** 0.5
        # Finite: -inf has no gradient that is a number.
        visible = layout.visible(grid)
        log_a = jax.nn.log_softmax(jnp.where(visible, logits, -1e30), -1)
        return jnp.where(visible, log_a, -jnp.inf)


def rotary(x: Array, positions: Array | np.ndarray, base: float = 10000.0) -> Array:
    """Rotary positions by halves: x `[..., length, dim]`, positions that broadcast to `[..., length]`."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.asarray(positions, jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def seer_target(q: Array, k: Array, layout: Layout, *, scale: float | None = None) -> Array:
    """Block maxima of true attention with rows divided by their sums, float32 `[batch, heads, q_blocks, kv_blocks]`;
    q and k as attention sees them (after positions)."""
    target = block_mass(q, k, layout, reduce="max", scale=scale)
    return lax.stop_gradient(target / jnp.maximum(target.sum(-1, keepdims=True), 1e-30))


def seer_loss(log_a: Array, target: Array, *, weight: float = 10.0) -> Array:
    r"""`weight` times $KL(\text{target} \,\|\, \hat A)$, the mean over batch, heads and blocks of queries.

    Args:
      log_a: the gate's output.
      target: of `seer_target`.
      weight: the authors' is 10.
    """
    some = target > 0
    ratio = jnp.log(jnp.where(some, target, 1.0)) - jnp.where(some, log_a, 0.0)
    return weight * jnp.where(some, target * ratio, 0.0).sum(-1).mean()


def seer(
    *,
    density: float | None = None,
    rule: select.Rule | None = None,
    gate: SeerGate | None = None,
    layout: Layout = BLOCKS_64,
) -> Predictor:
    """The blocks of a trained gate; see the module.

    Args:
      density, rule: the budget, one of them; `attention.threshold(5e-4)` to `5e-3` are the authors' settings.
      gate: of the layer; None: it comes with the call, as `State(params=gate)`.
      layout: its blocks, which must be the gate's.

    Returns:
      The predictor. It reads `State.q` and `State.k`, queries and keys before positions; layers give these. Without
      them it takes q and k as they are.
    """

    def scores(q: Array, k: Array, state: State) -> Array:
        found = state.params if gate is None else gate
        if not isinstance(found, SeerGate):
            raise ValueError(
                "seer needs a gate: seer(gate=...) or State(params=SeerGate(...)), trained with seer_loss"
            )
        mine, other = (
            (layout.block_q, layout.block_kv),
            (found.layout.block_q, found.layout.block_kv),
        )
        if mine != other:
            raise ValueError(f"layout has blocks {mine}, the gate {other}; they must be the same")
        q, k = q if state.q is None else state.q, k if state.k is None else state.k
        return found(q, k, state.lengths)

    cost = lambda sizes: pooled_cost(sizes, layout, passes=4)
    return by_scores("seer", scores, select.rule_of(density, rule), layout, cost)
