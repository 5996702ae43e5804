"""What a method works on: the sparse leaves of a tree, their structures and their budgets.

A `Plan` is made from the parameters whenever a method is traced. It holds shapes and names only, no
arrays, and moves values between whole trees and the list of sparse leaves, so that the rules of
methods are written on plain lists.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import _counts, allocations, masking, scores, selection, structures, targets
from jaxsparse.allocations import Allocation
from jaxsparse.structures import Structure


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One sparse leaf: `lead` leading axes stack independent layers of `layer_shape`."""

    index: int
    path: str
    shape: tuple[int, ...]
    lead: int
    structure: Structure

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer of the stack."""
        return self.shape[self.lead :]

    @property
    def layer_size(self) -> int:
        """Weights in one layer."""
        return math.prod(self.layer_shape)

    @property
    def layers(self) -> int:
        """Layers in the stack."""
        return math.prod(self.shape[: self.lead])

    @property
    def size(self) -> int:
        """Weights in the leaf."""
        return math.prod(self.shape)

    def salt(self, seed: Any, stream: Any = 0) -> Array:
        """A uint32 that differs between leaves, seeds and streams (the number of an update)."""
        return _salt(seed, stream, self.path)


def _salt(seed: Any, stream: Any, name: str) -> Array:
    """A uint32 that differs between seeds, streams and names; never their sum, by which seed 0 at
    step 1 would be seed 1 at step 0."""

    mix, path = selection.mix, jnp.uint32(zlib.crc32(name.encode()))
    return mix(mix(mix(selection.as_seed(seed)) ^ path) + selection.as_seed(stream))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sparse leaves of a tree of parameters."""

    treedef: Any
    leaves: tuple[Leaf, ...]

    def take(self, tree) -> list:
        """The values at the sparse leaves."""
        flat = self.treedef.flatten_up_to(tree)
        return [flat[leaf.index] for leaf in self.leaves]

    def gradients(self, updates, params) -> list:
        """The updates at the sparse leaves.

        Raises:
          ValueError: updates that are not like the parameters; the first such leaf is named.
        """
        try:
            found = self.treedef.flatten_up_to(updates)
        except ValueError as error:
            raise ValueError(f"updates: not a tree like the parameters: {error}") from None
        for u, (path, p) in zip(found, targets.named_leaves(params)):
            if hasattr(u, "shape") and tuple(u.shape) != tuple(jnp.shape(p)):
                raise ValueError(
                    f"updates: {path!r} has shape {tuple(u.shape)}, its parameter "
                    f"{tuple(jnp.shape(p))}; give the gradients of these parameters"
                )
        return [found[leaf.index] for leaf in self.leaves]

    def put(self, tree, values: Sequence):
        """`tree` with other values at the sparse leaves."""
        flat = list(self.treedef.flatten_up_to(tree))
        for leaf, value in zip(self.leaves, values):
            flat[leaf.index] = value
        return self.treedef.unflatten(flat)

    def scatter(self, values: Sequence, fill=None):
        """A tree with `values` at the sparse leaves and `fill` elsewhere."""
        flat = [fill] * self.treedef.num_leaves
        for leaf, value in zip(self.leaves, values):
            flat[leaf.index] = value
        return self.treedef.unflatten(flat)

    def masks(self, tree) -> list[Array]:
        """The boolean masks of a tree of masks (packed or not) at the sparse leaves."""
        return [masking.unpack(m) for m in self.take(tree)]


def make(params, target_rules=None, structure: Any = None) -> Plan:
    """The plan for `params`: `targets.select` and one structure for all leaves, or a mapping from
    path patterns to structures (the first that matches; leaves without one are unstructured).

    Raises:
      ValueError: rules that match nothing, a structure that a leaf cannot have.
    """
    chosen = targets.select(params, target_rules)
    flat, treedef = jax.tree.flatten(params)
    picked = [(i, s) for i, s in enumerate(chosen) if s.selected]
    if chosen and not picked:
        warnings.warn(
            "no leaf is sparsified: by default targets= takes floating-point kernels of two or "
            f"more dimensions; paths are {', '.join(s.path for s in chosen[:8])}",
            stacklevel=3,
        )
    of = _structures([s.path for _, s in picked], structure)
    leaves = []
    for (i, s), kind in zip(picked, of):
        shape = tuple(jnp.shape(flat[i]))
        kind.check(s.path, shape[s.lead :])
        leaves.append(Leaf(i, s.path, shape, s.lead, kind))
    return Plan(treedef, tuple(leaves))


def _structures(paths: list[str], structure) -> list[Structure]:
    if not isinstance(structure, Mapping):
        return [structures.resolve(structure)] * len(paths)
    if paths:
        targets.check_matched("structure", structure, paths)
    kinds = {p: structures.resolve(s) for p, s in structure.items()}
    default = structures.Unstructured()
    return [next((k for p, k in kinds.items() if re.search(p, path)), default) for path in paths]


def check_sparsity(sparsity, structure: Any = None) -> Any:
    """The sparsity asked for, checked; that of the structure where it fixes one.

    Raises:
      ValueError: not in [0, 1), missing, or at odds with an N:M structure.
    """
    fixed = structure.sparsity if isinstance(structure, Structure) else None
    if sparsity is None:
        if fixed is None:
            raise ValueError("sparsity is missing: give the fraction of zeros, in [0, 1)")
        return fixed
    if not _counts.is_concrete(sparsity):
        return sparsity
    if isinstance(sparsity, bool) or np.ndim(sparsity) != 0:
        raise ValueError(f"sparsity={sparsity!r}: give one number, the fraction of zeros in [0, 1)")
    if not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1); it is the fraction of zeros")
    if fixed is not None and abs(float(sparsity) - fixed) > 1e-6:
        raise ValueError(
            f"sparsity={sparsity} contradicts structure={structure}, whose sparsity is {fixed:.6g}; "
            "leave sparsity out, or give that value"
        )
    return float(sparsity) if not isinstance(sparsity, jax.Array) else sparsity


def unit_budgets(leaves: Sequence[Leaf], allocation, sparsity, fraction=1.0) -> list:
    """Units kept per slice of each leaf, when `fraction` of the way to `sparsity` is gone.

    Layer l has the sparsity `fraction * S_l`; counts are exact, and at fraction 1 those of the
    final sparsity.

    Raises:
      ValueError: a leaf would keep nothing.
    """
    found = []
    for leaf, s in zip(leaves, allocation.sparsities(leaves, sparsity)):
        fixed, n = leaf.structure.sparsity, leaf.layer_size
        dense = _counts.is_concrete(s) and s == 0.0
        s = s if fixed is None or dense else fixed
        final = leaf.structure.budget(leaf.layer_shape, _counts.kept_count(n, s))
        if isinstance(final, int) and final < 1:
            raise ValueError(
                f"sparsity={s:.6g} leaves nothing of {leaf.path!r}, {leaf.layer_shape} with "
                f"{leaf.structure}; ask for less, or keep the leaf dense with targets="
            )
        if not isinstance(fraction, float) or fraction != 1.0:
            ramp = jnp.asarray(fraction, jnp.float32)
            now = leaf.structure.budget(leaf.layer_shape, _counts.kept_count(n, s * ramp))
            final = jnp.where(ramp >= 1.0, final, jnp.maximum(now, final))
        found.append(final if isinstance(final, int) else jnp.maximum(final, 1))
    return found


def choose(
    leaves: Sequence[Leaf],
    values: Sequence[Array],
    allocation: Allocation,
    sparsity,
    *,
    fraction: Any = 1.0,
    where: Sequence[Any] | None = None,
    ties: str = "position",
    seed: Any = 0,
    stream: Any = 0,
) -> list[Array]:
    """Masks that keep the highest scores within the budget: the one place where scores, structure,
    allocation and sparsity meet.

    Args:
      leaves: the sparse leaves.
      values: scores, one array per leaf.
      allocation: how the budget is split.
      sparsity: the sparsity asked for; with `fraction` < 1 only that part of it.
      where: masks to choose within (a weight outside is never kept).
      ties, seed, stream: how equal scores are ranked, see `selection.topk_mask`.
    """
    where = list(where or [None] * len(leaves))
    if isinstance(allocation, allocations.Global):
        return _choose_global(
            leaves, values, allocation, sparsity, fraction, where, ties, seed, stream
        )
    units = unit_budgets(leaves, allocation, sparsity, fraction)
    kept = selection.topk_masks(
        [leaf.structure.pool(v, leaf.lead) for leaf, v in zip(leaves, values)],
        units,
        where=_unit_masks(leaves, where),
        ties=ties,
        seeds=[leaf.salt(seed, stream) for leaf in leaves],
        axes=[leaf.structure.axes(leaf.shape, leaf.lead) for leaf in leaves],
    )
    return [leaf.structure.expand(m, leaf.shape, leaf.lead) for leaf, m in zip(leaves, kept)]


def _unit_masks(leaves, masks) -> list:
    """The units that masks of weights hold; None for None."""
    return [
        None if m is None else structures.unit_mask(leaf.structure, m, leaf.lead)
        for leaf, m in zip(leaves, masks)
    ]


def _choose_global(leaves, values, allocation, sparsity, fraction, where, ties, seed, stream):
    if not leaves:
        return []
    unit = {leaf.structure.unit_size(leaf.layer_shape) for leaf in leaves}
    if any(leaf.structure.slices(leaf.layer_shape) > 1 for leaf in leaves) or len(unit) > 1:
        raise ValueError(
            "allocation='global' ranks units of one size over the whole network; "
            f"structure={leaves[0].structure} fixes budgets within a layer: use a rule of shapes "
            "such as allocation='uniform'"
        )
    (size,) = unit
    total = sum(leaf.size for leaf in leaves)
    kept = _counts.kept_units(total, sparsity, size)
    if isinstance(kept, int) and kept < 1:
        raise ValueError(f"sparsity={sparsity} leaves nothing of {total} weights; ask for less")
    if not isinstance(fraction, float) or fraction != 1.0:
        ramp = jnp.asarray(fraction, jnp.float32)
        now = _counts.kept_units(total, sparsity * ramp, size)
        kept = _counts.later(ramp >= 1.0, kept, now)
    ranked = [
        allocation.rank(leaf.structure.pool(v, leaf.lead), leaf.lead)
        for leaf, v in zip(leaves, values)
    ]
    eligible = _unit_masks(leaves, where)
    where = None if all(w is None for w in eligible) else eligible
    least = allocation.floor([leaf.size for leaf in leaves])
    masks = selection.global_topk_masks(
        ranked,
        kept,
        where=where,
        ties=ties,
        seed=_salt(seed, stream, ""),
        minimum=[x.layers * (n // (size * max(x.layers, 1))) for x, n in zip(leaves, least)]
        if allocation.minimum
        else None,
    )
    empty = [
        x.path for x, m in zip(leaves, masks) if _counts.is_concrete(m) and not bool(jnp.any(m))
    ]
    if empty:
        warnings.warn(
            f"sparsity={sparsity}: one ranking of the whole network leaves nothing of "
            f"{', '.join(map(repr, empty))}; allocation=Global(minimum=1) keeps a weight of every leaf, "
            "targets= keeps a leaf dense",
            stacklevel=3,
        )
    return [leaf.structure.expand(m, leaf.shape, leaf.lead) for leaf, m in zip(leaves, masks)]


def prune(
    params,
    sparsity=None,
    *,
    score: str | scores.Score = "magnitude",
    grads=None,
    structure: Any = None,
    allocation: Any = "uniform",
    targets: Any = None,
    seed: int = 0,
):
    """One-shot pruning without an optimizer: the sparse parameters and their masks.

    Args:
      params: any pytree of parameters.
      sparsity: the fraction of the sparsified weights that become zero, in [0, 1); may be left out
        with an N:M structure.
      score: "magnitude", "random", "gradient", "saliency" (these two need `grads`), or a function
        `(w, g) -> score`.
      structure, allocation, targets, seed: as for every method of the library.

    Returns:
      `(sparse_params, masks)`.

    >>> import jax.numpy as jnp
    >>> sparse, masks = prune({"kernel": jnp.arange(1.0, 11.0).reshape(5, 2)}, 0.8)
    >>> sparse["kernel"].ravel().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 10.0]

    Raises:
      ValueError: a sparsity out of range, a structure that does not fit, rules that match nothing,
        scores that are NaN.
    """
    structure = structure if isinstance(structure, Mapping) else structures.resolve(structure)
    sparsity = check_sparsity(sparsity, structure)
    plan = make(params, targets, structure)
    function = scores.resolve(score)
    gs = plan.take(grads) if grads is not None else [None] * len(plan.leaves)
    values = [function(w, g) for w, g in zip(plan.take(params), gs)]
    for leaf, v in zip(plan.leaves, values):
        if _counts.is_concrete(v) and bool(jnp.any(jnp.isnan(v))):
            raise ValueError(
                f"params: the scores of {leaf.path!r} hold NaN, which cannot be ranked; look for NaN "
                "in the weights and the gradients"
            )
    masks = plan.scatter(
        choose(
            plan.leaves,
            values,
            allocations.resolve(allocation),
            sparsity,
            ties=scores.ties(function),
            seed=seed,
        )
    )
    return masking.apply(params, masks), masks
