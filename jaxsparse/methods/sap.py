"""SAP: how much to prune in each round follows from how compressible the weights are."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import selection
from jaxsparse.engines import Step, all_kept, hold_masks, is_concrete
from jaxsparse.engines import rewind as rewinding
from jaxsparse.engines.setup import setup
from jaxsparse.methods.pq import check_pq, index_of_means, pq_index
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import AFTER_ONE_INTERVAL
from jaxsparse.selection import scale_count
from jaxsparse.typing import StepCount, Targets


def _scaled(n: Array, factor) -> Array:
    """floor(n * factor), exact, for a factor of 0 or more; at most 2^31 - 1."""
    whole = jnp.floor(jnp.asarray(factor, jnp.float32)).astype(jnp.int32)
    n = jnp.minimum(n, jnp.iinfo(jnp.int32).max // jnp.maximum(whole, 1))
    return whole * n + scale_count(n, factor - jnp.floor(jnp.asarray(factor, jnp.float32)))


def _prunable(index: Array, d: Array, p, q, eta, gamma, beta) -> Array:
    """How many of d weights a round prunes, in integers: c = min(gamma (d - m), beta d)."""
    left = (1 + eta) ** (-q / (q - p)) * (1.0 - index) ** (p * q / (q - p))
    # m = ceil(d left): k for k equal weights, whatever the rounding of the index.
    m = d - scale_count(d, 1.0 - left * (1 - 1e-6))
    return jnp.minimum(_scaled(d - m, gamma), scale_count(d, beta))


def _index_of_all(ws: list[Array], masks: list[Array], p, q) -> Array:
    """`pq_index` of all weights together, from three numbers of each leaf."""
    sizes = [jnp.where(m, jnp.abs(w).astype(jnp.float32), 0.0) for w, m in zip(ws, masks)]
    top = jnp.max(jnp.stack([jnp.max(x, initial=0.0) for x in sizes]))
    scaled = [x / jnp.where(top > 0, top, 1.0) for x in sizes]
    d = jnp.maximum(sum(selection.count(m) for m in masks), 1).astype(jnp.float32)
    a, b = (sum(jnp.sum(x**r) for x in scaled) / d for r in (p, q))
    return index_of_means(a ** (1 / p), b ** (1 / q))


@register(
    "sap",
    reference="Diao et al., Pruning deep neural networks from a sparsity perspective, 2023",
    controls_sparsity=False,
    dynamics="gradual",
    structures="unstructured",
    dense_phase="dense before begin_step; sparser by as much as the PQ index allows",
    starts_dense=True,
    timing=AFTER_ONE_INTERVAL,
)
def sap(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    scope: Literal["global", "layer", "neuron"] = "global",
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    rewind: bool | Literal["all"] = True,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes in rounds as many weights as the PQ index I of those that are left says can go, so
    that the sparsity is found, not asked for. With d weights left in a scope:

    $$m = d\,(1 + \eta)^{-q/(q-p)} (1 - I)^{pq/(q-p)}, \qquad
      c = \lfloor d \min(\gamma (1 - m/d), \beta) \rfloor$$

    and the c smallest |w| are pruned for good; the others return to their values at `init`, with
    moments and counts of the inner optimizer as at `init`, too, and train again. They take no
    gradient step at a cut. A schedule of the learning rate goes on.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      total_steps: the length of the run, in steps.
      scope: where weights compete: the network, each layer, or the inputs of each neuron.
      p: the lower norm of the PQ index, 0 < p < q.
      q: the higher norm.
      eta: 0 or more, as above; more prunes more.
      gamma: positive, as above; more prunes more.
      beta: the largest part of the weights that a cut prunes, in (0, 1).
      rewind: whether weights return to their values at `init` (which are kept): True: sparse
        leaves; "all": dense leaves (biases, norms), too, as the authors do it; False: no weight
        does, and the inner state goes on.
      update_every: the steps of a round; the authors train 200 epochs in each of 15 to 30 rounds.
      begin_step: the first cut; after `update_every` steps by default.
      end_step: no cut after it; 75 % of the run by default.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.sap(optax.sgd(0.1), total_steps=1000, update_every=100)

    Raises:
      ValueError: an option or a step out of range.
    """
    check_pq(p, q)
    if rewind not in (True, False, "all"):
        raise ValueError(f"rewind={rewind!r}: use True, False or 'all'")
    if scope not in ("global", "layer", "neuron"):
        raise ValueError(f"scope={scope!r}: use 'global', 'layer' or 'neuron'")
    if is_concrete(eta, gamma, beta) and not (eta >= 0 and gamma > 0 and 0 < beta < 1):
        raise ValueError(
            f"eta={eta}, gamma={gamma}, beta={beta}: need eta >= 0, gamma > 0 and 0 < beta < 1"
        )
    updates = AFTER_ONE_INTERVAL.updates(total_steps, begin_step, end_step, update_every)
    sparse = setup(asks_sparsity=False, targets=targets, pack_masks=pack_masks)

    def cut(step: Step):
        ws, masks = [v.w for v in step.views], step.masks
        sizes = [jnp.abs(w) for w in ws]
        if scope == "global":
            d = jnp.asarray(sum(selection.count(m) for m in masks), jnp.int32)
            c = _prunable(_index_of_all(ws, masks, p, q), d, p, q, eta, gamma, beta)
            return selection.topk_masks(sizes, d - c, where=masks, together=True)
        axes = [v.leaf.layer_axes[: -1 if scope == "neuron" else None] for v in step.views]
        stay = []
        for w, m, a in zip(ws, masks, axes):
            d, index = selection.count(m, axis=a), pq_index(w, p=p, q=q, where=m, axis=a)
            stay.append(d - _prunable(index, d, p, q, eta, gamma, beta))
        return selection.topk_masks(sizes, stay, where=masks, axis=axes)

    tx = hold_masks(inner, sparse, init=all_kept, rule=cut, at=updates)
    return rewinding(tx, inner, sparse, updates, dense_leaves=rewind == "all") if rewind else tx
