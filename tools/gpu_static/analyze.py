"""Compiles for a described GPU and reads what the compiler leaves: see the docstring of the package."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tools.tpu_static.compiling import as_if_on

HERE = pathlib.Path(__file__).resolve().parent
TARGETS = {"h100": "sm_90a", "a100": "sm_80"}
"""Described GPUs, and what they are called by the assembler."""
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "cp.async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk",
    "ldmatrix": r"ldmatrix",
    "fma.f32": r"\bfma\.rn\.f32",
    "local memory": r"\b(?:ld|st)\.local",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

__all__ = ["TARGETS", "analyze", "as_if_on", "devices", "why_not"]


def why_not() -> str | None:
    """The reason why nothing can be compiled for a GPU here, or None."""
    if importlib.util.find_spec("jax_plugins") is None or (
        importlib.util.find_spec("jax_plugins.xla_cuda12") is None
    ):
        return (
            "the compiler for GPUs is not installed: "
            f"pip install --no-deps jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12"
        )
    return None


def devices(target: str, count: int = 1) -> list[Any]:
    """Described GPUs to compile for, all on one host.

    Raises:
      ValueError: for an unknown target, or without the compiler.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; choose one of {sorted(TARGETS)}")
    if (reason := why_not()) is not None:
        raise ValueError(f"target={target!r} cannot be compiled for: {reason}")
    text = (HERE / "targets" / f"{target}.txtpb").read_text()
    topology = topologies.get_topology_desc(
        target, "cuda", target_config=text, topology=f"1x1x{count}"
    )
    return list(topology.devices)


def analyze(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    target: str = "h100",
    *,
    spills: bool = True,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compile `function(*arguments)` for the target.

    Args:
      function: jitted or not; it may ask for the kind of device while it is traced.
      arguments: arrays or `jax.ShapeDtypeStruct`s; what has no sharding is put on one device.
      target: "h100" or "a100".
      spills: False makes a kernel that spills registers an error.
      options: further options of the compiler.

    Returns:
      `target`, `seconds`, `argument_bytes`, `output_bytes`, `temporary_bytes`, `launches` (name, grid,
      threads, shared), `kernels` (name, registers, spill_bytes, instructions) and `collectives`
      (kind and shape).

    Raises:
      ValueError: as `devices`.
    """
    device = devices(target)[0]

    def place(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding or SingleDeviceSharding(device)
        )

    placed = jax.tree.map(place, tuple(arguments))
    dump = tempfile.mkdtemp(prefix="gpu_static_")
    flags: dict[str, Any] = {"xla_dump_to": dump, **(options or {})}
    if not spills:
        flags["xla_gpu_fail_ptx_compilation_on_register_spilling"] = True
    begun = time.process_time()  # of the processor: other work on the machine does not count
    try:
        with as_if_on(device):
            lowered = jax.jit(function).lower(*placed)
        compiled = lowered.compile(compiler_options=flags)
        memory: Any = compiled.memory_analysis()
        report = {
            "target": target,
            "seconds": round(time.process_time() - begun, 1),
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "collectives": collectives(compiled.as_text() or ""),
        }
        paths = sorted(pathlib.Path(dump).iterdir())
        text = {p: p.read_text() for p in paths if p.name.endswith("thunk_sequence.txt")}
        report["launches"] = [launch for t in text.values() for launch in launches(t)]
        ptx = [p for p in paths if p.suffix == ".ptx" and p.stat().st_size]
        report["kernels"] = [kernel for p in ptx for kernel in _kernels(p, TARGETS[target])]
    finally:
        shutil.rmtree(dump, ignore_errors=True)
    return report


def launches(text: str) -> list[dict[str, Any]]:
    """Kernels in the order of their launch, from the dump of a thunk sequence.

    >>> launches("001: kCustomKernel [source] mm grid: [8, 4, 1] threads: [128, 1, 1]  shared_memory: 512 bytes")
    [{'name': 'mm', 'grid': [8, 4, 1], 'threads': 128, 'shared': 512}]
    """
    pattern = (
        r"(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+).*?\](?:.*?shared_memory: (\d+))?"
    )
    return [
        {
            "name": name,
            "grid": [int(x), int(y), int(z)],
            "threads": int(threads),
            "shared": int(shared or 0),
        }
        for name, x, y, z, threads, shared in re.findall(pattern, text)
    ]


def collectives(text: str) -> list[tuple[str, str]]:
    """Kind and result of every collective of a compiled program.

    >>> collectives("  %a = f32[8]{0} all-reduce-start(f32[8]{0} %b), channel_id=1")
    [('all-reduce', 'f32[8]{0}')]
    """
    pattern = rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    return [(kind, shape) for shape, kind in re.findall(pattern, text)]


def instructions(text: str) -> dict[str, int]:
    """How often the instructions of interest are in a text of PTX.

    >>> instructions("wgmma.mma_async.sync.aligned; cp.async.cg.shared; cp.async.wait_group 1;")
    {'wgmma': 1, 'cp.async': 1}
    """
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def _assembler() -> str | None:
    if found := shutil.which("ptxas"):
        return found
    for package in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for place in (spec and spec.submodule_search_locations) or ():
            if (path := pathlib.Path(place) / "bin" / "ptxas").exists():
                return str(path)
    return None


def _kernels(path: pathlib.Path, architecture: str) -> list[dict[str, Any]]:
    """A file of PTX, kernel by kernel."""
    text = path.read_text()
    starts = list(re.finditer(r"\.entry (\w+)", text))
    ends = [m.start() for m in starts[1:]] + [len(text)]
    kernels: list[dict[str, Any]] = [
        {"name": m[1], "instructions": instructions(text[m.start() : end])}
        for m, end in zip(starts, ends)
    ]
    if (assembler := _assembler()) is not None:
        command = [assembler, "-v", f"-arch={architecture}", str(path), "-o", f"{path}.cubin"]
        log = subprocess.run(command, capture_output=True, text=True).stderr
        for kernel in kernels:
            _, _, part = log.partition(f"Compiling entry function '{kernel['name']}'")
            registers = re.search(r"Used (\d+) registers", part)
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
            if registers and spills:
                kernel["registers"] = int(registers[1])
                kernel["spill_bytes"] = int(spills[1]) + int(spills[2])
    return kernels
