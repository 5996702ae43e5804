"""BDWP: N:M weights for the forward product, and others for the input's gradient."""

from __future__ import annotations

import optax
from jax.typing import DTypeLike

from jaxsparse.engines.setup import setup
from jaxsparse.engines.two_view import two_view
from jaxsparse.methods.backward_pattern import along_outputs, pattern
from jaxsparse.methods.registry import register
from jaxsparse.methods.sr_ste import sr_ste
from jaxsparse.typing import Scalar, StructureLike, Targets


@register(
    "bdwp",
    reference="Fang et al., Efficient N:M sparse DNN training using algorithm, architecture, and "
    "dataflow co-design, 2023",
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="n:m",
    gradients="all",
)
def bdwp(
    inner: optax.GradientTransformation,
    *,
    decay: Scalar = 0.0,
    structure: StructureLike = "2:8",
    targets: Targets = None,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Bidirectional weight pruning: two n:m views of the dense W, made anew after every step and
    independent of each other,

    $$Y = X W_f,\quad \partial X = \partial Y W_b^T,\quad \partial W = X^T \partial Y,$$

    $W_f$ the n largest of each group of m inputs, $W_b$ of each group of m outputs. Unlike in
    Bi-Mask, $W_b$ holds exactly n/m of the weights, some of which $W_f$ lacks.

    The parameters are $W_f$; $W_b$ needs layers with two views: see `jaxsparse.nn.two_view`. On
    ordinary layers this is `sr_ste` with this `decay`.

    Args:
      inner: the optimizer of W, any optax transformation.
      decay: of the weights that $W_f$ lacks, as in `sr_ste`.
      structure: NM(n, m) or its text; m must divide the inputs and the outputs of every sparse
        leaf.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.methods.bdwp(optax.sgd(0.1), structure=jaxsparse.structures.NM(2, 8))

    Raises:
      ValueError: another structure, groups that do not divide.
    """
    forward, kind = pattern(structure)
    tx = sr_ste(
        inner,
        decay=decay,
        structure=forward,
        targets=targets,
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
    )
    return two_view(
        tx,
        setup(structure=forward, targets=targets, pack_masks=pack_masks),
        kind,
        lambda leaf, w, f, old, count: (along_outputs(leaf, kind, w), None),
    )
