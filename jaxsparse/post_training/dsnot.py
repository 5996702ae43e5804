r"""DSnoT (Zhang et al., Dynamic sparse no training, ICLR 2024): which weights are kept, mended by swaps.

From any mask, weights unchanged. With m_i the mean of input i and c_i = w_i m_i, pruning changes the
expected output by E = sum of c_i over the pruned i. For each output, at most `cycles` times:

1. grow the pruned weight that takes most of E with it: the largest c_i / Var(x_i)^p with the sign of E;
2. prune the kept weight of lowest |w_i| |x_i| whose c_i has the other sign (for N:M: of its group);
3. E changes by c_pruned - c_grown.

An output is done when |E| is at most `threshold`. |E| is not the error of the output: many swaps lower it
and raise the error, so few cycles are right (about 1 % of the inputs), and with `gram=` an output's swaps
stand only if its error has not grown.

This differs from the authors' code in: 1. an output stops where a swap would raise |E|; 2. with `gram=`
swaps are taken back where they hurt; 3. weights used once are marked, where the authors move pointers
into sorted lists.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_layer
from jaxsparse.post_training._layer import Pruned, errors, keep, only
from jaxsparse.post_training.wanda import wanda_scores
from jaxsparse.structures import NM, FanIn, Structure


def dsnot_core(
    w: Array,
    mean: Array,
    squares: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    mask: Array | None = None,
    cycles: int = 50,
    threshold: float = 1e-4,
    power: float = 1.0,
    gram: Array | None = None,
) -> Pruned:
    """Swaps weights such that the expected outputs come back.

    Args:
      w: `[in, out]`.
      mean: `[in]`, the mean of each input over tokens.
      squares: `[in]`, the mean of its square.
      sparsity: the fraction of zeros, in [0, 1).
      structure: `FanIn()` (the default) or `NM(n, m)` along the inputs.
      mask: where to start; Wanda's by default.
      cycles: swaps of an output, at most.
      threshold: of |E|, in the units of the outputs. (The authors' 0.1 is of sums over 2,048 tokens.)
      power: p.
      gram: `[in, in]`: swaps of an output are taken back if they raise its error.

    Returns:
      The pruned layer, its weights those of `w`.

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure or FanIn())
    if not isinstance(only(structure, "dsnot"), FanIn | NM):
        raise ValueError(f"structure={structure}: dsnot swaps within outputs; give FanIn()")
    check_layer(w, mean=mean, squares=squares, mask=mask, gram=gram)
    check_count("cycles", cycles, 0)
    w = w.astype(jnp.float32)
    if mask is None:
        mask = keep(wanda_scores(w, squares), sparsity, structure)
    groups = structure.m if isinstance(structure, NM) else 0
    swapped, _ = swaps(w, mean, squares, mask, groups, cycles, threshold, power)
    if gram is not None:
        lost = lambda m: errors(gram.astype(jnp.float32), jnp.where(m, 0.0, w))
        swapped = jnp.where(lost(swapped) <= lost(mask), swapped, mask)
    return Pruned(jnp.where(swapped, w, 0.0), swapped)


@functools.partial(jax.jit, static_argnames=("groups",))
def swaps(w, mean, squares, mask, groups: int, cycles, threshold, power) -> tuple[Array, Array]:
    """The mask after the swaps, and E `[out]`; `groups` is m of N:M, or 0."""
    inputs, outputs = w.shape
    c = w * mean[:, None]
    variance = jnp.maximum(squares - jnp.square(mean), 1e-12)
    growth = c / variance[:, None] ** power
    keepers = wanda_scores(w, squares)
    column = jnp.arange(outputs)
    group = jnp.arange(inputs) // max(groups, 1)

    def step(state):
        mask, fresh, e, active, i = state
        sign = jnp.sign(e)
        up = jnp.where(~mask & fresh, growth * sign, -jnp.inf)
        grown = _first_largest(up)
        may_go = mask & fresh
        may_go &= (group[:, None] == group[grown]) if groups else (c * sign < 0)
        down = jnp.where(may_go, keepers, jnp.inf)
        pruned = _first_largest(-down)
        after = e - c[grown, column] + c[pruned, column]
        exists = (up[grown, column] > 0) & jnp.isfinite(down[pruned, column])
        go = active & exists & (jnp.abs(after) < jnp.abs(e))
        place = jnp.arange(inputs)[:, None]
        here = lambda index: (place == index) & go
        mask = (mask | here(grown)) & ~here(pruned)
        fresh = fresh & ~here(grown) & ~here(pruned)
        e = jnp.where(go, after, e)
        return mask, fresh, e, go & (jnp.abs(e) > threshold), i + 1

    e = jnp.sum(jnp.where(mask, 0.0, c), axis=0)
    start = (mask, jnp.ones_like(mask), e, jnp.abs(e) > threshold, 0)
    mask, _, e, _, _ = jax.lax.while_loop(lambda s: jnp.any(s[3]) & (s[4] < cycles), step, start)
    return mask, e


def _first_largest(x: Array) -> Array:
    """The first place of the largest number of each column: two plain reductions, which CPUs do several
    times faster than `argmax`."""
    place = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    top = jnp.max(x, axis=0, keepdims=True)
    return jnp.min(jnp.where(x == top, place, x.shape[0]), axis=0)
