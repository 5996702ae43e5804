"""The dense network, so that sweeps and jobs treat it like any other method."""

from __future__ import annotations

import optax

from jaxsparse.engines import check_inner
from jaxsparse.methods.registry import register


@register(
    "dense",
    reference="",
    controls_sparsity=False,
    starts_dense=True,
    gradients="all",
    dynamics="none",
    dense_phase="all steps",
    structures="unstructured",
)
def dense(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """No sparsity: the inner optimizer as it is."""
    return check_inner(inner)
