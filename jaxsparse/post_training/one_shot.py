"""One-shot pruning without an optimizer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxsparse import allocations, masking, scores, structures
from jaxsparse import leaves as leaves_
from jaxsparse._control import is_concrete
from jaxsparse.choose import check_sparsity, choose
from jaxsparse.typing import AllocationLike, Scalar, Seed, StructureLike, Targets


def prune(
    params,
    sparsity: Scalar | None = None,
    *,
    score: str | scores.ScoreLike = "magnitude",
    grads: Any = None,
    stats: Any = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
):
    """Keeps the weights of highest score and sets the others to zero.

    Args:
      params: any pytree of parameters.
      sparsity: the fraction of the sparsified weights that become zero, in [0, 1); may be left out
        with an N:M structure. With `structures.Coupled` the fraction of units.
      score: "magnitude", "random", "gradient", "saliency" (these two need `grads`), or a function of
        a `scores.View` (weight `w`, gradient `g`, statistics `stats`), or of `(w, g)`.
      grads: a tree like the parameters, for scores that read gradients.
      stats: calibration statistics for scores that read them: a tree like the parameters, any value
        at a leaf, None where there is none; or a mapping from paths of leaves to values.
      structure: which patterns of zeros are allowed: None, a structure such as `NM(2, 4)`, its text
        ("2:4"), or a mapping from path patterns to these.
      allocation: how the budget is split over the layers: "uniform", "er", "erk", "global", "lamp", a
        mapping from path patterns to sparsities, or an object of `allocations`.
      targets: which leaves are sparsified, see `jaxsparse.targets`; by default kernels.
      seed: for random scores and ties.

    Returns:
      `(sparse_params, masks)`; masks are boolean, of the shape of their weights, None at dense leaves.

    >>> import jax.numpy as jnp
    >>> sparse, masks = prune({"kernel": jnp.arange(1.0, 11.0).reshape(5, 2)}, 0.8)
    >>> sparse["kernel"].ravel().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 10.0]

    Raises:
      ValueError: a sparsity out of range, a structure that does not fit, rules that match nothing,
        gradients or statistics that are not like the parameters, scores that are NaN.
    """
    kind = structures.resolve_all(structure)
    sparsity = check_sparsity(sparsity, kind)
    sparse, function = leaves_.find(params, targets, kind), scores.resolve(score)
    gs = [None] * len(sparse) if grads is None else sparse.gradients(grads, params)
    rows = zip(sparse, sparse.take(params), gs, leaves_.statistics_at(sparse, stats, params))
    values = [function(scores.View(leaf, w, g, stats=x)) for leaf, w, g, x in rows]
    for leaf, v in zip(sparse, values):
        if v.shape != leaf.shape:
            raise ValueError(
                f"score: {leaf.path!r} has shape {leaf.shape}, its scores {v.shape}; a score gives "
                "each weight a number"
            )
        if is_concrete(v) and bool(jnp.any(jnp.isnan(v))):
            raise ValueError(
                f"params: the scores of {leaf.path!r} hold NaN, which cannot be ranked; look for NaN "
                "in the weights and the gradients"
            )
    masks = choose(
        sparse.leaves,
        values,
        allocations.resolve(allocation),
        sparsity,
        ties=scores.ties(function),
        seed=seed,
    )
    tree = sparse.scatter(masks)
    return masking.apply(params, tree), tree
