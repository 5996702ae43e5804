r"""OBC's ExactOBS (Frantar, Singh & Alistarh, Optimal brain compression, NeurIPS 2022).

Optimal brain surgery on the least-squares problem of each output, one weight at a time and exactly. With
G the inverse of the (damped) Gram matrix restricted to the weights that are left,

    j = argmin w_j² / G_jj                       the removal that costs least
    w -= G[:, j] w_j / G_jj                      the best answer of the others
    G -= G[:, j] G[j, :] / G_jj                  removes j from the inverse

The costs of all removals add up to the error, and the weights left solve masked least squares. A layer's
budget is split over its outputs by the costs of all their removals: an output is cut after as many as
it has among the cheapest of the layer. (Costs within an output are not monotone, so it is the number that
counts, not which they are.)

Time grows as out * in³, memory as in² times the outputs that are treated together: for narrow layers, and
as the measure of what other methods lose.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import _counts, selection, structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_damping
from jaxsparse.post_training._layer import (
    Pruned,
    inverse_factor,
    kept_units,
    matmul,
    only,
    prepare,
)
from jaxsparse.structures import NM, Structure, Unstructured


def exact_obs_core(
    w: Array,
    gram: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    damping: float = 0.01,
    together: int = 32,
) -> Pruned:
    """Removes weights one by one, the cheapest first, and answers each with all others.

    Args:
      w: `[in, out]`.
      gram: `[in, in]`.
      sparsity: the fraction of zeros, in [0, 1).
      structure: `Unstructured()`, `FanIn()` (as many from every output) or `NM(n, m)` along inputs.
      damping: added to the diagonal, as a fraction of its mean.
      together: outputs that are treated at once, each with an inverse `[in, in]` of its own.

    Returns:
      The pruned layer, and the damping that was needed.

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure)
    only(structure, "exact_obs").check("w", w.shape)
    check_damping(damping)
    check_count("together", together)
    units = kept_units(w.shape, sparsity, structure)
    w, gram = prepare(w, gram)
    u, used = jax.jit(inverse_factor)(gram, damping)
    inputs, outputs = w.shape
    run = functools.partial(remove, w, matmul(u.T, u), structure=structure, together=together)
    if isinstance(structure, NM):
        removals = jnp.full(outputs, inputs // structure.m * (structure.m - structure.n))
    elif isinstance(structure, Unstructured):
        costs = run(jnp.full(outputs, inputs))[2]
        zeros = _counts.scale_count(inputs * outputs, sparsity)
        removals = selection.count(selection.topk_mask(-costs, zeros), axis=0)
    else:
        removals = jnp.full(outputs, inputs - units)
    weights, mask, _ = run(removals)
    return Pruned(weights, mask, damping=used)


@functools.partial(jax.jit, static_argnames=("structure", "together"))
def remove(
    w: Array, inverse: Array, removals: Array, *, structure: Structure, together: int
) -> tuple[Array, Array, Array]:
    """Removes as many weights of each output as `removals` `[out]` says.

    Returns:
      The weights and the mask `[in, out]`, and what each step cost, `[in, out]` in the order of steps.
    """
    inputs = w.shape[0]
    groups = structure.m if isinstance(structure, NM) else 1
    most = structure.m - structure.n if isinstance(structure, NM) else 1

    def one(column):
        w, count = column

        def step(state, i):
            w, inverse, left = state
            gone = jnp.sum(~left.reshape(-1, groups), axis=1, keepdims=True) >= most
            free = left & ~jnp.broadcast_to(gone, (inputs // groups, groups)).reshape(-1)
            diagonal = jnp.where(left, jnp.maximum(jnp.diagonal(inverse), 1e-30), 1.0)
            costs = jnp.where(free, jnp.square(w) / diagonal, jnp.inf)
            j = jnp.argmin(costs)
            go = (i < count) & free[j]
            after = left & (jnp.arange(inputs) != j)
            row = inverse[j] / diagonal[j]
            now = (
                jnp.where(after, w - row * w[j], 0.0),
                jnp.where(after[:, None] & after, inverse - jnp.outer(inverse[:, j], row), 0.0),
                after,
            )
            state = jax.tree.map(lambda a, b: jnp.where(go, a, b), now, state)
            return state, jnp.where(go, costs[j], jnp.inf)

        (w, _, left), costs = jax.lax.scan(
            step, (w, inverse, jnp.ones(inputs, bool)), jnp.arange(inputs)
        )
        return w, left, costs

    found = jax.lax.map(one, (w.T, removals), batch_size=together)
    return tuple(x.T for x in found)
