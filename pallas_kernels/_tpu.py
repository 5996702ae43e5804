"""What the TPU kernels of all operations share: the chip they are for, and how they are called."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import target_platform

LANES = 128  # numbers side by side in a vector register

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What kernels adapt to.

    Attributes:
      cores: TensorCores that share a call.
      vmem: bytes of vector memory of a core.
      matrix_width: columns of a matrix unit.
    """

    cores: int = 1
    vmem: int = 128 << 20
    matrix_width: int = LANES


def chip() -> Chip:
    """The chip that code traced now is for; one like a v5e where that is no TPU (interpreter)."""
    if target_platform() != "tpu":
        return Chip()
    info = pltpu.get_tpu_info()
    return Chip(info.num_cores, info.vmem_capacity_bytes, info.mxu_column_size)


def in_32_bits(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, traced with 32-bit types whatever `jax_enable_x64` says: kernels know no others."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return run


def result(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """What a kernel returns; inside `shard_map` it varies over the axes over which `like` does."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def compiler_params(dimensions: tuple[Any, ...], vmem: int) -> pltpu.CompilerParams:
    """Parameters of a kernel whose indices are known to lie inside its arrays.

    Args:
      dimensions: "parallel" or "arbitrary" for each dimension of the grid.
      vmem: most bytes of vector memory.
    """
    return pltpu.CompilerParams(
        dimension_semantics=dimensions,
        disable_bounds_checks=True,  # the checks cost 5 %
        vmem_limit_bytes=vmem,
    )


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not less than n."""
    return -(-n // multiple) * multiple
