"""C++ kernels for CPU behind `jax.ffi`: built by the machine's own compiler when they are first asked for.

`blocks.h` and `condensed.h` hold the algorithms, `vectors.h` what they are written in, `ffi.cc` the calls
that XLA makes. The library that is built is kept in a directory of the user's cache, by a hash of the
sources, the compiler, the processor and jaxlib. Without a compiler the paths in plain XLA serve, and a
warning says so once.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import warnings

import jax
import jax.numpy as jnp
from jaxlib import version as jaxlib_version

from pallas_kernels._dispatch import target_platform, vary, vary_alike, varying_axes
from pallas_kernels._formats import Array

SOURCES = pathlib.Path(__file__).parent
"""Where the C++ is."""
_TARGETS = (
    "CondensedMatmul",
    "CondensedMatmulTransposed",
    "CondensedValueGradient",
    "BlocksMatmul",
    "BlocksValueGradient",
)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wno-psabi")
"""How they are compiled."""


def compiler() -> str | None:
    """The C++ compiler: `CXX` of the environment if it is set (empty: none), else c++, g++ or clang++."""
    named = os.environ.get("CXX")
    if named is not None:
        return shutil.which(named) if named else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def why_not(dtype: jax.typing.DTypeLike) -> str | None:
    """The reason why the kernels cannot take operands of this type here, or None; builds them when
    they are first asked for.

    >>> why_not(jnp.float16)
    'it takes float32, not float16'
    """
    if target_platform() != "cpu":
        return f"it runs on CPU, not on {target_platform()}"
    if jnp.dtype(dtype) != jnp.float32:
        return f"it takes float32, not {jnp.dtype(dtype)}"
    return _ready(os.environ.get("CXX"))


def why_not_unasked() -> str | None:
    """The reason why they should not run where nobody named them, or None."""
    if jax.device_count() > 1:
        return "XLA cannot partition a call of C++, and there are several devices"
    return None


def call(name: str, shape: tuple[int, ...], *operands: Array, **attributes: bool) -> Array:
    """The float32 result of the target `name`, an array of this shape."""
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    run = jax.ffi.ffi_call(f"pallas_kernels.{name}", result, vmap_method="sequential")
    # Its result is typed as the same everywhere, inside `shard_map` too.
    return vary(run(*vary_alike(*operands), **attributes), varying_axes(operands))


@functools.cache
def _ready(cxx: str | None) -> str | None:
    del cxx  # what `compiler` reads: another one is another attempt
    reason = _build_and_register()
    if reason is not None:
        warnings.warn(
            f"the C++ kernels of pallas_kernels are not in use: {reason}; "
            "sparse products on CPU run in plain XLA, which is slower",
            stacklevel=2,
        )
    return reason


def _build_and_register() -> str | None:
    if os.name != "posix":
        return f"they are not built on {platform.system()} (C++ for POSIX systems)"
    cxx = compiler()
    if cxx is None:
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    try:
        library = ctypes.cdll.LoadLibrary(str(_built(cxx)))
    except (OSError, subprocess.CalledProcessError) as e:
        said = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        return f"building them with the C++ compiler {cxx} failed: {said[0] if said else e}"
    for name in _TARGETS:
        target = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"pallas_kernels.{name}", target, platform="cpu")
    return None


def _built(cxx: str) -> pathlib.Path:
    """The path of the library, which is compiled unless it has been."""
    sources = sorted(p for p in SOURCES.iterdir() if p.suffix in (".h", ".cc"))
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [p.read_text() for p in sources] + [version, " ".join(FLAGS), _processor()]
    key = hashlib.sha256("\0".join([*parts, jaxlib_version.__version__]).encode()).hexdigest()[:16]
    path = _cache() / f"cpu_kernels_{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = pathlib.Path(scratch) / path.name
            command = [cxx, *FLAGS, "-fPIC", "-shared", "-isystem", jax.ffi.include_dir()]
            command += [str(SOURCES / "ffi.cc"), "-o", str(made), "-pthread"]
            subprocess.run(command, capture_output=True, text=True, check=True)
            made.replace(path)  # whole or not at all: other processes build it too
    return path


def _cache() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "pallas_kernels"


def _processor() -> str:
    """What `-march=native` depends on: home directories are shared by machines of different kinds."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
