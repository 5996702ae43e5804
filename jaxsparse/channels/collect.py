"""From the labels of a trace to groups of channels and to what must stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxsparse.channels.trace import Trace
from jaxsparse.channels.union import Expr, Reason


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """Where the channels of a group lie in one leaf.

    Attributes:
      path: of the leaf.
      axis: of the leaf.
      side: "out" if the leaf makes the channels (outputs of a layer), "in" if a product sums over them (inputs
        of a layer), "with" if it goes along (bias, scale, statistics).
      channel: int [length of the axis]: the channel that each position belongs to, -1 for none.
    """

    path: str
    axis: int
    side: str
    channel: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Channels that must be removed together from all members.

    Attributes:
      name: path and axis of the leaf that makes them, as in `layers/0/kernel:1`; where the axis holds several
        groups, the number of the group in it follows.
      width: how many channels there are.
      members: every place that shrinks with them.
      summed: what sums over the channels outside of products, with the line of the model. Statistics of a norm
        do: a zeroed channel counts in a mean, a removed one does not.
      tied: names of other groups that must keep as many channels, since the model cuts an axis in equal parts.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    summed: tuple[str, ...]
    tied: tuple[str, ...]
    atom: int = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Channels that stay: where they first lie, how many, and why."""

    name: str
    width: int
    why: Reason

    def __str__(self) -> str:
        return f"{self.name} ({self.width}): {self.why}"


def ties_of(trace: Trace) -> list[tuple[int, ...]]:
    """Sets of atoms of which as many must stay, since the model cuts an axis into equal parts, or says so. Where one of them
    is pinned, all are; parts that cannot be brought into one form are pinned."""
    labels, borders, reasons = trace.labels, {}, {}
    for cut in trace.cuts:
        root = labels.root(cut.label)
        borders.setdefault(root, {0, labels.size(root)}).update((cut.start, cut.stop))
        reasons.setdefault(root, cut.reason)
    equal: list[tuple[Sequence[int], Reason]] = list(trace.equal)
    for root, places in borders.items():
        ordered = [p for p in range(labels.size(root) + 1) if p in places]
        sizes = [b - a for a, b in zip(ordered, ordered[1:])]
        pieces = labels.split(root, sizes) if len(set(sizes)) == 1 else None
        equal += [(pieces, reasons[root])] if pieces else []
    form = lambda pieces: [labels.expr(piece) for piece in pieces]
    for _ in equal:  # each pass may refine what another set shares
        for pieces, reason in equal:
            if not all([labels.refine_alike(pieces[0], piece) for piece in pieces[1:]]):
                why = Reason(
                    f"of another form than what it must equal ({reason.what})", reason.source
                )
                trace.pin(pieces, why)
    sets: list[tuple[set[int], Reason]] = []
    for pieces, reason in equal:
        for row in zip(*(expr.atoms() for expr in form(pieces))):
            tied = set(row)
            for other, _ in [s for s in sets if s[0] & tied]:
                tied |= other
            sets = [s for s in sets if not s[0] & tied]
            sets += [(tied, reason)] if len(tied) > 1 else []
    for tied, reason in sets:
        if any(map(labels.pinned, tied)):
            trace.pin(tied, Reason(f"as long as what must stay ({reason.what})", reason.source))
    return [tuple(tied) for tied, _ in sets if not any(map(labels.pinned, tied))]


def collect(
    trace: Trace, axes: Mapping[str, Sequence[Expr]], ties: Sequence[tuple[int, ...]]
) -> tuple[dict[str, Group], tuple[Fixed, ...]]:
    sides: dict[tuple[str, int], list[str]] = {}
    for role in trace.roles:
        for atom in trace.labels.expr(role.label).atoms():
            sides.setdefault((role.leaf, atom), []).append(role.side)
    members: dict[int, list[Member]] = {}
    sizes: dict[int, int] = {}
    for path, forms in axes.items():
        found: dict[int, list[tuple[int, np.ndarray]]] = {}
        for axis, form in enumerate(forms):
            sizes.update(_sizes(form))
            for atom in dict.fromkeys(form.atoms()):
                found.setdefault(atom, []).extend((axis, owner) for owner in form.owners(atom))
        for atom, places in found.items():
            known = dict.fromkeys(sides.get((path, atom), ["with"]))
            for axis, owner in places:
                # Kernels have their outputs last, as in a state that a layer maps to itself.
                side = (
                    next(iter(known))
                    if len(known) == 1
                    else ("out" if axis == places[-1][0] else "in")
                )
                members.setdefault(atom, []).append(Member(path, axis, side, owner))
    order: dict[int, tuple[str, int]] = {}
    for path, atom in sides:
        made = [m for m in members.get(atom, []) if m.path == path and m.side == "out"]
        if made:
            order.setdefault(atom, (path, made[0].axis))
    names = {}
    for atom, places in members.items():
        if sizes[atom] < 2:
            continue
        path, axis = order.get(atom, (places[0].path, places[0].axis))
        inside = [a for a in dict.fromkeys(axes[path][axis].atoms()) if sizes[a] > 1]
        names[atom] = f"{path}:{axis}" + (f".{inside.index(atom)}" if len(inside) > 1 else "")
    groups, fixed = {}, []
    for atom in (*order, *(atom for atom in members if atom not in order)):
        if atom not in names:
            continue
        why = trace.labels.pinned(atom)
        if why is not None:
            fixed.append(Fixed(names[atom], sizes[atom], why))
            continue
        together = {a for tied in ties if atom in tied for a in tied if a in names} - {atom}
        summed = dict.fromkeys(str(note) for note in trace.labels.notes(atom))
        groups[names[atom]] = Group(
            names[atom],
            sizes[atom],
            tuple(members[atom]),
            tuple(summed),
            tuple(names[a] for a in names if a in together),
            atom,
        )
    return groups, tuple(fixed)


def _sizes(form: Expr) -> dict[int, int]:
    if form.kind == "atom":
        return {form.atom: form.size}
    return {atom: size for part in form.parts for atom, size in _sizes(part).items()}
