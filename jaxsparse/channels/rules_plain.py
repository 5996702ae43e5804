"""Rules of primitives that work element by element, of reductions and poolings."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend import core

from jaxsparse.channels.trace import Axes, Trace, Value, shape_of
from jaxsparse.channels.union import Reason


def elementwise(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """Axes of equal size at one place are one; scalars and axes of size 1 are broadcast."""
    shape = shape_of(eqn.outvars[0])
    return [_broadcast(t, shape, inputs, t.because(eqn)) for _ in eqn.outvars[:1]] * len(
        eqn.outvars
    )


def _broadcast(t: Trace, shape: Sequence[int], inputs: list[Value], reason: Reason) -> Axes:
    axes = []
    for d, size in enumerate(shape):
        alike = [v.axes[d] for v in inputs if v.axes and t.labels.size(v.axes[d]) == size]
        for other in alike[1:]:
            t.labels.unify(alike[0], other, reason)
        axes.append(alike[0] if alike else t.labels.atom(size))
    return tuple(axes)


def one_to_one(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """Each result is the operand at its place."""
    return [value.axes for value in inputs[: len(eqn.outvars)]]


def fresh(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """Results that are made of nothing: random bits, empty arrays."""
    return [t.fresh(shape_of(var)) for var in eqn.outvars]


def reduce(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """The axes that are left. What is summed over is noted: the statistics of a norm change with it."""
    gone = {int(d) for d in eqn.params["axes"]}
    for value in inputs[: len(eqn.outvars)]:
        for d in gone:
            t.labels.note(value.axes[d], t.because(eqn))
    return [
        tuple(label for d, label in enumerate(value.axes) if d not in gone)
        for value in inputs[: len(eqn.outvars)]
    ]


def reduce_window(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    out = list(t.fresh(shape_of(eqn.outvars[0])))
    for d, (size, stride, padding) in enumerate(
        zip(eqn.params["window_dimensions"], eqn.params["window_strides"], eqn.params["padding"])
    ):
        if size == 1 and stride == 1 and tuple(padding) == (0, 0):
            out[d] = inputs[0].axes[d]
        else:
            t.pin((inputs[0].axes[d], out[d]), t.because(eqn, "the window of a pooling"))
    return [tuple(out)]
