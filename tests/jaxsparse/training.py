"""Short training runs for the tests of methods."""

import functools

import jax
import numpy as np
import optax
from contracts import QUICK

import jaxsparse


def stepper(tx):
    """`step(params, state, grads) -> (params, state)`, compiled."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(tx, params):
    """The state, and the sparse network of the first forward pass."""
    state = tx.init(params)
    return jaxsparse.apply_masks(params, state), state


def masks(state):
    """The masks as NumPy arrays, by key of a flat dict of parameters."""
    return {k: np.asarray(m) for k, m in jaxsparse.get_masks(state).items()}


def matrix(shape=(10, 10), seed=0):
    """A matrix of distinct normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape)
