"""What a weight is worth: functions of a `View` that give each weight of a leaf a number.

The higher the score, the sooner a weight is kept (or grown). A score of your own is a function of a
`View`,

    def wanda(view):
        return jnp.abs(view.w) * view.stats[:, None]

or of the weights and their gradients, `(w, g)`, which is adapted wherever a score is taken.
`declare` says more about it: `ties`, how equal scores are ranked: by "position" (the default), or by
a seeded "hash" of it, which does not favour the first rows where many scores are equal; and
`needs_gradient`, that it cannot be computed at `init`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from jaxsparse.leaves import Leaf


@dataclasses.dataclass(frozen=True)
class View:
    """One sparse leaf as a score or a rule sees it.

    Attributes:
      leaf: its path, shape and structure.
      w: the weights (raw where a method keeps them).
      g: their gradient; None where there is none, such as at `init`.
      m: the mask so far; None at `init` and where nothing is masked.
      stats: calibration statistics of this leaf, whatever was given for it; None without.
    """

    leaf: Leaf
    w: Array
    g: Any = None
    m: Any = None
    stats: Any = None

    def replace(self, **changes: Any) -> View:
        """The same view with other values: `view.replace(w=z)`."""
        return dataclasses.replace(self, **changes)


Score = Callable[[View], Array]
ScoreLike = Score | Callable[[Array, Any], Array]
Ties = Literal["position", "hash"]


def declare(*, ties: Ties = "position", needs_gradient: bool = False):
    """Decorator: says of a score how equal values are ranked, and whether it reads gradients.

    >>> @declare(ties="hash", needs_gradient=True)
    ... def steepness(view):
    ...     return jnp.square(view.g)
    >>> resolve(steepness).ties
    'hash'
    """

    def mark(function):
        function.ties, function.needs_gradient = ties, needs_gradient
        return function

    return mark


def magnitude(view: View) -> Array:
    """|w|."""
    return jnp.abs(view.w)


@declare(ties="hash", needs_gradient=True)
def gradient(view: View) -> Array:
    """|g|: how fast the loss would fall if the weight moved."""
    return jnp.abs(_gradient(view, "gradient"))


@declare(ties="hash", needs_gradient=True)
def saliency(view: View) -> Array:
    """|w g|: the change of the loss, to first order, if the weight were removed."""
    return jnp.abs(view.w * _gradient(view, "saliency"))


@declare(ties="hash")
def random(view: View) -> Array:
    """0 everywhere: the seeded tie-break then draws uniformly."""
    return jnp.zeros(view.w.shape, view.w.dtype)


def _gradient(view: View, name: str) -> Array:
    if view.g is None:
        raise ValueError(f"score={name!r} needs gradients, and none were given")
    return view.g


NAMED: dict[str, Score] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "saliency": saliency,
    "random": random,
}


def resolve(score: str | ScoreLike) -> Score:
    """A score by its name, or the function itself as a function of a `View`.

    A function that must be given two arguments is one of `(w, g)`; what `declare` said of it stays.

    >>> score = resolve(lambda w, g: w * g)
    >>> score(View(None, jnp.float32(2.0), jnp.float32(3.0))).item()
    6.0

    Raises:
      ValueError: an unknown name.
    """
    if not callable(score):
        if score not in NAMED:
            raise ValueError(
                f"score={score!r}: give a function of a View, or of (w, g), or one of {sorted(NAMED)}"
            )
        return NAMED[score]
    function: Any = score
    return _adapted(function) if _takes_two(function) else function


def _adapted(function: Callable[[Array, Any], Array]) -> Score:
    @functools.wraps(function)
    def score(view: View) -> Array:
        return function(view.w, view.g)

    del score.__wrapped__  # whose signature would be taken for that of the score
    return score


def _takes_two(function: Callable[..., Array]) -> bool:
    """Whether a function must be given a second argument, or may be given a gradient."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (
        ValueError
    ):  # functions of C have none; of numpy's and jax's those of one array are usual
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    second = [p for p in parameters if p.kind in kinds][1:2]
    return any(p.default is p.empty or p.name in ("g", "grad", "gradient") for p in second)


def ties(score: ScoreLike) -> Ties:
    """How equal scores of this function are ranked: "position" or "hash"."""
    return getattr(score, "ties", "position")


def needs_gradient(score: ScoreLike) -> bool:
    """Whether this function reads gradients, so that it cannot be computed at `init`."""
    return getattr(score, "needs_gradient", False)
