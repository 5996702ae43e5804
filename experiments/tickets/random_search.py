"""Random search over masks of hidden nodes: a neutral baseline for everything that searches before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.tickets.problem import Problem
from jaxsparse import leaves, masking
from jaxsparse.allocations import Uniform
from jaxsparse.choose import choose


def node_masks(params: Any, sparsity: float, seed: Any) -> Any:
    """Masks that leave a random set of hidden nodes in each layer: whole outputs of every kernel but the last.

    Args:
      params: of a network whose kernels are `[..., in, out]`.
      sparsity: of the nodes.
      seed: may be traced.

    Returns:
      A tree of masks, None at dense leaves.
    """
    sparse = leaves.find(params, None, "channel")
    hidden = list(sparse)[:-1]
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in hidden]
    masks = choose(hidden, zeros, Uniform(), sparsity, ties="hash", seed=seed)
    return sparse.scatter([*masks, jnp.ones(list(sparse)[-1].shape, bool)])


class Search(NamedTuple):
    """The masks of the lowest score and those of the first seed, and all scores `[number]`."""

    best: Any
    first: Any
    scores: Array


def random_search(
    score: Callable[[Any], Array], params: Any, sparsity: float, *, number: int, seed: Any
) -> Search:
    """Draws node masks, and keeps those with the lowest score of the masked initial network.

    Args:
      score: from parameters to a number, the loss on a fixed batch.
      params: initial weights.
      sparsity: of the nodes.
      number: of masks.
      seed: of the first; the others follow.

    (Farahani, Random search as a baseline for sparse neural network architecture search, 2024; the score and the
    budget are ours, which its abstract leaves open.)
    """
    draws = jnp.asarray(seed) * number + jnp.arange(number)
    one = lambda s: score(masking.apply(params, node_masks(params, sparsity, s)))
    scores = jax.lax.map(one, draws)
    at = draws[jnp.argmin(scores)]
    return Search(node_masks(params, sparsity, at), node_masks(params, sparsity, draws[0]), scores)


class Comparison(NamedTuple):
    """Per seed: initial and final loss and accuracy of the best mask and of a random one."""

    first_loss: np.ndarray
    last_loss: np.ndarray
    accuracy: np.ndarray


def compare(problem: Problem, sparsity: float, *, number: int, seeds: Sequence[int]) -> Comparison:
    """Trains the best of `number` masks and a random one from the same weights, for every seed.

    Returns:
      Arrays `[2, seeds]`: the best, the random one.
    """
    x, y = problem.splits["train"]["x"][:512], problem.splits["train"]["y"][:512]

    @jax.jit
    @jax.vmap
    def run(seed):
        state = problem.init(seed)
        score = lambda p: problem.loss(p, (x, y), state.stats)
        found = random_search(score, state.params, sparsity, number=number, seed=seed)
        rows = []
        for masks in (found.best, found.first):
            held = problem.with_masks(state, masks)
            end = problem.train(held, seed, 0, problem.steps)
            numbers = problem.evaluate(end.state.params, end.state.stats)
            rows.append((score(held.params), numbers["loss"], numbers["accuracy"]))
        return jax.tree.map(lambda *v: jnp.stack(v), *rows)

    first, last, accuracy = (np.asarray(v).T for v in run(jnp.asarray(seeds)))
    return Comparison(first, last, accuracy)
