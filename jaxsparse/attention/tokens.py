r"""Dynamic-LLaVA: small predictors, trained with the model, that drop image tokens and generated tokens.

1. A predictor gives each token two logits, keep and drop (`ImagePredictor`, `TextPredictor`).
2. In training a decision is drawn, $m = \mathrm{onehot}(\arg\max((\log p + \text{Gumbel})/\tau))$, times the decision
   before; its gradient is that of the softmax (`decide`). No token is removed: dropped keys have no weight in
   the softmax, each token still sees itself (`masked_attention`), so a gradient reaches the predictor.
3. The loss adds $\lambda \sum (r - \mathrm{mean}\, m)^2$ (`ratio_loss`), and $\tau$ falls from 1 to 0.1 (`temperature`).
4. For inference the best $\lfloor r n \rfloor$ tokens are gathered in their order, with their positions (`keep_tokens`);
   a generated token that is dropped is not stored (`Cache.decode(store=...)`).

Source: Huang et al., Dynamic-LLaVA, 2025, and its code.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsparse.attention.layout import check_heads, group
from jaxsparse.selection import topk_indices


class TextPredictor(nnx.Module):
    """LayerNorm and a network of three layers on each token by itself: causal by construction.

    Args:
      features: of the tokens.
      width: of the network; the authors' is 512.
      rngs: for the parameters.

    >>> TextPredictor(8, width=16, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 8))).shape
    (2, 5, 2)
    """

    def __init__(self, features: int, *, width: int = 512, rngs: nnx.Rngs):
        if width < 4 or width % 4:
            raise ValueError(f"width={width} must be a positive multiple of 4")
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.enter = nnx.Linear(features, width, rngs=rngs)
        self.layers = nnx.List([
            nnx.Linear(width, width // 2, rngs=rngs),
            nnx.Linear(width // 2, width // 4, rngs=rngs),
            nnx.Linear(width // 4, 2, rngs=rngs),
        ])  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Logits `[batch, tokens, 2]`, keep first, of x `[batch, tokens, features]`."""
        return self.decide(jax.nn.gelu(self.enter(self.norm(x))))

    def decide(self, h: Array) -> Array:
        """The last network."""
        for layer in list(self.layers)[:-1]:
            h = jax.nn.gelu(layer(h))
        return list(self.layers)[-1](h)


class ImagePredictor(TextPredictor):
    """As `TextPredictor`, with transformer blocks among all tokens, and half of the channels replaced by their mean over
    the tokens that are kept so far.

    Args:
      features, width, rngs: as there.
      heads, blocks: of the transformer; the authors' are 8 and 2.

    >>> ImagePredictor(8, width=16, heads=2, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 8)), jnp.ones((2, 5))).shape
    (2, 5, 2)
    """

    def __init__(
        self, features: int, *, width: int = 512, heads: int = 8, blocks: int = 2, rngs: nnx.Rngs
    ):
        super().__init__(features, width=width, rngs=rngs)
        attention = lambda: nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.attention = nnx.List([attention() for _ in range(blocks)])
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2 * blocks)])
        self.up = nnx.List([nnx.Linear(width, 4 * width, rngs=rngs) for _ in range(blocks)])
        self.down = nnx.List([nnx.Linear(4 * width, width, rngs=rngs) for _ in range(blocks)])

    def __call__(self, x: Array, kept: Array | None = None) -> Array:
        """Logits of x `[batch, tokens, features]`; `kept` `[batch, tokens]` is the decision so far."""
        kept = jnp.ones(x.shape[:2], x.dtype) if kept is None else kept
        h = jax.nn.gelu(self.enter(self.norm(x)))
        for i, attention in enumerate(self.attention):
            h = h + attention(self.norms[2 * i](h))
            h = h + self.down[i](jax.nn.gelu(self.up[i](self.norms[2 * i + 1](h))))
        half = h.shape[-1] // 2
        weight = kept[..., None]
        mean = (h[..., half:] * weight).sum(1, keepdims=True) / jnp.maximum(
            weight.sum(1, keepdims=True), 1e-6
        )
        return self.decide(
            jnp.concatenate([h[..., :half], jnp.broadcast_to(mean, h[..., half:].shape)], -1)
        )


def decide(key: Array, logits: Array, tau: Array | float, previous: Array | float = 1.0) -> Array:
    r"""A decision per token, exactly 0 or 1, whose gradient is that of the Gumbel softmax.

    Args:
      key: of the noise.
      logits: `[..., 2]`, keep first.
      tau: the temperature; see `temperature`.
      previous: decisions before, which it is multiplied with.

    >>> m = decide(jax.random.key(0), jnp.array([[9.0, -9.0], [-9.0, 9.0]]), 1.0)
    >>> m.tolist()
    [1.0, 0.0]
    """
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax((jax.nn.log_softmax(logits) + noise) / tau)[..., 0]
    hard = (soft >= 0.5).astype(soft.dtype)
    return (hard + (soft - jax.lax.stop_gradient(soft))) * previous


def temperature(progress: Array | float) -> Array:
    r"""$0.1^{\text{progress}}$, from 1 to 0.1 as progress goes from 0 to 1."""
    return jnp.asarray(0.1) ** progress


def ratio_loss(masks: Sequence[Array], ratios: Sequence[float], *, weight: float = 100.0) -> Array:
    r"""`weight` times $\sum_m \mathrm{mean}_{batch} (r - \mathrm{mean}_{tokens}\, m)^2$.

    Args:
      masks: decisions `[batch, tokens]`.
      ratios: shares of tokens to keep; the authors' are 0.2 of an image and 0.5 of generated text.
      weight: the authors' is 100.

    >>> float(ratio_loss([jnp.array([[1.0, 0, 0, 0, 0]])], [0.2]))
    0.0
    """
    if len(masks) != len(ratios):
        raise ValueError(
            f"{len(masks)} masks and {len(ratios)} ratios; give one ratio for each mask"
        )
    terms = [jnp.mean((r - m.mean(-1)) ** 2) for m, r in zip(masks, ratios)]
    return weight * jnp.asarray(sum(terms))


def masked_attention(
    q: Array, k: Array, v: Array, mask: Array, *, causal: bool = True, scale: float | None = None
) -> Array:
    r"""$o_i = \sum_j m_{ij} e^{s_{ij}} v_j \big/ \sum_j m_{ij} e^{s_{ij}}$ with $m_{ij} = m_j$, and 1 for $i = j$.

    Differentiable in m, which is inside of the sum below (weights multiplied after the softmax would not be those of the
    shorter sequence). For training: it makes the whole matrix.

    Args:
      q, k, v: `[batch, heads or kv_heads, tokens, ...]`.
      mask: m `[batch, tokens]`.
      causal: tokens see no later ones.
      scale: of the scores; by default `head_dim ** -0.5`.
    """
    sizes = check_heads(q, k, v)
    if mask.shape != (q.shape[0], sizes.kv_len) or sizes.q_len != sizes.kv_len:
        raise ValueError(
            f"mask has shape {mask.shape}; it must be {(q.shape[0], sizes.kv_len)}, one number per token"
        )
    s = jnp.einsum(
        "bgrqd,bgkd->bgrqk", group(q, sizes.kv_heads), k, preferred_element_type=jnp.float32
    )
    s = s * (sizes.dim**-0.5 if scale is None else scale)
    n = sizes.kv_len
    own = jnp.eye(n, dtype=bool)
    seen = jnp.tri(n, dtype=bool) if causal else jnp.ones((n, n), bool)
    m = jnp.where(own, 1.0, mask[:, None, :])[:, None, None]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(seen & (m > 0), s, -jnp.inf), -1, keepdims=True))
    w = jnp.where(seen, m * jnp.exp(jnp.minimum(s - top, 80.0)), 0.0)  # dropped keys may lie above
    out = jnp.einsum("bgrqk,bgkd->bgrqd", w / w.sum(-1, keepdims=True), v.astype(jnp.float32))
    return out.reshape(*q.shape[:3], -1).astype(q.dtype)


def keep_tokens(logits: Array, ratio: float) -> Array:
    r"""The $\lfloor r n \rfloor$ tokens with the best log-probability of being kept, ascending, int32 `[batch, kept]`: to
    gather tokens and their position ids with. Static sizes.

    >>> keep_tokens(jnp.array([[[0.0, 1], [3, 0], [0, 9], [2, 0]]]), 0.5).tolist()
    [[1, 3]]
    """
    n = logits.shape[-2]
    number = int(ratio * n)
    if not 1 <= number <= n:
        raise ValueError(
            f"ratio={ratio} of {n} tokens keeps {number}; give a ratio between {1 / n:.3g} and 1"
        )
    score = jax.nn.log_softmax(logits)[..., 0]
    index, _ = topk_indices(score, number)
    # In their order: ranks by counting, which is not a sort of values.
    rank = (index[..., :, None] > index[..., None, :]).sum(-1)
    return jnp.zeros_like(index).at[jnp.arange(index.shape[0])[:, None], rank].set(index)
