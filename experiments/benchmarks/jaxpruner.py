"""JaxPruner's algorithms, written out for comparison (Lee et al., JaxPruner, 2023).

A mask is an argsort and a scatter per leaf, stored as `uint8` and multiplied to the parameters; an
N:M mask takes two argsorts; its straight-through method makes its masks anew at every step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxsparse.state import SparseState


def argsort_mask(x, k):
    """JaxPruner's unstructured mask: indices in descending order, ones scattered to the first k."""
    order = jnp.argsort(x.ravel())[::-1]
    kept = (jnp.arange(x.size) < k).astype(jnp.uint8)
    return jnp.zeros(x.size, jnp.uint8).at[order].set(kept).reshape(x.shape)


def argsort_nm_mask(x, n: int, m: int):
    """JaxPruner's N:M mask: ranks within groups by two argsorts."""
    groups = x.reshape(-1, m)
    ranks = jnp.argsort(jnp.argsort(groups, axis=1), axis=1)
    return (ranks >= m - n).reshape(x.shape)


def pruning(inner, sparsity: float, every: int) -> optax.GradientTransformationExtraArgs:
    """Parameters times uint8 masks, sorted at every `every`-th step."""

    def masks_of(params):
        mask = lambda p: argsort_mask(jnp.abs(p), p.size - int(sparsity * p.size))
        return jax.tree.map(lambda p: mask(p) if p.ndim > 1 else None, params)

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return SparseState(zero, masks_of(params), None, None, None, inner.init(params), None)

    def update(updates, state, params=None, **extra):
        assert params is not None
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        after = optax.apply_updates(params, updates)
        masks = jax.lax.cond(state.count % every == 0, lambda: masks_of(after), lambda: state.masks)
        product = lambda m, p: p if m is None else p * m
        after = jax.tree.map(product, masks, after, is_leaf=lambda m: m is None)
        updates = jax.tree.map(jnp.subtract, after, params)
        return updates, state._replace(count=state.count + 1, masks=masks, inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def straight_through(inner, sparsity: float) -> optax.GradientTransformationExtraArgs:
    """The straight-through estimator, with an argsort per leaf at every step."""

    def project(z):
        if z.ndim < 2:
            return z
        return z * argsort_mask(jnp.abs(z), z.size - int(sparsity * z.size))

    def init(params):
        return jax.tree.map(jnp.copy, params), inner.init(params)

    def update(updates, state, params=None, **extra):
        raw, inner_state = state
        updates, inner_state = inner.update(updates, inner_state, raw, **extra)
        raw = optax.apply_updates(raw, updates)
        updates = jax.tree.map(lambda z, p: project(z) - p, raw, params)
        return updates, (raw, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
