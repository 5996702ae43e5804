r"""Proximal operators and projections on codes: $v, t \mapsto \arg\min_x \frac12\|x - v\|^2 + t\,R(x)$.

Those of `engines.penalties` act on the weights of a network and know its units; these act on the last
axis of an array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.selection import topk_mask


def soft(v: Array, t: Array | float) -> Array:
    r"""$R = \|x\|_1$: $sign(v)\max(|v| - t, 0)$.

    >>> soft(jnp.array([2.0, -0.25, -1.0]), 0.5).tolist()
    [1.5, 0.0, -0.5]
    """
    return v - jnp.clip(v, -t, t)


def soft_nonnegative(v: Array, t: Array | float) -> Array:
    r"""$R = \|x\|_1$ over $x \ge 0$: $\max(v - t, 0)$.

    >>> soft_nonnegative(jnp.array([2.0, -3.0]), 0.5).tolist()
    [1.5, 0.0]
    """
    return jnp.maximum(v - t, 0)


def hard(v: Array, t: Array | float) -> Array:
    r"""$R = \|x\|_0$: keeps $|v| > \sqrt{2t}$.

    >>> hard(jnp.array([2.0, -0.9]), 0.5).tolist()
    [2.0, 0.0]
    """
    return jnp.where(v * v > 2 * t, v, 0)


def group_soft(v: Array, t: Array | float, size: int) -> Array:
    r"""$R = \sum_g \|x_g\|_2$ over runs of `size` neighbours: $v_g \max(1 - t/\|v_g\|, 0)$.

    >>> [f"{x:.1f}" for x in group_soft(jnp.array([3.0, 4.0, 0.1, 0.0]), 1.0, 2)]
    ['2.4', '3.2', '0.0', '0.0']

    Raises:
      ValueError: a size that does not divide the last axis.
    """
    if v.shape[-1] % size:
        raise ValueError(f"size={size} does not divide the {v.shape[-1]} coefficients")
    groups = v.reshape(*v.shape[:-1], -1, size)
    norm = jnp.linalg.norm(groups, axis=-1, keepdims=True)
    t = jnp.asarray(t)[..., None] if jnp.ndim(t) else t
    scale = jnp.where(norm > t, 1 - t / jnp.where(norm > 0, norm, 1), 0)
    return (groups * scale).reshape(v.shape)


def fused(v: Array, t: Array | float, steps: int = 200) -> Array:
    r"""$R = \sum_i |x_{i+1} - x_i|$ (total variation), by `steps` accelerated projected gradient steps on its
    dual: $x = v - D^T u$ with $|u| \le t$.

    >>> [f"{x:.1f}" for x in fused(jnp.array([0.0, 0.0, 4.0, 4.0]), 1.0)]
    ['0.5', '0.5', '3.5', '3.5']

    Source: Condat, "A direct algorithm for 1-D total variation denoising", 2013, for the dual; the
    iteration is that of Beck & Teboulle, 2009.
    """
    pad = [(0, 0)] * (v.ndim - 1)
    adjoint = lambda u: -jnp.diff(jnp.pad(u, [*pad, (1, 1)]), axis=-1)

    def step(_, carry):
        u, z, momentum = carry
        new = jnp.clip(z + jnp.diff(v - adjoint(z), axis=-1) / 4, -t, t)
        after = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        return new, new + (momentum - 1) / after * (new - u), after

    u = jnp.zeros_like(v[..., 1:])
    u, _, _ = jax.lax.fori_loop(0, steps, step, (u, u, jnp.ones((), v.dtype)))
    return v - adjoint(u)


def keep_largest(v: Array, k: Array | int) -> Array:
    r"""The projection onto $\|x\|_0 \le k$: the k entries of largest magnitude of the last axis, exactly k of
    them (if so many are not 0), ties to the lower position.

    >>> keep_largest(jnp.array([[3.0, -4.0, 1.0]]), 2).tolist()
    [[3.0, -4.0, 0.0]]
    """
    keep = topk_mask(jax.lax.stop_gradient(v), k, axis=-1, score=jnp.abs)
    return jnp.where(keep, v, 0)


def select_soft(v: Array, t: Array | float, k: Array | int) -> Array:
    r"""The soft threshold with support selection: the k largest entries are kept as they are if above the
    threshold, all others shrink. The choice is a constant for gradients.

    >>> select_soft(jnp.array([3.0, -2.0, 0.25]), 0.5, 1).tolist()
    [3.0, -1.5, 0.0]

    Source: Chen et al., "Theoretical linear convergence of unfolded ISTA", 2018.
    """
    return _select(v, t, topk_mask(jax.lax.stop_gradient(v), k, axis=-1, score=jnp.abs))


def _select(v: Array, t: Array | float, largest: Array) -> Array:
    return jnp.where(largest & (jnp.abs(v) > t), v, soft(v, t))
