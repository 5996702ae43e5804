"""Averages of sparse networks that share a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.targets import named_leaves


class Soup(NamedTuple):
    """The mean of some networks, and which of them are in it."""

    params: Any
    members: tuple[int, ...]


def average(networks: Sequence[Any], *, same_zeros: bool = True) -> Any:
    """The mean of networks, leaf by leaf; a weight that is 0 in all of them stays exactly 0.

    Statistics of norms are not averaged here: estimate them anew.

    Args:
      networks: trees of parameters.
      same_zeros: refuse kernels whose zeros differ between networks: their mean is less sparse than each.

    (Zimmer, Spiegel & Pokutta, Sparse model soups: a recipe for improved pruning via model averaging, 2024.)

    >>> average([{"kernel": jnp.array([[0.0, 1.0]])}, {"kernel": jnp.array([[0.0, 3.0]])}])["kernel"].tolist()
    [[0.0, 2.0]]

    Raises:
      ValueError: no networks, or zeros that differ.
    """
    if not networks:
        raise ValueError("networks: there are none")
    if same_zeros:
        first = named_leaves(networks[0])
        for other in networks[1:]:
            for (path, a), (_, b) in zip(first, named_leaves(other)):
                if np.ndim(a) > 1 and bool(jnp.any((a == 0) != (b == 0))):
                    raise ValueError(
                        f"networks: the zeros of {path!r} differ; prune them with one mask, or give "
                        "same_zeros=False for a mean that is less sparse"
                    )
    count = len(networks)

    def mean(*xs):
        wide = jnp.promote_types(jnp.result_type(xs[0]), jnp.float32)
        total = jnp.asarray(sum(jnp.asarray(x, wide) for x in xs)) / count
        whole = jnp.issubdtype(jnp.result_type(xs[0]), jnp.integer)
        return (jnp.round(total) if whole else total).astype(jnp.result_type(xs[0]))

    return jax.tree.map(mean, *networks)


def greedy_soup(networks: Sequence[Any], evaluate: Callable[[Any], Any]) -> Soup:
    """Adds networks to the mean, best first, as long as it does not get worse.

    Args:
      networks: trees of parameters with one mask.
      evaluate: a number that is higher for better networks, on validation data; it recalibrates norms. A
        network whose number is NaN is not taken.

    >>> networks = [{"w": jnp.array([x])} for x in (1.0, -1.0, 8.0)]
    >>> greedy_soup(networks, lambda p: -jnp.abs(p["w"][0])).members
    (0, 1)

    Raises:
      ValueError: as `average`; no network whose number is not NaN.
    """
    if not networks:
        raise ValueError("networks: there are none")
    scores = [float(evaluate(p)) for p in networks]
    sound = [i for i, s in enumerate(scores) if not np.isnan(s)]
    if not sound:
        raise ValueError(f"networks: evaluate gives {scores}; at least one must not be NaN")
    order = sorted(sound, key=lambda i: (-scores[i], i))
    members, best = [order[0]], scores[order[0]]
    for i in order[1:]:
        now = float(evaluate(average([networks[j] for j in (*members, i)])))
        if now >= best:
            members, best = [*members, i], now
    return Soup(average([networks[j] for j in members]), tuple(members))
