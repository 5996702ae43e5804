"""`find`: the channels of a model that must be removed together."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from jaxsparse.channels.adapt import Adapted, adapt
from jaxsparse.channels.collect import Fixed, Group, collect, ties_of
from jaxsparse.channels.rules import RULES
from jaxsparse.channels.trace import Trace, Value, shape_of
from jaxsparse.channels.union import Expr, Reason
from jaxsparse.structures.coupled import Coupled, Part

_SILENT = ("the window of a convolution", "the length of a scan")


@dataclasses.dataclass(frozen=True)
class Work:
    """A product of the model: its operations are `2 * times * prod(widths of axes)`."""

    leaf: str
    times: int
    axes: tuple[Expr, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Groups(Mapping[str, Group]):
    """The groups of a model by name, and what the trace knows besides.

    Attributes:
      fixed: channels that cannot be removed, with reasons.
      axes: the form of every axis of every leaf, by path.
      work: every matrix product and convolution.
      shapes: of the leaves, by path.
      trained: paths of the parameters, statistics apart.
      model, trace: the model, taken apart, and its trace.
    """

    groups: Mapping[str, Group]
    fixed: tuple[Fixed, ...]
    axes: Mapping[str, tuple[Expr, ...]]
    work: tuple[Work, ...]
    shapes: Mapping[str, tuple[int, ...]]
    trained: frozenset[str]
    model: Adapted = dataclasses.field(repr=False)
    trace: Trace = dataclasses.field(repr=False)

    def __getitem__(self, name: str) -> Group:
        if name not in self.groups:
            raise KeyError(self.missing("groups", [name]))
        return self.groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def widths(self) -> dict[str, int]:
        """How many channels each group has."""
        return {name: group.width for name, group in self.groups.items()}

    def matching(self, pattern: str) -> Groups:
        """The groups whose name the regular expression finds; all others are left alone.

        Raises:
          ValueError: if it finds none.
        """
        kept = {name: g for name, g in self.groups.items() if re.search(pattern, name)}
        if not kept:
            raise ValueError(self.missing("pattern", [pattern], re.search))
        return self.only(kept)

    def without(self, *patterns: str) -> Groups:
        """All groups but those whose name one of the regular expressions finds.

        Raises:
          ValueError: if a pattern finds none.
        """
        missing = [p for p in patterns if not any(re.search(p, name) for name in self.groups)]
        if missing:
            raise ValueError(self.missing("patterns", missing, re.search))
        gone = lambda name: any(re.search(p, name) for p in patterns)
        return self.only([name for name in self.groups if not gone(name)])

    def only(self, names: Iterable[str]) -> Groups:
        """The groups of these names, where there are such; all others are left alone."""
        names, why = set(names), Reason("left out on request")
        kept = {name: g for name, g in self.groups.items() if name in names}
        out = tuple(Fixed(n, g.width, why) for n, g in self.groups.items() if n not in kept)
        return dataclasses.replace(self, groups=kept, fixed=(*self.fixed, *out))

    def missing(
        self,
        argument: str,
        wanted: Sequence[str],
        means: Callable[[str, str], object] = operator.eq,
    ) -> str:
        """The error for names or patterns that no group has: why channels of that name stay, or names that there
        are."""
        stay = [str(f) for f in self.fixed if any(means(w, f.name) for w in wanted)]
        what = f"{argument}: no group is called {', '.join(map(repr, wanted))}"
        if stay:
            return f"{what}; channels that stay: {'; '.join(stay[:4])}"
        return f"{what}; the groups are {', '.join(self) or 'none'}"

    def check_some(self, argument: str) -> None:
        """Raises `ValueError` where there is no group at all, with what stays and why."""
        if not self.groups:
            why = "; ".join(map(str, self.reported()[:4]))
            raise ValueError(f"{argument}: there are no channels that may go. What stays: {why}")

    def untrained(self, group: Group) -> str:
        """The leaves of a group none of which is a floating-point parameter, with their types."""
        types = {path: leaf.dtype for path, leaf in self.model.named()}
        return ", ".join(
            f"{p!r} ({types[p]})" for p in dict.fromkeys(m.path for m in group.members)
        )

    def structure(
        self,
        combine: Literal["sum", "mean", "max"] = "sum",
        sides: Sequence[str] = ("out", "with", "in"),
    ) -> Coupled:
        """The groups as a structure: a method that takes it zeroes whole channels, in all kernels that make them or
        read them, `jaxsparse.magnitude(tx, 0.5, structure=groups.structure(), ...)`. Of tied groups each is ranked
        by itself; `shrink` then keeps as many of both.

        Args:
          combine: how the scores of a channel in its leaves make one.
          sides: which leaves belong to a channel: those that make it ("out"), go along ("with": biases, scales of
            norms) and read it ("in"). Groups without such a leaf are left out.

        Raises:
          ValueError: no group has a leaf of these sides.

        >>> from jaxsparse import channels
        >>> import jax.numpy as jnp
        >>> net = lambda p, x: (x @ p["a"]) @ p["b"]
        >>> groups = channels.find(net, {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 3))}, jnp.ones((2, 4)))
        >>> [part.path for part in groups.structure().groups[0].parts]
        ['a', 'b']
        """
        self.check_some("groups")
        strip = "params/" if self.model.kind == "linen" else ""
        parts = [self._parts(group, strip, sides) for group in self.groups.values()]
        if not any(parts):
            some = next(iter(self.groups.values()))
            if not any(m.path in self.trained for g in self.groups.values() for m in g.members):
                raise ValueError(
                    f"groups: no floating-point parameter belongs to group {some.name!r}, which has "
                    f"{self.untrained(some)}; train before weights are quantized"
                )
            raise ValueError(
                f"sides={tuple(sides)}: no group has a leaf of these; give some of 'out', 'with', 'in'"
            )
        return Coupled([p for p in parts if p], combine)

    def _parts(self, group: Group, strip: str, sides: Sequence[str]) -> list[Part]:
        places: dict[tuple[str, int], list[np.ndarray]] = {}
        for m in (m for m in group.members if m.path in self.trained and m.side in sides):
            places.setdefault((m.path, m.axis), []).append(m.channel)
        parts = []
        for (path, axis), channels in places.items():
            rows = [
                np.flatnonzero(np.any([c == i for c in channels], 0)) for i in range(group.width)
            ]
            parts.append(Part(path.removeprefix(strip), axis, np.stack(rows)))
        return parts

    def parameters(self, counts: Mapping[str, int] | None = None) -> int:
        """How many parameters there are when so many channels of the groups stay."""
        atoms = self._counts(counts)
        return sum(
            math.prod(axis.width(atoms) for axis in axes)
            for path, axes in self.axes.items()
            if path in self.trained
        )

    def flops(self, counts: Mapping[str, int] | None = None) -> int:
        """Operations of products and convolutions on the example input when so many channels stay."""
        atoms = self._counts(counts)
        return sum(2 * w.times * math.prod(axis.width(atoms) for axis in w.axes) for w in self.work)

    def reported(self) -> list[Fixed]:
        """What stays, without the windows of convolutions and the lengths of loops."""
        return [f for f in self.fixed if f.why.what not in _SILENT]

    def _counts(self, counts: Mapping[str, int] | None) -> dict[int, int]:
        return {self[name].atom: count for name, count in (counts or {}).items()}

    def __str__(self) -> str:
        lines = [
            f"{len(self)} groups of channels, {self.parameters()} parameters, {self.flops()} operations"
        ]
        for group in self.groups.values():
            lines.append(f"  {group.name}: {group.width} channels")
            for side, verb in (("out", "made by"), ("with", "along"), ("in", "read by")):
                places = [f"{m.path}:{m.axis}" for m in group.members if m.side == side]
                lines += [f"    {verb} {', '.join(dict.fromkeys(places))}"] if places else []
            if group.summed:
                lines.append(
                    f"    summed over by {', '.join(group.summed)}: zeroed may not be removed"
                )
            if group.tied:
                lines.append(f"    keeps as many channels as {', '.join(group.tied)}")
        shown = self.reported()
        return "\n".join(
            [*lines, "left as they are:", *(f"  {f}" for f in shown)] if shown else lines
        )


def find(model: object, *args: object) -> Groups:
    """The groups of channels of a model, from one trace.

    A *channel* is what can be removed from a network as a whole: a hidden neuron, a feature of a convolution, a
    head, one coordinate of a head, an expert. A *group* lists every place in every leaf that one of its channels
    takes. Nothing is computed, and no kind of layer is known: the axes of all variables of the trace are
    unified by what each primitive does to them.

    Channels that reach an output, an input, an index, or a primitive without a rule stay; the report
    (`print(groups)`) says which, with the line of the model.

    Args:
      model: a Flax NNX module, or another callable tree of arrays (Equinox); or a function `apply_fn(params,
        *inputs)` or a Linen module, followed by its parameters. Modules are traced as they serve: no dropout,
        running averages.
      *args: example inputs, arrays or `jax.ShapeDtypeStruct`s, with a batch axis if the model takes one. Values
        do not matter.

    Returns:
      The groups by name.

    Raises:
      ValueError: if the model does not run on the inputs, or is no model.

    Source: the idea is that of Fang et al., "DepGraph: towards any structural pruning", 2023.

    >>> import jax, jax.numpy as jnp
    >>> params = {"first": jnp.ones((4, 6)), "bias": jnp.ones(6), "last": jnp.ones((6, 3))}
    >>> net = lambda p, x: jax.nn.relu(x @ p["first"] + p["bias"]) @ p["last"]
    >>> print(find(net, params, jnp.ones((2, 4))))
    1 groups of channels, 48 parameters, 168 operations
      first:1: 6 channels
        made by first:1
        along bias:0
        read by last:0
    left as they are:
      last:1 (3): an output of the model
      first:0 (4): an input of the model
    """
    return groups_of(adapt(model, args))


def groups_of(adapted: Adapted) -> Groups:
    """`find` of a model that has been taken apart."""
    trace, values = labelled(adapted)
    ties = ties_of(trace)
    axes = {str(v.leaf): tuple(map(trace.labels.expr, v.axes)) for v in values}
    groups, fixed = collect(trace, axes, ties)
    work = tuple(
        Work(p.leaf, p.times, tuple(map(trace.labels.expr, p.labels))) for p in trace.products
    )
    shapes = {path: tuple(leaf.shape) for path, leaf in adapted.named()}
    return Groups(groups, fixed, axes, work, shapes, adapted.trained(), adapted, trace)


def labelled(adapted: Adapted) -> tuple[Trace, list[Value]]:
    """The trace of a model with the labels of all its axes, and the values of its leaves.

    Raises:
      ValueError: if the model has no arrays, or does not run.
    """
    named = adapted.named()
    if not named:
        raise ValueError("model: it has no arrays")
    closed, count = adapted.jaxpr()
    trace = Trace(RULES)
    values = [Value(trace.fresh(shape_of(var))) for var in closed.jaxpr.invars]
    values[:count] = [
        Value(v.axes, path) for v, (path, _) in zip(values[:count], named, strict=True)
    ]
    for value in values[count:]:
        trace.pin(value.axes, Reason("an input of the model"))
    outputs = trace.walk(closed.jaxpr, closed.consts, values)
    for value in outputs:
        trace.pin(value.axes, Reason("an output of the model"))
    for value in values[:count]:
        if value.leaf not in trace.used:
            trace.pin(value.axes, Reason("a leaf that the trace does not use"))
    return trace, values[:count]
