"""Which channels stay: from masks, from zeros, or as given; never none, in multiples, equal where tied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import chex
import jax.numpy as jnp
import numpy as np

from jaxsparse import selection
from jaxsparse._checks import check_count
from jaxsparse.channels.adapt import Adapted
from jaxsparse.channels.collect import Group, Member
from jaxsparse.channels.groups import Groups
from jaxsparse.masking import by_path
from jaxsparse.state import find_states, get_masks

Keep = Mapping[str, Sequence[int] | Sequence[bool] | np.ndarray]


def per_channel(member: Member, values: np.ndarray, width: int) -> np.ndarray:
    """The sum of the values of a leaf over every channel of a member; float64 [width]."""
    along = values.astype(np.float64).sum(tuple(d for d in range(values.ndim) if d != member.axis))
    inside = member.channel >= 0
    return np.bincount(member.channel[inside], along[inside], minlength=width)


def alive(
    groups: Groups, adapted: Adapted, opt_state: chex.ArrayTree | None
) -> dict[str, np.ndarray]:
    """The channels that something is left of.

    A channel is gone if all that makes it is zero (kernels, biases, scales), or all that reads it. With masks in
    the optimizer state, kernels that have a mask decide alone: what a mask removed is gone whatever the bias.
    """
    masks = _masks(groups, opt_state)
    leaves = {
        path: np.asarray(leaf) != 0 for path, leaf in adapted.named() if path in groups.trained
    }
    values = masks or leaves

    def left(group: Group, sides: Sequence[str]) -> np.ndarray | None:
        found = [
            per_channel(m, values[m.path], group.width) > 0
            for m in group.members
            if m.side in sides and m.path in values
        ]
        return np.logical_or.reduce(found) if found else None

    kept = {}
    for name, group in groups.items():
        made, read = left(group, ("out", "with")), left(group, ("in",))
        every = np.ones(group.width, bool)
        kept[name] = (every if made is None else made) & (every if read is None else read)
    return kept


def _masks(groups: Groups, opt_state: chex.ArrayTree | None) -> dict[str, np.ndarray]:
    if opt_state is None or not find_states(opt_state):
        return {}
    paths = aliases(groups)
    found = {
        paths.get(path): np.asarray(mask) for path, mask in by_path(get_masks(opt_state)).items()
    }
    return {path: mask for path, mask in found.items() if path is not None}


def aliases(groups: Groups) -> dict[str, str]:
    """The paths of the leaves as an optimizer calls them: Linen's do not begin with their collection."""
    own = {path: path for path in groups.shapes}
    if groups.model.kind != "linen":
        return own
    return own | {p.removeprefix("params/"): p for p in groups.shapes if p.startswith("params/")}


def as_given(groups: Groups, keep: Keep) -> dict[str, np.ndarray]:
    """Masks of channels from masks or from indices; groups that are not named stay whole.

    Raises:
      ValueError: an unknown group, a mask of another length, an index out of range, nothing that stays.
    """
    unknown = sorted(set(keep) - set(groups))
    if unknown:
        raise ValueError(groups.missing("keep", unknown))
    kept = {name: np.ones(group.width, bool) for name, group in groups.items()}
    for name, value in keep.items():
        given, width = np.asarray(value), groups[name].width
        if given.dtype == bool:
            if given.shape != (width,):
                raise ValueError(
                    f"keep[{name!r}]: a mask of shape {given.shape} for {width} channels"
                )
            kept[name] = given
        else:
            if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
                raise ValueError(f"keep[{name!r}]: give a mask or a list of indices, not {value!r}")
            if given.size and (given.min() < 0 or given.max() >= width):
                raise ValueError(
                    f"keep[{name!r}]: indices must lie in 0..{width - 1}, got {given.tolist()}"
                )
            kept[name] = np.isin(np.arange(width), given)
        if not kept[name].any():
            raise ValueError(f"keep[{name!r}] leaves no channel; keep at least one")
    return kept


def magnitudes(groups: Groups, adapted: Adapted) -> dict[str, np.ndarray]:
    """The sum of squares of the parameters of every channel, over all members; float64 [width]."""
    squares = {
        path: np.square(np.asarray(leaf, np.float64))
        for path, leaf in adapted.named()
        if path in groups.trained
    }
    return {
        name: sum(
            (
                per_channel(m, squares[m.path], group.width)
                for m in group.members
                if m.path in squares
            ),
            np.zeros(group.width),
        )
        for name, group in groups.items()
    }


def rounded(
    groups: Groups, kept: Mapping[str, np.ndarray], adapted: Adapted, round_to: int
) -> dict[str, np.ndarray]:
    """Adds channels, those of the largest weights first, until their number is a multiple of `round_to` (or
    all), at least one, and equal where groups are tied. Nothing is removed."""
    check_count("round_to", round_to)
    counts = {}
    for name, group in groups.items():
        count = max(1, int(kept[name].sum()))
        counts[name] = min(group.width, -(-count // round_to) * round_to)
    for name, group in groups.items():
        partners = [name, *(other for other in group.tied if other in groups)]
        if len(partners) <= len(group.tied):  # one of them was left out, and stays whole
            counts[name] = group.width
        else:
            counts[name] = max(counts[other] for other in partners)
    short = {name for name in groups if counts[name] > int(kept[name].sum())}
    if not short:
        return dict(kept)
    size = magnitudes(groups, adapted)
    return {
        name: best(size[name], counts[name], kept[name]) if name in short else kept[name]
        for name in groups
    }


def best(score: np.ndarray, count: int, first: np.ndarray | None = None) -> np.ndarray:
    """The `count` channels of the highest score, those of `first` before all others."""
    if first is None:
        return np.asarray(selection.topk_mask(jnp.asarray(score, jnp.float32), count))
    more = selection.topk_mask(
        jnp.asarray(score, jnp.float32), count - int(first.sum()), where=jnp.asarray(~first)
    )
    return first | np.asarray(more)
