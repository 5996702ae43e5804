"""Which axes are one: union-find over the axes of all variables of a trace, with index maps.

Every axis of every variable is a *label*. A label is one of three things:

- an *atom*: `n` positions that nothing tells apart yet;
- a *product* of labels, in row-major order: what `reshape` makes of several axes (heads times head size,
  height times width times channels);
- a *concatenation* of labels: what `concatenate`, `split` and `slice` make.

Axes that must have the same positions are unified, as types are in type inference: an atom takes the form of
what it meets, products are refined to common factors, concatenations to common borders. So a map of indices
is never stored: it is read off the form of the label. Positions that cannot be told apart in a common form
are *pinned*: they must stay, with the reason.

The channels that can be removed are the atoms that are not pinned. `Expr` is a label as it stands at the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a label must stay as wide as it is.

    Attributes:
      what: the primitive, or what the label reaches, in words.
      source: file, line and function of the model where that happens; empty if there is none.
    """

    what: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.what} at {self.source}" if self.source else self.what


@dataclasses.dataclass(frozen=True)
class Expr:
    """The form of one axis: an atom (`parts` is empty), a product or a concatenation of expressions.

    >>> heads, size = Expr("atom", 2, 0), Expr("atom", 3, 1)
    >>> axis = Expr("product", 6, parts=(heads, size))
    >>> axis.keep({0: np.array([True, False])})
    array([ True,  True,  True, False, False, False])
    >>> axis.keep({1: np.array([True, False, True])})
    array([ True, False,  True,  True, False,  True])
    >>> axis.width({0: 1})
    3
    """

    kind: str
    size: int
    atom: int = -1
    parts: tuple[Expr, ...] = ()

    def atoms(self) -> list[int]:
        """The atoms of the axis, from left to right, each as often as it occurs."""
        if self.kind == "atom":
            return [self.atom]
        return [atom for part in self.parts for atom in part.atoms()]

    def keep(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        """Which positions of the axis stay, boolean [size]; atoms without a mask stay whole."""
        if self.kind == "atom":
            mask = masks.get(self.atom)
            return np.ones(self.size, bool) if mask is None else np.asarray(mask, bool)
        inner = [part.keep(masks) for part in self.parts]
        if self.kind == "concat":
            return np.concatenate(inner)
        kept = inner[0]
        for other in inner[1:]:
            kept = np.logical_and.outer(kept, other).ravel()
        return kept

    def width(self, counts: Mapping[int, int]) -> int:
        """How long the axis is when `counts[atom]` positions of the atoms stay."""
        if self.kind == "atom":
            return counts.get(self.atom, self.size)
        inner = [part.width(counts) for part in self.parts]
        return sum(inner) if self.kind == "concat" else math.prod(inner)

    def owners(self, atom: int) -> list[np.ndarray]:
        """For each occurrence of `atom` in the axis: the index in the atom of every position of the axis, or
        -1 where the occurrence does not reach; int [size]."""
        if self.kind == "atom":
            return [np.arange(self.size)] if self.atom == atom else []
        found = []
        for k, part in enumerate(self.parts):
            before = [p.size for p in self.parts[:k]]
            after = [p.size for p in self.parts[k + 1 :]]
            for inner in part.owners(atom):
                if self.kind == "product":
                    inner = np.tile(np.repeat(inner, math.prod(after)), math.prod(before))
                else:
                    inner = np.pad(inner, (sum(before), sum(after)), constant_values=-1)
                found.append(inner)
        return found


class Labels:
    """The labels of one trace. A label is an integer."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._kind: list[str] = []
        self._parts: list[tuple[int, ...]] = []
        self._pinned: dict[int, Reason] = {}
        self._notes: dict[int, list[Reason]] = {}

    def atom(self, size: int) -> int:
        """A new label about which nothing is known."""
        return self._new("atom", int(size), ())

    def product(self, labels: Sequence[int]) -> int:
        """The label of axes merged in row-major order."""
        labels = [i for i in labels if self.size(i) != 1]
        if len(labels) < 2:
            return labels[0] if labels else self.atom(1)
        return self._new("product", math.prod(map(self.size, labels)), tuple(labels))

    def concat(self, labels: Sequence[int]) -> int:
        """The label of axes laid end to end."""
        labels = [i for i in labels if self.size(i)]
        if len(labels) < 2:
            return labels[0] if labels else self.atom(0)
        return self._new("concat", sum(map(self.size, labels)), tuple(labels))

    def size(self, label: int) -> int:
        return self._size[label]

    def pin(self, label: int, reason: Reason) -> None:
        """All positions of the label must stay. The first reason is remembered."""
        self._mark(label, lambda atom: self._pinned.setdefault(atom, reason))

    def note(self, label: int, reason: Reason) -> None:
        """Remembers that something sums over the label."""
        self._mark(label, lambda atom: self._notes.setdefault(atom, []).append(reason))

    def pinned(self, label: int) -> Reason | None:
        """Why an atom must stay, or None."""
        return self._pinned.get(self._find(label))

    def notes(self, label: int) -> list[Reason]:
        """What sums over an atom."""
        return self._notes.get(self._find(label), [])

    def root(self, label: int) -> int:
        """The one label that stands for all that are unified with this one."""
        return self._find(label)

    def unify(self, a: int, b: int, reason: Reason) -> None:
        """Makes two labels of one size the same. Where their forms have nothing in common, both are pinned for
        that reason."""
        a, b = self._find(a), self._find(b)
        if a == b:
            return
        if self.size(a) != self.size(b):
            raise ValueError(f"{reason}: axes of {self.size(a)} and {self.size(b)} positions")
        if self._kind[a] == "atom":
            self._define(a, b)
        elif self._kind[b] == "atom":
            self._define(b, a)
        else:
            for one, other in ((a, b), (b, a)):
                if self._unify_as(one, other, reason):
                    return
            unlike = Reason(f"index maps without a common form, {reason.what}", reason.source)
            self.pin(a, unlike)
            self.pin(b, unlike)

    def split(self, label: int, sizes: Sequence[int]) -> list[int] | None:
        """Labels of consecutive pieces of these sizes; None if a border falls inside of a factor."""
        label = self._find(label)
        if len(sizes) == 1:
            return [label]
        if self._kind[label] == "atom":
            return list(self._refine(label, "concat", sizes))
        if self._kind[label] == "product":
            first, *rest = self._factors(label)
            inner = math.prod(map(self.size, rest))
            if any(size % inner for size in sizes):
                return None
            pieces = self.split(first, [size // inner for size in sizes])
            return pieces and [self.product([piece, *rest]) for piece in pieces]
        queue, pieces = list(self._pieces(label)), []
        for size in sizes:
            taken = []
            while size:
                piece = queue.pop(0)
                if self.size(piece) > size:
                    halves = self.split(piece, [size, self.size(piece) - size])
                    if halves is None:
                        return None
                    piece, rest = halves
                    queue.insert(0, rest)
                taken.append(piece)
                size -= self.size(piece)
            pieces.append(self.concat(taken))
        return pieces

    def factor(self, label: int, sizes: Sequence[int], reason: Reason) -> list[int] | None:
        """Labels of the axes of these sizes that the label is the row-major product of; None if its own factors
        do not divide them."""
        label = self._find(label)
        wanted = [size for size in sizes if size != 1]
        if len(wanted) < 2:
            found = [label] if wanted else []
        elif self._kind[label] == "atom":
            found = list(self._refine(label, "product", wanted))
        elif self._kind[label] == "product":
            found = self._factor_product(label, wanted, reason)
        else:
            found = self._factor_concat(label, wanted, reason)
        if found is None:
            return None
        rest = iter(found)
        return [self.atom(1) if size == 1 else next(rest) for size in sizes]

    def refine_alike(self, a: int, b: int) -> bool:
        """Gives two labels of one size the same form, their atoms apart; whether that can be done."""
        a, b = self._find(a), self._find(b)
        kinds = {self._kind[a], self._kind[b]}
        if a == b or kinds == {"atom"}:
            return True
        if "atom" in kinds:
            atom, other = (a, b) if self._kind[a] == "atom" else (b, a)
            kind = self._kind[other]
            parts = self._flat(other, kind)
            found = self._refine(atom, kind, [self.size(part) for part in parts])
            pairs = zip(found, parts)
        elif len(kinds) > 1:
            return False
        else:
            one, two = (self._flat(label, self._kind[label]) for label in (a, b))
            if [self.size(i) for i in one] != [self.size(i) for i in two]:
                return False
            pairs = zip(one, two)
        return all([self.refine_alike(one, two) for one, two in pairs])

    def expr(self, label: int) -> Expr:
        """The form of a label as it stands."""
        label = self._find(label)
        size = self.size(label)
        if self._kind[label] == "atom":
            return Expr("atom", size, label)
        parts = self._factors(label) if self._kind[label] == "product" else self._pieces(label)
        return Expr(self._kind[label], size, parts=tuple(map(self.expr, parts)))

    def _new(self, kind: str, size: int, parts: tuple[int, ...]) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._kind.append(kind)
        self._parts.append(parts)
        return len(self._parent) - 1

    def _find(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = label = self._parent[self._parent[label]]
        return label

    def _mark(self, label: int, mark: Callable[[int], object]) -> None:
        label = self._find(label)
        if self._kind[label] == "atom":
            mark(label)
        for part in self._parts[label]:
            self._mark(part, mark)

    def _define(self, atom: int, label: int) -> None:
        """An atom becomes another label, and hands on what is known of it."""
        reason, notes = self._pinned.pop(atom, None), self._notes.pop(atom, [])
        self._parent[atom] = label
        self._inherit(label, reason, notes)

    def _refine(self, atom: int, kind: str, sizes: Sequence[int]) -> tuple[int, ...]:
        """An atom becomes a product or a concatenation of new atoms."""
        parts = tuple(map(self.atom, sizes))
        reason, notes = self._pinned.pop(atom, None), self._notes.pop(atom, [])
        self._kind[atom], self._parts[atom] = kind, parts
        self._inherit(atom, reason, notes)
        return parts

    def _inherit(self, label: int, reason: Reason | None, notes: list[Reason]) -> None:
        if reason is not None:
            self.pin(label, reason)
        for note in notes:
            self.note(label, note)

    def _flat(self, label: int, kind: str) -> list[int]:
        """The parts of a label with parts of the same kind opened."""
        label = self._find(label)
        if self._kind[label] != kind:
            return [label]
        return [inner for part in self._parts[label] for inner in self._flat(part, kind)]

    def _factors(self, label: int) -> list[int]:
        return self._flat(label, "product")

    def _pieces(self, label: int) -> list[int]:
        return self._flat(label, "concat")

    def _unify_as(self, a: int, b: int, reason: Reason) -> bool:
        """Brings `b`, which is no atom, into the form of `a`, and unifies their parts."""
        if self._kind[a] == "product":
            parts = self._factors(a)
            found = self.factor(b, [self.size(i) for i in parts], reason)
        else:
            parts = self._pieces(a)
            found = self.split(b, [self.size(i) for i in parts])
        if found is None:
            return False
        for part, other in zip(parts, found):
            self.unify(part, other, reason)
        return True

    def _factor_product(self, label: int, wanted: list[int], reason: Reason) -> list[int] | None:
        queue, found = self._factors(label), []
        for size in wanted:
            taken = []
            while size > 1:
                factor = queue.pop(0)
                have = self.size(factor)
                if have > size:
                    halves = (
                        None if have % size else self.factor(factor, [size, have // size], reason)
                    )
                    if halves is None:
                        return None
                    factor, rest = halves
                    queue.insert(0, rest)
                elif size % have:
                    return None
                taken.append(factor)
                size //= self.size(factor)
            found.append(self.product(taken))
        return found

    def _factor_concat(self, label: int, wanted: list[int], reason: Reason) -> list[int] | None:
        """Pieces that are whole multiples of the inner factors share them: they are unified."""
        inner = wanted[1:]
        step, pieces = math.prod(inner), self._pieces(label)
        if any(self.size(piece) % step for piece in pieces):
            return None
        factored = []
        for piece in pieces:
            found = self.factor(piece, [self.size(piece) // step, *inner], reason)
            if found is None:
                return None
            factored.append(found)
        for other in factored[1:]:
            for one, two in zip(factored[0][1:], other[1:]):
                self.unify(one, two, reason)
        return [self.concat([found[0] for found in factored]), *factored[0][1:]]
