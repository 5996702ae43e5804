"""GSM: a gradient for the few weights that matter, decay for the rest, and one cut at the end."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse.choose import choose
from jaxsparse.engines import Step, all_kept, hold_masks, keep_best
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import AllocationLike, Scalar, Seed, StepCount, StructureLike, Targets

_TIMING = Timing()


@register(
    "gsm",
    reference="Ding et al., Global sparse momentum SGD for pruning very deep neural networks, 2019",
    dynamics="gradual",
    dense_phase="dense before end_step",
    starts_dense=True,
    timing=_TIMING,
)
def gsm(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    end_step: StepCount | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "global",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""At each step only the $Q = N - \lfloor S N \rfloor$ weights of largest $|w g|$ of the network
    have their gradient; the others see a gradient of 0, so that the decay alone moves them:

    $$v \leftarrow \beta v + B \odot g + \lambda w, \quad w \leftarrow w - \eta v.$$

    With a high momentum $\beta$ they shrink, by $1 - \eta\lambda/(1 - \beta)$ per step, until the
    smallest |w| are cut at `end_step` at little cost. **The decay must be part of `inner`, before
    its momentum**, and $\beta$ high: the authors take 0.98 and 0.99 with decays of 1e-4 and 5e-4
    over hundreds of epochs:

        optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(5e-3, momentum=0.98))

    Args:
      inner: the optimizer of the weights, with decay and momentum.
      sparsity: in [0, 1); may be left out with an N:M structure (with `allocation="uniform"`).
      total_steps: the length of the run, in steps.
      end_step: when the cut is made; 75 % of the run, the rest fine-tunes. The authors cut at the
        very end (`total_steps - 1`).
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any.
      allocation: how $B$ and the cut split the budget; "global" is the method.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    A gradient that is NaN is let through, so that it shows.

    >>> import jaxsparse
    >>> inner = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(5e-3, momentum=0.98))
    >>> tx = jaxsparse.gsm(inner, 0.9, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range.
    """
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks)
    updates = _TIMING.updates(total_steps, None, end_step)
    cut = schedules.At((updates.end,))

    def active(step: Step):
        saliency = [scores.saliency(v) for v in step.views]
        chosen = choose(
            step.leaves,
            saliency,
            sparse.allocation,
            sparse.sparsity,
            ties="hash",
            seed=seed,
            stream=step.count,
        )
        done = step.count >= updates.end
        return [
            jnp.where(jnp.where(done, v.m, b | jnp.isnan(v.g)), v.g, jnp.zeros((), v.g.dtype))
            for v, b in zip(step.views, chosen)
        ]

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=keep_best(scores.magnitude, sparse),
        at=cut,
        gradient=active,
    )
