"""A report as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def _si(x: float) -> str:
    for s, d in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= d:
            return f"{x / d:.3g}{s}"
    return f"{x:.3g}"


def table(rep: Mapping[str, Any]) -> str:
    """A report as a few lines of text."""
    L = [
        f"{rep['factory']} {json.dumps(rep['kwargs']) if rep.get('kwargs') else ''} on {rep['topology']}"
        f" ({rep.get('device_kind', '?')}, jax {rep.get('jax', '?')}, libtpu {rep.get('libtpu', '?')})"
    ]
    if not rep.get("ok"):
        return "\n".join(L + ["DOES NOT COMPILE", rep.get("error", "")[:4000]])
    m = rep["memory"]
    L.append(
        f"compiles in {rep['compile_s']:.1f} s of CPU; HBM bytes: arguments {_si(m['argument'])} "
        f"output {_si(m['output'])} temp {_si(m['temp'])}; code {_si(m['generated_code'])}"
    )
    c = rep["xla_cost"]
    h = rep.get("hlo", {})
    L.append(
        "XLA part: "
        + ", ".join(f"{k} {_si(v)}" for k, v in c.items())
        + f"; estimated_cycles {_si(h.get('estimated_cycles', 0))}"
        + (
            f" (+{h['unknown_trip_loops']} loops of unknown trip count)"
            if h.get("unknown_trip_loops")
            else ""
        )
        + (
            f" (+{h['without_estimate']} instructions without estimate)"
            if h.get("without_estimate")
            else ""
        )
    )
    for q in h.get("collectives", []):
        L.append(f"  collective {q['op']:<20} {_si(q['bytes'])}B x{q['times']} {q['shape']}")
    for k in rep.get("kernels", []):
        if "cycles" not in k:
            L.append(f"  kernel {k['name']}: {k.get('error') or k.get('note')}")
            continue
        s = k["static"]
        L.append(
            f"  kernel {k['name']}{'' if k['mosaic'] else ' (XLA)'} grid={k.get('grid')} "
            f"VMEM={_si(k.get('vmem_bytes') or 0)}B {k.get('allocations', '')}"
        )
        L.append(
            f"    cycles {_si(k['cycles'])}  with HBM floor {_si(k['cycles_hbm'])}  with DMA model "
            f"{_si(k['cycles_dma'])}  HBM {_si(k['hbm_bytes'])}B  MXU busy {100 * k['mxu_util']:.1f}%"
        )
        L.append(
            f"    code {k['final_bundles']} bundles ({k['scheduled_bundles']} scheduled), spills/fills "
            f"vmem {s['vmem_spill']}/{s['vmem_fill']} smem {s['smem_spill']}/{s['smem_fill']}"
            + (
                f"  UNKNOWN branches {sum(k['sim']['unknown_branches'].values())}"
                if k["sim"]["unknown_branches"]
                else ""
            )
            + (
                f"  extrapolated x{k['sim']['extrapolated_by']:.2f}"
                if k["sim"]["truncated"]
                else ""
            )
        )
        if "hot_loop" in k:
            q = k["hot_loop"]
            u = " ".join(f"{a} {100 * v:.0f}%" for a, v in q["unit_util"].items() if v >= 0.005)
            L.append(
                f"    hot loop [{q['start']:#x}..{q['end']:#x}] {q['bundles']} bundles x{q['iterations']}, "
                f"usual step {q['step_cycles']:.0f} cycles (x{q['step_times']}), MXU busy "
                f"{100 * q['step_mxu_util']:.1f}%; slots: {u}"
            )
    if "total_cycles" in rep:
        clk = rep["chip"]["clock"]
        L.append(
            f"total cycles {_si(rep['total_cycles'])} ({rep['total_cycles'] / clk * 1e3:.4g} ms at "
            f"{clk / 1e9:.2f} GHz); with DMA model {_si(rep['total_cycles_dma'])} "
            f"({rep['total_cycles_dma'] / clk * 1e3:.4g} ms)"
        )
    if "schedule_total_cycles" in rep:
        L.append(
            f"with XLA's fusions by schedule: cycles {_si(rep['schedule_total_cycles'])}, with HBM floor "
            f"{_si(rep['schedule_total_cycles_hbm'])}, with DMA model {_si(rep['schedule_total_cycles_dma'])}"
        )
    if "useful" in rep:
        u = rep["useful"]
        L.append(
            f"useful work: ideal {_si(u['ideal_cycles'])} cycles, efficiency {100 * u['efficiency']:.1f}% "
            f"(DMA model {100 * u['efficiency_dma']:.1f}%); cycles per useful 128^3 tile "
            f"{u['cycles_per_128_tile']:.1f} / {u['cycles_per_128_tile_dma']:.1f} "
            f"(ideal {u['ideal_cycles_per_128_tile']:.1f})"
        )
    return "\n".join(L)
