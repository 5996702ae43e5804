"""Shared by every operation of the package: which implementation runs, operands, mesh axes.

An operation lists its implementations, best first, each with the reason why it cannot take the
present arguments (`None` if it can):

    choose(implementation, {"tpu": why_not_tpu(x, w), "xla": None, "reference": None})
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def choose(implementation: str | None, reasons: Mapping[str, str | None]) -> str:
    """Return the name of the implementation to run.

    Args:
      implementation: one of the names, or None for the first that supports the arguments.
      reasons: name -> None if it supports the arguments, else the reason why not; best first.

    Raises:
      ValueError: if the name is unknown, or the named (or every) implementation has a reason
        against it.

    >>> choose(None, {"tpu": "no TPU here", "xla": None})
    'xla'
    >>> choose("tpu", {"tpu": "no TPU here", "xla": None})
    Traceback (most recent call last):
    ValueError: implementation='tpu' does not support these arguments: no TPU here
    """
    if implementation is None:
        for name, reason in reasons.items():
            if reason is None:
                return name
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no implementation supports these arguments ({why})")
    if implementation not in reasons:
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose None or one of {list(reasons)}"
        )
    if reasons[implementation] is not None:
        raise ValueError(
            f"implementation={implementation!r} does not support these arguments: "
            f"{reasons[implementation]}"
        )
    return implementation


def target_platform() -> str:
    """The platform that code traced now will run on: 'cpu', 'gpu' or 'tpu'.

    An abstract device in context (ahead-of-time compilation for another machine, see
    `jax.sharding.use_abstract_mesh`) decides before the default backend does.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def check_operands(x, w) -> jax.Array:
    """x `[..., in]` as an array, checked against the sparse matrix w `[in, out]`.

    Raises:
      ValueError: the shapes do not match, or a dtype is not floating point.
    """
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x.shape={x.shape} must end in {w.shape[0]}, the rows of w {w.shape}")
    for name, a in (("x", x), ("w", w)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype={a.dtype} must be a floating-point type")
    return x


def varying_axes(*trees: Any) -> frozenset[str]:
    """The axes of a `shard_map` mesh over which any of these values varies."""
    leaves = jax.tree.leaves(trees)
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same values, typed as varying over at least these axes."""

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(axes - varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def vary_alike(*trees: Any, like: Any = ()) -> Any:
    """The same values, typed as varying over all axes over which any of them, or of `like`, does.

    Inside `shard_map` a loop wants its carry, and a kernel its operands, to be of one such type.
    """
    alike = vary(trees, varying_axes(trees, like))
    return alike if len(alike) > 1 else alike[0]
