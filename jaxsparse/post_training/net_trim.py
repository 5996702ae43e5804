r"""Net-Trim (Aghasi, Abdi & Romberg, Fast convex pruning of deep neural networks, SIAM J. Math. Data Sci. 2020).

The sparsest weights, in the sense of l1, whose answers stay within a tolerance. X `[tokens, in]` are the
inputs and Y = relu(X W + b) the answers of a layer; Ω is where Y > 0.

    minimize |U|₁  such that  |(X U + b - Y)_Ω| <= ε   and   X U + b <= 0 outside of Ω.

Where the layer was silent it only has to stay silent, which least squares do not know. A layer without
a ReLU has Ω everywhere. Solved by the alternating direction method of multipliers in scaled form,

    Z = X W₃ - U₁;   W₁ = Z, on Ω drawn to within ε of Y, elsewhere cut at -b
    W₂ = soft(W₃ - U₂, 1/ρ)
    W₃ = (XᵀX + I)⁻¹ (Xᵀ (W₁ + U₁) + W₂ + U₂)          one Cholesky factor
    U₁ += W₁ - X W₃;   U₂ += W₂ - W₃

and W₂ has exact zeros. All tokens are kept in memory: for small sets of data. The tolerance decides how
sparse the layer is; with a sparsity, the largest entries of W₂ are kept on top.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse.post_training._layer import Pruned, keep, matmul
from jaxsparse.structures import Structure


def net_trim_core(
    w: Array,
    rows: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    tolerance: float = 0.05,
    relu: bool = False,
    bias: Array | None = None,
    penalty: float = 100.0,
    steps: int = 1000,
) -> Pruned:
    """Shrinks a layer's weights in l1 while its answers stay.

    Args:
      w: `[in, out]`.
      rows: `[tokens, in]`.
      sparsity: the fraction of zeros; None keeps what is not zero at this tolerance.
      structure: with a sparsity, any.
      tolerance: ε, relative to the norm of the answers.
      relu: whether a ReLU follows the layer.
      bias: `[out]`, of the layer, for `relu=True`.
      penalty: ρ.
      steps: at most.

    Returns:
      The pruned layer.

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have; a tolerance that is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: give a positive fraction of the answers' norm")
    structure = None if sparsity is None and structure is None else structures.resolve(structure)
    w, rows = w.astype(jnp.float32), rows.astype(jnp.float32)
    b = jnp.zeros(w.shape[1]) if bias is None else bias.astype(jnp.float32)
    found = _admm(w, rows, b, jnp.float32(tolerance), relu, jnp.float32(penalty), steps)
    mask = found != 0 if structure is None else keep(jnp.abs(found), sparsity, structure)
    return Pruned(jnp.where(mask, found, 0.0), mask)


@jax.jit
def _admm(w, x, bias, tolerance, relu, rho, steps) -> Array:
    scale = 0.3 * jnp.sqrt(jnp.maximum(jnp.max(jnp.abs(matmul(x.T, x))), 1e-30))
    x = x / scale
    answer = matmul(x, w) + bias / scale
    active = (answer > 1e-6) | ~relu
    target = jnp.where(active, answer - bias / scale, 0.0)
    epsilon = tolerance * jnp.linalg.norm(jnp.where(active, answer, 0.0))
    limit = jnp.broadcast_to(-bias / scale, answer.shape)
    factor = jnp.linalg.cholesky(matmul(x.T, x) + jnp.eye(x.shape[1]))
    solve = lambda y: jax.scipy.linalg.cho_solve((factor, True), y)

    def step(state):
        _, w3, u1, u2, _, i = state
        z = matmul(x, w3) - u1
        d = jnp.where(active, z - target, 0.0)
        near = target + d * epsilon / jnp.maximum(jnp.linalg.norm(d), epsilon)
        w1 = jnp.where(active, near, jnp.minimum(z, limit))
        v = w3 - u2
        w2 = jnp.sign(v) * jnp.maximum(jnp.abs(v) - 1 / rho, 0.0)
        new = solve(matmul(x.T, w1 + u1) + w2 + u2)
        moved = jnp.linalg.norm(new - w3)
        return w2, new, u1 + w1 - matmul(x, new), u2 + w2 - new, moved, i + 1

    enough = 1e-7 * jnp.linalg.norm(w)
    start = (w, w, jnp.zeros_like(answer), jnp.zeros_like(w), jnp.float32(jnp.inf), 0)
    return jax.lax.while_loop(lambda s: (s[4] > enough) & (s[5] < steps), step, start)[0]
