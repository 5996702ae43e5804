"""Sparse matrices that keep the leading spectrum: by magnitude, and by lot."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import selection
from jaxsparse.selection import scale_count
from jaxsparse.typing import Seed


class Sampled(NamedTuple):
    """A sparse matrix and its mask."""

    weights: Array
    mask: Array


def sample_spectrum(
    w: Array,
    kept: int,
    *,
    top: float = 0.5,
    power: float = 1.0,
    unbiased: bool = False,
    largest: float = 10.0,
    seed: Seed = 0,
) -> Sampled:
    r"""Keeps the largest entries of a kernel and a random part of the small ones, so that the leading
    spectrum suffers less than under a threshold.

    The `top` part of the budget are the largest |w|. Each other entry is kept with the chance
    $p = \min(1, c |w|^r)$, c such that as many as are left are expected; kept entries stay as they are or,
    `unbiased`, become w/p. For one number of nonzeros the threshold has the least Frobenius error; the
    error of a sample is spread over all directions, and its largest singular value can be less.

    Args:
      w: a kernel `[..., in, out]`; positions and inputs are the rows of the matrix.
      kept: how many entries are expected to be left.
      top: the part of these that is kept by magnitude, in [0, 1].
      power: r; 0 draws uniformly.
      unbiased: divide by p.
      largest: the most that a weight is multiplied with; sizes beyond it explode for tiny p.
      seed: of the draw.

    (Yao, Yu & Koutis, Neural network pruning as spectrum preserving process, 2023; we know the abstract,
    and the draw is that of the literature on matrix sparsification.)

    >>> found = sample_spectrum(jnp.arange(1.0, 9.0).reshape(2, 4), 4, top=1.0)
    >>> found.weights.tolist()
    [[0.0, 0.0, 0.0, 0.0], [5.0, 6.0, 7.0, 8.0]]

    Raises:
      ValueError: a number that cannot be kept, `top` out of range, a negative power.
    """
    if not 0 < kept <= w.size:
        raise ValueError(f"kept={kept}: must be in 1..{w.size}")
    if not 0 <= top <= 1:
        raise ValueError(f"top={top}: must be in [0, 1]")
    if power < 0 or largest < 1:
        raise ValueError(f"power={power}, largest={largest}: need power >= 0 and largest >= 1")
    size = jnp.abs(w).astype(jnp.float32)
    first = scale_count(kept, top)
    sure = selection.topk_mask(size, first)
    worth = jnp.where(sure | (size == 0), 0.0, size**power)
    worth = worth / jnp.maximum(jnp.max(worth), jnp.finfo(jnp.float32).tiny)
    left = kept - first
    # Bisection on c: the expected number rises with it.
    low, high = jnp.float32(-30.0), jnp.float32(60.0)
    for _ in range(60):
        mid = 0.5 * (low + high)
        fewer = jnp.sum(jnp.minimum(1.0, jnp.exp2(mid) * worth)) < left
        low, high = jnp.where(fewer, mid, low), jnp.where(fewer, high, mid)
    p = jnp.minimum(1.0, jnp.exp2(high) * worth) if left else jnp.zeros_like(worth)
    # Not the key itself: the weights may have been drawn from it.
    key = jax.random.fold_in(jax.random.key(selection.as_seed(seed)), 0x5BEC)
    u = jax.random.uniform(key, w.shape)
    drawn = (u < p) & ~sure
    factor = jnp.where(drawn & unbiased, 1.0 / jnp.maximum(p, 1.0 / largest), 1.0)
    mask = sure | drawn
    return Sampled(jnp.where(mask, w * factor.astype(w.dtype), jnp.zeros((), w.dtype)), mask)


def spectral_error(w: Array, sparse: Array) -> Array:
    r"""$\|W - W_s\|_2 / \|W\|_2$, largest singular values of the unfolded kernels `[..., in, out]`.

    >>> round(float(spectral_error(jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([4.0, 0.0])))), 4)
    0.25
    """
    norm = lambda x: jnp.linalg.norm(x.reshape(-1, x.shape[-1]).astype(jnp.float32), ord=2)
    return norm(w - sparse) / jnp.maximum(norm(w), jnp.finfo(jnp.float32).tiny)
