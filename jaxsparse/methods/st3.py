"""ST-3: straight-through training with a soft threshold and a rescale, ramped cubically."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import schedules, selection
from jaxsparse._control import is_concrete, when
from jaxsparse.engines import Projection, Step, straight_through
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register

_REFERENCE = (
    "Vanderschueren & De Vleeschouwer, Are straight-through gradients and soft-thresholding all you "
    "need for sparse training?, 2023"
)


def _build(
    inner, sparsity, *, total_steps, begin_step, end_step, update_every, soft, rescale, by_fan,
    targets, raw_dtype, pack_masks,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    sparsity = recipe.sparsity_of(sparsity, None)
    updates = schedules.window(
        total_steps, begin_step, end_step, update_every, fraction=0.5,
        default_begin=total_steps // 20,
    )  # fmt: skip
    ramp = schedules.cubic(updates.begin, updates.end)

    def fan(leaf) -> float:
        return math.sqrt(sum(leaf.layer_shape)) if by_fan else 1.0

    def threshold(step: Step) -> Array:
        """The quantile of |z| (times sqrt of the summed shape) over all leaves; -1 at sparsity 0."""
        s = ramp(step.count) * sparsity
        values = [(v.w, jnp.asarray(fan(v.leaf), v.w.dtype)) for v in step.views]
        q = jnp.where(ramp(step.count) >= 1.0, jnp.float32(sparsity), s)
        th = selection.quantile(values, q, score=lambda w, fan: jnp.abs(w) * fan)
        return jnp.where(s > 0, th, -1.0).astype(jnp.float32)

    def rule(step: Step) -> Projection:
        th, due = step.aux, jnp.bool_(True)
        if is_concrete(update_every) and update_every == 1:
            th = threshold(step) if step.views else th
        elif step.views:
            due = (step.count - updates.begin) % updates.every == 0
            due |= (step.count == updates.end) | (step.count == 0)
            run = lambda _, count, ws: threshold(
                Step(count, [_with(v, w) for v, w in zip(step.views, ws)])
            )
            th = when(due, run, th, step.count, [v.w for v in step.views])
        masks, shifts, scales = [], [], []
        for v in step.views:
            th_l = (th / fan(v.leaf)).astype(v.w.dtype)
            mask = jnp.abs(v.w) > th_l
            mask = mask if v.m is None else jnp.where(due, mask, v.m)
            masks.append(mask)
            shifts.append(jnp.maximum(th_l, 0) if soft else jnp.zeros((), v.w.dtype))
            scales.append(
                _scale(v.w, mask, v.leaf.layer_axes[:-1]) if rescale else jnp.ones((), v.w.dtype)
            )
        return Projection(masks, shifts, scales, th)

    return straight_through(
        inner,
        recipe.plan_for(targets, None),
        rule,
        init_aux=lambda _: jnp.float32(-1.0),
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
    )


def _with(view, w):
    return type(view)(view.leaf, w, None, None)


def _scale(z: Array, mask: Array, axes: tuple[int, ...]) -> Array:
    """1.01 / (r + 0.01) per output, r the part of the mean |z| that the (hard) mask leaves."""
    size = jnp.abs(z).astype(jnp.float32)
    left = jnp.mean(jnp.where(mask, size, 0.0), axis=axes, keepdims=True) + 1e-6
    r = left / (jnp.mean(size, axis=axes, keepdims=True) + 1e-6)
    return (1.01 / (r + 0.01)).astype(z.dtype)


_ARGS = """

    Args:
      inner: the optimizer of z.
      sparsity: the final sparsity in [0, 1).
      total_steps: the length of the run, in steps.
      begin_step, end_step: the ramp, by default from 5 % to 50 % of the run.
      update_every: steps between two rankings (the authors rank at every step). In between both the
        mask and the threshold stay; a kept weight that falls below the threshold is 0.
      soft, rescale: switches of the ablations: soft or hard threshold; with or without the scale.
      targets, pack_masks: see the guide of options.
      raw_dtype: the dtype of z; see `magnitude_ste`.

    Raises:
      ValueError: a sparsity or a step out of range.
"""


@register("st3", reference=_REFERENCE, keeps_raw=True, starts_dense=True, gradients="all", dynamics="projected",
          structures="unstructured", dense_phase="dense before begin_step")  # fmt: skip
def st3(
    inner: optax.GradientTransformation,
    sparsity: Any,
    *,
    total_steps: Any,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 1,
    soft: bool = True,
    rescale: bool = True,
    targets: Any = None,
    raw_dtype: Any = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""With th the quantile of all |z| of the network at the sparsity S(t) (cubic ramp), after every
    step of the raw weights z:

    $$p = c_o\, sign(z)(|z| - th) \;\text{where}\; |z| > th, \qquad
      c_o = \frac{1.01}{r_o + 0.01}, \quad r_o = \frac{mean(|z| \odot m)}{mean |z|}$$

    with the means over the inputs of output o. The gradient at p is applied to z unchanged: neither
    threshold nor scale is differentiated. Weight decay of `inner` acts on z. The number of zeros
    follows from the quantile (linear interpolation): 1 + floor((N - 1) S) where magnitudes are
    distinct.
    """
    return _build(
        inner, sparsity, total_steps=total_steps, begin_step=begin_step, end_step=end_step,
        update_every=update_every, soft=soft, rescale=rescale, by_fan=False, targets=targets,
        raw_dtype=raw_dtype, pack_masks=pack_masks,
    )  # fmt: skip


@register("st3_sigma", reference=_REFERENCE, keeps_raw=True, starts_dense=True, gradients="all", dynamics="projected",
          structures="unstructured", dense_phase="dense before begin_step")  # fmt: skip
def st3_sigma(
    inner: optax.GradientTransformation,
    sparsity: Any,
    *,
    total_steps: Any,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 1,
    soft: bool = True,
    rescale: bool = True,
    targets: Any = None,
    raw_dtype: Any = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`st3` with |z| measured in units of its layer's initial spread: the quantile is taken of
    $|z| \sqrt{\sum_i s_i}$, s the shape of the kernel, and the threshold of a layer is the quantile
    divided by that root. This spares small layers and saves more FLOPs at equal sparsity.
    """
    return _build(
        inner, sparsity, total_steps=total_steps, begin_step=begin_step, end_step=end_step,
        update_every=update_every, soft=soft, rescale=rescale, by_fan=True, targets=targets,
        raw_dtype=raw_dtype, pack_masks=pack_masks,
    )  # fmt: skip


for _method in (st3, st3_sigma):
    _method.__doc__ = (_method.__doc__ or "").rstrip() + _ARGS
