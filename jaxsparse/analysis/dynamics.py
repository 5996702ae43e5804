"""How masks differ and move: overlap of two, exploration of many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxsparse import masking
from jaxsparse.targets import named_leaves


def _flat(masks: Any) -> dict[str, np.ndarray]:
    leaves = named_leaves(masks, is_leaf=masking.is_mask)
    kept = [(path, masking.unpack(m)) for path, m in leaves if m is not None]
    return {path: np.asarray(m, bool) for path, m in kept if hasattr(m, "shape")}


def _pairs(a: Any, b: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    first, second = _flat(a), _flat(b)
    for name in sorted(set(first) | set(second)):
        shapes = [m[name].shape if name in m else None for m in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"masks: {name!r} has the shapes {shapes[0]} and {shapes[1]}")
    return {name: (first[name], second[name]) for name in first}


def density(masks: Any) -> dict[str, float]:
    """The part of each leaf that its mask keeps, by path: what `flops.sparse_flops` and
    `plots.density_bars` take. Leaves without a mask are left out.

    >>> density({"w": np.array([True, False, False, False]), "b": None})
    {'w': 0.25}
    """
    return {name: float(np.mean(m)) for name, m in _flat(masks).items() if m.size}


def hamming(a: Any, b: Any) -> int:
    """The positions at which two trees of masks differ. Of the masks of two consecutive updates it is
    the "sparse architecture divergence" of SR-STE (Zhou et al., 2021).

    >>> hamming({"w": np.array([True, False, True])}, {"w": np.array([True, True, False])})
    2

    Raises:
      ValueError: masks of different leaves or shapes.
    """
    return sum(int(np.count_nonzero(x ^ y)) for x, y in _pairs(a, b).values())


def iou(a: Any, b: Any) -> float:
    """Intersection over union of two trees of masks, over all leaves; 1 if both are empty.

    >>> iou({"w": np.array([True, False, True])}, {"w": np.array([True, True, False])})
    0.3333333333333333

    Raises:
      ValueError: masks of different leaves or shapes.
    """
    pairs = _pairs(a, b).values()
    both = sum(int(np.count_nonzero(x & y)) for x, y in pairs)
    either = sum(int(np.count_nonzero(x | y)) for x, y in pairs)
    return both / either if either else 1.0


def layer_iou(a: Any, b: Any) -> Mapping[str, float]:
    """`iou` of each leaf, by path.

    Raises:
      ValueError: masks of different leaves or shapes.
    """
    return {name: iou({"": x}, {"": y}) for name, (x, y) in _pairs(a, b).items()}


def exploration(masks: Iterable[Any]) -> float:
    r"""The exploration rate $R_s = |\bigcup_t m_t| / n$ of a sequence of trees of masks: the part of
    the weights that was ever kept (Liu et al., Do we actually need dense over-parameterization?
    In-time over-parameterization in sparse training, 2021). It counts masks, not nonzeros.

    >>> exploration([{"w": np.array([True, False, False])}, {"w": np.array([False, True, False])}])
    0.6666666666666666

    Raises:
      ValueError: no masks, or masks of different leaves or shapes.
    """
    fired: dict[str, np.ndarray] = {}
    for tree in masks:
        pairs = _pairs(fired or tree, tree)
        fired = {name: x | y for name, (x, y) in pairs.items()}
    if not fired:
        raise ValueError("masks: the sequence is empty, or none of its trees has a mask")
    return sum(int(np.count_nonzero(m)) for m in fired.values()) / sum(
        m.size for m in fired.values()
    )
