"""The Pallas kernels of a function: their static facts, and the integers that they are given.

A kernel that walks a list of blocks runs as the list says. So the function's jaxpr is walked with the concrete
arguments: what follows from them is computed, what does not is `None`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

LARGEST_VALUE = 1 << 24  # entries of a value that is computed on the way
LARGEST_OPERAND = 1 << 22  # entries of an operand that is kept for the kernel
# Their bodies do not see the arguments as the call has them.
_OPAQUE = ("scan", "while", "cond", "shard_map")
_CUSTOM = ("custom_vjp_call", "custom_jvp_call", "custom_vjp_call_jaxpr")


def find_kernels(closed: Any, arguments: Sequence[Any]) -> list[dict[str, Any]]:
    """Every `pallas_call` of a closed jaxpr, in the order of the program.

    Args:
      closed: the jaxpr.
      arguments: one per input; `None` where only its shape is known.

    Returns:
      Facts of each kernel; `prefetch` has its known integer operands by number. A walk that fails ends
      with an entry `error`.
    """
    found: list[dict[str, Any]] = []
    try:
        _walk(closed.jaxpr, closed.consts, arguments, found)
    except Exception as error:  # a report without these facts is still a report
        found.append({"error": f"{type(error).__name__}: {error}"})
    return found


def _walk(jaxpr, constants, values, found) -> list[Any]:
    """The outputs, as far as they are known."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *values]))
    read = lambda atom: atom.val if isinstance(atom, Literal) else env.get(atom)
    for eqn in jaxpr.eqns:
        outputs = _outputs(eqn, [read(atom) for atom in eqn.invars], found)
        env.update(zip(eqn.outvars, outputs or [None] * len(eqn.outvars)))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn, inputs, found) -> list[Any] | None:
    name = eqn.primitive.name
    if name == "pallas_call":
        found.append(_describe(eqn, inputs))
        return None
    known = all(value is not None for value in inputs)
    small = all(math.prod(getattr(v.aval, "shape", ())) <= LARGEST_VALUE for v in eqn.outvars)
    if known and small and not _has_kernel(eqn):
        return _evaluate(eqn, inputs)
    if name in (*_OPAQUE, *_CUSTOM):
        for jaxpr, constants in _inner(eqn):
            seen = name in _CUSTOM and len(jaxpr.invars) == len(inputs)
            values = inputs if seen else [None] * len(jaxpr.invars)
            outputs = _walk(jaxpr, constants, values, found)
            if seen:
                return outputs
        return None
    for jaxpr, constants in _inner(eqn):  # jit and its kin have one
        return _walk(jaxpr, constants, inputs, found) if len(jaxpr.invars) == len(inputs) else None
    return None


def _inner(eqn) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The jaxprs in an equation's parameters, with their constants."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield getattr(item, "jaxpr", item), getattr(item, "consts", ())


def _has_kernel(eqn) -> bool:
    return eqn.primitive.name == "pallas_call" or any(
        _has_kernel(inner) for jaxpr, _ in _inner(eqn) for inner in jaxpr.eqns
    )


def _evaluate(eqn, inputs) -> list[Any] | None:
    """The equation's outputs, or `None` if it cannot be computed here."""

    def bind(*values):
        functions, params = [], eqn.params
        if eqn.primitive.name.startswith("custom_"):
            functions, params = eqn.primitive.get_bind_params(params)
        return eqn.primitive.bind(*functions, *values, **params)

    try:
        outputs = jax.jit(bind)(*inputs)
    except Exception:
        return None
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _describe(eqn, inputs) -> dict[str, Any]:
    grid: Any = eqn.params["grid_mapping"]
    size = lambda side: getattr(side, "block_size", side)
    number = lambda x: x if isinstance(x, int) else None
    return {
        "name": _name(eqn.params),
        "grid": [number(side) for side in grid.grid],
        "num_prefetch": grid.num_index_operands,
        "num_dynamic": getattr(grid, "num_dynamic_grid_bounds", 0),
        "blocks": [
            {"block": [number(size(side)) for side in block.block_shape]}
            for block in grid.block_mappings
        ],
        "scratch": [str(aval) for aval in getattr(grid, "scratch_avals", ())],
        "operands": [str(getattr(atom, "aval", atom)) for atom in eqn.invars],
        "cost_estimate": str(eqn.params.get("cost_estimate")),
        # Any small integer operand may end up in scalar memory.
        "prefetch": {
            i: array
            for i, array in enumerate(map(_integers, inputs))
            if array is not None and array.size <= LARGEST_OPERAND
        },
    }


def _integers(value) -> np.ndarray | None:
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except Exception:  # keys and other types that NumPy does not have
        return None
    return array if array.dtype.kind in "iub" else None


def _name(params) -> str:
    named = params.get("name") or getattr(params.get("name_and_src_info"), "name", "")
    info = getattr(params["jaxpr"], "debug_info", None)
    return str(named or getattr(info, "func_name", "") or "kernel")
