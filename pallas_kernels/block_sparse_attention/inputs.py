"""What one call of an implementation computes with, after `api.check`."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_sparse_attention.mask import BlockMask
from pallas_kernels.block_sparse_attention.rules import Everything

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that masked - masked is not NaN
FLOOR = -0.5e30  # the running maximum never goes below: exp(MASKED - FLOOR) is exactly 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "mask", "segments"],
    meta_fields=["scale", "softcap", "skip_below"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of `block_sparse_attention`; only q, k and v have gradients.

    Attributes:
      q, k, v: `[batch, heads or kv_heads, length, dim]`.
      mask: its lists; blocks that segments cut are flagged (`mask.within_segments`).
      segments: int32 ids `[batch, q_len]` and `[batch, kv_len]`, or None.
      scale, softcap: static numbers; a softcap of None is none.
      skip_below: powers of two below the running maximum from which a block is skipped; None: none is.
    """

    q: Array
    k: Array
    v: Array
    mask: BlockMask
    segments: tuple[Array, Array] | None
    scale: float
    softcap: float | None
    skip_below: float | None = None

    @property
    def precision(self) -> str | None:
        """Products of float32 are exact to float32; those of bfloat16 are anyway."""
        return "highest" if self.q.dtype == jnp.float32 else None

    @property
    def hides_pairs(self) -> bool:
        """Whether kept blocks have pairs that do not see each other (other than behind the end of
        the keys, which is padded with zeros)."""
        rules = [rule for rule in self.mask.rules if not isinstance(rule, Everything)]
        return bool(rules) or self.segments is not None


def pad_to(x: Array, axis: int, length: int, value: float = 0) -> Array:
    """x with its axis extended to `length`."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)
