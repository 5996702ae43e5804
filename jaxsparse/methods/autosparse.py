"""AutoSparse: learned thresholds, and a gradient for pruned weights that is annealed away."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxsparse import schedules, selection
from jaxsparse.engines import (
    Projection,
    Step,
    soft_threshold_learner,
    straight_through,
    threshold_of,
)
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.selection import kept_count
from jaxsparse.typing import ScalarOrSchedule, StepCount, Targets


def learned_threshold(
    inner,
    *,
    backward,
    threshold_init,
    threshold_optimizer,
    targets,
    raw_dtype,
    pack_masks,
    shared=False,
) -> optax.GradientTransformationExtraArgs:
    r"""The frame of STR and AutoSparse: $p = sign(z)\,relu(|z| - \sigma(s))$ with s trained;
    `backward(view, step)` is the derivative taken for the relu."""

    def rule(step: Step) -> Projection:
        if any(v.m is None for v in step.views) and (zero := step.all_zero()):  # at init
            warnings.warn(
                f"{', '.join(map(repr, zero))} is zero everywhere, below any threshold, and may never "
                f"train; targets=[({zero[0]!r}, False)] leaves it dense",
                stacklevel=4,
            )
        thresholds, _ = step.aux
        shifts = [threshold_of(v, s) for v, s in zip(step.views, jax.tree.leaves(thresholds))]
        return Projection(
            [jnp.abs(v.w) > t for v, t in zip(step.views, shifts)], shifts, aux=step.aux
        )

    learner = soft_threshold_learner(
        inner if threshold_optimizer is None else threshold_optimizer,
        threshold_init,
        backward,
        shared,
    )
    return straight_through(
        inner,
        setup(asks_sparsity=False, targets=targets, pack_masks=pack_masks),
        rule,
        pull_back=lambda v, step: v.g * backward(v, step).astype(v.g.dtype),
        learner=learner,
        raw_dtype=raw_dtype,
    )


def _reset(total_steps, reset_step):
    return total_steps * 9 // 10 if reset_step is None else reset_step


@register(
    "autosparse",
    reference="Kundu et al., AutoSparse: towards automated sparse training of deep neural networks, "
    "2023",
    controls_sparsity=False,
    keeps_raw=True,
    starts_dense=True,
    gradients="all",
    dynamics="projected",
    structures="unstructured",
    timing=lambda options: {"reset_step": _reset(options["total_steps"], options["reset_step"])},
    dense_phase="nearly dense at first: as sparse as the thresholds make it",
)
def autosparse(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    alpha: ScalarOrSchedule = 0.5,
    reset_step: StepCount | None = None,
    backward_sparsity: float | None = None,
    threshold_init: float = -5.0,
    threshold_optimizer: optax.GradientTransformation | None = None,
    targets: Targets = None,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns its thresholds, one per layer, and so its sparsity, which cannot be asked for.

    $$p = sign(z)\,relu(x), \quad x = |z| - \sigma(s), \qquad
      \frac{\partial relu}{\partial x} := \begin{cases}1 & x > 0\\ \alpha_t & x \le 0\end{cases}$$

    for the gradients of z and of s alike. $\alpha_t = \alpha_0 \max(\text{cosine}, \text{sigmoid})$
    decays over the run (`schedules.gradient_annealing`) and is 0 from `reset_step` on. More
    `alpha` gives less sparsity: 0 throughout is STR, 1 throughout is straight-through.

    Args:
      inner: the optimizer of z, and of s unless `threshold_optimizer` is given.
      total_steps: the length of the run, in steps.
      alpha: $\alpha_0$, or a schedule of $\alpha_t$.
      reset_step: $\alpha_t$ is 0 from here on; 90 % of the run by default.
      backward_sparsity: with this, only the largest |z| (all but this fraction of a layer) have a
        gradient at all: the sparse backward pass.
      threshold_init: s at the start; $\sigma(-5) = 0.0067$.
      threshold_optimizer: the optimizer of s.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    The method is taken from a third-party implementation; that one multiplies alpha in place by
    the decay of every epoch, which compounds. Here it is $\alpha_0$ times the curve.

    >>> import jaxsparse
    >>> tx = jaxsparse.autosparse(optax.sgd(0.1), total_steps=1000)

    Raises:
      ValueError: `total_steps` below 1, `alpha` or `backward_sparsity` out of [0, 1].
    """
    schedules.check_length(total_steps)
    if isinstance(alpha, float | int) and not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: must be in [0, 1]")
    if backward_sparsity is not None and not 0.0 <= backward_sparsity < 1.0:
        raise ValueError(f"backward_sparsity={backward_sparsity}: must be in [0, 1)")
    reset = _reset(total_steps, reset_step)
    anneal = (
        alpha if callable(alpha) else schedules.gradient_annealing(alpha, total_steps, reset=reset)
    )

    def backward(v, step):
        pruned = jnp.asarray(anneal(step), jnp.float32)
        if backward_sparsity is None:
            return jnp.where(v.m, 1.0, pruned)
        axes = v.leaf.layer_axes
        kept = kept_count(v.leaf.layer_size, backward_sparsity)
        near = selection.topk_mask(jnp.abs(v.w), kept, axis=axes)
        return jnp.where(v.m, 1.0, jnp.where(near, pruned, 0.0))

    return learned_threshold(
        inner,
        backward=backward,
        threshold_init=threshold_init,
        threshold_optimizer=threshold_optimizer,
        targets=targets,
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
    )
