"""Bytes: what training holds, and what a sparse network takes when it is stored."""

from __future__ import annotations

import math

import jax

from jaxsparse import masking
from jaxsparse.state import find_states


def _bytes(tree) -> int:
    """The bytes of all arrays (or `jax.ShapeDtypeStruct`s) of a tree."""
    return sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(tree))


def training_memory(params, opt_state) -> dict[str, int]:
    """Bytes that a training step keeps from one step to the next, by purpose.

    Args:
      params: the parameters, or an `nnx.Module`.
      opt_state: the optimizer state, or an `nnx.Optimizer`. Both may be shapes from
        `jax.eval_shape`: nothing is computed.

    Returns:
      Bytes of `weights`; `masks`; `raw weights`, where a method keeps any; `method`: thresholds,
      scales and counters; `inner optimizer`: all the rest of the state.

    >>> import jax.numpy as jnp, jaxsparse, optax
    >>> params = {"kernel": jnp.ones((100, 10))}
    >>> tx = jaxsparse.rigl(optax.adam(1e-3), sparsity=0.9, total_steps=1000, pack_masks=True)
    >>> training_memory(params, tx.init(params))
    {'weights': 4000, 'masks': 130, 'raw weights': 0, 'method': 4, 'inner optimizer': 8004}
    """
    states = find_states(opt_state)
    found = {
        "weights": _bytes(masking.plain(params)),
        "masks": sum(_bytes(s.masks) for s in states),
        "raw weights": sum(_bytes(s.raw) for s in states),
        "method": sum(_bytes((s.count, s.shift, s.scale, s.aux)) for s in states),
    }
    total = _bytes(masking.plain(opt_state))
    return found | {"inner optimizer": total - sum(found.values()) + found["weights"]}


def stored_bytes(size: int, nonzeros: int, itemsize: int, *, block: int = 1) -> dict[str, int]:
    """Bytes of one layer in the usual formats.

    Args:
      size: weights of the layer.
      nonzeros: those that are not zero; with `block`, those in stored blocks.
      itemsize: bytes of a weight.
      block: weights per block, for which one index is kept.

    Returns:
      `dense`; `bitmap`: a bit for every weight, and the values; `indices`: an int32 per stored
      block, and the values. `bitmap` is the smaller of the two for blocks of 1 until 31 of 32
      weights are zero.

    >>> stored_bytes(1000, 100, 4)
    {'dense': 4000, 'bitmap': 525, 'indices': 800}
    >>> stored_bytes(16384 * 4, 16384, 2, block=16384)["indices"]
    32772

    Raises:
      ValueError: more nonzeros than weights, or a part of a block.
    """
    if not 0 <= nonzeros <= size:
        raise ValueError(f"nonzeros={nonzeros}: must be between 0 and size={size}")
    if block < 1 or nonzeros % block:
        raise ValueError(f"block={block}: must divide nonzeros={nonzeros}, the stored weights")
    return {
        "dense": size * itemsize,
        "bitmap": nonzeros * itemsize + -(-size // 8),
        "indices": nonzeros * itemsize + nonzeros // block * 4,
    }
