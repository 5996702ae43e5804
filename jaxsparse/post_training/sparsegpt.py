r"""SparseGPT (Frantar & Alistarh, Massive language models can be accurately pruned in one shot, ICML 2023),
and GPTQ's grid in the same sweep (Frantar et al., GPTQ, ICLR 2023).

The inputs are gone through in order. What pruning the weights of input i costs is pushed in closed form
into the inputs that follow, for all outputs at once. With U upper triangular, Uᵀ U = (gram + damping)⁻¹,

    q = w[i] where kept, else 0
    e[i] = (w[i] - q) / U[i, i]
    w[i:] -= U[i, i:]ᵀ e[i]

and the error of the layer is the sum of e². Masks are chosen block by block, by the saliency
w² / U[i, i]² of the weights as they stand when the sweep arrives: within a block of `block` inputs over all
outputs, or for N:M when a group of m inputs is reached. A quantizer in place of `q` gives sparse and
quantized weights at once.

Within a block, rows are updated one by one in panels of few rows, and what follows a panel by a product;
later blocks take what all earlier ones have left as one product when their turn comes.

This differs from the authors' code in: 1. exactly as many weights are pruned as asked, where the
published threshold takes one more in each block; 2. the Cholesky factor is that of the Gram matrix in
reverse order (see `_layer.inverse_factor`); 3. the damping grows where it does not exist.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import _counts, selection, structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_damping, check_layer
from jaxsparse.post_training._layer import (
    Pruned,
    inverse_factor,
    kept_units,
    matmul,
    only,
    prepare,
)
from jaxsparse.structures import NM, FanIn, Structure

_PANEL = 16  # rows of w that are updated one by one
_TOGETHER = 4  # blocks of which errors are carried on in one product


@dataclasses.dataclass(frozen=True)
class Int:
    """A symmetric grid of integers: `w ≈ scale * code`, |code| < 2^(bits - 1). Each output has a scale for
    every `group` inputs, the largest of its weights when the sweep reaches them. Zero is on the grid.

    >>> Int(4).largest
    7
    """

    bits: int = 4
    group: int = 128

    def __post_init__(self):
        whole = isinstance(self.bits, int) and isinstance(self.group, int)
        if not whole or not 2 <= self.bits <= 8 or self.group < 1:
            raise ValueError(f"Int({self.bits}, group={self.group}): 2 to 8 bits, a positive group")

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def scales(self, w: Array) -> Array:
        """`[1, out]`: the scale of a group of weights `[group, out]`."""
        peak = jnp.max(jnp.abs(w), axis=0, keepdims=True)
        return jnp.where(peak > 0, peak, 1.0) / self.largest

    def codes(self, w: Array, scales: Array) -> Array:
        """The nearest codes, as float32."""
        return jnp.clip(jnp.round(w / scales), -self.largest, self.largest)


def sparsegpt_core(
    w: Array,
    gram: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    block: int = 128,
    damping: float = 0.01,
    quantize: Int | None = None,
    mask: Array | None = None,
) -> Pruned:
    """Prunes a layer input by input, and lets the inputs that follow make up for it.

    Args:
      w: `[in, out]`.
      gram: `[in, in]`.
      sparsity: the fraction of zeros, in [0, 1).
      structure: `Unstructured()` (the default), `FanIn()` or `NM(n, m)` along the inputs.
      block: inputs of which the mask is chosen together; that of the quantizer's group with `quantize`.
      damping: added to the diagonal, as a fraction of its mean.
      quantize: the grid of the kept weights.
      mask: a mask to reconstruct weights for, in place of one that is chosen.

    Returns:
      The pruned layer, and the damping that was needed.

    >>> gram = jnp.eye(2)
    >>> sparsegpt_core(jnp.array([[1.0, 4.0], [3.0, 2.0]]), gram, 0.5).weights.tolist()
    [[0.0, 4.0], [3.0, 0.0]]

    Raises:
      ValueError: a sparsity or a structure that the layer cannot have.
    """
    structure = structures.resolve(structure)
    only(structure, "sparsegpt").check("w", w.shape)
    check_layer(w, gram=gram, mask=mask)
    check_count("block", block)
    check_damping(damping)
    if quantize is not None and not isinstance(quantize, Int):
        raise ValueError(f"quantize={quantize!r}: give a grid, such as post_training.Int(4)")
    inputs, outputs = w.shape
    block = min(quantize.group if quantize else block, inputs)
    if isinstance(structure, NM):
        block = max(structure.m, block // structure.m * structure.m)
    sparsity = sparsity if sparsity is not None else structure.sparsity
    if mask is None:
        kept_units(w.shape, sparsity, structure)
    ends = [min(i + block, inputs) for i in range(0, inputs, block)]
    slice_ = 1 if isinstance(structure, FanIn) else outputs
    zeros = [_counts.scale_count(end * slice_, sparsity or 0.0) for end in ends]
    sizes = [slice_ * (b - a) for a, b in zip([0, *ends], ends)]
    kept = [size - (b - a) for size, a, b in zip(sizes, [0, *zeros], zeros)]
    w, gram = prepare(w, gram)
    u, used = _inverse_factor(gram, damping)
    result = sweep(w, u, jnp.asarray(kept, jnp.int32), mask, structure, block, quantize)
    return Pruned(*result[:2], damping=used, codes=result[2], scales=result[3])


_inverse_factor = jax.jit(inverse_factor)


@functools.partial(jax.jit, static_argnames=("structure", "block", "quantize"))
def sweep(w, u, kept, mask, structure, block, quantize) -> tuple:
    """The sweep over blocks: weights, mask, codes, scales, and the errors e `[in, out]`.

    Args:
      w: `[in, out]`.
      u: `[in, in]`, upper triangular.
      kept: int32 `[blocks]`: the weights kept in each slice of each block, for N:M unused.
      mask: bool `[in, out]` or None.
      structure: as for `sparsegpt_core`.
      block: rows of a block; N:M: a multiple of m.
      quantize: the grid, or None.
    """
    inputs, outputs = w.shape
    blocks = -(-inputs // block)
    pad = lambda x, n: jnp.pad(x, ((0, n - inputs), (0, 0)))  # by rows that nothing depends on
    w, mask = pad(w, blocks * block), None if mask is None else pad(mask, blocks * block)
    padded = -(-blocks // _TOGETHER) * _TOGETHER * block
    u = jnp.concatenate([pad(u, padded), jnp.eye(padded, dtype=u.dtype)[:, inputs:]], axis=1)

    def step(e, at):
        i, k = at
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block)
        now = rows(w) - _from_earlier(u, e, i, block)
        square = jax.lax.dynamic_slice(u, (i * block, i * block), (block, block))
        if mask is not None:
            chosen = rows(mask)
        elif isinstance(structure, NM):
            chosen = None
        else:
            exists = jnp.broadcast_to((i * block + jnp.arange(block) < inputs)[:, None], now.shape)
            axis = 0 if isinstance(structure, FanIn) else None
            chosen = selection.topk_mask(_saliency(now, square), k, where=exists, axis=axis)
        scales = None
        if quantize is not None:
            scales = quantize.scales(now if chosen is None else jnp.where(chosen, now, 0.0))
        q, chosen, codes, mine = _panels(now, square, chosen, structure, quantize, scales)
        return jax.lax.dynamic_update_slice_in_dim(e, mine, i * block, axis=0), (
            q,
            chosen,
            codes,
            scales,
        )

    e, (q, chosen, codes, scales) = jax.lax.scan(
        step, jnp.zeros((padded, outputs), w.dtype), (jnp.arange(blocks), kept)
    )
    whole = lambda x: x.reshape(-1, outputs)[:inputs]
    if scales is None:
        return whole(q), whole(chosen), None, None, e[:inputs]
    scales = scales.reshape(-1, outputs)
    return whole(q), whole(chosen), whole(codes).astype(jnp.int8), scales, e[:inputs]


def _from_earlier(u, e, i, block) -> Array:
    """What the blocks before block `i` leave to it, `[block, out]`: a sum of products, some blocks at a time
    (those from `i` on have no errors yet)."""

    rows = _TOGETHER * block

    def add(j, total):
        above = jax.lax.dynamic_slice(u, (j * rows, i * block), (rows, block))
        return total + matmul(above.T, jax.lax.dynamic_slice_in_dim(e, j * rows, rows))

    return jax.lax.fori_loop(0, -(-i // _TOGETHER), add, jnp.zeros((block, e.shape[1]), e.dtype))


def _saliency(w: Array, u: Array) -> Array:
    return jnp.square(w / jnp.diagonal(u)[:, None])


def _panels(w, u, mask, structure, quantize, scales) -> tuple:
    """A block, panel by panel; after each a product corrects what follows."""
    rows = w.shape[0]
    panel = math.gcd(rows, _PANEL)
    if mask is None:  # of whole groups
        panel = structure.m * math.gcd(rows // structure.m, max(1, _PANEL // structure.m))

    def step(w, i):
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * panel, panel)
        now, above = part(w), part(u)
        square = jax.lax.dynamic_slice_in_dim(above, i * panel, panel, axis=1)
        chosen = None if mask is None else part(mask)
        found = _rows(now, square, chosen, structure, quantize, scales)
        return w - matmul(above.T, found[3]), found  # above is 0 left of the panel

    _, found = jax.lax.scan(step, w, jnp.arange(rows // panel))
    return tuple(x.reshape(rows, -1) for x in found)


def _rows(w, u, mask, structure, quantize, scales) -> tuple:
    """The update row by row: kept weights, mask, codes, errors. Without a mask each group of N:M is chosen
    when its first row is reached."""
    chosen = [] if mask is None else list(mask)
    kept, codes, mine = [], [], []
    for i in range(w.shape[0]):
        if mask is None and i % structure.m == 0:
            group = slice(i, i + structure.m)
            scores = _saliency(w[group], u[group, group])
            chosen.extend(selection.topk_mask(scores, structure.n, axis=0))
        q = jnp.where(chosen[i], w[i], 0.0)
        code = q
        if quantize is not None:
            code = quantize.codes(q, scales[0])
            q = code * scales[0]
        e = (w[i] - q) / u[i, i]
        w = w - u[i][:, None] * e
        kept.append(q)
        codes.append(code)
        mine.append(e)
    return jnp.stack(kept), jnp.stack(chosen), jnp.stack(codes), jnp.stack(mine)
