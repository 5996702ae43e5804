r"""Masks over fixed weights: what few weights to train of a network that stays dense.

    masks = fish_mask(fisher(forward, params, batches), params, density=0.005, head="head")
    tx = anchored(optax.sgd(0.4), masks, compact=True)                                      # FISH
    tx = anchored(optax.sgd(0.1), keep(snip(loss, params, batches), params, 0.99))          # FreezeNet
    tx = three_valued(optax.sgd(0.1), kinds)                                                # zero, frozen, trained

`jaxsparse.engines.anchored` has the transformation, what is stored (`changes`, `save_seeded`), and how that
is read again.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import masking, selection
from jaxsparse.engines import anchored
from jaxsparse.methods import static
from jaxsparse.selection import scale_count
from jaxsparse.targets import check_matched, named_leaves

ZERO, FROZEN, TRAINED = 0, 1, 2


def fish_mask(fisher: Any, params: Any, density: float, *, head: str | None = None) -> Any:
    r"""The mask of a FISH fine-tuning: the $\lfloor d\, n \rfloor$ parameters of largest Fisher information, of
    all n (biases and norms too), the head among them in any case.

    Args:
      fisher: a tree like the parameters, see `initial_scores.fisher`.
      params: the pretrained parameters.
      density: d, in (0, 1); the authors take 0.005.
      head: a regular expression for the paths of the classifier, which is always trained and counted.

    Returns:
      A tree of masks for `engines.anchored`, of every leaf.

    (Sung, Nair & Raffel, Training neural networks with fixed sparse masks, 2021.)

    >>> f = {"body": jnp.array([3.0, 1.0, 2.0]), "head": jnp.array([0.0])}
    >>> m = fish_mask(f, f, 0.5, head="head")
    >>> m["body"].tolist(), m["head"].tolist()
    ([True, False, False], [True])

    Raises:
      ValueError: a density that is not in (0, 1), or less than the head alone; a pattern that matches
        nothing; another tree.
    """
    if not 0 < density < 1:
        raise ValueError(f"density={density}: must be in (0, 1); it is the trained fraction")
    paths = [path for path, _ in named_leaves(params)]
    scores, treedef = jax.tree.flatten(fisher)
    if [path for path, _ in named_leaves(fisher)] != paths:
        raise ValueError(
            f"fisher: must be a tree like the parameters, with leaves {', '.join(paths[:4])}"
        )
    if head is not None:
        check_matched("head", [head], paths)
    always = [head is not None and re.search(head, path) is not None for path in paths]
    total = sum(s.size for s in scores)
    in_head = sum(s.size for s, a in zip(scores, always) if a)
    k = scale_count(total, density) - in_head
    if k < 0:
        raise ValueError(
            f"density={density}: {scale_count(total, density)} weights of {total} are less than the head "
            f"has; the head alone is {in_head / total:.3g}"
        )
    body = [s for s, a in zip(scores, always) if not a]
    chosen = iter(selection.topk_masks(body, k, together=True))
    return treedef.unflatten(
        [jnp.ones(s.shape, bool) if a else next(chosen) for s, a in zip(scores, always)]
    )


def interleaved_masks(scores: Any, number: int, kept: int) -> list[Any]:
    """Disjoint masks of several workers: the `number * kept` parameters of highest score, those of rank i,
    i + number, ... to worker i. Their changes add up.

    Args:
      scores: a tree, such as `initial_scores.fisher`.
      number: of workers.
      kept: the weights of each.

    >>> [m["w"].tolist() for m in interleaved_masks({"w": jnp.array([4.0, 3.0, 2.0, 1.0])}, 2, 2)]
    [[True, False, True, False], [False, True, False, True]]

    Raises:
      ValueError: more weights than there are.
    """
    leaves, treedef = jax.tree.flatten(scores)
    flat = np.concatenate([np.asarray(s, np.float64).ravel() for s in leaves])
    if number < 1 or kept < 1 or number * kept > flat.size:
        raise ValueError(
            f"number={number}, kept={kept}: need at least 1 of each, and {flat.size} at most together"
        )
    order = np.argsort(-flat, kind="stable")[: number * kept]
    ends = np.cumsum([s.size for s in leaves])[:-1]
    masks = []
    for worker in range(number):
        mask = np.zeros(flat.size, bool)
        mask[order[worker::number]] = True
        parts = [m.reshape(s.shape) for m, s in zip(np.split(mask, ends), leaves)]
        masks.append(treedef.unflatten([jnp.asarray(m) for m in parts]))
    return masks


def three_valued(
    inner: optax.GradientTransformation, kinds: Any
) -> optax.GradientTransformationExtraArgs:
    """Weights of three kinds: `ZERO`, `FROZEN` at their value, `TRAINED`.

    Without frozen ones it is pruning (`static`), without zeros freezing (`engines.anchored`), without
    either the inner optimizer, each bit by bit.

    Args:
      inner: the optimizer of the trained weights.
      kinds: a tree of int8 arrays like the parameters; None at leaves that are trained whole.

    Returns:
      The transformation; `get_masks` of its state is what is not zero.

    (Wimmer, Mehnert & Condurache, Dimensionality reduced training by pruning and freezing parts of a deep
    neural network, a survey, 2023.)

    >>> params = {"kernel": jnp.array([[5.0, 6.0, 7.0]])}
    >>> tx = three_valued(optax.sgd(1.0), {"kernel": jnp.array([[ZERO, FROZEN, TRAINED]], jnp.int8)})
    >>> updates, _ = tx.update({"kernel": jnp.ones((1, 3))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[0.0, 6.0, 6.0]]

    Raises:
      ValueError: another kind than these three.
    """
    for path, k in named_leaves(kinds, is_leaf=masking.is_mask):
        if k is not None and not np.isin(np.asarray(k), (ZERO, FROZEN, TRAINED)).all():
            raise ValueError(f"kinds: {path!r} must hold 0 (zero), 1 (frozen) and 2 (trained) only")
    trained = jax.tree.map(lambda k: k == TRAINED, kinds)
    return static(anchored(inner, trained), masks=jax.tree.map(lambda k: k > ZERO, kinds))
