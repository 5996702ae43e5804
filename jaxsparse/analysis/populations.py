"""Populations of sparse models: many networks pruned at once, and how they relate to their parents.

(Honegger, Schürholt & Borth, Sparsified model zoo twins: investigating populations of sparsified neural network
models, 2023.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse.leaves import find
from jaxsparse.post_training.one_shot import prune
from jaxsparse.typing import AllocationLike, Targets


def prune_population(
    population: Any,
    sparsity: float,
    *,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
) -> tuple[Any, Any]:
    """Prunes every network by magnitude, in one program.

    Args:
      population: parameters with a leading axis of networks at every leaf.
      sparsity: the fraction of zeros, in [0, 1).
      allocation, targets: as for every method; paths and shapes are those of one network.

    Returns:
      The sparse population, and its masks (None at dense leaves).

    >>> import jax.numpy as jnp
    >>> two = {"kernel": jnp.array([[[1.0, 2.0]], [[4.0, 3.0]]])}
    >>> prune_population(two, 0.5)[0]["kernel"].tolist()
    [[[0.0, 2.0]], [[4.0, 0.0]]]

    Raises:
      ValueError: as `jaxsparse.prune`; a population without a leading axis.
    """
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(population)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "population: every leaf needs the same leading axis of networks; found "
            f"{sorted(sizes)}; stack parameters with jax.tree.map(lambda *x: jnp.stack(x), *networks)"
        )
    one = lambda p: prune(p, sparsity, allocation=allocation, targets=targets)
    return jax.jit(jax.vmap(one))(population)


def layer_sparsity(population: Any, *, targets: Targets = None) -> dict[str, np.ndarray]:
    """The fraction of zeros of each sparse layer, for every network: `[networks]` by path.

    >>> layer_sparsity({"kernel": np.array([[[0.0, 2.0]], [[4.0, 3.0]]])})["kernel"].tolist()
    [0.5, 0.0]
    """
    first = jax.tree.map(lambda x: x[0], population)
    sparse = find(first, targets)
    rows = zip(sparse.leaves, sparse.take(population))
    zeros = lambda w: np.mean(np.asarray(w) == 0, axis=tuple(range(1, np.ndim(w))))
    return {leaf.path: zeros(w) for leaf, w in rows}


class Relation(NamedTuple):
    """Of networks and their parents: the fraction of examples with equal predictions, of all and of those that the
    parent gets wrong (NaN: it gets none wrong), per network; and the correlation of accuracies over the
    population."""

    agreement: np.ndarray
    on_errors: np.ndarray
    correlation: float


def relation(parents, children, labels) -> Relation:
    """How sparse networks relate to the ones that they were pruned from.

    High agreement alone may be high accuracy; on the errors of the parent it is not.

    Args:
      parents, children: predictions, integers `[networks, examples]`, row by row of one family.
      labels: the truth, `[examples]`.

    >>> found = relation([[0, 1, 1], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]], [0, 0, 1])
    >>> found.agreement.round(3).tolist(), found.on_errors.tolist()
    ([0.667, 1.0], [1.0, nan])

    Raises:
      ValueError: shapes that do not fit.
    """
    a, b, truth = np.asarray(parents), np.asarray(children), np.asarray(labels)
    if a.shape != b.shape or a.ndim != 2 or truth.shape != a.shape[1:]:
        raise ValueError(
            f"predictions {a.shape} and {b.shape}, labels {truth.shape}: give [networks, examples] twice, "
            "and [examples]"
        )
    same, wrong = a == b, a != truth
    count = wrong.sum(axis=1)
    errors = np.where(count > 0, (same & wrong).sum(axis=1) / np.maximum(count, 1), np.nan)
    accuracies = (a == truth).mean(axis=1), (b == truth).mean(axis=1)
    varied = len(a) > 1 and min(np.std(x) for x in accuracies) > 0
    correlation = float(np.corrcoef(*accuracies)[0, 1]) if varied else float("nan")
    return Relation(same.mean(axis=1), errors, correlation)
