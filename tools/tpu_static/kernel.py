"""The facts of one kernel, from its listing and its run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tools.tpu_static import dumps
from tools.tpu_static.bundles import HEAD, parse_bundles
from tools.tpu_static.chips import DMA_LATENCY_S, Chip
from tools.tpu_static.program import Program
from tools.tpu_static.simulate import simulate


def analyze_kernel(
    name: str,
    files: Mapping[str, pathlib.Path],
    chip: Chip,
    rates: Mapping[str, int],
    operands: Mapping[int, np.ndarray] | None = None,
    max_s: float = 120.0,
) -> dict[str, Any]:
    """Cycles, traffic and use of units of a kernel.

    Args:
      name: of the kernel.
      files: its dumps by kind, see `dumps.kernel_files`.
      chip: that it was compiled for.
      rates: see `dumps.matmul_rates`.
      operands: known integer operands by number.
      max_s: seconds that its run may take; the rest is extrapolated from its outermost loop.
    """
    bundles = parse_bundles(files["packed-bundles-post-ra"].read_text())
    rows, units, capacities = dumps.read_utilization(
        files.get("pre-delay_hlo-static-per-bundle-utilization")
    )
    program = Program(bundles, rows, units, rates, chip.mxus, operands)
    final = files.get("final_bundles")
    report: dict[str, Any] = {
        "name": name,
        "scheduled_bundles": len(bundles),
        "final_bundles": len(HEAD.findall(final.read_text())) if final else None,
        "unit_capacity": dict(zip(units, capacities)),
        "static": _static(program),
    }
    if "post-delay-converter" in files:
        report["allocations"] = dumps.allocations(files["post-delay-converter"])
    report["split_over_cores"] = any(
        op.opcode == "sld" and "core id" in op.note for bundle in bundles for op in bundle.ops
    )
    per_cycle = chip.hbm / chip.clock
    run = simulate(program, per_cycle, DMA_LATENCY_S * chip.clock, chip.granule, max_s=max_s)
    run["extrapolated_by"] = scale = _scale(run)
    cycles, busy = run["cycles"] * scale, max(run["mxu_busy"]) * scale
    with_dma = cycles + run["stall"] * scale
    hbm = sum(size for kind, size in run["dma_bytes"].items() if "hbm" in kind) * scale
    report |= {
        "sim": run,
        "cycles": cycles,
        "cycles_dma": with_dma,
        "hbm_bytes": hbm,
        "cycles_hbm": max(cycles, hbm / per_cycle),
        "hbm_bound_cycles": hbm / per_cycle,
        "mxu_busy_cycles": busy,
        "mxu_util": busy / cycles if cycles else 0.0,
        "mxu_util_dma": busy / with_dma if with_dma else 0.0,
        "unit_util": _use(run["counts"], run["cycles"], units, capacities),
    }
    own = lambda loop: sum(path["own_cycles"] * path["times"] for path in loop["paths"])
    loops = [loop for loop in run["loops"] if loop["iterations"]]
    if loops:
        report["hot_loop"] = _hot_loop(max(loops, key=own), units, capacities)
    return report


def _static(program: Program) -> dict[str, float]:
    """Counts of instructions in the listing."""
    counts = program.stats(0, len(program.b) - 1)
    ops = [op for bundle in program.b for op in bundle.ops]
    spills = lambda opcode: sum(op.opcode == opcode and "_spill" in op.args for op in ops)
    return {
        "vmem_spill": counts.get("VSTORE:SPILL", 0),
        "vmem_fill": counts.get("VLOAD:FILL", 0),
        "vmatmul": sum(n for kind, n in counts.items() if kind.startswith("vmatmul_")),
        "vmatpush": counts.get("vmatpush", 0),
        "smem_spill": spills("sst"),
        "smem_fill": spills("sld"),
    }


def _scale(run: Mapping[str, Any]) -> float:
    """By how much a run that was cut off is shorter than the whole, by its outermost loop."""
    if not run["truncated"]:
        return 1.0
    outer = [
        loop
        for loop in run["loops"]
        if loop.get("exit_constant") and loop.get("depth") == 0 and loop["iterations"]
    ]
    if not outer:
        return 1.0
    longest = max(outer, key=lambda loop: loop["cycles"])
    return max(1.0, longest["exit_constant"] / longest["iterations"])


def _use(counts, cycles, units, capacities) -> dict[str, float]:
    return {
        unit: counts.get(unit, 0) / (capacity * cycles)
        for unit, capacity in zip(units, capacities)
        if capacity and cycles
    }


def _hot_loop(loop, units, capacities) -> dict[str, Any]:
    """The loop that the most cycles are spent in, and its usual step."""
    step = max(loop["paths"], key=lambda path: path["own_cycles"] * path["times"])
    return {
        **{key: loop[key] for key in ("start", "end", "bundles", "depth", "iterations")},
        "step_cycles": step["cycles"],
        "step_times": step["times"],
        "step_stall": step["stall"],
        "step_mxu_busy": step["mxu_busy"],
        "step_mxu_util": step["mxu_util"],
        "vmatmul": step["vmatmul"],
        "unit_util": _use(step["units"], step["cycles"], units, capacities),
    }
