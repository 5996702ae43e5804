"""STR: a learned soft threshold per layer."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxsparse.methods.autosparse import learned_threshold
from jaxsparse.methods.registry import register
from jaxsparse.typing import Targets


@register(
    "str",
    reference="Kusupati et al., Soft threshold weight reparameterization for learnable sparsity, "
    "2020",
    controls_sparsity=False,
    keeps_raw=True,
    starts_dense=True,
    dynamics="projected",
    structures="unstructured",
    dense_phase="nearly dense at first: as sparse as the thresholds make it",
)
def str_(
    inner: optax.GradientTransformation,
    *,
    threshold_init: float = -3200.0,
    scope: Literal["layer", "global"] = "layer",
    threshold_optimizer: optax.GradientTransformation | None = None,
    targets: Targets = None,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns its thresholds, one per layer, and so its sparsity, which cannot be asked for.

    $$p = sign(z)\,relu(|z| - \sigma(s)), \quad
      \frac{\partial L}{\partial z} = g \odot 1[|z| > \sigma(s)], \quad
      \frac{\partial L}{\partial s} = -\sigma'(s) \sum sign(z)\, g\, 1[|z| > \sigma(s)]$$

    Weight decay drives s up from `threshold_init` towards 0 until the thresholds wake, and the loss
    pushes back: the final sparsity is set by the decay and by `threshold_init` only. **An inner
    optimizer without weight decay leaves the network dense.** It must reach s too: a `mask` of
    the decay that spares small leaves would spare s.

    Args:
      inner: the optimizer of z, and of s unless `threshold_optimizer` is given.
      threshold_init: s at the start; the authors use -3200 with a decay of about 2e-5 over 100
        epochs of ImageNet, and -200 elsewhere. Short runs need values near 0.
      scope: one threshold per layer, or one for the network (the gradient of s is then the sum over
        all layers).
      threshold_optimizer: the optimizer of s.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.str_(optax.adamw(1e-3, weight_decay=1e-3), threshold_init=-5.0)
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r}: use 'layer' or 'global'")
    return learned_threshold(
        inner,
        backward=lambda v, _: v.m.astype(jnp.float32),
        threshold_init=threshold_init,
        threshold_optimizer=threshold_optimizer,
        targets=targets,
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
        shared=scope == "global",
    )
