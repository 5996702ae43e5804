r"""CHITA (Benbaki et al., Fast as CHITA: neural network pruning with combinatorial optimization, ICML 2023).

The quadratic model of the loss of `obs.py`, as a regression under an l0 constraint. With A the gradients of
n samples `[n, p]` and y = A w₀,

    minimize  Q(w) = ½ |y - A w|² + (n λ / 2) |w - w₀|²   such that at most k weights are not zero.

Nothing of size p x p is formed. The support is searched by iterative hard thresholding,
w = P_k(w - τ ∇Q), with τ = 1/L, 2/L, 4/L, ...; the weights of each support are solved exactly, and the best is
taken where Q falls. With S the support and r = A (w₀ outside of S),

    w[S] = w₀[S] + A_Sᵀ (A_S A_Sᵀ + n λ)⁻¹ r,

a system of n x n. CHITA++ takes gradients anew at growing sparsities: `stages=` of `prune`.

This differs from the authors' code in: 1. a layer is one problem, not blocks of 500 weights under a
threshold for the network; 2. steps double from 1/L, where theirs begin at the point where the support
changes; 3. weights are solved in every step, and there is no coordinate descent; 4. λ is relative.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_damping, check_layer
from jaxsparse.post_training._layer import Pruned, kept_units, matmul
from jaxsparse.structures import Structure

_LENGTHS = 8  # that are tried in each step of the search


def chita_core(
    w: Array,
    gradients: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    damping: float = 0.01,
    steps: int = 20,
) -> Pruned:
    """Searches a support by hard thresholding, then solves for its weights.

    Args:
      w: `[in, out]`.
      gradients: `[samples, in, out]`, of the loss of single samples or small batches.
      sparsity: the fraction of zeros, in [0, 1).
      structure: any; by default the whole layer is ranked.
      damping: λ, as a fraction of the mean of the gradients' squares.
      steps: of the search; 0 keeps the support of the largest weights.

    Returns:
      The pruned layer.

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure)
    check_layer(w, gradients=gradients)
    check_damping(damping)
    check_count("steps", steps, 0)
    structure.check("w", w.shape)
    units = jnp.int32(kept_units(w.shape, sparsity, structure))
    a = gradients.astype(jnp.float32).reshape(gradients.shape[0], -1)
    ridge = jnp.maximum(damping * jnp.sum(jnp.square(a)) / w.size, 1e-30)
    found = _search(w.astype(jnp.float32), a, ridge, units, steps, structure)
    return Pruned(*found, damping=jnp.float32(damping))


def objective(w: Array, start: Array, a: Array, ridge: Array | float) -> Array:
    """Q of the weights `[p]`: ½ |A (w - w₀)|² + ridge/2 |w - w₀|²."""
    d = w - start
    return 0.5 * (jnp.sum(jnp.square(matmul(a, d))) + ridge * jnp.sum(jnp.square(d)))


@functools.partial(jax.jit, static_argnames=("structure",))
def _search(w, a, ridge, units, steps, structure: Structure) -> tuple[Array, Array]:
    start = w.reshape(-1)
    small = matmul(a, a.T)
    # The largest eigenvalue of A Aᵀ, and so of AᵀA, is at most its largest row sum.
    lipschitz = jnp.max(jnp.sum(jnp.abs(small), axis=1)) + ridge
    project = lambda x: structures.topk(structure, jnp.abs(x.reshape(w.shape)), units).reshape(-1)

    def solved(mask):
        x = solve_support(start, a, ridge, mask)
        return x, mask, objective(x, start, a, ridge)

    def step(_, state):
        x = state[0]
        slope = matmul(a.T, matmul(a, x - start)) + ridge * (x - start)

        def tried(best, length):
            now = solved(project(x - length * slope))
            return jax.tree.map(lambda n, o: jnp.where(now[2] < best[2], n, o), now, best), None

        return jax.lax.scan(tried, state, 2.0 ** jnp.arange(_LENGTHS) / lipschitz)[0]

    x, mask, _ = jax.lax.fori_loop(0, steps, step, solved(project(start)))
    return x.reshape(w.shape), mask.reshape(w.shape)


def solve_support(start: Array, a: Array, ridge: Array | float, mask: Array) -> Array:
    """The minimizer of Q among weights that are zero outside of the mask; all `[p]`."""
    inside = jnp.where(mask, a, 0.0)
    system = matmul(inside, inside.T) + ridge * jnp.eye(a.shape[0], dtype=a.dtype)
    missing = matmul(a, jnp.where(mask, 0.0, start))
    answer = jax.scipy.linalg.solve(system, missing, assume_a="pos")
    return jnp.where(mask, start + matmul(inside.T, answer), 0.0)
