"""The mean of gradients over microbatches, with the same bits on any number of devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def mean_over_microbatches(
    fn: Callable[..., Any], count: int, axis_name: str | None = None
) -> Callable[..., Any]:
    """The mean of `fn(*args, microbatch)` over the `count` microbatches of the global batch, with the
    same bits on any number of devices.

    Floating-point sums depend on their order, and a sum over devices has another order than the sum on
    one. Here `fn` sees the same `count` pieces at the same shapes wherever they are, and the results are
    added along one balanced binary tree: pieces 0 and 1, 2 and 3, then those sums, and so on. A device
    adds the subtree of its own pieces, one at a time (it holds log2 of their number at once); devices
    add the rest by recursive doubling, where each exchanges sums with the one whose number differs in
    one bit. As a + b = b + a, all of them end with the same bits.

    XLA on CPU also rounds a product and the sum after it once or twice, depending on what it fuses them
    with: for the same bits there, add --xla_cpu_max_isa=AVX (no fused multiply-add) to XLA_FLAGS.

    Args:
      fn: returns a tree of floating-point arrays.
      count: a power of two, and a multiple of the number of devices along `axis_name`.
      axis_name: the axis of `pmap` or `shard_map` that shares the batch; `None` if it is whole.

    Returns:
      `mean(*args, batch)`, where `batch` is what this device has of the global batch.
    """

    def mean(*args):
        *fixed, batch = args
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        local = count // devices
        pieces = jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch)

        # The barriers keep the compiler from merging `fn` with what is around it, which differs with
        # the number of devices, and with it the rounding.
        def one(piece):
            return lax.optimization_barrier(fn(*lax.optimization_barrier((*fixed, piece))))

        total = _tree_sum(one, pieces, local)
        joined, split = _joined(total)
        for bit in range(devices.bit_length() - 1):
            pairs = [(i, i ^ (1 << bit)) for i in range(devices)]
            other = lax.ppermute(joined, axis_name, pairs)
            joined = jax.tree.map(jnp.add, joined, other)
        return lax.optimization_barrier(jax.tree.map(lambda x: x / count, split(joined)))

    return mean


def _joined(tree):
    """All leaves of one type as one vector, and the way back: between hosts a message costs more than
    what is in it."""
    leaves, structure = jax.tree.flatten(tree)
    dtypes = sorted({x.dtype for x in leaves}, key=str)
    of = {d: [i for i, x in enumerate(leaves) if x.dtype == d] for d in dtypes}
    vectors = [jnp.concatenate([leaves[i].ravel() for i in of[d]]) for d in dtypes]

    def split(vectors):
        out = list(leaves)
        for d, vector in zip(dtypes, vectors):
            ends = np.cumsum([leaves[i].size for i in of[d]])
            for i, part in zip(of[d], jnp.split(vector, ends[:-1])):
                out[i] = part.reshape(leaves[i].shape)
        return jax.tree.unflatten(structure, out)

    return vectors, split


def _tree_sum(fn, pieces, count):
    """The sum of `fn` over the `count` leading entries of `pieces`, along a balanced binary tree.

    Counts in binary: `sums[l]` is a finished subtree of 2^l pieces that waits for its sibling.
    """
    if count == 1:
        return fn(jax.tree.map(lambda x: x[0], pieces))
    levels = count.bit_length() - 1
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carry, inputs):
        (sums, _), (i, piece) = carry, inputs
        total, rises, kept = fn(piece), jnp.array(True), []
        for level, waiting in enumerate(sums):
            has_sibling = (i >> level) & 1 == 1
            stays, joins = rises & ~has_sibling, rises & has_sibling
            kept.append(jax.tree.map(lambda w, t: jnp.where(stays, t, w), waiting, total))  # noqa: B023
            total = jax.tree.map(lambda w, t: jnp.where(joins, w + t, t), waiting, total)  # noqa: B023
            rises = joins
        return (kept, total), None

    (_, total), _ = lax.scan(body, ([zeros] * levels, zeros), (jnp.arange(count), pieces))
    return total
