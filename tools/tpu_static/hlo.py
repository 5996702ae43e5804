"""What the text of an optimized HLO module says: estimated cycles, collectives, Mosaic calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_DT = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
_COLL = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


def shape_bytes(s: str) -> int:
    """Bytes of all arrays in the text of a shape.

    >>> shape_bytes("(bf16[8,128], s32[4])")
    2064
    """
    n = 0
    for dt, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", s):
        if dt in _DT or dt.startswith("f8"):
            k = 1
            for d in filter(None, dims.split(",")):
                k *= int(d)
            n += k * _DT.get(dt, 1)
    return int(n)


def trip_count(line: str, comps: Mapping[str, Any]) -> int | None:
    """A while loop `i < constant`, taken to count up from 0 by 1 as scan does."""
    c = re.search(r"condition=%?([\w.\-]+)", line)
    body = " ".join(comps.get(c.group(1), {}).get("lines", [])) if c else ""
    m = re.search(r"ROOT .*? compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", body)
    k = re.search(r"%?" + re.escape(m.group(2)) + r" = \S+ constant\((\d+)\)", body) if m else None
    return int(k.group(1)) if k else None


_COSTLY = (
    "fusion",
    "sort",
    "scatter",
    "gather",
    "convolution",
    "dot",
    "reduce",
    "reduce-window",
    "select-and-scatter",
    "cholesky",
    "triangular-solve",
    "fft",
    "copy",
    "transpose",
)


def parse_hlo(text: str) -> dict[str, Any]:
    """XLA's own estimate, and the bytes that it copies from HBM to VMEM beside the kernels, multiplied by known trip
    counts of while loops."""
    comps, cur = {}, None
    for line in text.splitlines():
        m = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if m:
            cur = m.group(2)
            comps[cur] = dict(entry=bool(m.group(1)), lines=[])
        elif line == "}" or line.startswith("} //"):
            cur = None
        elif cur:
            ls = comps[cur]["lines"]
            if ls and not re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = ", line):
                ls[-1] += " " + line.strip()  # attributes may span lines
            else:
                ls.append(line)
    entry = next((c for c, v in comps.items() if v["entry"]), None)
    tot = dict(
        estimated_cycles=0, instructions_with_cycles=0, unknown_trip_loops=0, without_estimate=0,
        prefetched_bytes=0,
    )  # fmt: skip
    colls, mosaic, items, mult_of, est_of = [], [], [], {}, {}
    seen = set()

    def visit(name, mult):
        if name not in comps:
            return
        seen.add(name)
        for line in comps[name]["lines"]:
            m = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
            if not m:
                continue
            nm, shape, op = m.groups()
            mult_of[nm] = mult_of.get(nm, 0) + mult
            ec = re.search(r'"estimated_cycles":"?(\d+)', line)
            if ec:
                c = int(ec.group(1))
                if c > 1 << 50:  # XLA's "no estimate" (a saturated 64-bit integer)
                    tot["without_estimate"] += 1
                    c = 0
                est_of[nm] = est_of.get(nm, 0) + c * mult
                tot["estimated_cycles"] += c * mult
                tot["instructions_with_cycles"] += 1
                items.append((c * mult, nm, op, mult))
            elif op in _COSTLY and "S(6)" not in shape:
                tot["without_estimate"] += 1
            if op in ("copy-start", "slice-start"):
                to, source = shape.split("}, ")[:2]
                if "S(1)" in to and "S(" not in source:  # S(1) is VMEM, nothing is HBM
                    tot["prefetched_bytes"] += shape_bytes(to) * mult
            base = op[:-6] if op.endswith("-start") else op
            if base in _COLL:
                g = re.search(r"replica_groups=(\{\{.*?\}\}|\[[^ ]*)", line)
                b = shape_bytes(shape)
                if op.endswith("-start"):
                    b = shape_bytes(shape.split(")")[0].split(",", 1)[-1]) if "(" in shape else b
                colls.append(
                    dict(
                        name=nm,
                        op=base,
                        shape=re.sub(r"\{[^}]*\}", "", shape)[:120],
                        bytes=b,
                        times=mult,
                        groups=g.group(1)[:80] if g else None,
                        estimated_cycles=int(ec.group(1)) if ec else None,
                    )
                )
            if 'custom_call_target="tpu_custom_call"' in line:
                vm = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
                mem = {}
                if vm:
                    for sp, sz in re.findall(
                        r'"memory_space":"(\d+)","offset":"\d+","size":"(\d+)"', vm.group(1)
                    ):
                        mem[sp] = mem.get(sp, 0) + int(sz)
                mosaic.append(dict(name=nm, vmem_bytes=mem.get("1"), times=mult))
            if op == "while":
                b = re.search(r"body=%?([\w.\-]+)", line)
                t = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                n = int(t.group(1)) if t else trip_count(line, comps)
                if n is None:
                    tot["unknown_trip_loops"] += 1
                if b:
                    visit(b.group(1), mult * (1 if n is None else n))
            elif op == "conditional":
                for b in re.findall(
                    r"(?:branch_computations=\{|true_computation=|false_computation=)"
                    r"([^,}]*(?:,[^,}]*)*)",
                    line,
                ):
                    for c in re.findall(r"%?([\w.\-]+)", b):
                        visit(c, mult)
            elif op in ("call", "async-start"):
                b = re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", line)
                if b:
                    visit(b.group(1), mult)

    if entry:
        visit(entry, 1)
    items.sort(reverse=True)
    return dict(
        **tot,
        top=[dict(cycles=c, name=n, op=o, times=t) for c, n, o, t in items[:12]],
        collectives=colls,
        mosaic=mosaic,
        mult_of=mult_of,
        est_of=est_of,
    )
