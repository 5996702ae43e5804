"""The sparse leaves of a tree of parameters, each of which speaks for its structure.

`find` makes them from the parameters whenever a method is traced. They hold shapes and names only, no
arrays. `SparseLeaves` moves values between whole trees and the list of sparse leaves, so that the
rules of methods are written on plain lists. A `Leaf` is a stack of layers: whoever ranks its weights
asks it (`pool`, `axes`, `expand`), and structures are written for one layer alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import masking, selection, structures, targets
from jaxsparse.structures import Coupled, Group, Structure, Unstructured


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One sparse leaf: `lead` leading axes stack independent layers of `layer_shape`.

    Its units are `[layers, *units of a layer]`, without the first axis where `lead` is 0.

    >>> leaf = Leaf(0, "kernel", (3, 8, 4), 1, structures.Block(4, 4))
    >>> leaf.layers, leaf.layer_shape, leaf.pool(jnp.ones((3, 8, 4))).shape, leaf.axes
    (3, (8, 4), (3, 2, 1), (1, 2))
    """

    index: int
    path: str
    shape: tuple[int, ...]
    lead: int
    structure: Structure

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The axes that stack layers."""
        return self.shape[: self.lead]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer of the stack."""
        return self.shape[self.lead :]

    @property
    def layer_axes(self) -> tuple[int, ...]:
        """The axes of the leaf that make up a layer."""
        return tuple(range(self.lead, len(self.shape)))

    @property
    def layer_size(self) -> int:
        """Weights in one layer."""
        return math.prod(self.layer_shape)

    @property
    def layers(self) -> int:
        """Layers in the stack."""
        return math.prod(self.stack_shape)

    @property
    def size(self) -> int:
        """Weights in the leaf."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the units within which units compete."""
        return tuple(a + min(self.lead, 1) for a in self.structure.axes(self.layer_shape))

    @property
    def unit_size(self) -> int:
        """Weights in a unit."""
        return self.structure.unit_size(self.layer_shape)

    @property
    def slices(self) -> int:
        """Slices of a layer that rank separately."""
        return self.structure.slices(self.layer_shape)

    def pool(self, x: Array) -> Array:
        """Scores of units from scores of weights."""
        return self._by_layer(self.structure.pool, x)

    def expand(self, units: Array) -> Array:
        """The mask of weights that a mask of units stands for."""
        one = lambda u: self.structure.expand(u, self.layer_shape)
        return (jax.vmap(one) if self.lead else one)(units).reshape(self.shape)

    def units(self, mask: Array) -> Array:
        """The units that a mask of weights holds: those of which it keeps any weight."""
        return self._by_layer(lambda m: structures.unit_mask(self.structure, m), mask)

    def counts(self, mask: Array) -> Array:
        """How many units a mask of weights holds in each slice, int32."""
        return selection.count(self.units(mask), axis=self.axes)

    def best(
        self,
        scores: Array,
        k: Any,
        *,
        where: Array | None = None,
        ties: str = "position",
        seed: Any = None,
    ) -> Array:
        """The mask that keeps the k units of highest pooled score in each slice, of those that
        `where` (a mask of weights) holds; ties and seed as for `selection.topk_mask`."""
        kept = selection.topk_mask(
            self.pool(scores),
            k,
            where=None if where is None else self.units(where),
            ties=ties,
            seed=seed,
            axis=self.axes,
        )
        return self.expand(kept)

    def assign(
        self, scores: Array, kept: Any, *, where: Array | None, ties: str, seed: Any
    ) -> Array:
        """The mask of a structure that chooses it itself, see `Structure.assign`."""
        one = functools.partial(self.structure.assign, ties=ties)
        if not self.lead:
            return one(scores, kept, where=where, seed=seed)
        stack = lambda x: x.reshape(self.layers, *self.layer_shape)
        seeds = seed + jnp.arange(self.layers, dtype=jnp.uint32)
        if where is None:
            masks = jax.vmap(lambda x, s: one(x, kept, where=None, seed=s))(stack(scores), seeds)
        else:
            masks = jax.vmap(lambda x, s, w: one(x, kept, where=w, seed=s))(
                stack(scores), seeds, stack(where)
            )
        return masks.reshape(self.shape)

    def with_structure(self, structure: Structure | None) -> Leaf:
        """The same leaf with another structure."""
        return dataclasses.replace(self, structure=structures.resolve(structure))

    def salt(self, seed: Any, stream: Any = 0) -> Array:
        """A uint32 that differs between leaves, seeds and streams (the number of an update)."""
        return salt(seed, stream, self.path)

    def _by_layer(self, function: Callable[[Array], Array], x: Array) -> Array:
        if not self.lead:
            return function(x)
        return jax.vmap(function)(x.reshape(self.layers, *self.layer_shape))


def salt(seed: Any, stream: Any, name: str) -> Array:
    """A uint32 that differs between seeds, streams and names; never their sum, by which seed 0 at
    step 1 would be seed 1 at step 0."""

    mix, path = selection.mix, jnp.uint32(zlib.crc32(name.encode()))
    return mix(mix(mix(selection.as_seed(seed)) ^ path) + selection.as_seed(stream))


@dataclasses.dataclass(frozen=True)
class SparseLeaves:
    """The sparse leaves of a tree of parameters, in the order of `jax.tree.leaves`."""

    treedef: Any
    leaves: tuple[Leaf, ...]

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

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


def find(
    params,
    target_rules: targets.Targets = None,
    structure: Structure | str | Mapping[str, Structure | str | None] | None = None,
) -> SparseLeaves:
    """The sparse leaves of `params`.

    Args:
      params: any tree of arrays, or of their shapes.
      target_rules: which leaves, see `targets.select`.
      structure: one structure for all leaves; a mapping from path patterns to structures (the first
        that matches; leaves without one are unstructured); or `Coupled`, which takes the leaves that
        its groups name and leaves all others dense.

    Returns:
      The leaves.

    >>> [leaf.path for leaf in find({"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})]
    ['a/kernel']

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
    if isinstance(structure, Coupled):
        paths = [s.path for s in chosen]
        if unknown := sorted(structure.paths - set(paths)):
            raise ValueError(targets.unmatched_message("structure", unknown, paths))
        picked = [(i, s) for i, s in picked if s.path in structure.paths]
    of = _structures([s.path for _, s in picked], structure)
    leaves = []
    for (i, s), kind in zip(picked, of):
        shape = tuple(jnp.shape(flat[i]))
        kind.check(s.path, shape[s.lead :])
        leaves.append(Leaf(i, s.path, shape, s.lead, kind))
    coupling(leaves)  # refuses groups whose leaves do not fit together
    return SparseLeaves(treedef, tuple(leaves))


def _structures(paths: list[str], structure) -> list[Structure]:
    if not isinstance(structure, Mapping):
        return [structures.resolve(structure)] * len(paths)
    if paths:
        targets.check_matched("structure", structure, paths)
    kinds = {p: structures.resolve(s) for p, s in structure.items()}
    default = Unstructured()
    return [next((k for p, k in kinds.items() if re.search(p, path)), default) for path in paths]


# -- Units that span leaves --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Leaves of which some are coupled, seen as leaves that are not: one for each group, whose weights
    are its units, then those that no group holds. What ranks and exchanges weights works on these."""

    members: tuple[Leaf, ...]
    groups: tuple[tuple[Coupled, Group], ...]
    leaves: tuple[Leaf, ...]

    def pool(self, values: Sequence[Array], combine: str | None = None) -> list[Array]:
        """The scores of units from those of weights, by the rule of each structure (`combine`) or as
        given: "sum", "mean" or "max"."""
        joint = {"sum": sum, "mean": lambda x: sum(x) / len(x), "max": _maximum}
        pooled = [
            joint[combine or kind.combine](self._parts(group, kind, values, lambda p, x: p.pool(x)))
            for kind, group in self.groups
        ]
        return [*pooled, *self._single(values)]

    def units(self, masks: Sequence[Array]) -> list[Array]:
        """The units that masks of weights hold: those of which any weight is kept."""
        held = lambda part, m: part.pool(m.astype(jnp.int32)) > 0
        found = [
            functools.reduce(jnp.logical_or, self._parts(group, kind, masks, held))
            for kind, group in self.groups
        ]
        return [*found, *self._single(masks)]

    def expand(self, units: Sequence[Array], join: Literal["all", "sum"] = "all") -> list[Array]:
        """The masks of weights: a weight is kept where every group that holds it keeps its unit. Of
        numbers of units, their products at the weights, 1 where no unit is; or the sums, 0 there."""
        fill, both = (1, operator.mul) if join == "all" else (0, operator.add)
        single = iter(units[len(self.groups) :])
        masks = []
        for leaf in self.members:
            if not isinstance(leaf.structure, Coupled):
                masks.append(next(single))
                continue
            found = []
            for (kind, group), kept in zip(self.groups, units):
                for part in group.parts if kind == leaf.structure else ():
                    if part.path == leaf.path:
                        one = functools.partial(part.expand, shape=leaf.layer_shape, fill=fill)
                        found.append((jax.vmap(one) if leaf.lead else one)(kept))
            masks.append(functools.reduce(both, found).reshape(leaf.shape))
        return masks

    def salts(self, salts: Sequence[Array]) -> list[Array]:
        """One seed per leaf of `leaves`, from one per member: a group takes that of its first part."""
        of = {(leaf.structure, leaf.path): s for leaf, s in zip(self.members, salts)}
        first = [next(of[k, p.path] for p in g.parts if (k, p.path) in of) for k, g in self.groups]
        return [*first, *self._single(salts)]

    def _parts(self, group: Group, kind: Coupled, values, function) -> list[Array]:
        """What `function(part, layer)` makes of each part of a group."""
        found = []
        for part in group.parts:
            for leaf, x in zip(self.members, values):
                if leaf.path == part.path and leaf.structure == kind:
                    found.append(leaf._by_layer(functools.partial(function, part), x))
        return found

    def _single(self, values: Sequence[Array]) -> list[Array]:
        rows = zip(self.members, values)
        return [x for leaf, x in rows if not isinstance(leaf.structure, Coupled)]


def _maximum(xs: Sequence[Array]) -> Array:
    return functools.reduce(jnp.maximum, xs)


def coupling(leaves: Sequence[Leaf]) -> Coupling | None:
    """The coupling of the leaves; None if none is coupled.

    Raises:
      ValueError: parts of a group with other numbers of units, or of layers.
    """
    kinds = list(dict.fromkeys(x.structure for x in leaves if isinstance(x.structure, Coupled)))
    if not kinds:
        return None
    groups, made = [], []
    for kind in kinds:
        of = {leaf.path: leaf for leaf in leaves if leaf.structure == kind}
        for group in kind.groups:
            parts = [p for p in group.parts if p.path in of]
            if not parts:
                continue
            sizes = {
                (of[p.path].layers, p.unit_count(of[p.path].layer_shape)): p.path for p in parts
            }
            if len(sizes) > 1:
                raise ValueError(
                    f"structure=Coupled: the leaves of group {group.name!r} have different numbers "
                    f"of (layers, units): {', '.join(f'{p!r} {n}' for n, p in sizes.items())}"
                )
            ((layers, units),) = sizes
            lead = min(of[parts[0].path].lead, 1)
            shape = (layers, units) if lead else (units,)
            groups.append((kind, group))
            made.append(Leaf(-1, group.name, shape, lead, Unstructured()))
    single = [leaf for leaf in leaves if not isinstance(leaf.structure, Coupled)]
    return Coupling(tuple(leaves), tuple(groups), (*made, *single))


def statistics_at(leaves: SparseLeaves, stats, params) -> list:
    """What calibration statistics hold at the sparse leaves; None where they hold nothing.

    Args:
      leaves: the sparse leaves.
      stats: a tree like the parameters, any value (an array, a dictionary of arrays) at each leaf; or
        a mapping from paths of leaves to such values.
      params: the parameters.

    Raises:
      ValueError: neither; a path that no leaf has.
    """
    if stats is None:
        return [None] * len(leaves)
    paths = [path for path, _ in targets.named_leaves(params)]
    if isinstance(stats, Mapping) and not set(stats) - set(paths):
        return [stats.get(leaf.path) for leaf in leaves]
    try:
        found = masking.at_leaves(stats, masking.plain(params))
    except ValueError:
        unknown = sorted(map(str, stats)) if isinstance(stats, Mapping) else [type(stats).__name__]
        raise ValueError(targets.unmatched_message("stats", unknown, paths)) from None
    missing = lambda x: x is None or isinstance(x, optax.MaskedNode)
    return [None if missing(found[leaf.index]) else found[leaf.index] for leaf in leaves]
