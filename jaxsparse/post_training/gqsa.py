r"""GQSA (Zeng et al., GQSA: group quantization and sparsity for accelerating large language model inference,
2024): whole groups of inputs of an output go, and what is left is quantized by the same groups.

    saliency_ij = w_ij² / [H⁻¹]_ii²,   of a group of G inputs of one output: its mean

The groups of least saliency of the layer are dropped. The others are rounded to integers with a scale for
each group, in the sweep of `sparsegpt.py`, so that what follows makes up for groups that went and for
rounding. Then the scales are solved once more by least squares with the integers held fixed: with C the
matrix of an output's integers, one column for each group,

    (Cᵀ H C) s = Cᵀ H w.

A group that is kept has codes and one scale, a group that went has neither: `pack` stores a layer as
block-sparse rows.

This differs from the paper in: 1. rounding is symmetric; 2. both of its stages (weights of a block, then
scales of the network, by gradient steps) are replaced by these closed forms on one layer.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import structures
from jaxsparse._checks import check_count
from jaxsparse.post_training._checks import check_damping
from jaxsparse.post_training._layer import (
    Pruned,
    damped,
    errors,
    inverse_factor,
    keep,
    matmul,
    prepare,
)
from jaxsparse.post_training.sparsegpt import Int, sparsegpt_core
from jaxsparse.structures import Block, Structure


def gqsa_core(
    w: Array,
    gram: Array,
    sparsity: float | None = None,
    *,
    structure: Structure | str | None = None,
    group: int = 16,
    bits: int = 4,
    damping: float = 0.01,
) -> Pruned:
    """Drops groups of inputs and quantizes the others.

    Args:
      w: `[in, out]`.
      gram: `[in, in]`.
      sparsity: the fraction of groups that go, in [0, 1).
      structure: none but `Block(group, 1)`.
      group: inputs of a group, of which one output has `in / group`.
      bits: of the integers, 2 to 8.
      damping: added to the diagonal, as a fraction of its mean.

    Returns:
      The pruned layer with its codes and scales.

    Raises:
      ValueError: a group that does not divide the inputs, another structure, a sparsity that the layer
        cannot have.
    """
    check_count("group", group)
    check_damping(damping)
    mine = Block(group, 1)
    if structure is not None and structures.resolve(structure) != mine:
        raise ValueError(f"structure={structure}: gqsa drops Block({group}, 1); leave it out")
    mine.check("w", w.shape)
    dense, h = prepare(w, gram)
    u, _ = jax.jit(inverse_factor)(h, damping)
    saliency = jnp.square(dense / jnp.sum(jnp.square(u), axis=0)[:, None])
    mask = keep(saliency, sparsity, mine)
    found = sparsegpt_core(
        w, gram, structure=None, mask=mask, quantize=Int(bits, group), damping=damping
    )
    assert found.codes is not None and found.scales is not None
    scales = _scales(dense, damped(h, damping), found.codes, found.scales, group)
    weights = found.codes * jnp.repeat(scales, group, axis=0)
    return found._replace(weights=jnp.where(mask, weights, 0.0), mask=mask, scales=scales)


@functools.partial(jax.jit, static_argnames=("group",))
def _scales(w, gram, codes, scales, group: int) -> Array:
    """The scales `[groups, out]` of least error; of an output that would lose by rounding, those it had."""
    inputs, groups = codes.shape[0], codes.shape[0] // group
    codes = codes.astype(jnp.float32)
    wanted = codes * matmul(gram, w)
    by_group = lambda x: x.reshape(groups, group, -1).sum(1)

    def one(column):
        c, right, s = column
        # C has one entry in each row: gram C is a sum over neighbouring columns, no product.
        half = (gram * c).reshape(inputs, groups, group).sum(2)
        system = by_group(c[:, None] * half)
        empty = jnp.diagonal(system) <= 0
        solved = jnp.linalg.solve(system + jnp.diag(jnp.where(empty, 1.0, 0.0)), right)
        return jnp.where(empty, s, solved)

    solved = jax.lax.map(one, (codes.T, by_group(wanted).T, scales.T)).T
    lost = lambda x: errors(gram, w - codes * jnp.repeat(x, group, axis=0))
    return jnp.where(lost(solved) <= lost(scales), solved, scales)


class Groups(NamedTuple):
    """A layer as block-sparse rows: `starts` int32 `[out + 1]`, and for each group that is kept, output by
    output, `columns` (which group of inputs), `codes` int8 `[kept, group]` and `scales`."""

    starts: np.ndarray
    columns: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    inputs: int

    def unpack(self) -> np.ndarray:
        """The weights, float32 `[in, out]`."""
        group, outputs = self.codes.shape[1], len(self.starts) - 1
        found = np.zeros((outputs, self.inputs // group, group), np.float32)
        rows = np.repeat(np.arange(outputs), np.diff(self.starts))
        found[rows, self.columns] = self.codes * self.scales[:, None]
        return found.reshape(outputs, -1).T


def pack(pruned: Pruned, group: int) -> Groups:
    """The groups that are kept, of a layer from `gqsa_core`.

    Raises:
      ValueError: a layer without codes.
    """
    if pruned.codes is None or pruned.scales is None:
        raise ValueError("pruned: it has no codes; give what gqsa_core returned")
    mask, codes = np.asarray(pruned.mask), np.asarray(pruned.codes)
    kept = mask.reshape(-1, group, mask.shape[1]).all(1).T  # [out, groups]
    rows, columns = np.nonzero(kept)
    by_group = codes.reshape(-1, group, codes.shape[1]).transpose(2, 0, 1)
    starts = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
    scales = np.asarray(pruned.scales).T[rows, columns]
    return Groups(starts, columns.astype(np.int32), by_group[rows, columns], scales, mask.shape[0])
