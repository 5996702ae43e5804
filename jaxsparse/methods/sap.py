"""SAP: how much to prune in each round follows from how compressible the weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxsparse import schedules, selection
from jaxsparse._counts import is_concrete
from jaxsparse.engines import Step, hold_masks
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register


def pq_index(
    w: Array, *, p: float = 0.5, q: float = 1.0, where: Any = None,
    axis: int | Sequence[int] | None = None,
) -> Array:  # fmt: skip
    r"""The PQ index of sparsity, $I = 1 - d^{1/q - 1/p}\, \|w\|_p / \|w\|_q$, in [0, 1).

    0 for a vector of equal magnitudes, $1 - k/d$ (p = 1/2, q = 1) for k equal ones among d; it does
    not change when w is scaled or repeated. (Diao et al., Pruning deep neural networks from a
    sparsity perspective, 2023.)

    Args:
      w: any array.
      p, q: 0 < p < q.
      where: the d entries that count (bool), such as those still kept; all by default. 0 if none.
      axis: the axes over which it is taken.

    >>> round(float(pq_index(jnp.array([1.0, 2.0, 3.0, 4.0]))), 6)
    0.055586

    Raises:
      ValueError: p or q out of order.
    """
    _check_pq(p, q)
    where = jnp.ones(w.shape, bool) if where is None else where
    size = jnp.abs(w).astype(jnp.float32)
    top = jnp.max(jnp.where(where, size, 0.0), axis=axis, keepdims=True)
    x = jnp.where(where, size / jnp.where(top > 0, top, 1.0), 0.0)  # means do not overflow
    d = jnp.maximum(jnp.sum(where, axis=axis, dtype=jnp.int32), 1)
    a = (jnp.sum(x**p, axis=axis) / d) ** (1 / p)
    b = (jnp.sum(x**q, axis=axis) / d) ** (1 / q)
    return jnp.where(b > 0, jnp.clip(1.0 - a / jnp.where(b > 0, b, 1.0), 0.0, 1.0), 0.0)


def gini_index(w: Any) -> float:
    r"""The Gini index of the magnitudes, an index of sparsity in [0, 1):

    $$\frac{\sum_i (2i - n - 1)\, |w|_{(i)}}{n \sum_i |w|_i}, \qquad |w|_{(1)} \le |w|_{(2)} \le \dots$$

    0 for equal magnitudes, $1 - k/n$ for k equal ones among n, like `pq_index` (p = 1/2, q = 1). It
    needs all weights in order, so it is computed on the host, in float64. (Hurley & Rickard, Comparing
    measures of sparsity, 2009.)

    >>> gini_index(jnp.array([1.0, 2.0, 3.0, 4.0])), gini_index(jnp.array([0.0, 5.0, 0.0, 0.0]))
    (0.25, 0.75)
    """
    size = np.sort(np.abs(np.asarray(w, np.float64)).ravel())
    n, total = size.size, size.sum()
    ranks = 2.0 * np.arange(1, n + 1) - n - 1
    return float(ranks @ size / (n * total)) if total > 0 else 0.0


def _check_pq(p, q):
    if not 0 < p < q:
        raise ValueError(f"p={p}, q={q}: need 0 < p < q")


def _prunable(index: Array, d: Array, p, q, eta, gamma, beta) -> Array:
    """How many of d weights a round prunes: c = floor(d min(gamma (1 - m/d), beta))."""
    n = d.astype(jnp.float32)
    m = n * (1 + eta) ** (-q / (q - p)) * (1.0 - index) ** (p * q / (q - p))
    m = jnp.ceil(m * (1 - 1e-6))  # m = k exactly for k equal weights, whatever the rounding
    part = jnp.minimum(gamma * (1.0 - m / jnp.maximum(n, 1.0)), beta)
    return jnp.clip(jnp.floor(n * part + 1e-3), 0, n).astype(jnp.int32)


@register(
    "sap",
    reference="Diao et al., Pruning deep neural networks from a sparsity perspective, 2023",
    controls_sparsity=False,
    dynamics="gradual",
    structures="unstructured",
    dense_phase="dense before begin_step; sparser by as much as the PQ index allows",
    starts_dense=True,
)
def sap(
    inner: optax.GradientTransformation,
    *,
    total_steps: Any,
    scope: Literal["global", "layer", "neuron"] = "global",
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    rewind: bool = True,
    update_every: Any = 100,
    begin_step: Any = None,
    end_step: Any = None,
    targets: Any = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes in rounds as many weights as the PQ index I of those that are left says can go, so
    that the sparsity is found, not asked for. With d weights left in a scope:

    $$m = d\,(1 + \eta)^{-q/(q-p)} (1 - I)^{pq/(q-p)}, \qquad
      c = \lfloor d \min(\gamma (1 - m/d), \beta) \rfloor$$

    and the c smallest |w| are pruned for good; then the others return to their values at `init`
    with a fresh inner state, and train again.

    Args:
      inner: the optimizer of the weights.
      total_steps: the length of the run, in steps.
      scope: where weights compete: the network, each layer, or the inputs of each neuron.
      p, q, eta, gamma, beta: as above; more eta or gamma prunes more.
      rewind: whether weights return to their values at `init` (which are kept); dense leaves do not.
      update_every: the steps of a round; the authors train 200 epochs in each of 15 to 30 rounds.
      begin_step, end_step: the first cut (`update_every`) and the last (75 % of the run).
      targets, pack_masks: see the guide of options.

    >>> import jaxsparse
    >>> tx = jaxsparse.sap(optax.sgd(0.1), total_steps=1000, update_every=100)

    Raises:
      ValueError: an option or a step out of range.
    """
    _check_pq(p, q)
    if scope not in ("global", "layer", "neuron"):
        raise ValueError(f"scope={scope!r}: use 'global', 'layer' or 'neuron'")
    if is_concrete(eta, gamma, beta) and not (eta >= 0 and gamma > 0 and 0 < beta < 1):
        raise ValueError(
            f"eta={eta}, gamma={gamma}, beta={beta}: need eta >= 0, gamma > 0 and 0 < beta < 1"
        )
    updates = schedules.window(
        total_steps, begin_step, end_step, update_every, default_begin=update_every, at_end=False
    )

    def cut(step: Step):
        if scope == "global":
            sizes = jnp.concatenate([jnp.abs(v.w).astype(jnp.float32).ravel() for v in step.views])
            held = jnp.concatenate([v.m.ravel() for v in step.views])
            d = selection.count(held)
            c = _prunable(pq_index(sizes, p=p, q=q, where=held), d, p, q, eta, gamma, beta)
            return selection.global_topk_masks(
                [jnp.abs(v.w) for v in step.views], d - c, where=step.masks
            )
        masks = []
        for v in step.views:
            axes = tuple(range(v.leaf.lead, v.w.ndim - (scope == "neuron")))
            d = selection.count(v.m, axis=axes)
            index = pq_index(v.w, p=p, q=q, where=v.m, axis=axes)
            c = _prunable(index, d, p, q, eta, gamma, beta)
            masks.append(selection.topk_mask(jnp.abs(v.w), d - c, where=v.m, axis=axes))
        return masks

    def back(step: Step):
        due = updates.fires(step.count)
        return step.masks, [jnp.where(due, w0, v.w) for w0, v in zip(step.aux, step.views)]

    return hold_masks(
        inner,
        recipe.plan_for(targets, None),
        init=recipe.all_kept,
        rule=(lambda step: (cut(step), step.aux)) if rewind else cut,
        at=updates,
        after=back if rewind else None,
        fresh=updates.fires if rewind else None,
        aux=(lambda step: [jnp.array(v.w, copy=True) for v in step.views]) if rewind else None,
        pack_masks=pack_masks,
    )
