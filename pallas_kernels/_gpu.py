"""What the GPU kernels of all operations share: the chip they are for, tables of tile sizes, products.

The kernels are Pallas Triton. A program owns what it writes: no output block is written by two of them,
and nothing is added atomically, so results are the same in every run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels._dispatch import target_platform
from pallas_kernels._tpu import in_32_bits, result, round_up

__all__ = [
    "Chip",
    "Config",
    "call",
    "chip",
    "config",
    "dot",
    "in_32_bits",
    "largest_tile",
    "load",
    "power_of_2",
    "result",
    "round_up",
    "store",
    "why_not",
]

ANY = pl.BlockSpec(memory_space=pl.ANY)
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What kernels adapt to.

    Attributes:
      name: row of the tables of tile sizes: "h100", "a100" or "small" (less shared memory).
      capability: the compute capability times ten; 0 where it is not known.
      processors: streaming multiprocessors.
    """

    name: str
    capability: int
    processors: int


# Described devices (ahead of time) have a name only.
_KINDS = {"H100": 90, "H200": 90, "GH200": 90, "A100": 80, "A30": 80, "T4": 75, "V100": 70}


@functools.lru_cache
def _chip(kind: str, capability: int | None, processors: int) -> Chip:
    if capability is None:
        known = [number for name, number in _KINDS.items() if name in kind]
        capability = known[0] if known else 0
    name = {90: "h100", 80: "a100"}.get(capability, "h100" if capability >= 100 else "small")
    return Chip(name, capability, processors)


def chip() -> Chip:
    """The GPU that code traced now is for; one like an A100 where that is none (interpreter)."""
    if target_platform() != "gpu":
        return Chip("a100", 80, 108)
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return _chip(device.device_kind, None, device.num_cores or 108)
    device = jax.devices()[0]
    capability = round(10 * float(device.compute_capability))
    return _chip(device.device_kind, capability, getattr(device, "core_count", 108))


def why_not(interpret: bool) -> str | None:
    """Why no kernel of this kind runs on what code traced now is for, or None."""
    if target_platform() != "gpu":
        if interpret:
            return None
        return f"it runs on GPU, not on {target_platform()} (interpret=True emulates it)"
    if chip().capability and chip().capability < 80:
        reason = f"it needs compute capability 8.0 (A100, L4, H100), not {chip().capability / 10}"
        _say_once(reason)
        return reason
    return None


@functools.lru_cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"no kernel of pallas_kernels runs on this GPU: {reason}; plain XLA serves", stacklevel=2
    )


# ---- tile sizes ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is cut.

    Attributes:
      tile: rows that a program computes, at most.
      depth: how much of a contraction (or of keys) at a time, at most.
      warps: of a program.
      stages: of the pipeline of copies to shared memory.
    """

    tile: int
    depth: int
    warps: int
    stages: int


Table = Mapping[str, Mapping[str, Config]]
"""Chip -> size class -> `Config`."""


def cache_path() -> pathlib.Path:
    """Where `python -m pallas_kernels.tune` keeps what it measured; `PALLAS_KERNELS_CACHE` names another."""
    named = os.environ.get("PALLAS_KERNELS_CACHE")
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return pathlib.Path(named or f"{home}/pallas_kernels/tuned.json").expanduser()


@functools.lru_cache
def _tuned(path: pathlib.Path, kind: str) -> Mapping[str, Config]:
    try:
        found = json.loads(path.read_text()).get(kind, {})
    except (OSError, ValueError):
        return {}
    return {name: Config(**fields) for name, fields in found.items()}


_FORCED: dict[tuple[str, str], Config] = {}


@contextlib.contextmanager
def forced(kernel: str, size: str, sizes: Config) -> Iterator[None]:
    """What is traced inside uses these sizes: for the tuner."""
    _FORCED[kernel, size] = sizes
    try:
        yield
    finally:
        del _FORCED[kernel, size]


def config(kernel: str, size: str, table: Table) -> Config:
    """The tile sizes of a kernel: as measured on this device, else those of the table.

    Args:
      kernel, size: its name and the class of its arguments, a key of the table.
      table: for each chip, the classes.
    """
    if (kernel, size) in _FORCED:
        return _FORCED[kernel, size]
    if target_platform() == "gpu" and jax.sharding.get_abstract_mesh().abstract_device is None:
        tuned = _tuned(cache_path(), jax.devices()[0].device_kind)
        if (found := tuned.get(f"{kernel} {size}")) is not None:
            return found
    return table[chip().name][size]


def largest_tile(size: int, most: int) -> int:
    """The largest power of two that divides the size, but not more than `most`.

    >>> largest_tile(384, 64), largest_tile(48, 128)
    (64, 16)
    """
    return math.gcd(size, most)


def power_of_2(size: int) -> int:
    """The smallest power of two that is not less.

    >>> power_of_2(40), power_of_2(64)
    (64, 64)
    """
    return 1 << max(0, size - 1).bit_length()


# ---- inside a kernel ----------------------------------------------------------------------------


def load(ref: Any, mask: Array | None = None, other: float = 0) -> Array:
    """What is in memory; `other` where the mask is false, and nothing is read there."""
    if mask is None:
        return triton.load(ref)
    return triton.load(ref, mask=mask, other=jnp.asarray(other, ref.dtype))


def store(ref: Any, value: Array, mask: Array | None = None) -> None:
    """Write a tile, where the mask is true."""
    triton.store(ref, value, mask=mask)


def kind(dtype: Any, precision: lax.PrecisionLike) -> str:
    """How numbers are multiplied: "16 bits", "tf32" (10 bits of mantissa), or "exact" (float32 as three
    products of tf32)."""
    if jnp.dtype(dtype).itemsize == 2:
        return "16 bits"
    return "exact" if precision in (lax.Precision.HIGHEST, "highest", "float32") else "tf32"


def dot(precision: lax.PrecisionLike, interpret: bool) -> Callable[[Array, Array], Array]:
    """The matrix product of two tiles, summed in float32.

    float32 is multiplied as tf32 (10 bits of mantissa) unless the precision is "highest": then three
    such products make one that is exact to nearly float32. Both use tensor cores.
    """
    exact = kind(jnp.float32, precision) == "exact"
    how: Any = "highest" if exact else None
    if exact and not interpret:
        how = lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def product(a: Array, b: Array) -> Array:
        if a.dtype == jnp.float32:
            return jnp.dot(a, b, precision=how, preferred_element_type=jnp.float32)
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    return product


def call(
    kernel: Callable[..., None],
    name: str,
    programs: tuple[int, ...],
    out_shape: Any,
    how: Config,
    interpret: bool,
    *arguments: Array,
    aliases: dict[int, int] | None = None,
    cost: pl.CostEstimate | None = None,
) -> Any:
    """A kernel that indexes whole arrays itself, one program for each point of the grid."""
    specs: Any = jax.tree.map(lambda _: ANY, out_shape)
    return pl.pallas_call(
        kernel,
        grid=programs,
        in_specs=[ANY] * len(arguments),
        out_specs=specs,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=how.warps, num_stages=how.stages),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*arguments)
