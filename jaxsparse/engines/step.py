"""What a rule is given: one step of training as it is seen at the sparse leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.leaves import Leaf, SparseLeaves
from jaxsparse.scores import View


@dataclasses.dataclass(frozen=True)
class Step:
    """What a rule is given: the step (int32, 0 at `init` and at the first update), the sparse
    leaves, the inner optimizer's state before this step, and what the method keeps besides."""

    count: Array
    views: Sequence[View]
    inner: Any = None
    aux: Any = None

    @property
    def leaves(self) -> list[Leaf]:
        """The sparse leaves."""
        return [v.leaf for v in self.views]

    @property
    def masks(self) -> list:
        """The masks so far."""
        return [v.m for v in self.views]

    def salts(self, seed: Any) -> list[Array]:
        """One seed per leaf, of this step."""
        return [leaf.salt(seed, self.count) for leaf in self.leaves]


def views(plan: SparseLeaves, ws, gs=None, ms=None) -> list[View]:
    """The views of all sparse leaves."""
    none = [None] * len(plan.leaves)
    return [View(*row) for row in zip(plan.leaves, ws, gs or none, ms or none)]


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
    bad = [jnp.any(jnp.isnan(x)) for x in (*grads, *weights)]
    return jnp.any(jnp.stack(bad)) if bad else jnp.zeros((), bool)
