"""The report: compile in a process of its own, read the dumps, run the kernels, add up."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tools.tpu_static import dumps
from tools.tpu_static.chips import CHIPS, Chip
from tools.tpu_static.hlo import parse_hlo
from tools.tpu_static.kernel import analyze_kernel

VERSION = 1  # of the report


def analyze(
    factory: str,
    topology: str = "v5e:2x2",
    kwargs: Mapping[str, Any] | None = None,
    *,
    paths: Sequence[str] = (),
    flags: str = "",
    keep: str | pathlib.Path | None = None,
    all_kernels: bool = False,
    python: str | None = None,
    timeout: float = 1800,
    max_s: float = 120.0,
) -> dict[str, Any]:
    """What the compiler makes of a function; see the docstring of the package.

    Args:
      factory: `module:function` or `file.py:function`.
      topology: such as `v5e:2x2`, `v6e:2x2`, `v4:2x2x1`.
      kwargs: arguments of the factory, as JSON has them.
      paths: directories where modules are looked for first.
      flags: further flags of libtpu.
      keep: a directory in which the dumps stay; files of another run in it are removed.
      all_kernels: whether XLA's own fusions are run as well, where they have a listing.
      python: the interpreter to compile with.
      timeout: seconds that compilation may take.
      max_s: seconds that the run of a kernel may take.

    Returns:
      The report; after an error of the compiler `{"ok": False, "error": ...}`, which is not raised.
    """
    kwargs = dict(kwargs or {})
    with _directory(keep) as dump:
        job = {
            "work": str(dump),
            "factory": factory,
            "topology": topology,
            "kwargs": kwargs,
            "paths": [*paths, os.getcwd()],
        }
        code = _compile(job, dump, flags, python or sys.executable, timeout)
        if not (dump / "meta.json").exists():
            tail = (dump / "child.log").read_text(errors="replace")[-3000:]
            error = f"compiler process ended ({code}): {tail}"
            return {"ok": False, "factory": factory, "topology": topology, "error": error}
        head = {"tool": VERSION, "factory": factory, "topology": topology, "kwargs": kwargs}
        report: dict[str, Any] = head | json.loads((dump / "meta.json").read_text())
        if not report["ok"]:
            return report
        if report["device_kind"] not in CHIPS:
            return report | {"note": "no figures for this chip; kernel cycles not computed"}
        chip = _core(CHIPS[report["device_kind"]], topology, report["num_devices"])
        report["chip"] = dataclasses.asdict(chip)
        report["chip"]["peak_bf16_flops_per_core"] = 2 * chip.macs_per_cycle * chip.clock
        hlo = parse_hlo((dump / "module.hlo").read_text())
        calls = {key: hlo.pop(key) for key in ("mosaic", "mult_of", "est_of")}
        report["hlo"] = hlo
        report["mxu_cycles_per_vmatmul"] = dumps.matmul_rates(dump, chip.gen)
        report["kernels"] = _kernels(report, calls, dump, chip, all_kernels, max_s)
        return report | _totals(report, chip, all_kernels)


@contextlib.contextmanager
def _directory(keep: str | pathlib.Path | None) -> Iterator[pathlib.Path]:
    """An empty directory for the dumps: one that goes afterwards, or `keep` without what was in it."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="tpu_static_", ignore_cleanup_errors=True) as name:
            yield pathlib.Path(name)
        return
    dump = pathlib.Path(keep).absolute()
    dump.mkdir(parents=True, exist_ok=True)
    for path in dump.iterdir():
        if re.match(r"\d+-.*\.(txt|html)$|meta\.json$|module\.hlo$|prefetch_", path.name):
            path.unlink()
    yield dump


def _compile(job, dump: pathlib.Path, flags: str, python: str, timeout: float) -> int | str:
    """Runs `compiling`; its exit code, or "timeout"."""
    root = str(pathlib.Path(__file__).parents[2])
    dumping = (
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        f"--xla_jf_dump_to={dump}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_hlo_text=true",
        "--xla_jf_emit_annotations=true",
        f"--xla_jf_dump_llo_pass_label_regex={dumps.FILTER}",
        flags,
    )
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        # No device is opened: several compilers may run side by side.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "LIBTPU_INIT_ARGS": " ".join(filter(None, dumping)),
    }
    with (dump / "child.log").open("wb") as log:
        try:
            return subprocess.run(
                [python, "-m", "tools.tpu_static.compiling"],
                input=json.dumps(job).encode(),
                stdout=log,
                stderr=log,
                env=env,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            return "timeout"


def _core(chip: Chip, topology: str, devices: int) -> Chip:
    """The chip, with as many cores as a device of this topology has."""
    shape = topology.partition(":")[2]
    chips = math.prod(int(side) for side in re.findall(r"\d+", shape)) if shape else devices
    return dataclasses.replace(chip, cores=max(1, chip.cores * chips // devices))


def pair(calls: Sequence[str], kernels: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Which Pallas kernel of the function each call of the compiled module is.

    By name and in order where names agree; the rest in the order of the program, if as many are left.

    >>> pair(["matmul.1", "matmul"], [{"name": "matmul"}, {"name": "matmul"}])
    {'matmul': 0, 'matmul.1': 1}
    """
    waiting: dict[str, list[int]] = collections.defaultdict(list)
    for i, kernel in enumerate(kernels):
        if "name" in kernel:
            waiting[re.sub(r"\W", "_", kernel["name"])].append(i)
    paired = {}
    for name in _in_order(calls):
        base = re.sub(r"\W", "_", re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", name))
        if waiting[base]:
            paired[name] = waiting[base].pop(0)
    left = [name for name in calls if name not in paired]
    rest = sorted(i for indices in waiting.values() for i in indices)
    return paired | (dict(zip(left, rest)) if len(left) == len(rest) else {})


def _in_order(calls: Sequence[str]) -> list[str]:
    """By base name, then by the number that XLA appends."""

    def key(name):
        number = re.search(r"\.(\d+)$", name)
        return re.sub(r"\.\d+$", "", name), int(number.group(1)) if number else 0

    return sorted(calls, key=key)


def _kernels(report, calls, dump, chip, all_kernels, max_s) -> list[dict[str, Any]]:
    """The facts of each kernel that the module calls, and of fusions with a listing if asked for."""
    files = dumps.kernel_files(dump)
    mosaic = {call["name"]: call for call in calls["mosaic"]}
    jaxpr = report.get("pallas_calls", [])
    paired = pair(list(mosaic), jaxpr)
    fusions = [n for n in files if n not in mosaic and n in calls["mult_of"]] if all_kernels else []
    kernels = []
    for name in [*_in_order(list(mosaic)), *fusions]:
        if "packed-bundles-post-ra" not in files.get(name, {}):
            note = "no listing (deduplicated with another kernel?)"
            kernels.append({"name": name, "mosaic": name in mosaic, "note": note})
            continue
        try:
            rates = report["mxu_cycles_per_vmatmul"]
            operands = _operands(dump, paired.get(name))
            facts: dict[str, Any] = analyze_kernel(name, files[name], chip, rates, operands, max_s)
        except Exception as error:  # a listing that is not understood leaves the others
            facts = {"name": name, "error": f"{type(error).__name__}: {error}"}
        facts["mosaic"] = name in mosaic
        if name in mosaic:
            facts["vmem_bytes"], facts["times"] = (mosaic[name][k] for k in ("vmem_bytes", "times"))
        else:
            facts["times"] = calls["mult_of"].get(name, 1)
            facts["estimated_cycles"] = calls["est_of"].get(name)
        if name in paired:
            facts |= {key: jaxpr[paired[name]][key] for key in ("grid", "scratch", "blocks")}
        kernels.append(facts)
    return kernels


def _operands(dump: pathlib.Path, index: int | None) -> dict[int, np.ndarray] | None:
    """The known integer operands of a Pallas kernel."""
    path = dump / f"prefetch_{index}.npz"
    if index is None or not path.exists():
        return None
    with np.load(path) as saved:
        return {int(name): saved[name] for name in saved.files}


def _totals(report, chip: Chip, all_kernels: bool) -> dict[str, Any]:
    """Sums over kernels and XLA's estimate of the rest, and how much of it is useful."""
    counted = [kernel for kernel in report["kernels"] if "cycles" in kernel]
    mosaic = [kernel for kernel in counted if kernel["mosaic"]]
    estimate = report["hlo"]["estimated_cycles"]
    summed = lambda key: sum(float(k[key]) * (k["times"] or 1) for k in mosaic)
    total = {key: summed(key) for key in ("cycles", "cycles_dma", "cycles_hbm", "hbm_bytes")}
    found: dict[str, Any] = {
        "mosaic_total": total | {"mxu_busy": summed("mxu_busy_cycles")},
        "total_cycles": total["cycles"] + estimate,
        "total_cycles_dma": total["cycles_dma"] + estimate,
    }
    if all_kernels:  # XLA's fusions by their schedules where they have one
        fusions = [kernel for kernel in counted if not kernel["mosaic"]]
        left = estimate - sum(kernel["estimated_cycles"] or 0 for kernel in fusions)
        for key in ("cycles", "cycles_dma", "cycles_hbm"):
            own = sum(kernel[key] * kernel["times"] for kernel in fusions)
            found[f"schedule_total_{key}"] = total[key] + left + own
    if flops := (report.get("meta") or {}).get("useful_flops"):
        # Of the whole device: a kernel that is not split over a device of 2 cores gets at most half.
        per_cycle = chip.macs_per_cycle * chip.cores
        ideal, tiles = flops / (2 * per_cycle), flops / (2 * 128**3)
        cycles, with_dma = found["total_cycles"], found["total_cycles_dma"]
        found["useful"] = {
            "ideal_cycles": ideal,
            "tiles_128": tiles,
            "efficiency": ideal / cycles if cycles else None,
            "efficiency_dma": ideal / with_dma if with_dma else None,
            "cycles_per_128_tile": cycles / tiles,
            "cycles_per_128_tile_dma": with_dma / tiles,
            "ideal_cycles_per_128_tile": 128**3 / per_cycle,
        }
    return found
