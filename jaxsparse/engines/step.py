"""What a rule is given: one step of training as it is seen at the sparse leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse import selection
from jaxsparse._control import is_concrete
from jaxsparse.leaves import Leaf, SparseLeaves
from jaxsparse.scores import View
from jaxsparse.state import masks_of_inner


@dataclasses.dataclass(frozen=True)
class Step:
    """What a rule is given: the step (int32, 0 at `init` and at the first update), the sparse
    leaves, the inner optimizer's state before this step, what the method keeps besides, and where the
    inner optimizer is itself a method with masks, those: nothing outside of `inside` can be kept."""

    count: Array
    views: Sequence[View]
    inner: Any = None
    aux: Any = None
    inside: Sequence[Array] | None = None

    @property
    def leaves(self) -> list[Leaf]:
        """The sparse leaves."""
        return [v.leaf for v in self.views]

    @property
    def masks(self) -> list:
        """The masks so far."""
        return [v.m for v in self.views]

    @property
    def held(self) -> list:
        """The masks so far, as far as a method inside keeps them too."""
        return intersect(self.masks, self.inside)

    @property
    def sizes(self) -> list[Array]:
        """How many weights of each layer can be kept, int32."""
        if self.inside is not None:
            rows = zip(self.leaves, self.inside)
            return [jnp.sum(m, axis=x.layer_axes, dtype=jnp.int32) for x, m in rows]
        return [jnp.full(x.stack_shape, x.layer_size, jnp.int32) for x in self.leaves]

    def all_zero(self) -> list[str]:
        """The paths of leaves whose weights are all 0, as far as they are known while tracing."""
        known = [v for v in self.views if is_concrete(v.w)]
        return [v.leaf.path for v in known if not bool(jnp.any(v.w != 0))]

    def salts(self, seed: Any) -> list[Array]:
        """One seed per leaf, of this step."""
        return [leaf.salt(seed, self.count) for leaf in self.leaves]


def views(plan: SparseLeaves, ws, gs=None, ms=None) -> list[View]:
    """The views of all sparse leaves."""
    none = [None] * len(plan.leaves)
    return [View(*row) for row in zip(plan.leaves, ws, gs or none, ms or none)]


def intersect(masks: Sequence[Array], others: Sequence[Array] | None) -> list[Array]:
    """What both keep; the first masks if there are no others."""
    return list(masks) if others is None else [m & o for m, o in zip(masks, others)]


def kept_inside(plan: SparseLeaves, inner_state, params) -> list[Array] | None:
    """What the methods inside the inner optimizer keep of each sparse leaf; None if there are none."""
    found = masks_of_inner(inner_state, params)
    if found is None:
        return None
    rows = [(found[leaf.index], leaf.shape) for leaf in plan]
    return [jnp.ones(shape, bool) if m is None else m for m, shape in rows]


def momentum(step: Step) -> list[Array]:
    r"""The momentum of the sparse leaves in the inner optimizer's state, whatever wraps it: `trace`
    (SGD), or `mu` (Adam and its kin), divided by $\sqrt{\nu} + 10^{-8}$ where there is a `nu`.

    Raises:
      ValueError: the inner optimizer keeps none.
    """
    masked_out = lambda x: isinstance(x, optax.MaskedNode)

    def slot(name: str, leaf: Leaf):
        for _, tree in optax.tree.get_all_with_path(step.inner, name):
            flat = jax.tree.leaves(tree, is_leaf=masked_out)
            x = flat[leaf.index] if leaf.index < len(flat) else None
            if x is not None and not masked_out(x) and jnp.shape(x) == leaf.shape:
                return x
        return None

    found = []
    for leaf in step.leaves:
        m, nu = slot("trace", leaf), None
        if m is None:
            m, nu = slot("mu", leaf), slot("nu", leaf)
        if m is None:
            raise ValueError(
                f"inner: this method reads its momentum, and it keeps none for {leaf.path!r} (no "
                "`trace` or `mu` in its state); give optax.sgd(0.1, momentum=0.9) or optax.adam"
            )
        found.append(m if nu is None else m / (jnp.sqrt(nu) + 1e-8))
    return found


def any_nan(grads: Sequence[Array], weights: Sequence[Array]) -> Array:
    """Whether any gradient or weight of the sparse leaves is NaN (bool scalar)."""
    # A count is one kernel on CPU, where `jnp.any` is three and an array of the size of the weights.
    bad = [selection.count(jnp.isnan(x)) for x in (*grads, *weights)]
    return jnp.any(jnp.stack(bad) != 0) if bad else jnp.zeros((), bool)
