r"""Frames of sound that are clipped or have gaps: the sparsest spectrum that is consistent with what is known.

SPADE and SPAIN are one solver with two projections: ADMM under $\|z\|_0 \le k$, k growing until the fit is within
a tolerance. The transform is a DFT of a multiple of the length of the frame, scaled so that $A^H A = I$. Cut long sounds
into windowed frames, and add their overlaps afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse.coding.operators import check_positive
from jaxsparse.selection import topk_mask

Variant = Literal["analysis", "synthesis"]


def declip(
    frames: Array,
    high: Array,
    low: Array,
    *,
    variant: Variant = "analysis",
    tolerance: float = 0.1,
    grow: int = 1,
    every: int = 2,
    redundancy: int = 2,
    steps: int = 200,
) -> Array:
    r"""SPADE: consistent frames equal y where it is not clipped, are at least y where it is clipped above, and at most
    y where it is clipped below. Every result is consistent to the bit.

    "analysis", from $x = y, u = 0$: $\bar z = H_k(Ax + u)$, $x = P(A^H(\bar z - u))$, $u \leftarrow u + Ax - \bar z$, until
    $\|Ax - \bar z\|$ is within the tolerance. "synthesis": $\bar z = H_k(A(x - u))$, $e = A^H\bar z$, $x = P(e + u)$,
    $u \leftarrow u + e - x$, until $\|e - x\|$ is. $H_k$ keeps the k largest conjugate pairs, DC at half its size; k
    grows by `grow` every `every` steps. The best iterate is returned.

    Args:
      frames: y `[..., samples]`.
      high: where it is clipped above `[..., samples]`, bool.
      low: where it is clipped below.
      variant: "analysis" (A-SPADE) or "synthesis" (S-SPADE).
      tolerance: a frame is left as it is from there on.
      grow: by how much k grows.
      every: steps between.
      redundancy: the length of the DFT over that of a frame.
      steps: how many at most.

    Returns:
      Frames `[..., samples]`.

    Raises:
      ValueError: masks of another shape, an unknown variant, a negative tolerance.

    >>> y = jnp.sin(jnp.arange(8.0))
    >>> nothing = jnp.zeros(8, bool)
    >>> bool((declip(y, nothing, nothing, steps=3) == y).all())
    True

    Source: Kitić, Bertin, Gribonval, "Sparsity and cosparsity for audio declipping", 2015; the toolbox of Záviška et
    al., 2020, for the order of the steps.
    """
    _check("high", high, frames)
    _check("low", low, frames)

    def project(v):
        v = jnp.where(high, jnp.maximum(v, frames), v)
        v = jnp.where(low, jnp.minimum(v, frames), v)
        return jnp.where(high | low, v, frames)

    return _solve(frames, project, variant, tolerance, grow, every, redundancy, steps)


def inpaint(
    frames: Array,
    known: Array,
    *,
    variant: Variant = "analysis",
    tolerance: float = 0.1,
    grow: int = 1,
    every: int = 1,
    redundancy: int = 2,
    steps: int = 200,
) -> Array:
    r"""SPAIN: as `declip`, where consistent frames equal y on the samples that are known.

    Args:
      frames: y `[..., samples]`; what stands in the gaps is where it starts.
      known: which samples are known `[..., samples]`, bool.
      variant: "analysis" (A-SPAIN) or "synthesis" (S-SPAIN).
      tolerance: a frame is left as it is from there on.
      grow: by how much k grows.
      every: steps between.
      redundancy: the length of the DFT over that of a frame.
      steps: how many at most.

    Returns:
      Frames `[..., samples]`.

    Raises:
      ValueError: a mask of another shape, an unknown variant, a negative tolerance.

    >>> y = jnp.sin(jnp.arange(8.0))
    >>> bool((inpaint(y, jnp.ones(8, bool), steps=3) == y).all())
    True

    Source: Mokrý, Záviška, Rajmic, Veselý, "Introducing SPAIN (SParse Audio INpainter)", 2019.
    """
    _check("known", known, frames)
    project = lambda v: jnp.where(known, frames, v)
    return _solve(frames, project, variant, tolerance, grow, every, redundancy, steps)


def _solve(
    y: Array,
    project: Callable[[Array], Array],
    variant: Variant,
    tolerance: float,
    grow: int,
    every: int,
    redundancy: int,
    steps: int,
) -> Array:
    if variant not in ("analysis", "synthesis"):
        raise ValueError(f"variant={variant!r}: use one of analysis, synthesis")
    check_positive("tolerance", tolerance, zero=True)
    length = redundancy * y.shape[-1]
    forward = lambda x: jnp.fft.rfft(x, length, norm="ortho")
    adjoint = lambda z: jnp.fft.irfft(z, length, norm="ortho")[..., : y.shape[-1]]
    bins = length // 2 + 1
    # Bins other than DC and the Nyquist frequency stand for two of the whole spectrum.
    single = [0] if length % 2 else [0, bins - 1]
    twice = jnp.full(bins, 2.0, y.dtype).at[jnp.array(single)].set(1)
    rank = jnp.ones(bins, y.dtype).at[0].set(0.5)

    def largest(z, i):
        keep = topk_mask(jnp.abs(z) * rank, jnp.minimum(grow * (1 + i // every), bins), axis=-1)
        return jnp.where(keep, z, 0)

    def analysis(i, x, u):
        z = forward(x)
        kept = largest(z + u, i)
        error = jnp.sqrt(jnp.sum(twice * jnp.abs(z - kept) ** 2, -1))
        new = project(adjoint(kept - u))
        return error, new, u + forward(new) - kept

    def synthesis(i, x, u):
        fit = adjoint(largest(forward(x - u), i))
        new = project(fit + u)
        return jnp.linalg.norm(fit - x, axis=-1), new, u + fit - new

    advance = analysis if variant == "analysis" else synthesis

    def step(i, carry):
        x, u, best, least = carry
        error, x_new, u = advance(i, x, u)
        better = (error < least) & (least > tolerance)
        best = jnp.where(better[..., None], x, best)
        return x_new, u, best, jnp.where(better, error, least)

    u = jnp.zeros_like(forward(y)) if variant == "analysis" else jnp.zeros_like(y)
    start = (y, u, y, jnp.full(y.shape[:-1], jnp.inf, y.dtype))
    return jax.lax.fori_loop(0, steps, step, start)[2]


def _check(name: str, mask: Array, frames: Array) -> None:
    if mask.shape != frames.shape:
        raise ValueError(f"{name} has shape {mask.shape}: give one of the frames, {frames.shape}")
