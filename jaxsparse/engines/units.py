"""The units of the sparse leaves as vectors: norms over units, and what is decided of units at the weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from jaxsparse import structures
from jaxsparse.engines.setup import Setup, setup
from jaxsparse.leaves import Leaf, coupling
from jaxsparse.structures import Channel, Coupled, MakesCoupled
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, Targets


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of leaves: those of every leaf, or of every group of a `Coupled` structure.

    Values of units are lists of arrays, `[units]` or as the structure shapes them, one for each group or
    leaf; values of weights are lists of arrays, one for each leaf.

    >>> leaf = Leaf(0, "kernel", (2, 3), 0, Channel())
    >>> [n.tolist() for n in Units([leaf]).norms([jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])])]
    [[5.0, 0.0, 1.0]]
    """

    members: Sequence[Leaf]

    @property
    def leaves(self) -> Sequence[Leaf]:
        """One leaf for every array of units."""
        together = coupling(self.members)
        return self.members if together is None else together.leaves

    def pool(self, values: Sequence[Array], combine: Literal["sum", "mean", "max"] = "sum") -> list:
        """Sums over units, in float32 at least; of the members of a unit the sum, mean or maximum."""
        together = coupling(self.members)
        if together is not None:
            return together.pool(values, combine)
        return [leaf.pool(x) for leaf, x in zip(self.members, values)]

    def dots(self, xs: Sequence[Array], ys: Sequence[Array]) -> list[Array]:
        """The inner products of units."""
        return self.pool([_wide(x) * _wide(y) for x, y in zip(xs, ys)])

    def norms(self, xs: Sequence[Array]) -> list[Array]:
        """The Euclidean norms of units."""
        return [jnp.sqrt(n) for n in self.dots(xs, xs)]

    def sizes(self) -> list[Array]:
        """The numbers of weights in units, float32."""
        return self.pool([jnp.ones(leaf.shape, jnp.float32) for leaf in self.members])

    def at_weights(
        self, units: Sequence[Array], join: Literal["all", "sum"] = "all"
    ) -> list[Array]:
        """What is said of units, at their weights: masks, or numbers. Where a weight is in two units,
        masks meet and numbers are multiplied; with "sum" numbers are added, and are 0 at weights of no
        unit."""
        together = coupling(self.members)
        if together is not None:
            return together.expand(units, join)
        return [leaf.expand(u) for leaf, u in zip(self.members, units)]

    def alive(self, xs: Sequence[Array]) -> list[Array]:
        """Of which units any weight is not 0."""
        together, held = coupling(self.members), [x != 0 for x in xs]
        if together is not None:
            return together.units(held)
        return [leaf.units(m) for leaf, m in zip(self.members, held)]


def safe_divide(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def group_setup(
    sparsity: Scalar | None,
    groups: GroupsLike,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
    *,
    sides: Sequence[str] = ("out", "with"),
    asks_sparsity: bool = True,
    by_layer: bool = False,
) -> Setup:
    """The setup of a method that works on groups.

    Args:
      groups: what `channels.find` returns, a structure, or None: every output channel of a kernel.
      sides: what of the groups of `channels.find` belongs to a unit.
      sparsity, allocation, targets, seed, pack_masks, asks_sparsity, by_layer: as for `setup`. Targets
        are by default all leaves that the groups name, biases and scales among them.

    Returns:
      The setup.

    Raises:
      ValueError: groups that are none of these; what `setup` raises.
    """
    if groups is None:
        kind: Any = Channel()
    elif isinstance(groups, MakesCoupled):
        kind = groups.structure(sides=sides)
    elif isinstance(groups, structures.Structure):
        kind = groups
    else:
        raise ValueError(
            f"groups={groups!r}: give what channels.find(model, x) returns, a structure such as "
            "Channel(), or None for every output channel by itself"
        )
    if targets is None and isinstance(kind, Coupled):
        targets = tuple((f"^{re.escape(path)}$", True) for path in sorted(kind.paths))
    return setup(
        sparsity,
        kind,
        allocation,
        targets,
        seed,
        pack_masks,
        asks_sparsity=asks_sparsity,
        by_layer=by_layer,
    )


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
