r"""Masks before training and between rounds: from scores by rank or by lot, from weights that moved little.

tx = jaxsparse.static(optax.adamw(1e-3), masks=keep(snip(loss, params, batches), params, 0.9))
tx = jaxsparse.static(optax.adamw(1e-3), masks=sketch(snip(loss, params, batches), params, 0.9))
tx = jaxsparse.static(optax.adamw(1e-3), masks=synflow(forward, params, x, 0.9))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import allocations, masking, selection
from jaxsparse._control import is_concrete
from jaxsparse.choose import check_sparsity, choose
from jaxsparse.initial_scores import given
from jaxsparse.leaves import find
from jaxsparse.post_training.one_shot import prune
from jaxsparse.selection import scale_count
from jaxsparse.typing import AllocationLike, Scalar, Seed, StructureLike, Targets


def keep(
    scores: Any,
    params: Any,
    sparsity: Scalar | None,
    *,
    allocation: AllocationLike = "global",
    structure: StructureLike = None,
    targets: Targets = None,
    seed: Seed = 0,
) -> Any:
    """The masks that keep the highest of given scores, by default over all layers together.

    Args:
      scores: a tree like the parameters (`initial_scores.snip`, `grasp`, `fisher`).
      params: the parameters.
      sparsity: the fraction of zeros, in [0, 1).
      allocation, structure, targets, seed: as for every method.

    Returns:
      A tree of masks, None at dense leaves, for `jaxsparse.static(masks=...)`.

    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> keep({"kernel": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, params, 0.5)["kernel"].tolist()
    [[False, True], [True, False]]

    Raises:
      ValueError: as `jaxsparse.prune`.
    """
    return prune(
        params,
        sparsity,
        score=given,
        stats=scores,
        structure=structure,
        allocation=allocation,
        targets=targets,
        seed=seed,
    )[1]


def sketch(
    scores: Any,
    params: Any,
    sparsity: Scalar,
    *,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
) -> Any:
    r"""Masks drawn by lot, a weight with a chance that grows with its score: pruning at initialisation as
    sketching.

    A mask of a linear map is a sample of its columns. Of k draws with the chances p,
    $\frac1k \sum X_i w_i / p_i$ has the error $\frac1k (\sum \|X_i\|^2 w_i^2 / p_i - \|Xw\|^2)$, least
    for $p_i \propto |w_i| \|X_i\|$; with trained weights in place of w the same bounds the error after
    training. Here k distinct weights are drawn, one after the other in proportion to their scores
    (the k largest of $\log c + G$, G Gumbel noise). They are not divided by p: the network is trained.

    Args:
      scores: a tree like the parameters, not negative; a score of 0 is never drawn.
      params: the parameters.
      sparsity: the fraction of zeros, in [0, 1).
      allocation: "global": one lot for all layers.
      targets, seed: as for every method.

    Returns:
      A tree of masks, None at dense leaves, for `jaxsparse.static(masks=...)`.

    (Bar & Giryes, Pruning at initialization - a sketching perspective, 2023; their theory is of linear
    maps.)

    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> c = {"kernel": jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])}
    >>> sketch(c, params, 0.5)["kernel"].tolist()
    [[True, False, True], [False, True, False]]

    Raises:
      ValueError: negative scores, or fewer positive ones than are to be kept.
    """
    sparsity = check_sparsity(sparsity)
    sparse = find(params, targets)
    worth = [jnp.asarray(c, jnp.float32) for c in sparse.take(scores)]
    for leaf, c in zip(sparse, worth):
        fine = jnp.all(c >= 0)
        if is_concrete(fine) and not bool(fine):
            raise ValueError(f"scores: those of {leaf.path!r} must not be negative or NaN")
    noise = [
        jax.random.gumbel(jax.random.key(leaf.salt(seed)), leaf.shape, jnp.float32)
        for leaf in sparse
    ]
    values = [jnp.log(jnp.where(c > 0, c, 1.0)) + g for c, g in zip(worth, noise)]
    where = [c > 0 for c in worth]
    rule = allocations.resolve(allocation)
    masks = choose(sparse.leaves, values, rule, sparsity, where=where)
    if is_concrete(sparsity, *masks):
        ones = [jnp.ones(leaf.shape, jnp.float32) for leaf in sparse]
        wanted = choose(sparse.leaves, ones, rule, sparsity)
        got, full = (sum(int(jnp.sum(m)) for m in ms) for ms in (masks, wanted))
        if got < full:
            raise ValueError(
                f"scores: {got} of the {full} weights that sparsity={sparsity} keeps have a positive "
                "score; ask for more sparsity, or give other scores"
            )
    return sparse.scatter(masks)


def prune_round(
    params: Any,
    masks: Any,
    fraction: float,
    *,
    start: Any = None,
    activate: float = 0.0,
    score: Literal["magnitude", "random"] = "magnitude",
    seed: Seed = 0,
) -> Any:
    r"""The masks of the next round: of the n weights that are left, $\lceil p n \rceil$ go.

    All layers compete (iterative magnitude pruning). With `activate`, that part of n is reserved for
    *selective activation* (AP): the smallest $p - q$ go by magnitude, then the q of n that moved least,
    $|w - w_{start}|$, among negative weights: without them pre-activations rise, and fewer ReLUs are dead.
    Counts are of the weights before the round. If fewer negative ones are left, those are all that go.

    Args:
      params: the weights at the end of the round.
      masks: those that were held, a tree with None at dense leaves.
      fraction: p, in (0, 1).
      start: the weights at the start of the round, for `activate`.
      activate: q, in [0, p]; the authors take 0.02.
      score: "magnitude", or "random" as a control.
      seed: of ties and random scores.

    Returns:
      Masks that are subsets of the old ones.

    (Frankle & Carbin, The lottery ticket hypothesis, 2019; Liu, Ghosh, Tan & Motani, AP: selective activation
    for de-sparsifying pruned neural networks, 2023.)

    >>> w = {"kernel": jnp.array([[1.0, -2.0, 3.0, -4.0, 5.0]])}
    >>> all_kept = {"kernel": jnp.ones((1, 5), bool)}
    >>> prune_round(w, all_kept, 0.2)["kernel"].tolist()
    [[False, True, True, True, True]]
    >>> moved = {"kernel": jnp.array([[0.0, 0.0, 0.0, -3.9, 0.0]])}
    >>> prune_round(w, all_kept, 0.4, start=moved, activate=0.2)["kernel"].tolist()
    [[False, True, True, False, True]]

    Raises:
      ValueError: fractions out of range, `activate` without `start`.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: must be in (0, 1)")
    if not 0 <= activate <= fraction:
        raise ValueError(f"activate={activate}: must be in [0, fraction={fraction}]")
    if activate and start is None:
        raise ValueError("start is missing: activate needs the weights at the start of the round")
    held = masking.at_leaves(masks, params)
    at = [i for i, m in enumerate(held) if m is not None]
    old = [masking.unpack(held[i]) for i in at]
    flat, treedef = jax.tree.flatten(params)
    ws = [flat[i] for i in at]
    n = jnp.asarray(sum(selection.count(m) for m in old), jnp.int32)
    gone = n - scale_count(n, 1.0 - fraction)  # ceil(p n), in integers
    by_move = scale_count(n, activate) if activate else jnp.int32(0)
    sizes = [jnp.abs(w).astype(jnp.float32) for w in ws]
    options: dict[str, Any] = {"where": old, "together": True}
    if score == "random":
        sizes = [jnp.zeros_like(s) for s in sizes]
        options |= {"ties": "hash", "seed": seed}
    new = selection.topk_masks(sizes, n - gone + by_move, **options)
    if activate:
        first = jax.tree.leaves(start)
        negative = [m & (w < 0) for m, w in zip(new, ws)]
        still = [-jnp.abs(w - first[i]).astype(jnp.float32) for w, i in zip(ws, at)]
        out = selection.topk_masks(still, by_move, where=negative, together=True)
        new = [m & ~o for m, o in zip(new, out)]
    found: list[Any] = [None] * len(flat)
    for i, m in zip(at, new):
        found[i] = m
    return treedef.unflatten(found)


def prune_within(
    evaluate: Callable[[Any], Any],
    params: Any,
    masks: Any,
    *,
    tolerance: float,
    steps: int = 12,
) -> Any:
    r"""The masks that the largest threshold T on |w| leaves for which the metric falls by no more than a tolerance;
    found by bisection over the sorted magnitudes, for a metric that falls as T rises.

    Args:
      evaluate: from parameters to a number, higher is better, on validation data.
      params: trained parameters.
      masks: those that are held; what they prune stays pruned.
      tolerance: what may be lost, in units of the metric.
      steps: of the bisection; each evaluates once.

    Returns:
      Masks that are subsets of the old ones. If they are the same, no more weights can go.

    (The cut of Bonetta, Ribero & Cancelliere, Regularization-based pruning of irrelevant weights, 2023.)

    >>> w = {"kernel": jnp.array([[0.1, 0.2, 3.0, 4.0]])}
    >>> ones = {"kernel": jnp.ones((1, 4), bool)}
    >>> prune_within(lambda p: p["kernel"].sum(), w, ones, tolerance=0.35)["kernel"].tolist()
    [[False, False, True, True]]

    Raises:
      ValueError: a negative tolerance, fewer steps than one.
    """
    if not tolerance >= 0 or steps < 1:
        raise ValueError(f"tolerance={tolerance}, steps={steps}: need at least 0 and 1")
    held = masking.at_leaves(masks, params)
    flat, treedef = jax.tree.flatten(params)
    at = [i for i, m in enumerate(held) if m is not None]
    if not at:
        raise ValueError("masks: no leaf has one, so there is nothing to prune within")
    sizes = [np.abs(np.asarray(flat[i], np.float64)) for i in at]
    old = [np.asarray(masking.unpack(held[i])) for i in at]
    order = np.sort(np.concatenate([s[m] for s, m in zip(sizes, old)]))
    goal = float(evaluate(masking.apply(params, masks))) - tolerance

    def cut(number: int) -> Any:
        found: list[Any] = [None] * len(flat)
        threshold = order[number] if number < order.size else np.inf
        for i, s, m in zip(at, sizes, old):
            found[i] = jnp.asarray(m & (s >= threshold))
        return treedef.unflatten(found)

    low, high = 0, order.size  # so many go: low is fine, high is not known to be
    for _ in range(steps):
        middle = (low + high + 1) // 2
        if middle in (low, high + 1):
            break
        fine = float(evaluate(masking.apply(params, cut(middle)))) >= goal
        low, high = (middle, high) if fine else (low, middle - 1)
    return cut(low)


def shuffle_within_layers(masks: Any, seed: Seed = 0) -> Any:
    """Masks of the same number of weights in every layer, at random places: the sanity check of scores
    (Frankle et al., Pruning neural networks at initialization: why are we missing the mark?, 2021).

    >>> m = {"kernel": jnp.arange(8).reshape(2, 4) < 3}
    >>> int(shuffle_within_layers(m, 1)["kernel"].sum())
    3
    """
    leaves, treedef = jax.tree.flatten(masks)
    counts = [selection.count(m) for m in leaves]
    mixed = [selection.mix(selection.as_seed(seed) + jnp.uint32(i)) for i in range(len(leaves))]
    zeros = [jnp.zeros(m.shape, jnp.float32) for m in leaves]
    return treedef.unflatten(selection.topk_masks(zeros, counts, ties="hash", seed=mixed))


__all__ = [
    "keep",
    "prune_round",
    "prune_within",
    "shuffle_within_layers",
    "sketch",
]
