"""What the compiler leaves in its directory besides listings: files by kernel, use of units, allocations, rates."""

from __future__ import annotations

import collections
import pathlib
import re

_FILE = re.compile(
    r"\d+-(.+)-\d+-(packed-bundles-post-ra|final_bundles|"
    r"pre-delay_hlo-static-per-bundle-utilization|post-delay-converter)\.txt$"
)
# What the compiler is asked for: those, and its own profile.
FILTER = (
    "packed-bundles-post-ra|final_bundles|utilization|static-bundle-profile|post-delay-converter"
)


def kernel_files(dump: pathlib.Path) -> dict[str, dict[str, pathlib.Path]]:
    """The files of each kernel, by kind."""
    found: dict[str, dict[str, pathlib.Path]] = {}
    for path in sorted(dump.iterdir()):
        if name := _FILE.match(path.name):
            found.setdefault(name.group(1), {})[name.group(2)] = path
    return found


def read_utilization(path: pathlib.Path | None) -> tuple[list[list[int]], list[str], list[int]]:
    """Of each bundle, how often it uses each unit; the names of the units, and what they can do."""
    rows: list[list[int]] = []
    units: list[str] = []
    capacities: list[int] = []
    if path is None or not path.exists():
        return rows, units, capacities
    lines, in_table = path.read_text().splitlines(), False
    for i, line in enumerate(lines):
        if line.startswith("== CAPA"):
            units = [name.strip() for name in lines[i + 1].split(",")]
            capacities = [int(x) for x in lines[i + 2].split()]
        elif line.startswith("== UTIL"):
            in_table = True
        elif in_table and line.strip():
            rows.append([int(x) for x in line.split()])
    return rows, units, capacities


def allocations(path: pathlib.Path) -> dict[str, int]:
    """Bytes of VMEM and SMEM that the kernel's own code allocates, by purpose."""
    out: collections.Counter[str] = collections.Counter()
    for line in path.read_text().splitlines():
        found = re.search(
            r"#allocation\d+\w* \[shape = '[^']*', space=(vmem|smem), size = 0x([0-9a-f]+)(.*)",
            line,
        )
        if found and "fixed_abs" not in found.group(3):
            tag = re.search(r"tag = '([^']*)", found.group(3))
            purpose = _purpose(tag.group(1) if tag else "", line)
            out[f"{found.group(1)} {purpose}"] += int(found.group(2), 16)
    return dict(out)


def _purpose(tag: str, line: str) -> str:
    for start in ("input window", "output window"):
        if tag.startswith(start):
            return f"{start}s"
    if tag.startswith("scratch"):
        return "scratch"
    return "spills" if "spill" in tag or "_spill" in line else "other"


def matmul_rates(dump: pathlib.Path, generation: str) -> dict[str, int]:
    """Cycles that a matrix unit is held by one instruction, by kind: from the compiler's own profile of
    the longest loop where it has one."""
    rates = {"packed": 8 if generation in ("v6e", "v7x") else 16, "plain": 8, "x8": 16}
    labels = {"packed": "matmul_packed", "plain": "matmul", "x8": "matmul_x8_packed"}
    longest = 500  # shorter ones are too coarse
    for path in sorted(dump.glob("*static-bundle-profile.txt")):
        for block in path.read_text().split("\nHLO:"):
            found = re.search(r"SCALAR_ALU: \(\d+/(\d+)\)", block)
            cycles = int(found.group(1)) // 2 if found else 0
            if cycles <= longest:
                continue
            longest = cycles
            for kind, label in labels.items():
                most = re.search(rf"MXU_0 {label}: \(\d+/(\d+)\)", block)
                if most and int(most.group(1)):
                    rates[kind] = max(1, round(cycles / int(most.group(1))))
    return rates
