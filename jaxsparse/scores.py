"""What a weight is worth: functions `(w, g) -> score` of the weight and its gradient.

The higher the score, the sooner a weight is kept (or grown). A score of your own is any function
with this signature. Its attribute `ties` ("position", the default, or "hash") says how equal scores
are ranked: by position, or by a seeded hash of it, which does not favour the first rows where many
scores are equal; `needs_gradient` (default False) that it cannot be computed at `init`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

Score = Callable[[Array, Array | None], Array]


def _mark(*, ties: str, needs_gradient: bool):
    def mark(function):
        function.ties, function.needs_gradient = ties, needs_gradient
        return function

    return mark


def magnitude(w: Array, g: Array | None = None) -> Array:
    """|w|."""
    return jnp.abs(w)


@_mark(ties="hash", needs_gradient=True)
def gradient(w: Array, g: Array | None) -> Array:
    """|g|: how fast the loss would fall if the weight moved."""
    return jnp.abs(_need(g, "gradient"))


@_mark(ties="hash", needs_gradient=True)
def saliency(w: Array, g: Array | None) -> Array:
    """|w g|: the change of the loss, to first order, if the weight were removed."""
    return jnp.abs(w * _need(g, "saliency"))


@_mark(ties="hash", needs_gradient=False)
def random(w: Array, g: Array | None = None) -> Array:
    """0 everywhere: the seeded tie-break then draws uniformly."""
    return jnp.zeros(w.shape, w.dtype)


def _need(g, name: str):
    if g is None:
        raise ValueError(f"score={name!r} needs gradients, and none were given")
    return g


NAMED: dict[str, Score] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "saliency": saliency,
    "random": random,
}


def resolve(score: str | Score) -> Score:
    """A score by its name, or the function itself.

    Raises:
      ValueError: an unknown name.
    """
    if callable(score):
        return score
    if score not in NAMED:
        raise ValueError(f"score={score!r}: give a function (w, g) or one of {sorted(NAMED)}")
    return NAMED[score]


def ties(score: Score) -> str:
    """How equal scores of this function are ranked: "position" or "hash"."""
    return getattr(score, "ties", "position")
