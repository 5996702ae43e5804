"""ST-3: straight-through training with a soft threshold and a rescale, ramped cubically."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from jaxsparse import schedules, selection
from jaxsparse.engines import Projection, Step, is_concrete, straight_through, when
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import preset, register
from jaxsparse.methods.timing import Timing
from jaxsparse.typing import Scalar, StepCount, Targets

_REFERENCE = (
    "Vanderschueren & De Vleeschouwer, Are straight-through gradients and soft-thresholding all you "
    "need for sparse training?, 2023"
)
_TIMING = Timing(begin=5, end=50)
_FACTS: dict[str, Any] = dict(
    keeps_raw=True,
    starts_dense=True,
    gradients="all",
    dynamics="projected",
    structures="unstructured",
    dense_phase="dense before begin_step",
    timing=_TIMING,
)


@register("st3", reference=_REFERENCE, **_FACTS)
def st3(
    inner: optax.GradientTransformation,
    sparsity: Scalar,
    *,
    total_steps: StepCount,
    measure: Literal["magnitude", "sigma"] = "magnitude",
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    update_every: StepCount = 1,
    soft: bool = True,
    rescale: bool = True,
    targets: Targets = None,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""With th the quantile of all |z| of the network at the sparsity S(t) (cubic ramp), after every
    step of the raw weights z:

    $$p = c_o\, sign(z)\,relu(|z| - th) \;\text{where}\; |z| > th, \qquad
      c_o = \frac{1.01}{r_o + 0.01}, \quad r_o = \frac{mean(|z| \odot m)}{mean |z|}$$

    with the means over the inputs of output o. The gradient at p is applied to z unchanged: neither
    threshold nor scale is differentiated. Weight decay of `inner` acts on z. The number of zeros
    follows from the quantile (linear interpolation): 1 + floor((N - 1) S) where magnitudes are
    distinct.

    Args:
      inner: the optimizer of z, any optax transformation.
      sparsity: the final sparsity in [0, 1).
      total_steps: the length of the run, in steps.
      measure: "magnitude": |z|. "sigma" (ST-3-sigma): $|z| \sqrt{\sum_i s_i}$, s the shape of the
        kernel: |z| in units of its layer's initial spread; the threshold of a layer is the quantile
        divided by that root. This spares small layers and saves more FLOPs at equal sparsity.
      begin_step: where the ramp starts; 5 % of the run by default.
      end_step: where it ends, at the full sparsity; 50 % of the run by default.
      update_every: steps between two rankings (the authors rank at every step). In between both the
        mask and the threshold stay; a kept weight that falls below the threshold is 0.
      soft: soft threshold, or (an ablation) hard.
      rescale: with the scale c, or (an ablation) without.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.st3(optax.sgd(0.1), 0.9, total_steps=1000)

    Raises:
      ValueError: a sparsity or a step out of range, an unknown measure.
    """
    if measure not in ("magnitude", "sigma"):
        raise ValueError(f"measure={measure!r}: use 'magnitude' or 'sigma'")
    sparse = setup(sparsity, targets=targets, pack_masks=pack_masks)
    updates = _TIMING.updates(total_steps, begin_step, end_step, update_every)
    ramp = schedules.cubic(updates.begin, updates.end)
    every_step = is_concrete(update_every) and update_every == 1

    def unit(leaf) -> float:
        return math.sqrt(sum(leaf.layer_shape)) if measure == "sigma" else 1.0

    def quantile(step: Step) -> Array:
        """th before it is divided by the unit of the layer; -1 at sparsity 0."""
        s = ramp(step.count) * sparse.sparsity
        q = jnp.where(ramp(step.count) >= 1.0, jnp.float32(sparse.sparsity), s)
        values = [(v.w, jnp.asarray(unit(v.leaf), v.w.dtype)) for v in step.views]
        th = selection.quantile(values, q, score=lambda w, u: jnp.abs(w) * u)
        return jnp.where(s > 0, th, -1.0).astype(jnp.float32)

    def ranked(step: Step) -> tuple[Array, Array]:
        """Whether this step ranks, and th."""
        if not step.views or every_step:
            return jnp.bool_(True), quantile(step) if step.views else step.aux
        due = (step.count - updates.begin) % updates.every == 0
        due |= (step.count == updates.end) | (step.count == 0)

        def run(_, count, ws):
            return quantile(Step(count, [v.replace(w=w, g=None) for v, w in zip(step.views, ws)]))

        return due, when(due, run, step.aux, step.count, [v.w for v in step.views])

    def rule(step: Step) -> Projection:
        due, th = ranked(step)
        masks, shifts, scales = [], [], []
        for v in step.views:
            own = (th / unit(v.leaf)).astype(v.w.dtype)
            mask = jnp.abs(v.w) > own
            mask = mask if v.m is None else jnp.where(due, mask, v.m)
            one, zero = jnp.ones((), v.w.dtype), jnp.zeros((), v.w.dtype)
            masks.append(mask)
            shifts.append(jnp.maximum(own, 0) if soft else zero)
            scales.append(_scale(v.w, mask, v.leaf.layer_axes[:-1]) if rescale else one)
        return Projection(masks, shifts, scales, th)

    return straight_through(
        inner, sparse, rule, init_aux=lambda _: jnp.float32(-1.0), raw_dtype=raw_dtype
    )


def _scale(z: Array, mask: Array, axes: tuple[int, ...]) -> Array:
    """1.01 / (r + 0.01) per output, r the part of the mean |z| that the (hard) mask leaves."""
    size = jnp.abs(z).astype(jnp.float32)
    left = jnp.mean(jnp.where(mask, size, 0.0), axis=axes, keepdims=True) + 1e-6
    r = left / (jnp.mean(size, axis=axes, keepdims=True) + 1e-6)
    return (1.01 / (r + 0.01)).astype(z.dtype)


st3_sigma = preset(
    "st3_sigma",
    st3,
    """ST-3 with |z| measured in units of its layer's initial spread. It is `st3` with
    `measure="sigma"`, where the options are explained.

    >>> import jaxsparse
    >>> tx = jaxsparse.st3_sigma(optax.sgd(0.1), 0.9, total_steps=1000)
    """,
    reference=_REFERENCE,
    fixed={"measure": "sigma"},
    **_FACTS,
)
