"""The run of a program: cycles, waits, copies, and what its loops do."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from typing import Any

from tools.tpu_static.memory import Dma, smem_words
from tools.tpu_static.program import Program
from tools.tpu_static.unknown import U, Unknown, negate, select, signed, unsigned

MAX_BLOCKS = 20_000_000
LONGEST_PATH = 400  # blocks of one turn of a loop that tell its path from others
MOST_PATHS = 200  # paths of a loop that are told apart


class Events:
    """What the functions of a program tell: the cycle `t`, and `stall`, the cycles of waits on top."""

    def __init__(self, program: Program, memory: dict[Any, Any], dma: Dma):
        self.operands, self.memory, self.dma_model = program.operands, memory, dma
        self.t = 0
        self.stall = 0.0
        self.unknown_branches: collections.Counter[int] = collections.Counter()
        self.bound: set[int] = set()

    def dma(self, off, kind, granules, flag, src, dst, _bundle):
        """A copy starts; one of a whole known operand to scalar memory is done for real."""
        self.dma_model.start(self.t + off + self.stall, kind, granules, flag)
        if not kind.endswith("_to_smem") or src is U or dst is U:
            return
        shift = 48 if src >> 56 == 1 else 44  # see the addresses of operands in `Program`
        operand = (src >> shift) & 255
        array = self.operands.get(operand)
        if array is not None and src >> (shift + 8) == 1 and src & ((1 << shift) - 1) == 0:
            for j, v in enumerate(smem_words(array)):
                self.memory[dst + j] = v
            self.bound.add(operand)

    def wait(self, off, flag, granules):
        self.stall += self.dma_model.wait(self.t + off + self.stall, flag, granules)

    def unk(self, following, taken):
        """A branch that is not taken, or not known."""
        if taken is U:
            self.unknown_branches[following] += 1
        return following


@dataclasses.dataclass
class Turns:
    """What the turns of one loop were: `paths` by the blocks of a turn, each with its number, cycles and
    stalls; the turn under way began at `mark` and has come through `blocks`."""

    iterations: int = 0
    paths: dict[tuple[int, ...], list[float]] = dataclasses.field(default_factory=dict)
    blocks: list[int] = dataclasses.field(default_factory=list)
    mark: tuple[float, float] | None = None

    def end(self, events: Events) -> None:
        assert self.mark is not None
        key, (cycles, stall) = tuple(self.blocks), self.mark
        path = self.paths.get(key)
        if path is None and len(self.paths) < MOST_PATHS:
            self.paths[key] = path = [0, 0, 0.0]
        if path is not None:
            path[0] += 1
            path[1] += events.t - cycles
            path[2] += events.stall - stall
        self.iterations += 1
        self.blocks = []


def simulate(
    program: Program,
    bytes_per_cycle: float,
    latency: float,
    granule: int = 32,
    *,
    max_blocks: int = MAX_BLOCKS,
    max_s: float = 120.0,
) -> dict[str, Any]:
    """Runs a program to its end.

    Args:
      program: the listing of a kernel.
      bytes_per_cycle: of HBM.
      latency: of a copy, in cycles.
      granule: bytes of a granule.
      max_blocks: basic blocks after which the run is cut off (`truncated`).
      max_s: seconds of the processor after which it is.

    Returns:
      `cycles` of the schedule, `stall` for copies on top, counts of copies, bytes and instructions, and the
      loops with their most costly paths.
    """
    memory: dict[Any, Any] = {}
    dma = Dma(bytes_per_cycle, latency, granule)
    events = Events(program, memory, dma)
    functions = program.functions()(
        [U] * 64, [U] * 32, memory, events, U, negate, select, unsigned, signed
    )
    inside = {block: program.loop_of(block) for block in program.leaders}
    ends = {
        block: k
        for block, (_, branch) in program.blocks.items()
        for k, (_, _, back) in enumerate(program.loops)
        if branch == back
    }
    around = [_around(program, k) for k in range(len(program.loops))]
    turns = [Turns() for _ in program.loops]
    visits: collections.Counter[int] = collections.Counter()
    Unknown.hits = 0
    block, n, truncated, deadline = 0, 0, False, time.process_time() + max_s
    while block < len(program.b):
        here, loop = block, inside[block]
        if loop is not None:
            if turns[loop].mark is None:
                for k in (loop, *around[loop]):
                    turns[k].mark = turns[k].mark or (events.t, events.stall)
            if len(turns[loop].blocks) < LONGEST_PATH:
                turns[loop].blocks.append(here)
        visits[here] += 1
        block = functions[here]()
        if (k := ends.get(here)) is not None:
            turns[k].end(events)
            again = block == program.loops[k][0]
            turns[k].mark = (events.t, events.stall) if again else None
        n += 1
        if n >= max_blocks or (n & 4095 == 0 and time.process_time() > deadline):
            truncated = True
            break
    counts = {b: program.stats(b, program.blocks[b][0]) for b in visits}
    total = collections.defaultdict[str, float](int)
    for b, times in visits.items():
        for unit, value in counts[b].items():
            total[unit] += value * times
    return {
        "cycles": events.t,
        "stall": events.stall,
        "blocks_run": n,
        "truncated": truncated,
        "unknown_branches": {
            hex(program.b[min(at, len(program.b) - 1)].addr): times
            for at, times in events.unknown_branches.items()
        },
        "unknown_reads": Unknown.hits,
        "unknown_ops": dict(program.unknown_ops),
        "dma_count": dict(dma.n),
        "dma_bytes": dict(dma.bytes),
        "mxu_busy": [total[f"mxu{m}_busy"] for m in range(8)],
        "counts": {k: v for k, v in total.items() if not k.endswith("_busy")},
        "bound_operands": sorted(events.bound),
        "loops": [
            _loop(program, k, turns[k], counts, len(around[k])) for k in range(len(program.loops))
        ],
    }


def _around(program: Program, k: int) -> list[int]:
    """The loops around loop k."""
    start, end, _ = program.loops[k]
    return [j for j, (a, b, _) in enumerate(program.loops) if j != k and a <= start and b >= end]


def _loop(program: Program, k: int, turns: Turns, counts, depth: int) -> dict[str, Any]:
    """The facts of a loop, with its four most costly paths."""
    start, end, _ = program.loops[k]
    facts: dict[str, Any] = {"start": start, "end": end, "bundles": end - start + 1}
    if not turns.iterations:
        return facts | {"iterations": 0}
    costly = sorted(turns.paths.items(), key=lambda item: -item[1][1])[:4]
    return facts | {
        "depth": depth,
        "iterations": turns.iterations,
        "exit_constant": _exit_constant(program, start, end),
        "cycles": sum(path[1] for path in turns.paths.values()),
        "paths": [_path(program, blocks, path, counts) for blocks, path in costly],
    }


def _path(program: Program, blocks, path, counts) -> dict[str, Any]:
    times, cycles, stall = path[0], path[1] / path[0], path[2] / path[0]
    used: collections.Counter[str] = collections.Counter()
    for b in blocks:
        used.update(counts[b])
    busy = max(used[f"mxu{m}_busy"] for m in range(8))
    return {
        "times": times,
        "cycles": cycles,
        "own_cycles": sum(program.blocks[b][0] - b + 1 for b in blocks),
        "stall": stall,
        "mxu_busy": busy,
        "mxu_util": busy / cycles if cycles else 0,
        "vmatmul": sum(v for name, v in used.items() if name.startswith("vmatmul_")),
        "units": {name: used[name] for name in program.units if used[name]},
    }


def _exit_constant(program: Program, start: int, end: int) -> int | None:
    """What the counter of a loop is compared with."""
    found = None
    for bundle in program.b[start : end + 1]:
        for op in bundle.ops:
            if "loop exit test" in op.note:
                constant = re.search(r"(\d+)\s*$", op.args)
                found = int(constant.group(1)) if constant else None
    return found
