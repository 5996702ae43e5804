"""Rules of primitives that move, cut and join axes."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend import core

from jaxsparse.channels.trace import Axes, Cut, Trace, Value, shape_of
from jaxsparse.channels.union import Reason


def broadcast_in_dim(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    axes = list(t.fresh(eqn.params["shape"]))
    for label, d in zip(inputs[0].axes, eqn.params["broadcast_dimensions"]):
        if t.labels.size(label) == t.labels.size(axes[d]):
            axes[d] = label
    return [tuple(axes)]


def transpose(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    return [tuple(inputs[0].axes[d] for d in eqn.params["permutation"])]


def squeeze(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    gone = {d % len(inputs[0].axes) for d in eqn.params["dimensions"]}
    return [tuple(label for d, label in enumerate(inputs[0].axes) if d not in gone)]


def reshape(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """Both shapes are walked from the left; where running products meet, the axes between are one product."""
    new = tuple(int(n) for n in eqn.params["new_sizes"])
    old = [t.labels.size(label) for label in inputs[0].axes]
    if eqn.params.get("dimensions") is not None or 0 in new:
        axes = t.fresh(new)
        t.pin((*axes, *inputs[0].axes), t.because(eqn))
        return [axes]
    axes, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if j == len(new) or (i < len(old) and old[i] == 1 and new[j] != 1):
            i += 1  # an axis of size 1 goes
            continue
        if i == len(old) or (new[j] == 1 and old[i] != 1):
            axes.append(t.labels.atom(1))
            j += 1
            continue
        first, start, have, want = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                have, i = have * old[i], i + 1
            else:
                want, j = want * new[j], j + 1
        axes += _regroup(t, eqn, inputs[0].axes[first:i], new[start:j])
    return [tuple(axes)]


def _regroup(t: Trace, eqn: core.JaxprEqn, labels: Sequence[int], sizes: Sequence[int]) -> Axes:
    reason = t.because(eqn, "a reshape whose factors have no common form")
    found = t.labels.factor(t.labels.product(labels), sizes, reason)
    if found is None:
        t.pin(labels, reason)
        found = t.fresh(sizes)
        t.pin(found, reason)
    return tuple(found)


def concatenate(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    axis, axes = eqn.params["dimension"], list(inputs[0].axes)
    for value in inputs[1:]:
        for d, label in enumerate(value.axes):
            if d != axis:
                t.labels.unify(axes[d], label, t.because(eqn))
    axes[axis] = t.labels.concat([value.axes[axis] for value in inputs])
    return [tuple(axes)]


def stack(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """Operands of one shape along a new axis, whose positions are numbered by the operands."""
    axes = list(inputs[0].axes)
    for value in inputs[1:]:
        for d, label in enumerate(value.axes):
            t.labels.unify(axes[d], label, t.because(eqn))
    joined = t.labels.atom(len(inputs))
    t.labels.pin(joined, t.because(eqn))
    return [(*axes[: eqn.params["axis"]], joined, *axes[eqn.params["axis"] :])]


def unstack(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    axis, axes = eqn.params["axis"], inputs[0].axes
    t.pin((axes[axis],), t.because(eqn))
    return [(*axes[:axis], *axes[axis + 1 :])] * len(eqn.outvars)


def split(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    axis, sizes = eqn.params["axis"], [int(n) for n in eqn.params["sizes"]]
    found, start = [], 0
    for size in sizes:
        axes = list(inputs[0].axes)
        axes[axis] = _cut(t, axes[axis], start, start + size, t.because(eqn))
        found.append(tuple(axes))
        start += size
    return found


def slice_(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    params, axes = eqn.params, []
    strides = params["strides"] or (1,) * len(inputs[0].axes)
    for label, start, stop, stride in zip(
        inputs[0].axes, params["start_indices"], params["limit_indices"], strides
    ):
        axes.append(_cut(t, label, start, stop, t.because(eqn), stride))
    return [tuple(axes)]


def _cut(t: Trace, label: int, start: int, stop: int, reason: Reason, stride: int = 1) -> int:
    """The label of the positions `start, start + stride, ...` below `stop`."""
    t.places.append(Cut(label, start, stop, reason))
    size, taken = t.labels.size(label), -(-(stop - start) // stride)
    if (start, taken, stride) == (0, size, 1):
        return label
    if stride == 1:
        pieces = t.labels.split(label, [start, stop - start, size - stop])
        if pieces is not None:
            t.cuts.append(Cut(label, start, stop, reason))
            return pieces[1]
    elif size % stride == 0 and start < stride and taken == size // stride:
        # Every so-manyth position, as rotary embeddings of neighbouring pairs take them.
        factors = t.labels.factor(label, [taken, stride], reason)
        if factors is not None:
            t.labels.pin(factors[1], Reason("a slice with a stride", reason.source))
            return factors[0]
    found = t.labels.atom(taken)
    t.pin((label, found), Reason("a slice inside of a factor", reason.source))
    return found


def pad(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    axes = list(t.fresh(shape_of(eqn.outvars[0])))
    for d, config in enumerate(eqn.params["padding_config"]):
        if tuple(config) == (0, 0, 0):
            axes[d] = inputs[0].axes[d]
        else:
            t.pin((inputs[0].axes[d], axes[d]), t.because(eqn))
    return [tuple(axes)]
