"""Rules of primitives to which the number of a position means something: it must stay."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend import core

from jaxsparse.channels.rules_plain import elementwise, reduce
from jaxsparse.channels.trace import Axes, Role, Rule, Trace, Value, shape_of


def iota(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """Numbered positions mean what their number is."""
    axes = t.fresh(shape_of(eqn.outvars[0]))
    t.labels.pin(axes[eqn.params["dimension"]], t.because(eqn, "positions numbered by iota"))
    return [axes]


def along(key: str) -> Rule:
    """Operations along one axis, `params[key]`, in which the order of positions counts."""

    def rule(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
        axes = elementwise(t, eqn, inputs)
        named = eqn.params[key]
        for d in named if isinstance(named, tuple | list) else (named,):
            t.labels.pin(axes[0][d], t.because(eqn, f"{eqn.primitive.name}, in which order counts"))
        return axes

    return rule


def arg_reduce(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    for d in eqn.params["axes"]:
        t.labels.pin(
            inputs[0].axes[d], t.because(eqn, f"{eqn.primitive.name}, whose result is a position")
        )
    return reduce(t, eqn, inputs)


def top_k(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    axis = eqn.params.get("axis", -1) % len(inputs[0].axes)
    reason = t.because(eqn, "top_k, whose result is positions")
    t.labels.pin(inputs[0].axes[axis], reason)
    axes = list(inputs[0].axes)
    axes[axis] = t.labels.atom(shape_of(eqn.outvars[0])[axis])
    t.labels.pin(axes[axis], reason)
    return [tuple(axes)] * len(eqn.outvars)


def dynamic_slice(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    return [_window(t, eqn, inputs[0].axes, eqn.params["slice_sizes"])]


def dynamic_update_slice(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    whole, part = inputs[0].axes, inputs[1].axes
    for a, b in zip(whole, part):
        if t.labels.size(a) == t.labels.size(b):
            t.labels.unify(a, b, t.because(eqn))
        else:
            t.pin((a, b), t.because(eqn))
    return [whole]


def _window(t: Trace, eqn: core.JaxprEqn, axes: Axes, sizes: Sequence[int]) -> Axes:
    """Axes that are taken whole stay; of the others, position decides."""
    found = []
    for label, size in zip(axes, sizes):
        if t.labels.size(label) != size:
            t.labels.pin(label, t.because(eqn))
            label = t.labels.atom(size)
            t.labels.pin(label, t.because(eqn))
        found.append(label)
    return tuple(found)


def gather(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """Rows of an embedding: axes taken whole go through, those that are indexed are pinned."""
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, indices = inputs[0], inputs[1]
    reason = t.because(eqn, "gather, which takes positions by number")
    batch = dict(zip(dims.operand_batching_dims, dims.start_indices_batching_dims))
    windows = []
    for d, label in enumerate(table.axes):
        if d in batch:
            t.labels.unify(label, indices.axes[batch[d]], reason)
        elif sizes[d] != t.labels.size(label) or d in dims.collapsed_slice_dims:
            t.labels.pin(label, reason)
        if d not in batch and d not in dims.collapsed_slice_dims:
            whole = sizes[d] == t.labels.size(label)
            windows.append(label if whole else t.labels.atom(sizes[d]))
            if not whole:
                t.labels.pin(windows[-1], reason)
    rest, window = iter(indices.axes[:-1]), iter(windows)
    rank = len(shape_of(eqn.outvars[0]))
    out = tuple(next(window) if d in dims.offset_dims else next(rest) for d in range(rank))
    if table.leaf is not None:
        t.roles += [Role(table.leaf, label, "out") for label in windows]
    return [out]


def scatter(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """What is written to by number is pinned; axes written whole are those of the updates."""
    dims = eqn.params["dimension_numbers"]
    into, indices, updates = inputs[:3]
    reason = t.because(eqn, f"{eqn.primitive.name}, which writes to positions by number")
    batch = dict(zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims))
    windows = iter(dims.update_window_dims)
    for d, label in enumerate(into.axes):
        if d in batch:
            t.labels.unify(label, indices.axes[batch[d]], reason)
        elif d in dims.inserted_window_dims:
            t.labels.pin(label, reason)
        else:
            written = updates.axes[next(windows)]
            if t.labels.size(written) == t.labels.size(label):
                t.labels.unify(label, written, reason)
            else:
                t.pin((label, written), reason)
    rest = [label for d, label in enumerate(updates.axes) if d not in dims.update_window_dims]
    for a, b in zip(rest, indices.axes[:-1]):
        t.labels.unify(a, b, reason)
    return [into.axes]
