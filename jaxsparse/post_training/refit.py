r"""Masked least squares: the best values for the weights that a mask keeps.

For each output, with S the inputs that its mask keeps,

    min over v of |(w - v)ᵀ X|²,  v = 0 outside of S:   gram[S, S] v[S] = (gram w)[S].

Solved for all outputs at once by conjugate gradients whose residual is masked in each step
(preconditioned with the diagonal): products of `[in, in]` with `[in, out]` alone. It upgrades the mask of
any method, and on small layers matters as much as how the mask was chosen. An output whose error would
grow, by rounding, keeps the weights that it had.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_damping, check_layer
from jaxsparse.post_training._layer import Pruned, damped, errors, matmul, prepare


def refit_core(
    w: Array,
    gram: Array,
    pruned: Pruned,
    *,
    damping: float = 0.01,
    steps: int = 100,
    tolerance: float = 1e-6,
) -> Pruned:
    """Solves the kept weights of a layer anew; its error never grows.

    Args:
      w: `[in, out]`, the dense layer.
      gram: `[in, in]`.
      pruned: a pruned layer, where the search begins.
      damping: added to the diagonal, as a fraction of its mean.
      steps: of conjugate gradients, at most.
      tolerance: of the residual of each output, relative to its right-hand side.

    Returns:
      The layer with the same mask and other weights.

    >>> gram = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    >>> pruned = Pruned(jnp.array([[2.0], [0.0]]), jnp.array([[True], [False]]))
    >>> refit_core(jnp.array([[2.0], [1.0]]), gram, pruned, damping=0.0).weights.tolist()
    [[2.5], [0.0]]
    """
    check_layer(w, gram=gram, mask=pruned.mask)
    check_damping(damping)
    check_count("steps", steps, 0)
    weights = _solve(w, gram, pruned.weights, pruned.mask, jnp.float32(damping), steps, tolerance)
    return pruned._replace(weights=weights, codes=None, scales=None)


@jax.jit
def _solve(w, gram, start, mask, damping, steps, tolerance) -> Array:
    w, gram = prepare(w, gram)
    start = jnp.where(mask, start.astype(jnp.float32), 0.0)
    system = damped(gram, damping)
    inverse = 1.0 / jnp.diagonal(system)[:, None]
    wanted = jnp.where(mask, matmul(system, w), 0.0)
    enough = tolerance * jnp.linalg.norm(wanted, axis=0)
    dot = lambda a, b: jnp.sum(a * b, axis=0)
    over = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

    def unfinished(state):
        _, r, _, _, i = state
        return (i < steps) & jnp.any(jnp.linalg.norm(r, axis=0) > enough)

    def step(state):
        v, r, p, rz, i = state
        q = jnp.where(mask, matmul(system, p), 0.0)
        a = over(rz, dot(p, q))
        v, r = v + a * p, r - a * q
        z = inverse * r
        new = dot(r, z)
        return v, r, z + over(new, rz) * p, new, i + 1

    r = wanted - jnp.where(mask, matmul(system, start), 0.0)
    z = inverse * r
    v = jax.lax.while_loop(unfinished, step, (start, r, z, dot(r, z), 0))[0]
    better = errors(system, w - v) <= errors(system, w - start)  # False for NaN
    return jnp.where(better, v, start)
