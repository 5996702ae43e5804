"""Units that span several leaves: a hidden neuron is a column of one kernel, an entry of its bias and a
row of the next kernel, and lives or dies as a whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.structures.base import Shape, Structure, resolve, sum_over


@dataclasses.dataclass(frozen=True)
class Part:
    """What a group of units holds of one leaf: positions along one axis.

    Attributes:
      path: the path of the leaf.
      axis: an axis of a layer of the leaf (of stacked layers the stack does not count).
      index: the positions that belong to each unit, integers `[units, members]`; None where unit i is
        position i. Positions in no unit are always kept.
    """

    path: str
    axis: int
    index: Sequence[Sequence[int]] | np.ndarray | None = None

    def __post_init__(self):
        if self.index is None:
            return
        rows = np.asarray(self.index)
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or rows.size == 0:
            raise ValueError(
                f"index={self.index!r} of {self.path!r}: give integers [units, members], or None"
            )
        if rows.min() < 0 or len(np.unique(rows)) < rows.size:
            raise ValueError(
                f"index={self.index!r} of {self.path!r}: a position belongs to one unit, and is not "
                "negative"
            )
        object.__setattr__(self, "index", tuple(map(tuple, rows.tolist())))

    def unit_count(self, shape: Shape) -> int:
        """The number of units in a layer of `shape`."""
        return shape[self.axis] if self.index is None else len(self.index)

    def check(self, shape: Shape) -> None:
        """Raises `ValueError` if a layer of this shape has no such axis or positions."""
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"structure=Coupled: {self.path!r} has shape {shape}, and no axis {self.axis}"
            )
        if self.index is not None and np.max(np.asarray(self.index)) >= shape[self.axis]:
            raise ValueError(
                f"structure=Coupled: the index of {self.path!r} goes up to "
                f"{np.max(np.asarray(self.index))}; axis {self.axis} of {shape} is shorter"
            )

    def pool(self, x: Array) -> Array:
        """The sum over each unit of a layer, `[units]`."""
        axis = self.axis % x.ndim
        along = sum_over(x, tuple(a for a in range(x.ndim) if a != axis))
        return along if self.index is None else sum_over(along[np.asarray(self.index)], (1,))

    def expand(self, units: Array, shape: Shape, fill: int = 1) -> Array:
        """The mask of a layer of `shape` that a mask of units, `[units]`, stands for; of numbers of
        units the numbers, and `fill` where no unit is."""
        axis = self.axis % len(shape)
        if self.index is not None:
            at = np.asarray(self.index)
            every = jnp.full(shape[axis], fill, units.dtype)
            units = every.at[at].set(jnp.broadcast_to(units[:, None], at.shape))
        others = tuple(a for a in range(len(shape)) if a != axis)
        return jnp.broadcast_to(jnp.expand_dims(units, others), shape)


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that compete: unit i is what its parts hold at i, in several leaves."""

    parts: tuple[Part, ...]

    def __init__(self, parts: Iterable[Part | tuple]):
        made = tuple(p if isinstance(p, Part) else Part(*p) for p in parts)
        if not made:
            raise ValueError("Group: give at least one part (path, axis)")
        object.__setattr__(self, "parts", made)

    @property
    def name(self) -> str:
        """The paths of its leaves, joined by " + "; what `allocation` by path matches."""
        return " + ".join(part.path for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Coupled(Structure):
    """Groups of units that span leaves. The score of a unit is pooled over the leaves, and the masks
    of all of them follow one choice; a leaf in two groups keeps what both keep.

    Leaves that are no targets (biases, by default) count nothing and stay dense; targets that no
    group names stay dense as well. A sparsity is that of the units of each group.

    Args:
      groups: each a `Group`, or a list of parts `(path, axis)` or `(path, axis, index)`.
      combine: how the pooled scores of the leaves make that of the unit.

    >>> hidden = Coupled([[("first/kernel", -1), ("first/bias", 0), ("second/kernel", 0)]])
    >>> [part.path for part in hidden.groups[0].parts]
    ['first/kernel', 'first/bias', 'second/kernel']

    Raises:
      ValueError: a group without parts, an index that is none, an unknown `combine`.
    """

    groups: tuple[Group, ...]
    combine: Literal["sum", "mean", "max"] = "sum"

    def __init__(
        self,
        groups: Iterable[Group | Iterable[Part | tuple]],
        combine: Literal["sum", "mean", "max"] = "sum",
    ):
        if combine not in ("sum", "mean", "max"):
            raise ValueError(f"combine={combine!r}: use 'sum', 'mean' or 'max'")
        made = tuple(g if isinstance(g, Group) else Group(g) for g in groups)
        if not made:
            raise ValueError("Coupled: give at least one group")
        object.__setattr__(self, "groups", made)
        object.__setattr__(self, "combine", combine)

    @property
    def paths(self) -> frozenset[str]:
        """The leaves that the groups name."""
        return frozenset(part.path for group in self.groups for part in group.parts)

    def parts(self, path: str) -> list[Part]:
        """What the groups hold of a leaf."""
        return [p for group in self.groups for p in group.parts if p.path == path]

    def check(self, path: str, shape: Shape) -> None:
        if not self.parts(path):
            raise ValueError(f"structure=Coupled: no group names {path!r}")
        for part in self.parts(path):
            part.check(shape)

    def pool(self, x: Array) -> Array:
        raise ValueError(_ALONE)

    def expand(self, units: Array, shape: Shape) -> Array:
        raise ValueError(_ALONE)

    def axes(self, shape: Shape) -> tuple[int, ...]:
        raise ValueError(_ALONE)

    def unit_size(self, shape: Shape) -> int:
        raise ValueError(_ALONE)

    def slices(self, shape: Shape) -> int:
        raise ValueError(_ALONE)

    def budget(self, shape: Shape, kept):
        raise ValueError(_ALONE)

    def __str__(self) -> str:
        units = math.fsum(len(group.parts) for group in self.groups)
        return f"Coupled({len(self.groups)} groups of {int(units)} parts)"


@runtime_checkable
class MakesCoupled(Protocol):
    """What has groups of units, as `channels.find` returns them."""

    def structure(
        self,
        combine: Literal["sum", "mean", "max"] = "sum",
        sides: Sequence[str] = ("out", "with", "in"),
    ) -> Coupled:
        """The groups as a structure, of the leaves on these sides."""
        ...


def resolve_all(
    structure: Structure | str | Mapping[str, Structure | str | None] | MakesCoupled | None,
) -> Structure | dict[str, Structure]:
    """As `resolve`, of all that a method takes: groups give their structure, a mapping from path patterns
    one for each pattern.

    >>> resolve_all({"head": "1:2"})["head"].sparsity
    0.5

    Raises:
      ValueError: anything else.
    """
    if isinstance(structure, MakesCoupled):
        return structure.structure()
    if isinstance(structure, Mapping):
        return {path: resolve(s) for path, s in structure.items()}
    return resolve(structure)


_ALONE = (
    "structure=Coupled: a leaf has no units of its own; this method ranks leaf by leaf: use one that "
    "keeps the best scores or drops and grows (magnitude, rigl, set, prune, ...)"
)
