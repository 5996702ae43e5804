"""What the engines share besides: arguments that fit together, and states as they are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse import masking
from jaxsparse.engines.setup import Setup
from jaxsparse.leaves import SparseLeaves
from jaxsparse.state import SparseState


def sharded_as(x: Array, param: Array) -> Array:
    """`x` with the sharding of `param`, eagerly or under `jit`."""
    if x.shape != param.shape:
        return x
    if isinstance(param, Tracer) or isinstance(x, Tracer):
        return shard_alike(x, param)[0]
    sharding = getattr(param, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return x  # leave the choice of the device to JAX, as the parameters do
    return jax.device_put(x, sharding)


def store_masks(masks: Sequence[Array], packed: bool) -> list:
    """The masks as the state holds them."""
    return [masking.pack(m) if packed else m for m in masks]


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


def check_raw_dtype(raw_dtype: Any) -> None:
    """Raises `ValueError` for what is no dtype of weights."""
    if raw_dtype is not None and not jnp.issubdtype(raw_dtype, jnp.floating):
        raise ValueError(f"raw_dtype={raw_dtype!r}: give a floating-point dtype, or None")


def with_whole_masks(state, init: Callable[[Any], Any], params):
    """The state with its packed masks whole: `nnx.Optimizer` hands them back as mappings of their
    fields after an update, as it does with whatever is no array."""
    pieces = jax.tree.leaves(state, is_leaf=masking.taken_apart)
    if params is None or not any(map(masking.taken_apart, pieces)):
        return state
    return jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(init, params)), jax.tree.leaves(state)
    )


def check_arguments(params, state, setup: Setup, *, keeps_raw: bool) -> SparseLeaves:
    """The plan of an update, whose arguments fit together.

    Raises:
      ValueError: no parameters; a state that is not of this method, or of another model.
    """
    if params is None:
        raise ValueError("update needs the parameters: call tx.update(grads, opt_state, params)")
    if not isinstance(state, SparseState):
        raise ValueError(
            f"opt_state: {type(state).__name__} is not the state that this method's init returns; "
            "call tx.init(params)"
        )
    if (state.raw is not None) != keeps_raw:
        raise ValueError(
            f"opt_state: the state of another method: it {'does not hold' if keeps_raw else 'holds'} "
            "raw weights; restore it with the method that made it"
        )
    plan = setup.leaves_for(params)
    try:
        masks = plan.take(state.masks)
    except ValueError as error:
        raise ValueError(f"opt_state: the state of another model: {error}") from None
    for leaf, mask in zip(plan.leaves, masks):
        found = None if mask is None or isinstance(mask, optax.MaskedNode) else mask.shape
        if found != leaf.shape:
            raise ValueError(
                "opt_state: the state of another model, or of other targets: the mask of "
                f"{leaf.path!r} is {found or 'missing'}, its weights are {leaf.shape}"
            )
    return plan


def first_state(state: SparseState, params) -> SparseState:
    """What `init` returns: small leaves (counts, thresholds) are on all devices of the parameters, as
    they are after a compiled update; on one device only, the second update would compile anew.

    `optax.tree.map_params` asks `init` which parts of a state are like the parameters, with a
    placeholder in their place. Only those of the inner optimizer are: masks are not to be cast with
    the weights, and trees of masks and raw weights have no leaf where a weight is dense.
    """
    if is_placeholder(params):
        opaque = lambda tree: None if tree is None else 0
        return SparseState(
            count=state.count,
            masks=opaque(state.masks),
            raw=opaque(state.raw),
            shift=opaque(state.shift),
            scale=opaque(state.scale),
            inner=state.inner,
            aux=opaque(state.aux),
        )
    placed = [
        getattr(p, "sharding", None) for p in jax.tree.leaves(params) if not isinstance(p, Tracer)
    ]
    meshes = {s.mesh for s in placed if isinstance(s, NamedSharding) and s.num_devices > 1}
    if len(meshes) != 1:
        return state
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())

    def place(x):
        loose = isinstance(x, Array) and not isinstance(x, Tracer) and not x.committed
        return jax.device_put(x, everywhere) if loose else x

    return jax.tree.map(place, state)


def is_placeholder(params: Any) -> bool:
    """Whether these are no parameters, but what `optax.tree.map_params` hands to `init` in their place."""
    return isinstance(params, _placeholder())


@functools.cache
def _placeholder() -> type:
    """The type of the placeholder, seen by asking as a user would."""
    seen: list[type] = []

    def init(params: Any) -> Any:
        seen.append(type(params))
        return ()

    optax.tree.map_params(init, lambda x: x, ())
    return seen[0]


def compiled_once(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`update`, as one compiled program where it is called outside of `jit`.

    The loops and conditionals of an update would otherwise be compiled anew at every step. Extra
    arguments that are no arrays (functions for a line search) cannot be compiled with: there the
    update runs as it is.
    """
    compiled = jax.jit(update)

    def run(updates, state, params=None, **extra):
        values = jax.tree.leaves((updates, state, params, extra))
        outside = all(isinstance(x, _CONCRETE) and not isinstance(x, Tracer) for x in values)
        return (compiled if outside else update)(updates, state, params, **extra)

    return run


_CONCRETE = (Array, np.ndarray, np.generic, bool, int, float, complex)
