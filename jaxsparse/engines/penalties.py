r"""Penalties on weights and on groups of weights, and their gradient as a transformation *before* the inner
optimizer:

    tx = jaxsparse.rigl(optax.chain(add_penalty(GroupLasso(1e-4)), optax.adamw(1e-3)), 0.9, ...)

Momentum and adaptive steps then act on the penalty as well. The proximal step *after* the optimizer
(`engines.proximal`) solves the same problem for plain gradient descent and gives exact zeros; under momentum
and Adam the two differ, and under Adam a Euclidean proximal step is not that of Adam's metric.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse.engines.units import Units, group_setup, safe_divide
from jaxsparse.leaves import Leaf
from jaxsparse.scores import View
from jaxsparse.typing import GroupsLike, Scalar, ScalarOrSchedule, Targets

Family = Literal["units", "filters", "channels", "shapes", "layers"]
FAMILIES = ("units", "filters", "channels", "shapes", "layers")


class Penalty(Protocol):
    """A penalty on the sparse leaves: what transformations ask of it. Values of weights are lists of
    arrays, one for each leaf of `units.members`."""

    def value(self, units: Units, ws: Sequence[Array]) -> Array:
        """The penalty of the weights, a float32 scalar."""
        ...

    def gradient(self, units: Units, ws: Sequence[Array]) -> list[Array]:
        """Its (sub)gradient, of the shapes of the weights; 0 where there is none."""
        ...

    def prox(self, units: Units, vs: Sequence[Array], step: Scalar) -> list[Array]:
        r"""$\arg\min_w \frac12 \|w - v\|^2 + step \cdot R(w)$."""
        ...


@dataclasses.dataclass(frozen=True)
class L1:
    r"""$\lambda \sum |w|$. Its proximal step is the soft threshold.

    >>> units = Units([Leaf(0, "w", (3,), 0, group_setup(0.5, None).structure)])
    >>> L1(0.5).prox(units, [jnp.array([2.0, -0.25, -1.0])], 1.0)[0].tolist()
    [1.5, 0.0, -0.5]

    Raises:
      ValueError: a negative strength.
    """

    strength: Scalar

    def __post_init__(self):
        check_strength("strength", self.strength)

    def value(self, units: Units, ws: Sequence[Array]) -> Array:
        return self.strength * sum(
            (jnp.sum(jnp.abs(w), dtype=jnp.float32) for w in ws), jnp.zeros(())
        )

    def gradient(self, units: Units, ws: Sequence[Array]) -> list[Array]:
        return [(self.strength * jnp.sign(w)).astype(w.dtype) for w in ws]

    def prox(self, units: Units, vs: Sequence[Array], step: Scalar) -> list[Array]:
        by = step * self.strength
        shrunk = lambda v: jnp.where(jnp.abs(v) <= by, 0, v - by * jnp.sign(v)).astype(v.dtype)
        return [shrunk(v) for v in vs]


@dataclasses.dataclass(frozen=True)
class GroupLasso:
    r"""$\lambda \sum_g \|w_g\|_2$ over the groups of a family. Its gradient is $\lambda w_g / \|w_g\|$, of norm
    $\lambda$ in every group that is not 0; its proximal step is $\max(0, 1 - \lambda/\|v_g\|)\, v_g$.

    Families of a kernel `[..., in, out]`: "filters" have a fixed output, "channels" a fixed input, "shapes" a
    fixed position and input (a row of the lowered matrix), "layers" are whole kernels; leaves of one dimension
    are left out of all but "layers". "units" are the units of the structure, such as the groups of
    `channels.find`; where a weight is in two of them the gradients add up, and the factors of the proximal step
    are multiplied, which is its solution for units that share no weight only.

    Args:
      strength: $\lambda$.
      family: see above.
      by_size: multiply the norm with the root of the number of weights in the group.

    >>> w = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    >>> units = Units([Leaf(0, "w", (2, 2), 0, group_setup(0.5, None).structure)])
    >>> GroupLasso(2.0, "filters").gradient(units, [w])[0].round(1)
    Array([[1.2, 0. ],
           [1.6, 0. ]], dtype=float32)

    Raises:
      ValueError: a negative strength, an unknown family.

    Source: Yuan & Lin, 2006; the families are those of Wen et al., "Learning structured sparsity in deep neural
    networks", 2016.
    """

    strength: Scalar
    family: Family = "units"
    by_size: bool = False

    def __post_init__(self):
        check_strength("strength", self.strength)
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r}: use one of {', '.join(FAMILIES)}")

    def value(self, units: Units, ws: Sequence[Array]) -> Array:
        rows = zip(self._norms(units, ws), self._roots(units))
        return self.strength * sum((jnp.sum(n * r) for n, r in rows), jnp.zeros((), jnp.float32))

    def gradient(self, units: Units, ws: Sequence[Array]) -> list[Array]:
        factors = self._at_weights(units, self._inverse(units, ws), "sum")
        return [(self.strength * f * w).astype(w.dtype) for f, w in zip(factors, ws)]

    def prox(self, units: Units, vs: Sequence[Array], step: Scalar) -> list[Array]:
        by = step * self.strength
        short = [jnp.maximum(1 - by * n, 0) for n in self._inverse(units, vs)]
        factors = self._at_weights(units, short, "all")
        return [jnp.where(v == 0, v, (f * v).astype(v.dtype)) for f, v in zip(factors, vs)]

    def _norms(self, units: Units, ws: Sequence[Array]) -> list[Array]:
        """The norms of the groups, 0 of those that the family leaves out."""
        if self.family == "units":
            return units.norms(ws)
        over = [_axes(leaf, self.family) for leaf in units.members]
        wide = [w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in ws]
        return [
            jnp.zeros(()) if a is None else jnp.sqrt(jnp.sum(w * w, axis=a, keepdims=True))
            for w, a in zip(wide, over)
        ]

    def _roots(self, units: Units) -> list[Array]:
        """The roots of the sizes of the groups, if these count."""
        ones = [jnp.ones(leaf.shape, jnp.float32) for leaf in units.members]
        norms = self._norms(units, ones)
        return norms if self.by_size else [jnp.ones(()) for _ in norms]

    def _inverse(self, units: Units, ws: Sequence[Array]) -> list[Array]:
        """What the weights are multiplied with to give the gradient of the norms of their groups."""
        return [safe_divide(r, n) for r, n in zip(self._roots(units), self._norms(units, ws))]

    def _at_weights(
        self, units: Units, values: list[Array], join: Literal["all", "sum"]
    ) -> list[Array]:
        if self.family == "units":
            return units.at_weights(values, join)
        return values


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum of several penalties. It has a gradient; of proximal steps it takes one after the other, which is
    the solution where the families are nested (groups of weights within groups).

    >>> both = Sum((GroupLasso(1e-3, "filters"), GroupLasso(1e-3, "shapes")))
    """

    terms: tuple[Penalty, ...]

    def value(self, units: Units, ws: Sequence[Array]) -> Array:
        return sum((term.value(units, ws) for term in self.terms), jnp.zeros((), jnp.float32))

    def gradient(self, units: Units, ws: Sequence[Array]) -> list[Array]:
        rows = zip(*(term.gradient(units, ws) for term in self.terms))
        return [functools.reduce(operator.add, row) for row in rows]

    def prox(self, units: Units, vs: Sequence[Array], step: Scalar) -> list[Array]:
        vs = list(vs)
        for term in self.terms:
            vs = term.prox(units, vs, step)
        return vs


class CountState(NamedTuple):
    """The number of updates so far, int32."""

    count: Array


def add_penalty(
    penalty: Penalty,
    *,
    scale: ScalarOrSchedule = 1.0,
    groups: GroupsLike = None,
    targets: Targets = None,
) -> optax.GradientTransformation:
    """Adds the gradient of a penalty to the gradients: to stand before an optimizer in `optax.chain`.

    Args:
      penalty: `L1`, `GroupLasso`, a sum of these, or anything with their three functions.
      scale: a factor, or a function of the step.
      groups: what the units are: `channels.find(model, x)`, a structure, None: every output channel.
      targets: which leaves, by path; None: all kernels, or all leaves that the groups name.

    >>> tx = optax.chain(add_penalty(L1(0.5)), optax.sgd(1.0))
    >>> params = {"kernel": jnp.array([[2.0, -1.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
    >>> updates["kernel"].tolist()
    [[-0.5, 0.5]]

    Raises:
      ValueError: no parameters at an update; groups of another model.
    """
    scaled: Callable = scale if callable(scale) else lambda count: scale
    sparse = group_setup(
        None, groups, targets=targets, sides=("out", "with", "in"), asks_sparsity=False
    )

    def init_fn(params):
        sparse.leaves_for(params)
        return CountState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "update needs the parameters: call tx.update(grads, opt_state, params)"
            )
        plan = sparse.leaves_for(params)
        found = penalty.gradient(Units(plan.leaves), plan.take(params))
        factor = scaled(state.count)
        gs = [
            g + (factor * x).astype(g.dtype) for g, x in zip(plan.gradients(updates, params), found)
        ]
        return plan.put(updates, gs), CountState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init_fn, update_fn)


def penalized(
    views: Sequence[View], gradient: Sequence[Array], on: Array | bool = True
) -> list[Array]:
    """The gradients that an inner optimizer sees: of kept weights with the penalty's added where `on`, of
    others 0."""
    return [
        jnp.where(
            v.m,
            v.g + jnp.where(on, x, jnp.zeros((), x.dtype)).astype(v.g.dtype),
            jnp.zeros((), v.g.dtype),
        )
        for v, x in zip(views, gradient)
    ]


def check_strength(name: str, value: Scalar) -> None:
    """Raises `ValueError` for a strength that is negative or NaN."""
    if is_concrete(value) and not float(value) >= 0:
        raise ValueError(f"{name}={value}: a strength must not be negative")


def check_fraction(name: str, value: Scalar) -> None:
    """Raises `ValueError` for what does not lie in [0, 1)."""
    if is_concrete(value) and not 0 <= float(value) < 1:
        raise ValueError(f"{name}={value}: must be in [0, 1)")


def _axes(leaf: Leaf, family: Family) -> tuple[int, ...] | None:
    """The axes that a group of a family runs along; None where the family leaves the leaf out."""
    axes = leaf.layer_axes
    if family == "layers":
        return axes
    if len(axes) < 2:
        return None
    fixed = {"filters": axes[-1:], "channels": axes[-2:-1], "shapes": axes[:-1]}[family]
    return tuple(a for a in axes if a not in fixed)
