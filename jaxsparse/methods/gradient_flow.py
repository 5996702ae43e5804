"""Progressive gradient flow: N:M patterns reached by decaying masks (MdGf) or in stages (SdGf)."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxsparse import plan as plans
from jaxsparse import schedules, structures
from jaxsparse.methods._registry import register
from jaxsparse.structures import NM
from jaxsparse.transforms import Projection, Step, straight_through

_REFERENCE = (
    "Bambhaniya et al., Progressive gradient flow for robust N:M sparsity training in transformers, "
    "2024"
)


def _largest(v, pattern: NM):
    """The mask of the N largest |z| of each group."""
    return structures.topk(pattern, jnp.abs(v.w), pattern.n, lead=v.leaf.lead)


def _check_pattern(structure) -> NM:
    if not isinstance(structure, NM):
        raise ValueError(f"structure={structure!r}: this method is defined for NM(n, m)")
    return structure


@register(
    "mdgf",
    reference=_REFERENCE,
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="NM",
    dense_phase="dense, pruned weights fading, before end_step",
    starts_dense=True,
    gradients="all",
)
def mdgf(
    inner: optax.GradientTransformation,
    *,
    total_steps: Any,
    decay: Literal["exponential", "linear"] = "exponential",
    rate: float | None = None,
    flow: Literal["identity", "true"] = "identity",
    begin_step: Any = None,
    end_step: Any = None,
    structure: Any = NM(2, 4),  # noqa: B008 - a frozen value
    targets: Any = None,
    raw_dtype: Any = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Fades the weights that an N:M mask would prune, until they are gone:

    $$p = z \odot (m + (1 - m)\,\beta_t), \qquad \beta_t = e^{-c (t - t_0)}
      \;\text{or}\; \max(0, 1 - c (t - t_0))$$

    with m the N largest |z| of each group, chosen at every step; $\beta$ is 1 before `begin_step`
    $t_0$ and 0 from `end_step` on. The sparsity is that of the structure.

    Args:
      inner: the optimizer of z.
      total_steps: the length of the run, in steps.
      decay: the curve of $\beta$.
      rate: c per step; the authors take 1e-4 (exponential) and 2e-4 (linear) for long runs. By
        default $\beta$ is 0.01, or 0, at `end_step`.
      flow: "identity", as the authors' code: the gradient at p goes to z as it is; "true": the
        derivative of the formula, $g \odot (m + (1 - m)\beta_t)$.
      begin_step, end_step: 0 and 75 % of the run.
      structure: groups run along the inputs by default.
      targets, pack_masks: see the guide of options.
      raw_dtype: the dtype of z; see `magnitude_ste`.

    The authors count t from the start of the run, so that beta jumps when a dense phase ends.

    >>> import jaxsparse
    >>> tx = jaxsparse.mdgf(optax.adam(1e-3), total_steps=1000, structure=NM(1, 8))

    Raises:
      ValueError: another structure than N:M, a step out of range, an unknown option.
    """
    pattern = _check_pattern(structure)
    if decay not in ("exponential", "linear"):
        raise ValueError(f"decay={decay!r}: use 'exponential' or 'linear'")
    if flow not in ("identity", "true"):
        raise ValueError(f"flow={flow!r}: use 'identity' or 'true'")
    if rate is not None and rate <= 0:
        raise ValueError(f"rate={rate}: must be positive; beta would never fall")
    window = schedules.window(total_steps, begin_step, end_step)
    span = jnp.maximum(window.end - window.begin, 1)
    c = rate if rate is not None else (math.log(100.0) if decay == "exponential" else 1.0) / span

    def beta(forward):
        """The factor in forward pass number `forward`, counted from 0."""
        x = c * jnp.maximum(forward - window.begin, 0).astype(jnp.float32)
        value = jnp.exp(-x) if decay == "exponential" else jnp.maximum(1.0 - x, 0.0)
        return jnp.where(forward > window.end, 0.0, value)

    def factor(v, forward):
        return jnp.where(_largest(v, pattern), 1.0, beta(forward)).astype(v.w.dtype)

    def rule(step: Step) -> Projection:
        forward = step.count + (0 if any(v.m is None for v in step.views) else 1)
        factors = [factor(v, forward) for v in step.views]
        return Projection([(f == 1) | (forward <= window.end) for f in factors], None, factors)

    return straight_through(
        inner,
        lambda params: plans.make(params, targets, pattern),
        rule,
        pull_back=None if flow == "identity" else lambda v, t: v.g * factor(v, t).astype(v.g.dtype),
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
    )


def sdgf_stages(structure: NM, stages: Literal["stepwise", "geometric"] = "stepwise") -> list[NM]:
    """The patterns of SdGf, from the densest to `structure`.

    Stepwise: M-1:M, then M/2:M, M/4:M, ... N:M. Geometric: 8N:8M, 4N:4M, 2N:2M, N:M.

    >>> [(s.n, s.m) for s in sdgf_stages(NM(1, 8))]
    [(7, 8), (4, 8), (2, 8), (1, 8)]
    >>> [(s.n, s.m) for s in sdgf_stages(NM(1, 8), "geometric")]
    [(8, 64), (4, 32), (2, 16), (1, 8)]

    Raises:
      ValueError: an unknown kind; M is not N times a power of 2 (stepwise).
    """
    pattern = _check_pattern(structure)
    make = lambda n, m: NM(n, m, pattern.axis, pattern.strided)
    if stages == "geometric":
        return [make(pattern.n * 2**i, pattern.m * 2**i) for i in (3, 2, 1, 0)]
    if stages != "stepwise":
        raise ValueError(f"stages={stages!r}: use 'stepwise' or 'geometric'")
    halvings, rest = divmod(pattern.m, pattern.n)
    if rest or halvings & (halvings - 1):
        raise ValueError(
            f"structure={structure}: m must be n times a power of 2 for halving stages"
        )
    steps = [make(pattern.m >> i, pattern.m) for i in range(1, halvings.bit_length())]
    return [make(max(pattern.m - 1, pattern.n), pattern.m), *steps]


@register(
    "sdgf",
    reference=_REFERENCE,
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="NM",
    dense_phase="dense before begin_step, denser than the structure before its last stage",
    starts_dense=True,
    gradients="all",
)
def sdgf(
    inner: optax.GradientTransformation,
    *,
    total_steps: Any,
    stages: Literal["stepwise", "geometric"] = "stepwise",
    begin_step: Any = None,
    end_step: Any = None,
    structure: Any = NM(2, 4),  # noqa: B008 - a frozen value
    targets: Any = None,
    raw_dtype: Any = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Straight-through N:M training whose pattern tightens in equally long stages between
    `begin_step` and `end_step`.

    $p = z \odot m$ with m the largest |z| of each group of the stage's pattern (`sdgf_stages`); the
    gradient at p goes to every z. The sparsity is that of the structure from the last stage on.

    Args:
      inner: the optimizer of z.
      total_steps: the length of the run, in steps.
      stages: "stepwise": groups of M throughout, halving what stays; "geometric": groups of 8M, 4M,
        2M, M at one sparsity.
      begin_step, end_step: 0 and 75 % of the run; dense before.
      structure, targets, pack_masks: as `mdgf`.
      raw_dtype: the dtype of z; see `magnitude_ste`.

    >>> import jaxsparse
    >>> tx = jaxsparse.sdgf(optax.adam(1e-3), total_steps=1000, structure=NM(1, 4))

    Raises:
      ValueError: as `mdgf`; a pattern that has no such stages, a stage whose groups do not divide.
    """
    patterns = sdgf_stages(structure, stages)
    window = schedules.window(total_steps, begin_step, end_step)

    def plan_for(params):
        plan = plans.make(params, targets, structure)
        for leaf in plan.leaves:
            for pattern in patterns:
                pattern.check(leaf.path, leaf.layer_shape)
        return plan

    def rule(step: Step) -> Projection:
        ws = [v.w for v in step.views]
        views = lambda ws: [type(v)(v.leaf, w, None, None) for v, w in zip(step.views, ws)]
        dense = lambda ws: [jnp.ones(w.shape, bool) for w in ws]
        stage = [lambda ws, s=s: [_largest(v, s) for v in views(ws)] for s in patterns]
        n, span = len(patterns), jnp.maximum(window.end - window.begin, 1)
        past = jnp.asarray(step.count - window.begin)
        now = jnp.where(past < 0, 0, 1 + jnp.minimum(past * n // span, n - 1))
        return Projection(jax.lax.switch(now, [dense, *stage], ws))

    return straight_through(inner, plan_for, rule, raw_dtype=raw_dtype, pack_masks=pack_masks)
