"""Initial networks: budgets taken from scores, and weights rescaled to the inputs that are left."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import leaves, masking, scores, selection
from jaxsparse._counts import scale_count
from jaxsparse.allocations import Explicit, Global
from jaxsparse.choose import check_sparsity
from jaxsparse.post_training.one_shot import prune


def _explicit(by_path: dict[str, float]) -> Explicit:
    return Explicit({f"^{re.escape(path)}$": s for path, s in by_path.items()})


def score_ratios(
    params,
    sparsity,
    *,
    score: str | scores.Score = "saliency",
    grads=None,
    minimum: int = 1,
    targets: Any = None,
    seed: int = 0,
) -> Explicit:
    """The budgets of layers that a global ranking by score would leave, without its positions.

    With |w g| ("saliency") these are the SNIP ratios of Liu et al., The unreasonable effectiveness
    of random pruning, 2022: `static(..., allocation=score_ratios(params, 0.9, grads=grads))`
    draws the positions anew at random. For GraSP ratios give the product of Hessian and gradient as
    `grads` and `score=lambda w, hg: -w * hg`.

    Args:
      params: the parameters.
      sparsity: over all sparse leaves, in [0, 1).
      score, grads: as for `jaxsparse.prune`.
      minimum: the weights that every layer keeps.
      targets, seed: as for every method.

    >>> a = score_ratios({"a": jnp.ones((2, 5)), "b": jnp.full((2, 5), 3.0)}, 0.4, score="magnitude")
    >>> sorted(a.by_path.values())
    [0.0, 0.8]
    """
    _, masks = prune(
        params,
        sparsity,
        score=score,
        grads=grads,
        allocation=Global(minimum=minimum),
        targets=targets,
        seed=seed,
    )
    made = leaves.find(params, targets)
    kept = [int(np.count_nonzero(np.asarray(m))) for m in made.masks(masks)]
    return _explicit({leaf.path: 1 - k / leaf.size for leaf, k in zip(made.leaves, kept)})


def minimum_threshold(
    params, sparsity, *, minimum: float = 0.0005, targets: Any = None
) -> Explicit:
    r"""The budgets of Global MP with a minimum threshold (Gupta et al., Is complexity required for
    neural network pruning?, 2022): a global ranking by |w|, corrected so that no layer collapses.

    With $t = \lfloor minimum \cdot N \rfloor$: layers smaller than t stay dense; the sparsities of the
    others are scaled to meet the budget, and clipped at $1 - t/n_l$, in turn, until they do.
    `allocations.Global(minimum=...)` protects the t largest weights of each layer and ranks all
    others together instead.

    Args:
      params: concrete parameters.
      sparsity: S in [0, 1) over all sparse leaves.
      minimum: the fraction of all N weights that every layer keeps.
      targets: as for every method.

    Raises:
      ValueError: a budget that the minima alone exceed.
    """
    sparsity = check_sparsity(sparsity)
    made = leaves.find(params, targets)
    sizes = np.asarray([leaf.size for leaf in made.leaves], np.float64)
    total = sizes.sum()
    _, masks = prune(params, sparsity, allocation=Global(), targets=targets)
    kept = np.asarray([np.count_nonzero(np.asarray(m)) for m in made.masks(masks)], np.float64)
    least = scale_count(int(total), minimum)
    small = sizes < least
    most = np.where(small, 0.0, 1.0 - least / np.maximum(sizes, 1))
    wanted = sparsity * total
    if (most * sizes).sum() < wanted - 1:
        raise ValueError(
            f"minimum={minimum}: {least} weights in each of {len(sizes)} layers are more than "
            f"sparsity={sparsity} leaves; ask for less of one of them"
        )
    s = np.where(small, 0.0, 1.0 - kept / sizes)
    s = np.minimum(np.where((s == 0) & ~small, 1e-6, s), most)
    for _ in range(10_000):
        removed = (s * sizes).sum()
        if abs(removed - wanted) < 0.25:
            break
        s = np.minimum(s * (wanted / max(removed, 1e-12)), most)
    # Whole weights: floor everywhere, and what is missing by the largest remainders.
    zeros = np.floor(s * sizes + 1e-6)
    order = sorted(range(len(sizes)), key=lambda i: zeros[i] - s[i] * sizes[i])
    for i in order[: scale_count(int(total), sparsity) - int(zeros.sum())]:
        zeros[i] += zeros[i] < most[i] * sizes[i]
    return _explicit({leaf.path: float(z / n) for leaf, z, n in zip(made.leaves, zeros, sizes)})


def preserve_flow(masks, *, seed: int = 0):
    r"""Masks in which no neuron has lost all inputs or all outputs: where one has, a connection at
    random is added (Gadhikar et al., Why random pruning is all we need to start sparse, 2023).

    Of a kernel `[..., in, out]` every output gets an input, then every input an output; positions of
    a convolution count together. At most in + out weights are added to a kernel: ask for so many less.

    Args:
      masks: a tree of masks (`get_masks(opt_state)`), `None` at dense leaves, which stay.
      seed: of the positions that are added.

    >>> m = preserve_flow({"kernel": jnp.array([[True, True, False], [False, False, False]])})
    >>> m["kernel"].any(axis=0).tolist(), m["kernel"].any(axis=1).tolist(), int(m["kernel"].sum())
    ([True, True, True], [True, True], 3)
    """
    leaves, treedef = jax.tree.flatten(masks, is_leaf=masking.is_mask)

    def one(i, m):
        m = masking.unpack(m)
        if getattr(m, "ndim", 0) < 2:
            return m
        for side in (-1, -2):
            axes = tuple(a for a in range(m.ndim) if a != m.ndim + side)
            alone = ~jnp.any(m, axis=axes, keepdims=True)
            u = selection.position_hash(m.shape, seed + 2 * i + (side == -1))
            m |= alone & (u == jnp.max(u, axis=axes, keepdims=True))  # hashes are distinct
        return m

    return treedef.unflatten([one(i, m) for i, m in enumerate(leaves)])


def rescale_fan_in(params, masks, *, per: str = "output"):
    r"""Dense initial weights made right for the inputs that a mask leaves, and masked.

    Initialisers divide by the square root of the fan-in, so that activations keep their variance; a
    mask leaves less. Each kernel is multiplied by $\sqrt{f / f_o}$ with $f_o$ of its f inputs left at
    output o (Evci et al., Gradient flow in sparse neural networks and how lottery tickets win,
    2022), or, with `per="layer"`, by $1/\sqrt{density}$.

    Args:
      params: the parameters, drawn for the dense network.
      masks: a tree of masks (`get_masks(opt_state)`); `None` at dense leaves, which stay.
      per: "output" or "layer".

    >>> w = {"kernel": jnp.ones((4, 2))}
    >>> m = {"kernel": jnp.array([[1, 1], [0, 1], [0, 1], [0, 1]], bool)}
    >>> rescale_fan_in(w, m)["kernel"][0].tolist()
    [2.0, 1.0]

    Raises:
      ValueError: an unknown `per`.
    """
    if per not in ("output", "layer"):
        raise ValueError(f"per={per!r}: use 'output' or 'layer'")

    def one(p, m):
        m = masking.unpack(m)
        axes = tuple(range(p.ndim - 1)) if per == "output" else None
        left = jnp.mean(m, axis=axes, keepdims=True, dtype=jnp.float32)
        factor = jax.lax.rsqrt(jnp.where(left > 0, left, 1.0)).astype(p.dtype)
        return jnp.where(m, p * factor, jnp.zeros((), p.dtype))

    leaves, treedef = jax.tree.flatten(params)
    found = masking.at_leaves(masks, params)
    return treedef.unflatten([p if m is None else one(p, m) for p, m in zip(leaves, found)])
