"""One walk over a jaxpr: labels for the axes of every variable, through calls, loops and branches.

What a primitive does to labels is in `rules`; here is what holds programs together. A loop ties what it
carries to itself; `scan` pins the axis that it runs over; branches of a `cond` are one.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import flax
import jax
from jax.extend import core

from jaxsparse.channels.union import Labels, Reason

# Files whose lines say nothing of the user's model.
_LIBRARIES = tuple(
    str(pathlib.Path(root).resolve())
    for root in (jax.__path__[0], flax.__path__[0], pathlib.Path(__file__).parent)
)
# The operations through which a weight is still that weight.
_VIEWS = {
    "reshape", "transpose", "convert_element_type", "squeeze", "broadcast_in_dim", "copy", "copy_p", "slice",
    "dynamic_slice", "split", "reduce_precision", "optimization_barrier", "sharding_constraint", "stop_gradient",
}  # fmt: skip


Axes = tuple[int, ...]


class Value(NamedTuple):
    """A variable: the labels of its axes, and the leaf of the parameters that it is a view of, if any."""

    axes: Axes
    leaf: str | None = None


class Product(NamedTuple):
    """A matrix product or convolution: `2 * times * prod(sizes of labels)` operations."""

    leaf: str
    times: int
    labels: tuple[int, ...]


class Cut(NamedTuple):
    """An axis of which the positions from `start` to `stop` are taken."""

    label: int
    start: int
    stop: int
    reason: Reason


class Step(NamedTuple):
    """One equation: its primitive, the labels of its results, the line of the model."""

    name: str
    axes: tuple[Axes, ...]
    source: str


class Role(NamedTuple):
    """In a product, `label` of `leaf` is summed over ("in") or reaches the result ("out")."""

    leaf: str
    label: int
    side: str


def shape_of(var: core.Var | core.Literal) -> tuple[int, ...]:
    """The shape of a variable of a jaxpr; () of what is no array."""
    return getattr(var.aval, "shape", ())


@dataclasses.dataclass
class Trace:
    """What one walk has found. `rules` says what each primitive does to labels: a function of the trace, the
    equation and the values of its operands, which returns the labels of each result."""

    rules: Mapping[str, Rule]
    labels: Labels = dataclasses.field(default_factory=Labels)
    products: list[Product] = dataclasses.field(default_factory=list)
    cuts: list[Cut] = dataclasses.field(default_factory=list)
    roles: list[Role] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    attention: list[int] = dataclasses.field(default_factory=list)
    equal: list[tuple[tuple[int, int], Reason]] = dataclasses.field(default_factory=list)
    places: list[Cut] = dataclasses.field(default_factory=list)
    used: set[str] = dataclasses.field(default_factory=set)
    times: int = 1
    called_at: str = ""

    def fresh(self, shape: Sequence[int]) -> tuple[int, ...]:
        """New labels for an array of this shape."""
        return tuple(map(self.labels.atom, shape))

    def unify(self, one: Iterable[int], other: Iterable[int], reason: Reason) -> None:
        for a, b in zip(one, other, strict=True):
            self.labels.unify(a, b, reason)

    def pin(self, axes: Iterable[int], reason: Reason) -> None:
        for label in axes:
            self.labels.pin(label, reason)

    def because(self, eqn: core.JaxprEqn, what: str = "") -> Reason:
        """The equation as a reason: what it is, and the line of the model that wrote it."""
        return Reason(what or eqn.primitive.name, self.source_of(eqn))

    def inside(self, eqn: core.JaxprEqn, function: str) -> bool:
        """Whether a function of JAX of this name wrote the equation."""
        traceback = eqn.source_info.traceback
        frames = traceback.frames if traceback is not None else ()
        return any(f.function_name == function and _in_a_library(f.file_name) for f in frames)

    def source_of(self, eqn: core.JaxprEqn) -> str:
        """`file:line (function)` of the innermost frame outside of JAX, Flax and this package; inside of a
        function of theirs, that of the call."""
        traceback = eqn.source_info.traceback
        for frame in traceback.frames if traceback is not None else ():
            if not _in_a_library(frame.file_name):
                name = pathlib.Path(frame.file_name).name
                return f"{name}:{frame.line_num} ({frame.function_name})"
        return self.called_at

    def walk(
        self, jaxpr: core.Jaxpr, consts: Sequence[object], inputs: Sequence[Value]
    ) -> list[Value]:
        """The values of the outputs of a jaxpr, given those of its inputs."""
        values: dict[core.Var, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            values[var] = Value(self.fresh(getattr(const, "shape", ())))
            self.pin(values[var].axes, Reason("a constant that the model captures"))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def value(var: core.Var | core.Literal) -> Value:
            if isinstance(var, core.Literal):
                return Value(self.fresh(shape_of(var)))
            return values[var]

        for eqn in jaxpr.eqns:
            found = self._equation(eqn, [value(var) for var in eqn.invars])
            axes = tuple(result.axes for result in found)
            self.steps.append(Step(eqn.primitive.name, axes, self.source_of(eqn)))
            values.update(zip(eqn.outvars, found, strict=True))
        return [value(var) for var in jaxpr.outvars]

    def _equation(self, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, inputs)
        if name == "while":
            return self._while(eqn, inputs)
        if name == "cond":
            return self._cond(eqn, inputs)
        if name in self.rules:
            self.used.update(value.leaf for value in inputs if value.leaf is not None)
            axes = self.rules[name](self, eqn, inputs)
            leaf = inputs[0].leaf if inputs and name in _VIEWS else None
            return [Value(tuple(a), leaf) for a in axes]
        if (inner := _called(eqn)) is not None:
            outer, self.called_at = self.called_at, self.source_of(eqn)
            outputs = self.walk(inner.jaxpr, inner.consts, inputs)
            self.called_at = outer
            return outputs
        reason = self.because(eqn, f"the primitive {name!r}, which has no rule")
        for found in inputs:
            self.pin(found.axes, reason)
        outputs = [Value(self.fresh(shape_of(var))) for var in eqn.outvars]
        for found in outputs:
            self.pin(found.axes, reason)
        return outputs

    def _scan(self, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        reason = self.because(eqn)
        steps = Reason("the length of a scan", reason.source)
        first = consts + carries
        for stacked in inputs[first:]:
            self.labels.pin(stacked.axes[0], steps)
        layers = [Value(stacked.axes[1:], stacked.leaf) for stacked in inputs[first:]]
        outer, self.times = self.times, self.times * length
        outputs = self.walk(body.jaxpr, body.consts, [*inputs[:first], *layers])
        self.times = outer
        for before, after in zip(inputs[consts:first], outputs[:carries], strict=True):
            self.unify(before.axes, after.axes, reason)
        found = outputs[:carries]
        for collected in outputs[carries:]:
            lead = self.labels.atom(length)
            self.labels.pin(lead, steps)
            found.append(Value((lead, *collected.axes)))
        return found

    def _while(self, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carried = inputs[skip + consts :]
        self.walk(cond.jaxpr, cond.consts, [*inputs[:skip], *carried])
        outputs = self.walk(body.jaxpr, body.consts, inputs[skip:])
        for before, after in zip(carried, outputs, strict=True):
            self.unify(before.axes, after.axes, self.because(eqn))
        return outputs

    def _cond(self, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
        branches = [self.walk(b.jaxpr, b.consts, inputs[1:]) for b in eqn.params["branches"]]
        for other in branches[1:]:
            for one, two in zip(branches[0], other, strict=True):
                self.unify(one.axes, two.axes, self.because(eqn))
        return branches[0]


Rule = Callable[[Trace, core.JaxprEqn, list[Value]], Sequence[Axes]]


def _called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The body of a call (`jit`, `remat`, `custom_jvp`, `custom_vjp`, ...), if its inputs and outputs are the
    call's."""
    for value in eqn.params.values():
        closed = core.ClosedJaxpr(value, ()) if isinstance(value, core.Jaxpr) else value
        if (
            isinstance(closed, core.ClosedJaxpr)
            and len(closed.jaxpr.invars) == len(eqn.invars)
            and len(closed.jaxpr.outvars) == len(eqn.outvars)
            and eqn.primitive.name not in ("shard_map", "pallas_call")
        ):
            return closed
    return None


@functools.cache
def _in_a_library(file: str) -> bool:
    return str(pathlib.Path(file).resolve()).startswith(_LIBRARIES)
