"""HyperSparse and ART: a regulariser that pushes the weights to be pruned ever harder to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules, scores
from jaxsparse.allocations import Global
from jaxsparse.choose import choose
from jaxsparse.engines import Step, all_kept, hold_masks, is_concrete, keep_best
from jaxsparse.engines.setup import setup
from jaxsparse.leaves import find
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import Scalar, Seed, StepCount, Targets

# artanh(1 / sqrt(3)): where tanh bends most; sech^2 is 2/3 there.
_BEND = 0.6584789484624083


def _statistics(leaves, ws, sparsity) -> tuple[Array, Array, Array]:
    """s = bend / (smallest |w| that is kept), sum |w| and sum tanh(s |w|) over the network."""
    sizes = [jnp.abs(w).astype(jnp.float32) for w in ws]
    kept = choose(leaves, sizes, Global(), sparsity)
    border = jnp.min(jnp.stack([jnp.min(jnp.where(m, x, jnp.inf)) for m, x in zip(kept, sizes)]))
    s = _BEND / jnp.maximum(border, 1e-12)
    total = jnp.sum(jnp.stack([jnp.sum(x) for x in sizes]))
    squashed = jnp.sum(jnp.stack([jnp.sum(jnp.tanh(s * x)) for x in sizes]))
    return s, total, squashed


def hypersparse_loss(params, sparsity: Scalar, *, targets: Targets = None) -> Array:
    r"""The regulariser as a loss to be added to one's own: its value is 0, its gradient

    $$\frac{\partial R}{\partial w} = sign(w)\, s\, sech^2(s|w|)\,
      \frac{\sum |w|}{\sum \tanh(s|w|)}, \qquad s = \frac{artanh(1/\sqrt 3)}{w_\kappa}$$

    with $w_\kappa$ the smallest |w| that would be kept: large for the weights below it, vanishing
    for those far above, and the same for a network multiplied by a constant.

    >>> float(hypersparse_loss({"kernel": jnp.ones((4, 4))}, 0.5))
    0.0
    """
    plan = find(params, targets)
    ws = plan.take(params)
    s, total, squashed = jax.lax.stop_gradient(_statistics(plan.leaves, ws, sparsity))
    now = sum(jnp.sum(jnp.tanh(s * jnp.abs(w))) for w in ws)
    return total * (now / squashed) - total


def art_stop(pruned: Sequence[float], dense: Sequence[float], buffer: int = 1) -> int | None:
    """The epoch whose model ART keeps, or None while training should go on.

    With the training accuracies of the pruned copy and of the dense model after each epoch, the mean
    of the pruned ones over a window of 2 `buffer` + 1 epochs is compared with the dense one of the
    last epoch; once a window's mean exceeds it, training stops, and the middle of the best window
    so far is kept.

    >>> art_stop([0.1, 0.5, 0.6, 0.7], [0.9, 0.9, 0.9, 0.9]) is None
    True
    >>> art_stop([0.1, 0.5, 0.93, 0.92, 0.94], [0.9, 0.9, 0.9, 0.9, 0.91])
    3
    """
    if buffer < 0 or len(pruned) != len(dense):
        raise ValueError(
            f"buffer={buffer}, {len(pruned)} accuracies of pruned and {len(dense)} of dense models: "
            "give one of each per epoch and a buffer that is not negative"
        )
    width = 2 * buffer + 1
    means = [sum(pruned[i : i + width]) / width for i in range(len(pruned) - width + 1)]
    for last, mean in enumerate(means):
        if mean > dense[last + width - 1]:
            return max(range(last + 1), key=means.__getitem__) + buffer
    return None


def _windows(total_steps, begin_step, end_step, update_every):
    """The steps in which the penalty grows, and the length of an epoch."""
    updates = Timing(begin=20, end=60).updates(total_steps, begin_step, end_step, update_every)
    epoch = (updates.end - updates.begin) / 140 if update_every is None else update_every
    return updates, epoch


def _timing(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("total_steps", "begin_step", "end_step", "update_every")
    updates, epoch = _windows(*(options[name] for name in names))
    return {"begin_step": updates.begin, "end_step": updates.end, "update_every": epoch}


@register(
    "hypersparse",
    reference="Glandorf, Kaiser & Rosenhahn, HyperSparse neural networks: shifting exploration to "
    "exploitation through adaptive regularization, 2023",
    dynamics="gradual",
    dense_phase="dense before end_step",
    starts_dense=True,
    structures="unstructured",
    timing=_timing,
)
def hypersparse(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    total_steps: StepCount,
    penalty: Scalar = 5e-6,
    growth: Scalar = 1.05,
    update_every: StepCount | None = None,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds $\lambda_t\, \partial R/\partial w$ (see `hypersparse_loss`) to the gradients, with

    $$\lambda_t = \lambda_0\, \eta^{(t - t_0)/T},$$

    until `end_step`, when the smallest |w| of the network are cut and the rest trains on with the
    inner optimizer's per-weight state as at `init`.

    Args:
      inner: the optimizer of the weights, any optax transformation.
      sparsity: in [0, 1).
      total_steps: the length of the run, in steps.
      penalty: $\lambda_0$ (the authors' code; their text says 5e-4).
      growth: $\eta$, per `update_every` steps.
      update_every: T, the steps of an epoch. By default a 140th of the steps in which the penalty
        grows, which is about the length of the authors' runs in epochs: a factor of 900 in all.
      begin_step: $t_0$, before which nothing is added; 20 % of the run.
      end_step: the cut; 60 % of the run. ART stops when a pruned copy is as good as the dense
        model, which the training loop finds out: `art_stop`.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of ties, an integer.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.hypersparse(optax.sgd(0.1, momentum=0.9), 0.9, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, a negative penalty, a growth below 1.
    """
    if is_concrete(penalty, growth) and (penalty < 0 or growth < 1):
        raise ValueError(f"penalty={penalty}, growth={growth}: need penalty >= 0 and growth >= 1")
    sparse = setup(sparsity, allocation="global", targets=targets, seed=seed, pack_masks=pack_masks)
    updates, epoch = _windows(total_steps, begin_step, end_step, update_every)
    cut = schedules.At((updates.end,))

    def pushed(step: Step):
        s, total, squashed = _statistics(step.leaves, [v.w for v in step.views], sparse.sparsity)
        now = (step.count >= updates.begin) & (step.count < updates.end)
        age = (step.count - updates.begin).astype(jnp.float32) / jnp.maximum(epoch, 1e-3)
        strength = jnp.where(now, penalty * growth ** jnp.maximum(age, 0.0), 0.0) * total / squashed

        def push(v):
            slope = jnp.sign(v.w) * s / jnp.cosh(jnp.minimum(s * jnp.abs(v.w), 40.0)) ** 2
            extra = jnp.where(strength > 0, strength * slope, 0.0).astype(v.g.dtype)
            return jnp.where(v.m, v.g + extra, jnp.zeros((), v.g.dtype))

        return [push(v) for v in step.views]

    return hold_masks(
        inner,
        sparse,
        init=all_kept,
        rule=keep_best(scores.magnitude, sparse),
        at=cut,
        gradient=pushed,
        fresh=cut.fires,
    )
