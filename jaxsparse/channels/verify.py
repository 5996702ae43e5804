"""Whether a narrower model computes what the wide one does: the two traces side by side."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.channels.adapt import Adapted
from jaxsparse.channels.groups import Groups, labelled


def mismatch(groups: Groups, small: Adapted, kept: Mapping[str, np.ndarray]) -> str:
    """What is wrong with the narrower model, in words; empty if nothing is.

    Both traces must have the same primitives in the same order, every array the size that the removed channels
    leave of it, and every slice must begin where its part begins now. A number of heads that was not changed, or
    a border of a slice that is written as a number, is found so.
    """
    wide = groups.trace
    try:
        narrow = labelled(small)[0]
    except ValueError as error:
        return str(error)
    masks = {groups[name].atom: mask for name, mask in kept.items()}
    if [step.name for step in wide.steps] != [step.name for step in narrow.steps]:
        return "it computes something else: its primitives differ from those of the wide model"
    for before, after in zip(wide.steps, narrow.steps):
        for one, two in zip(before.axes, after.axes):
            expected = [int(wide.labels.expr(label).keep(masks).sum()) for label in one]
            found = [narrow.labels.size(label) for label in two]
            if expected != found:
                where = f" at {before.source}" if before.source else ""
                return f"{before.name}{where} makes {found} where {expected} is left"
    for before, after in zip(wide.places, narrow.places):
        start = int(wide.labels.expr(before.label).keep(masks)[: before.start].sum())
        if start != after.start:
            return f"{before.reason} begins at {after.start} where its part begins at {start}"
    return ""


def difference(one: list[jax.Array], other: list[jax.Array]) -> float:
    """The largest difference of two lists of outputs, relative to the largest value if that is above 1."""
    gaps, largest = [0.0], 1.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return float("inf")
        a, b = (jnp.asarray(x).astype(jnp.float32) for x in (a, b))
        if a.size:
            gaps.append(float(jnp.max(jnp.abs(a - b))))
            largest = max(largest, float(jnp.max(jnp.abs(a))))
    return float(np.max(gaps)) / largest
