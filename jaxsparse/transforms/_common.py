"""What the engines share: how rules see the sparse leaves, and how state leaves are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike

from jaxsparse import masking
from jaxsparse.plan import Leaf, Plan


@dataclasses.dataclass(frozen=True)
class View:
    """One sparse leaf as a rule sees it: `w` the weights (raw where a method keeps them), `g` their
    gradient (None at `init`), `m` the mask so far (None at `init`)."""

    leaf: Leaf
    w: Array
    g: Any
    m: Any


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


PlanFor = Callable[[Any], Plan]


def views(plan: Plan, ws, gs=None, ms=None) -> list[View]:
    """The views of all sparse leaves."""
    none = [None] * len(plan.leaves)
    return [View(*row) for row in zip(plan.leaves, ws, gs or none, ms or none)]


def like(x: Array, param: Array) -> Array:
    """`x` with the sharding of `param`, eagerly or under `jit`."""
    if x.shape != param.shape:
        return x
    if isinstance(param, Tracer) or isinstance(x, Tracer):
        return shard_alike(x, param)[0]
    sharding = getattr(param, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return x  # leave the choice of the device to JAX, as the parameters do
    return jax.device_put(x, sharding)


def store_masks(plan: Plan, masks: Sequence[Array], packed: bool):
    """The tree of masks as the state holds it."""
    return plan.scatter([masking.pack(m) if packed else m for m in masks])


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


def broken(grads: Sequence[Array], weights: Sequence[Array]) -> Array:
    """Whether any gradient or weight of the sparse leaves is NaN (bool scalar)."""
    bad = [jnp.any(jnp.isnan(x)) for x in (*grads, *weights)]
    return jnp.any(jnp.stack(bad)) if bad else jnp.zeros((), bool)


def check_inner(inner) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer, accepting extra arguments.

    Raises:
      ValueError: not an optax gradient transformation.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner={inner!r}: give an optax gradient transformation, such as optax.adamw(1e-3)"
        )
    return optax.with_extra_args_support(inner)


def check_params(params, name: str):
    """Raises `ValueError` if the parameters were not passed to `update`."""
    if params is None:
        raise ValueError(
            f"{name}: update needs the parameters; call tx.update(grads, opt_state, params)"
        )
