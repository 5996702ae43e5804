"""MdGf, progressive gradient flow: an N:M pattern reached by fading the weights outside it."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxsparse import structures
from jaxsparse.engines import Projection, Step, straight_through
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.structures import NM
from jaxsparse.typing import StepCount, StructureLike, Targets

REFERENCE = (
    "Bambhaniya et al., Progressive gradient flow for robust N:M sparsity training in transformers, "
    "2024"
)

_TIMING = Timing()


def largest(v, pattern: NM):
    """The mask of the N largest |z| of each group."""
    return v.leaf.with_structure(pattern).best(jnp.abs(v.w), pattern.n)


def check_pattern(structure) -> NM:
    """The structure, if it is N:M."""
    pattern = structures.resolve(structure)
    if not isinstance(pattern, NM):
        raise ValueError(f"structure={structure!r}: this method is defined for NM(n, m)")
    return pattern


@register(
    "mdgf",
    reference=REFERENCE,
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="n:m",
    dense_phase="dense, pruned weights fading, before end_step",
    starts_dense=True,
    gradients="all",
    timing=_TIMING,
)
def mdgf(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    decay: Literal["exponential", "linear"] = "exponential",
    rate: float | None = None,
    flow: Literal["identity", "true"] = "identity",
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    structure: StructureLike = "2:4",
    targets: Targets = None,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Fades the weights that an N:M mask would prune, until they are gone:

    $$p = z \odot (m + (1 - m)\,\beta_t), \qquad \beta_t = e^{-c (t - t_0)}
      \;\text{or}\; \max(0, 1 - c (t - t_0))$$

    with m the N largest |z| of each group, chosen at every step; $\beta$ is 1 before `begin_step`
    $t_0$ and 0 from `end_step` on. The sparsity is that of the structure.

    Args:
      inner: the optimizer of z, any optax transformation.
      total_steps: the length of the run, in steps.
      decay: the curve of $\beta$.
      rate: c per step; the authors take 1e-4 (exponential) and 2e-4 (linear) for long runs. By
        default $\beta$ is 0.01, or 0, at `end_step`.
      flow: "identity", as the authors' code: the gradient at p goes to z as it is; "true": the
        derivative of the formula, $g \odot (m + (1 - m)\beta_t)$.
      begin_step: $t_0$; 0 by default.
      end_step: where $\beta$ becomes 0; 75 % of the run by default.
      structure: NM(n, m) or its text; groups run along the inputs by default.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    The authors count t from the start of the run, so that beta jumps when a dense phase ends.

    >>> import jaxsparse
    >>> tx = jaxsparse.mdgf(optax.adam(1e-3), total_steps=1000, structure=NM(1, 8))

    Raises:
      ValueError: another structure than N:M, a step out of range, an unknown option.
    """
    pattern = check_pattern(structure)
    if decay not in ("exponential", "linear"):
        raise ValueError(f"decay={decay!r}: use 'exponential' or 'linear'")
    if flow not in ("identity", "true"):
        raise ValueError(f"flow={flow!r}: use 'identity' or 'true'")
    if rate is not None and rate <= 0:
        raise ValueError(f"rate={rate}: must be positive; beta would never fall")
    window = _TIMING.updates(total_steps, begin_step, end_step)
    span = jnp.maximum(window.end - window.begin, 1)
    to_zero = decay == "linear" and rate is None
    c = rate if rate is not None else (math.log(100.0) if decay == "exponential" else 1.0) / span

    def beta(forward):
        """The factor in forward pass number `forward`, counted from 0."""
        x = c * jnp.maximum(forward - window.begin, 0).astype(jnp.float32)
        value = jnp.exp(-x) if decay == "exponential" else jnp.maximum(1.0 - x, 0.0)
        # The line that ends at end_step is 0 there, whatever its rounding.
        gone = forward >= window.end if to_zero else forward > window.end
        return jnp.where(gone, 0.0, value)

    def factor(v, forward):
        return jnp.where(largest(v, pattern), 1.0, beta(forward)).astype(v.w.dtype)

    def rule(step: Step) -> Projection:
        forward = step.count + (0 if any(v.m is None for v in step.views) else 1)
        factors = [factor(v, forward) for v in step.views]
        fading = beta(forward) > 0  # dense until then, N:M from then on
        return Projection([(f == 1) | fading for f in factors], None, factors)

    return straight_through(
        inner,
        setup(structure=pattern, targets=targets, pack_masks=pack_masks),
        rule,
        pull_back=None if flow == "identity" else lambda v, t: v.g * factor(v, t).astype(v.g.dtype),
        raw_dtype=raw_dtype,
    )
