"""The compact lists of a mask, made under `jit`: codes of blocks, and how lists come from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.block_sparse_attention.rules import Rule

# A code per block: dropped, every pair visible, or FULL + 1 + i: where rules[i] holds; with the
# flag SEGMENTS also where the segment ids agree (see `mask.within_segments`).
DROPPED, FULL, SEGMENTS = 0, 1, 64
RULE_MASK = SEGMENTS - 1
# A list entry is index << CODE_BITS | code; with int32, a mask has at most 2^24 blocks per head.
CODE_BITS = 7
CODE_MASK = (1 << CODE_BITS) - 1
_PADDING = np.int32(2**31 - 1)
# Rows of up to this many scores are ranked by comparing all pairs (a single pass, a quarter of the
# time at 64); longer ones by a search for the k-th largest, bit by bit.
PAIRWISE = 128


def module_of(x: Any) -> Any:
    """numpy for numpy arrays (masks made outside `jit` compile nothing), else jax.numpy."""
    return np if isinstance(x, np.ndarray) else jnp


def visible(codes: Array, rules: Sequence[Rule], q: Array, k: Array) -> Array:
    """Elementwise: may position q see position k, given the code of their block?"""
    codes = codes & RULE_MASK
    seen = codes == FULL
    for i, rule in enumerate(rules):
        seen = seen | ((codes == FULL + 1 + i) & rule(q, k))
    return seen


def compact(codes: Array | np.ndarray, capacity: int) -> tuple[Any, Any, Any]:
    """Starts `[b, h, n + 1]` and entries `[b, h, capacity]` of the kept blocks in row order, as many
    as fit, and which blocks come before those that do not.

    One sort of integers: on a TPU a tenth of the cost of a scatter. In numpy for numpy codes.
    """
    xp = module_of(codes)
    b, h, n, m = codes.shape
    counts = xp.sum(codes != DROPPED, -1, dtype=np.int32)
    starts = xp.cumsum(xp.pad(counts, ((0, 0), (0, 0), (1, 0))), -1, dtype=np.int32)
    flat = codes.reshape(b, h, n * m).astype(np.int32)
    index = xp.arange(n * m, dtype=np.int32).reshape(1, 1, -1)
    keys = xp.where(flat != DROPPED, index << CODE_BITS | flat, _PADDING)
    # A stable sort would carry positions along, twice the work.
    ordered = np.sort(keys, -1) if xp is np else lax.sort(keys, is_stable=False)
    first = ordered[..., :capacity]
    entries = (first >> CODE_BITS) % m << CODE_BITS | first & CODE_MASK
    entries = xp.where(first == _PADDING, 0, entries).astype(np.int32)
    fits = keys < ordered[..., capacity:][..., :1] if capacity < n * m else keys < _PADDING
    return starts, entries, fits.reshape(codes.shape)


def best(scores: Array, k: Array) -> Array:
    """The k largest of each row as booleans; ties to the lower index, never -inf or NaN."""
    eligible = scores > -jnp.inf
    k = jnp.broadcast_to(k, scores.shape[:-1])[..., None]
    n = scores.shape[-1]
    if n <= PAIRWISE:
        # All rows of all heads along the last axis: full lanes, and no sum across them. What is not
        # eligible comes before nothing that is.
        across = jnp.moveaxis(scores, -1, 0).reshape(n, -1)
        mine, other = across[:, None], across[None]
        earlier = (np.arange(n)[:, None] > np.arange(n))[..., None]
        rank = jnp.sum(jnp.where(earlier, other >= mine, other > mine), 1, dtype=jnp.int32)
        return (jnp.moveaxis(rank.reshape(n, *scores.shape[:-1]), 0, -1) < k) & eligible
    scores = jnp.where(eligible, jnp.where(scores == 0, 0.0, scores), -jnp.inf)  # -0 equals 0
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    # Unsigned integers in the order of the floats.
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def refine(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.sum(order >= candidate, -1, keepdims=True, dtype=jnp.int32) >= k
        return jnp.where(enough, candidate, threshold)

    threshold = lax.fori_loop(0, 32, refine, jnp.zeros_like(order[..., :1]))
    above = order > threshold
    ties = order == threshold
    room = k - jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
    ties &= jnp.cumsum(ties, -1, dtype=jnp.int32) <= room
    return (above | ties) & eligible
