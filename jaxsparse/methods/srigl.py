"""SRigL: RigL with the same number of inputs for every neuron, and neurons that are switched off."""

from __future__ import annotations

import re

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules, selection
from jaxsparse.allocations import last_leaf
from jaxsparse.engines import Step, View, hold_masks, random_masks
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import REWIRING
from jaxsparse.selection import kept_count, scale_count
from jaxsparse.structures import FanIn
from jaxsparse.typing import AllocationLike, Scalar, ScalarOrSchedule, Seed, StepCount, Targets


def _rewire(v: View, kept, fraction, gamma, ablate: bool, salt: Array) -> Array:
    """Steps 1 to 5 of `srigl` for one leaf, as [layers, fan_in, out]."""
    shape = (v.leaf.layers, -1, v.leaf.layer_shape[-1])
    m, size, grad = v.m.reshape(shape), jnp.abs(v.w).reshape(shape), jnp.abs(v.g).reshape(shape)
    fan_in, out = m.shape[1:]
    ones = selection.count(m, axis=(1, 2))
    alive_weights = selection.count(m & (size > 0), axis=(1, 2))
    stay = jnp.minimum(ones - scale_count(ones, fraction), alive_weights)

    largest = selection.topk_mask(size, stay, where=m, axis=(1, 2))
    steepest = selection.topk_mask(grad, ones - stay, ties="hash", seed=salt, axis=(1, 2))
    votes = selection.count(largest | steepest, axis=1)  # [layers, out]

    now = jnp.max(selection.count(m, axis=1), axis=1, keepdims=True)
    gate = gamma if gamma >= 1 else jnp.maximum(scale_count(now, gamma), 1)
    # So many neurons stay that none needs more inputs than there are.
    needed = jnp.minimum(kept // fan_in + 1, out)
    safe = selection.topk_mask(votes, needed, axis=1)
    lowest = jnp.min(jnp.where(safe, votes, fan_in), axis=1, keepdims=True)
    neurons = votes >= jnp.minimum(gate, lowest) if ablate else jnp.ones_like(votes, bool)

    k = (kept // selection.count(neurons, axis=1))[:, None]
    stays = selection.topk_mask(size, stay, where=m & neurons[:, None], axis=(1, 2))
    stays = selection.topk_mask(size, jnp.broadcast_to(k, votes.shape), where=stays, axis=1)
    missing = jnp.where(neurons, k - selection.count(stays, axis=1), 0)
    grown = selection.topk_mask(
        grad, missing, where=~stays, ties="hash", seed=salt ^ jnp.uint32(0x9E3779B9), axis=1
    )
    return (stays | grown).reshape(v.leaf.shape)


@register(
    "srigl",
    reference="Lasby et al., Dynamic sparse training with structured sparsity, 2024",
    structures="fan_in",
    gradients="updates",
    exact_budget=False,
    timing=REWIRING,
)
def srigl(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    drop_fraction: ScalarOrSchedule = 0.3,
    min_salient: float = 0.3,
    keep_neurons: str | None = None,
    update_every: StepCount = 100,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    allocation: AllocationLike = "erk",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RigL with constant fan-in: every neuron of a layer that is not switched off has the same
    number of inputs, so that the layer is a small dense matrix of values and one of indices
    (`jaxsparse.nn.condense`).

    At an update, in a layer of o neurons with a budget of B weights of which $n_1$ are kept and
    $K = \lfloor n_1 f \rfloor$ (at least the number of kept weights that are zero):

    1. salient are the $n_1 - K$ largest |w| and the K largest |g| of all positions;
    2. a neuron with fewer than $\gamma$ salient inputs is switched off, but never so many that the
       others would need more inputs than exist;
    3. the fan-in becomes $k = \lfloor B / active \rfloor$: the others get denser;
    4. of the $n_1 - K$ largest |w| of active neurons each neuron keeps its k largest;
    5. each active neuron grows the largest |g| among its other inputs until it has k.

    As in `rigl` an update takes the place of the gradient step. Ablation is decided anew at each
    update, so a neuron can return. At most as many weights as asked for are kept, and fewer than
    one per active neuron less.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1).
      total_steps: the length of the run, in steps.
      drop_fraction: the start of the cosine f, or a schedule of f.
      min_salient: $\gamma$: from 1 on a number of inputs, below 1 a fraction of the fan-in before
        the update (0.3 for convolutions; the authors use 0.95 for vision transformers); 0 switches
        only neurons without any off.
      keep_neurons: a pattern of the layers whose neurons are never switched off; by default the
        last layer in the natural order of the paths. Patterns must name the output layer too.
      update_every: steps between two updates of the masks.
      begin_step: the first update, at least 1; after `update_every` steps by default.
      end_step: no update after it; 75 % of the run by default.
      allocation: the budgets of layers: "uniform", "er", "erk", a mapping by path.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

    This differs from the authors' code in: 1. a neuron with more than k keeps its largest |w| (they
    sort the mask, so that the order of the indices decides); 2. weights are not drawn anew for the
    sparse fan-in at init: `jaxsparse.rescale_fan_in` does that.

    >>> import jaxsparse
    >>> tx = jaxsparse.srigl(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: as `rigl`; a budget of less than one input per neuron, a negative `min_salient`.
    """
    if min_salient < 0:
        raise ValueError(f"min_salient={min_salient}: give a count, or a fraction in [0, 1)")
    sparse = setup(
        sparsity,
        structure=FanIn(),
        allocation=allocation,
        targets=targets,
        seed=seed,
        pack_masks=pack_masks,
        by_layer=True,
    )
    updates = REWIRING.updates(total_steps, begin_step, end_step, update_every)
    fraction = schedules.drop_fraction(drop_fraction, updates.end)

    def init(step: Step):
        if step.inside is not None:
            raise ValueError(
                "inner: srigl chooses whole neurons and cannot stay inside the masks of another "
                "method; wrap that one around it: jaxsparse.static(jaxsparse.srigl(optimizer, ...), ...)"
            )
        return random_masks(sparse)(step)

    def rule(step: Step):
        f, last = fraction(step.count), last_leaf(step.leaves)
        fixed = lambda path: re.search(keep_neurons, path) if keep_neurons else path == last
        return [
            _rewire(
                v,
                kept_count(v.leaf.layer_size, s),
                f,
                min_salient,
                not fixed(v.leaf.path),
                v.leaf.salt(seed, step.count),
            )
            for v, s in zip(step.views, sparse.by_shape.sparsities(step.leaves, sparse.sparsity))
        ]

    return hold_masks(
        inner,
        sparse,
        init=init,
        rule=rule,
        at=updates,
        on_update="replace",
        fresh="grown",
    )
