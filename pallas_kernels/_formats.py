"""What all storage formats share: the one convention of values and places.

A format is a frozen dataclass and a pytree. Its `values` are floating point and the only leaf that is
trained; its places are integers, arrays too, so that a pattern of the same size compiles nothing anew.
Gradients are taken with respect to the values:

    jax.grad(lambda values: loss(dataclasses.replace(w, values=values)))(w.values)

Optimizers, averages, noise and decay belong on `values` alone. What they make of places when they are
mapped over a whole format is no integer any more, and is refused here.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp

Array = Any  # jax.Array, numpy.ndarray, or what stands for them while tracing

REMEDY = (
    "train, average and differentiate `values` alone, as in "
    "jax.grad(lambda values: loss(dataclasses.replace(w, values=values)))(w.values)"
)


def concrete(*arrays: Array) -> bool:
    """Whether the values of the arrays are known now (not being traced, not mere shapes)."""
    leaves = jax.tree.leaves(arrays)
    return not any(isinstance(a, jax.core.Tracer | jax.ShapeDtypeStruct) for a in leaves)


def integer_places(name: str, places: Array) -> Array:
    """The places, checked to be integers.

    Raises:
      ValueError: if they are not: they are those of a gradient (which has none of its own), or what
        an optimizer or an average has made of them.
    """
    if not jnp.issubdtype(places.dtype, jnp.integer):
        whose = (
            "a gradient has no places of its own (use w.with_values(gradient.values))"
            if places.dtype == jax.dtypes.float0
            else "places are not numbers to calculate with"
        )
        raise ValueError(f"{name}.dtype={places.dtype} must be an integer type: {whose}; {REMEDY}")
    return places
