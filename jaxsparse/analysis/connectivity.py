"""Whether two networks lie in one valley: the error along the line between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Line(NamedTuple):
    """Places on the line, the error there, and the barrier: how far it rises above the line between the ends."""

    places: np.ndarray
    errors: np.ndarray
    barrier: float


def line(error: Callable[[Any], Any], first: Any, second: Any, *, points: int = 31) -> Line:
    r"""$\max_a E((1 - a) w_1 + a w_2) - ((1 - a) E(w_1) + a E(w_2))$ over places a in [0, 1].

    Two runs from one early state, with the data in other orders, are *stable* to the noise of training if the
    barrier of their error is below about 2 points; where they are, the tickets found by rewinding to that state
    match the dense network.

    Args:
      error: from parameters to a number; networks with norms estimate their statistics anew in it.
      first, second: trees of parameters.
      points: how many places, the ends included.

    (Frankle, Dziugaite, Roy & Carbin, Linear mode connectivity and the lottery ticket hypothesis, 2020.)

    >>> import jax.numpy as jnp
    >>> found = line(lambda p: jnp.cos(p["w"]), {"w": jnp.float32(-3.14159)}, {"w": jnp.float32(3.14159)})
    >>> round(found.barrier, 3), len(found.errors)
    (2.0, 31)

    Raises:
      ValueError: fewer than three points.
    """
    if points < 3:
        raise ValueError(f"points={points}: give at least three")
    places = np.linspace(0, 1, points)
    mix = lambda a: jax.tree.map(lambda x, y: (1 - a) * x + a * y, first, second)
    errors = np.array([float(error(mix(float(a)))) for a in places])
    above = errors - ((1 - places) * errors[0] + places * errors[-1])
    return Line(places, errors, float(above.max()))
