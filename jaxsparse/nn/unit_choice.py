r"""Units that are a ReLU, the identity or nothing: networks with few units that are not linear, for control by
mixed-integer programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsparse import selection

RELU, IDENTITY, ZERO = 0, 1, 2


class UnitChoice(nnx.Module):
    r"""An activation that learns for each unit which of {ReLU, identity, 0} it is: $\pi_R\, relu(a) + \pi_I\, a$, one-hot
    draws with Gumbel noise in training, straight through the softmax; the likeliest in evaluation. Add
    `choice.relus()` times a strength to the loss. `keep_relus` of all layers reduces them stage by stage to a count,
    and fixes what is left.

    Args:
      features: units.
      temperature: of the softmax; too low early on, and nothing is learnt.
      rngs: the stream `noise`.

    Source: Liu et al., "Model-based control with sparse neural dynamics", 2023; we know the abstract, the relaxation
    and the stages are ours.

    >>> choice = UnitChoice(4, rngs=nnx.Rngs(0, noise=1))
    >>> choice.eval()
    >>> choice(jnp.array([[-1.0, 2.0, -3.0, 4.0]])).tolist()
    [[0.0, 2.0, 0.0, 4.0]]
    """

    def __init__(self, features: int, *, temperature: float = 1.0, rngs: nnx.Rngs):
        start = jnp.tile(jnp.array([1.0, 0.0, 0.0]), (features, 1))
        self.logits = nnx.Param(start)
        self.may_be_relu = nnx.Variable(jnp.ones(features, bool))
        self.temperature, self.rngs, self.deterministic = temperature, rngs, False

    def _allowed(self) -> Array:
        banned = ~self.may_be_relu[...][:, None] & (jnp.arange(3) == RELU)
        return jnp.where(banned, -1e9, self.logits[...])

    @property
    def kinds(self) -> Array:
        """The likeliest kind of each unit: `RELU`, `IDENTITY`, `ZERO`."""
        return jnp.argmax(self._allowed(), axis=1)

    def relus(self) -> Array:
        """The expected number of ReLUs."""
        return jnp.sum(jax.nn.softmax(self._allowed(), axis=1)[:, RELU])

    def __call__(self, a: Array) -> Array:
        """`[..., features]`."""
        scores = self._allowed()
        if not self.deterministic:
            noise = jax.random.gumbel(self.rngs.noise(), scores.shape)
            scores = (scores + noise) / self.temperature
        soft = jax.nn.softmax(scores, axis=1)
        hard = jax.nn.one_hot(jnp.argmax(scores, axis=1), 3)
        pi = (soft + jax.lax.stop_gradient(hard - soft)).astype(a.dtype)
        return pi[:, RELU] * jax.nn.relu(a) + pi[:, IDENTITY] * a


def keep_relus(choices: Sequence[UnitChoice], count: int) -> None:
    """Leaves the `count` units with the most ReLU in them (the logit less the better of the other two) over all
    layers; all others are the identity or 0 from now on.

    Raises:
      ValueError: more than there are units.
    """
    units = sum(c.logits[...].shape[0] for c in choices)
    if not 0 <= count <= units:
        raise ValueError(f"count={count}: must be in 0..{units}")
    margins = [c._allowed()[:, RELU] - jnp.max(c._allowed()[:, 1:], axis=1) for c in choices]
    masks = selection.topk_masks(margins, count, together=True)
    for c, m in zip(choices, masks):
        c.may_be_relu[...] = m
        wins = jnp.max(c.logits[...][:, 1:], axis=1) + 1e-3
        first = jnp.where(m, jnp.maximum(c.logits[...][:, RELU], wins), c.logits[...][:, RELU])
        c.logits[...] = c.logits[...].at[:, RELU].set(first)


# -- The network as a program ------------------------------------------------------------------------

Layer = tuple[np.ndarray, np.ndarray, np.ndarray]  # kernel [in, out], bias [out], kinds [out]


def evaluate(layers: Sequence[Layer], x: np.ndarray) -> np.ndarray:
    """The network in NumPy, float64; the kinds of the last layer are usually `IDENTITY`."""
    for w, b, kinds in layers:
        a = x @ w + b
        x = np.where(kinds == RELU, np.maximum(a, 0), np.where(kinds == IDENTITY, a, 0.0))
    return x


def collapse(layers: Sequence[Layer]) -> list[Layer]:
    """Layers without any ReLU multiplied into the next, exactly; a network without ReLUs becomes one layer.

    >>> one = (np.eye(2), np.zeros(2), np.array([IDENTITY, ZERO]))
    >>> len(collapse([one, one, one]))
    1
    """
    found: list[Layer] = []
    for w, b, kinds in layers:
        w, b = np.asarray(w, np.float64), np.asarray(b, np.float64)
        if found and not (found[-1][2] == RELU).any():
            w0, b0, kinds0 = found.pop()
            on = (kinds0 == IDENTITY).astype(np.float64)
            w, b = (w0 * on) @ w, (b0 * on) @ w + b
        found.append((w, b, np.asarray(kinds)))
    return found


class Bounds(NamedTuple):
    """Bounds of the pre-activations of a layer, `[out]` each."""

    low: np.ndarray
    high: np.ndarray


def interval_bounds(layers: Sequence[Layer], low: np.ndarray, high: np.ndarray) -> list[Bounds]:
    """Bounds of all pre-activations for inputs between `low` and `high`, by interval arithmetic: true, not tight.

    >>> layer = (np.array([[1.0, -1.0]]), np.zeros(2), np.array([RELU, RELU]))
    >>> [b.tolist() for b in interval_bounds([layer], np.array([-1.0]), np.array([2.0]))[0]]
    [[-1.0, -2.0], [2.0, 1.0]]
    """
    found = []
    for w, b, kinds in layers:
        positive, negative = np.maximum(w, 0), np.minimum(w, 0)
        below = low @ positive + high @ negative + b
        above = high @ positive + low @ negative + b
        found.append(Bounds(below, above))
        act = lambda v, kinds=kinds: np.where(
            kinds == RELU, np.maximum(v, 0), np.where(kinds == IDENTITY, v, 0.0)
        )
        low, high = act(below), act(above)
    return found


def relu_constraints(low: float, high: float) -> list[tuple[float, float, float, float]]:
    r"""z = relu(a) for a in [l, u] as linear constraints with a binary b: $z \ge 0$, $z \ge a$, $z \le u b$,
    $z \le a - l(1 - b)$. Each row (p, q, r, s) says $p z + q a + r b \le s$.

    Args:
      low: l, at most 0 (a unit with l > 0 is the identity).
      high: u, at least 0 (with u < 0 it is 0).

    >>> len(relu_constraints(-1.0, 2.0))
    4

    Raises:
      ValueError: bounds on one side of 0.
    """
    if not low <= 0 <= high:
        raise ValueError(
            f"low={low}, high={high}: a unit that cannot switch needs no binary variable"
        )
    return [
        (-1.0, 0.0, 0.0, 0.0),
        (-1.0, 1.0, 0.0, 0.0),
        (1.0, 0.0, -high, 0.0),
        (1.0, -1.0, -low, -low),
    ]
