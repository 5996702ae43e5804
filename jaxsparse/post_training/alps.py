r"""ALPS (Meng et al., ADMM-based one-shot pruning for high sparsity, NeurIPS 2024).

The sparse weights nearest to a layer's outputs, by the alternating direction method of multipliers. With
gram scaled to a unit diagonal, B₀ = sqrt(diag) w, G = gram B₀, and P the projection that keeps the largest
entries of the whole layer (or of each N:M group),

    B = (gram + ρ)⁻¹ (G - V + ρ D),   D = P(B + V / ρ),   V += ρ (B - D).

ρ grows the faster the more the support of D still changes; while it has never changed enough, ρ is too
large, and the search begins anew with a fifth of it. One eigendecomposition serves every ρ. The support
found is given its least-squares weights by `refit_core`. The search is a heuristic: on orthogonal inputs,
where the largest entries are the optimum, it may exchange a few that are nearly as large.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import selection, structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_damping
from jaxsparse.post_training._layer import Pruned, damped, kept_units, matmul, only, prepare
from jaxsparse.post_training.refit import refit_core
from jaxsparse.structures import Structure

_MOST_RHO = 1e6


def alps_core(
    w: Array,
    gram: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    damping: float = 0.01,
    rho: float = 0.1,
    steps: int = 300,
    refit_steps: int = 10,
) -> Pruned:
    """Searches the support by ADMM, then solves for its weights.

    Args:
      w: `[in, out]`.
      gram: `[in, in]`.
      sparsity: the fraction of zeros of the layer, in [0, 1).
      structure: `Unstructured()`, `FanIn()` or `NM(n, m)` along the inputs.
      damping: added to the diagonal, as a fraction of its mean.
      rho: the penalty that the search begins with.
      steps: at most.
      refit_steps: of conjugate gradients on the support; more of them come closer to its optimum.

    Returns:
      The pruned layer.

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure)
    only(structure, "alps").check("w", w.shape)
    check_damping(damping)
    check_count("steps", steps)
    check_count("refit_steps", refit_steps, 0)
    units = jnp.int32(kept_units(w.shape, sparsity, structure))
    original = w
    w, gram = prepare(w, gram)
    system = damped(gram, damping)
    scale = jnp.sqrt(jnp.diagonal(system))
    start = scale[:, None] * w
    found = search(start, system / jnp.outer(scale, scale), rho, units, steps, structure)
    mask = found.support
    weights = jnp.where(mask, found.b / scale[:, None], 0.0)
    first = Pruned(weights, mask, damping=jnp.float32(damping))
    return refit_core(original, gram, first, damping=damping, steps=refit_steps, tolerance=1e-4)


class Search(NamedTuple):
    """The state of the search; `support` is that of `d`, `before` that of three steps ago."""

    b: Array
    d: Array
    v: Array
    rho: Array
    support: Array
    before: Array
    raised: Array
    done: Array
    step: Array
    residual: Array


@functools.partial(jax.jit, static_argnames=("steps", "structure"))
def search(start, gram, rho, units, steps: int, structure: Structure) -> Search:
    """ADMM from `start` `[in, out]`, `gram` with a unit diagonal, that keeps `units` in each slice of the
    structure; `residual` is the distance of B and D, relative to the size of `start`."""
    values, vectors = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0.0)
    wanted = matmul(gram, start)
    project = lambda x: structures.topk(structure, jnp.abs(x), units)
    first = project(start)
    total = selection.count(first)

    def step(s: Search) -> Search:
        right = matmul(vectors.T, wanted - s.v + s.rho * s.d)
        b = matmul(vectors, right / (values + s.rho)[:, None])
        raised_b = b + s.v / s.rho
        support = project(raised_b)
        d = jnp.where(support, raised_b, 0.0)
        v = s.v + s.rho * (b - d)
        residual = jnp.linalg.norm(b - d) / jnp.linalg.norm(start)
        now = s._replace(b=b, d=d, v=v, support=support, step=s.step + 1, residual=residual)
        return jax.lax.cond(now.step % 3 == 0, adapt, lambda s: s, now)

    def adapt(s: Search) -> Search:
        change = selection.count(s.support != s.before)
        share = change / total
        large = share > 0.005
        factor = jnp.where(share > 0.1, 1.3, jnp.where(large, 1.2, jnp.where(change > 0, 1.1, 1.0)))
        raised = s.raised | large
        restart = ~raised
        stop = (change == 0) & s.raised | (s.step > 30) & (share < 3e-4) & raised
        rho = jnp.minimum(jnp.where(restart, s.rho / 5, s.rho * factor), _MOST_RHO)
        anew = lambda a, b: jnp.where(restart, a, b)
        return s._replace(
            b=anew(start, s.b),
            d=anew(jnp.where(first, start, 0.0), s.d),
            v=anew(jnp.zeros_like(start), s.v),
            rho=rho,
            support=anew(first, s.support),
            before=anew(first, s.support),
            raised=raised,
            done=stop,
        )

    state = Search(
        start,
        jnp.where(first, start, 0.0),
        jnp.zeros_like(start),
        jnp.float32(rho),
        first,
        first,
        jnp.zeros((), bool),
        jnp.zeros((), bool),
        jnp.int32(0),
        jnp.float32(jnp.inf),
    )
    found = jax.lax.while_loop(lambda s: (s.step < steps) & ~s.done, step, state)
    support = project(found.b)
    return found._replace(support=support)
