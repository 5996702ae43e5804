"""SdGf, progressive gradient flow: an N:M pattern reached in stages of denser ones."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxsparse.engines import Projection, Step, straight_through
from jaxsparse.engines.setup import setup
from jaxsparse.methods.mdgf import REFERENCE, check_pattern, largest
from jaxsparse.methods.registry import register
from jaxsparse.methods.timing import Timing
from jaxsparse.structures import NM
from jaxsparse.typing import StepCount, StructureLike, Targets

Stages = Literal["stepwise", "geometric", "densify"]

_TIMING = Timing()


def sdgf_stages(structure: NM, stages: Stages = "stepwise") -> list[NM]:
    """The patterns of SdGf, the last of which is `structure`.

    Stepwise: M-1:M, then M/2:M, M/4:M, ... N:M. Geometric: 8N:8M, 4N:4M, 2N:2M, N:M. Densify:
    N:8M, N:4M, N:2M, N:M, which starts sparser than it ends.

    >>> [(s.n, s.m) for s in sdgf_stages(NM(1, 8))]
    [(7, 8), (4, 8), (2, 8), (1, 8)]
    >>> [(s.n, s.m) for s in sdgf_stages(NM(1, 8), "geometric")]
    [(8, 64), (4, 32), (2, 16), (1, 8)]

    Raises:
      ValueError: an unknown kind; M is not N times a power of 2 (stepwise).
    """
    pattern = check_pattern(structure)
    make = lambda n, m: NM(n, m, pattern.axis, pattern.strided)
    if stages in ("geometric", "densify"):
        many = lambda i: 2**i if stages == "geometric" else 1
        return [make(pattern.n * many(i), pattern.m * 2**i) for i in (3, 2, 1, 0)]
    if stages != "stepwise":
        raise ValueError(f"stages={stages!r}: use 'stepwise', 'geometric' or 'densify'")
    halvings, rest = divmod(pattern.m, pattern.n)
    if rest or halvings & (halvings - 1):
        raise ValueError(
            f"structure={structure}: m must be n times a power of 2 for halving stages"
        )
    steps = [make(pattern.m >> i, pattern.m) for i in range(1, halvings.bit_length())]
    return [make(max(pattern.m - 1, pattern.n), pattern.m), *steps]


@register(
    "sdgf",
    reference=REFERENCE,
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="n:m",
    dense_phase="dense before begin_step, another pattern than the structure before its last stage",
    starts_dense=True,
    gradients="all",
    timing=_TIMING,
)
def sdgf(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    stages: Stages = "stepwise",
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    structure: StructureLike = "2:4",
    targets: Targets = None,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Straight-through N:M training whose pattern tightens in equally long stages between
    `begin_step` and `end_step`.

    $p = z \odot m$ with m the largest |z| of each group of the stage's pattern (`sdgf_stages`); the
    gradient at p goes to every z. The sparsity is that of the structure from the last stage on.

    Args:
      inner: the optimizer of z, any optax transformation.
      total_steps: the length of the run, in steps.
      stages: "stepwise": groups of M throughout, halving what stays; "geometric": groups of 8M, 4M,
        2M, M at one sparsity; "densify": N in groups of 8M, 4M, 2M, M (both in the authors' code,
        as "fine" and "densify").
      begin_step: where the first stage starts, dense before; 0 by default.
      end_step: from here on the pattern is `structure`; 75 % of the run by default.
      structure: NM(n, m) or its text, the pattern of the last stage; groups run along the inputs by
        default.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.sdgf(optax.adam(1e-3), total_steps=1000, structure=NM(1, 4))

    Raises:
      ValueError: as `mdgf`; a pattern that has no such stages, a stage whose groups do not divide.
    """
    patterns = sdgf_stages(check_pattern(structure), stages)
    window = _TIMING.updates(total_steps, begin_step, end_step)
    sparse = setup(structure=structure, targets=targets, pack_masks=pack_masks, fits=patterns)

    def rule(step: Step) -> Projection:
        ws = [v.w for v in step.views]
        views = lambda ws: [v.replace(w=w, g=None, m=None) for v, w in zip(step.views, ws)]
        dense = lambda ws: [jnp.ones(w.shape, bool) for w in ws]
        stage = [lambda ws, s=s: [largest(v, s) for v in views(ws)] for s in patterns]
        n, span = len(patterns), jnp.maximum(window.end - window.begin, 1)
        past = jnp.asarray(step.count - window.begin)
        now = jnp.where(past < 0, 0, 1 + jnp.minimum(past * n // span, n - 1))
        return Projection(jax.lax.switch(now, [dense, *stage], ws))

    return straight_through(inner, sparse, rule, raw_dtype=raw_dtype)
