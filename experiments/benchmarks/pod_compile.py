"""What the training step costs on a pod, read off the program that the TPU compiler makes of it.

    python -m experiments.benchmarks.pod_compile [--only=REGEX] [--list] [--out=docs/results/pod_compile.json]
    python -m experiments.benchmarks.pod_compile --table [--out=...]

No TPU is needed. `libtpu` compiles for the devices of a whole pod (and the compiler for GPUs, see
`tools.gpu_static`, for a host of H100s: memory and collectives, without an estimate of time); the program for one chip says how
much memory it takes, which collectives it runs on how many bytes, and how long XLA thinks it takes.
What is compiled is the training job's own step (`experiments.task.make_task`, `experiments.parallel`)
with its state donated: `jax.pmap` for replicas, `jax.jit` with sharded state for fsdp. One minute to
several per case; each is saved as it is done, and cases that are there are not compiled again.

The step holds a conditional: masks are updated or they are not. Both ways are read off one program,
the real one: the branches of the conditionals are followed either all to the left (an ordinary step) or
all to the right (an update). The loops of the search for a threshold end when it is found; each is
counted `--passes` times.

Figures are XLA's own but for one column: XLA does not estimate collectives, so they are priced at the
published speed of the links (`WIRES`), none of them hidden behind computation. It has no estimate of
sorts, and its FLOPs count the body of a loop once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import parallel
from experiments.benchmarks import jaxpruner
from experiments.configs import imagenet_resnet50, transformer_1b
from experiments.datasets import Dataset
from experiments.optimizer import make_optimizer
from experiments.task import make_task
from tools import gpu_static
from tools.tpu_static import CHIPS, hlo

EVERY = 100


# -- What is compiled ------------------------------------------------------------------------------


class Case(NamedTuple):
    model: str
    method: str
    topology: str
    parallel: str

    def __str__(self):
        return "/".join(self)


# Method and options; sparsity is that of the config.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "rigl": ("rigl", {"update_every": EVERY}),
    "st3": ("st3", {"update_every": EVERY}),
    "global_magnitude": ("global_magnitude", {"update_every": EVERY}),
    "rigl_2:4": ("rigl", {"update_every": EVERY, "structure": "2:4"}),
    "sr_ste_2:4": ("sr_ste", {"structure": "2:4"}),
    "jaxpruner": ("dense", {}),  # its update is put around the same optimizer, see `make_task`
}
TOKENS = {"transformer_1b": (2048, 32_768), "transformer_small": (64, 256)}  # and vocabulary
PER_CHIP = {"resnet50": 16, "transformer_1b": 2, "transformer_small": 2}  # images; sequences
CASES = [
    Case(model, method, topology, strategy)
    for topology in ("v5e:16x16", "v5p:4x4x4")
    for model in ("transformer_1b", "resnet50")
    for strategy in ("fsdp", "pmap")
    for method in METHODS
] + [
    Case(model, method, topology, "fsdp")
    for model, topology in (
        ("transformer_1b", "v5e:4x4"),
        ("transformer_small", "v5e:2x2"),
        ("transformer_1b", "h100:8"),
        ("transformer_small", "h100:8"),
    )
    for method in METHODS
]


class Wire(NamedTuple):
    """Links of one chip: bytes per second into each direction of each axis of the torus."""

    speed: float
    hop: float = 1e-6


# J. Austin et al., How to scale your model, 2025. NVLink is a switch: a ring of one axis.
WIRES = {"v5e": Wire(4.5e10), "v5p": Wire(9e10), "h100": Wire(4.5e11 / 2)}
HBM = {"v5e": 16e9, "v5p": 95e9, "h100": 80e9}


def configure(case: Case) -> tuple[Any, Dataset]:
    """The config of a case and its data set, of which only shapes are used."""
    source = imagenet_resnet50 if case.model == "resnet50" else transformer_1b
    config: Any = source.get_config()
    if case.model == "transformer_small":
        config.model_options.update(dim=256, depth=2, heads=2)
    config.method, options = METHODS[case.method]
    config.options.update(options)
    config.parallel = case.parallel
    config.batch_size = PER_CHIP[case.model] * math.prod(_torus(case.topology))
    shape, classes = (224, 224, 3), 1000
    text = case.model in TOKENS
    if text:
        length, classes = TOKENS[case.model]
        shape = (length,)
    return config, Dataset(case.model, {}, lambda record, rng: dict(record), shape, classes, text)


def _torus(topology: str) -> list[int]:
    return [int(n) for n in topology.split(":")[1].split("x")]


def devices_of(topology: str) -> np.ndarray:
    """The devices of a pod that is not there, such as `v5e:16x16`; or GPUs of a host, `h100:8`."""
    kind, _, count = topology.partition(":")
    if kind in gpu_static.TARGETS:
        return np.array(gpu_static.devices(kind, int(count)))
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return np.array(found.devices)


def lower(config, data: Dataset, devices: np.ndarray, tx=None):
    """The training step, lowered for the devices; the shapes of its state, and those on one device.

    `tx` stands in place of the config's optimizer.
    """
    n, rows = devices.size, config.batch_size
    batch = {"x": (rows, *data.shape), "y": (rows, *(data.shape if data.is_text else ()))}
    types = {"x": jnp.int32 if data.is_text else jnp.float32, "y": jnp.int32}
    if config.parallel == "pmap":
        task = make_task(config, data, parallel.Pmap.axis_name, tx=tx)
        state = jax.eval_shape(task.init)
        each = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), state)
        split = {
            k: jax.ShapeDtypeStruct((n, s[0] // n, *s[1:]), types[k]) for k, s in batch.items()
        }
        step = jax.pmap(
            task.train_step, parallel.Pmap.axis_name, devices=list(devices), donate_argnums=(0,)
        )
        return step.lower(each, split), state, state
    strategy = parallel.Fsdp(batch_size=config.batch_size, tensor=config.tensor, devices=devices)
    task = make_task(config, data, mesh=strategy.mesh, tx=tx)
    state = jax.eval_shape(task.init)
    where = strategy.shardings(state)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
    )
    split = {k: jax.ShapeDtypeStruct(s, types[k], sharding=strategy.rows) for k, s in batch.items()}
    step = jax.jit(task.train_step, donate_argnums=(0,), out_shardings=(where, strategy.whole))
    shards = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), placed
    )
    return step.lower(placed, split), state, shards


# -- What is read off the program ------------------------------------------------------------------

COLLECTIVES = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|"
    "ragged-all-to-all"
)


def steps_of(text: str, passes: int, wire: Wire, torus: list[int]) -> dict[str, dict]:
    """The cost of a step by which way its conditionals go: `ordinary` and `update`.

    Args:
      text: the program of one chip, as XLA prints it after compilation.
      passes: how often a loop runs whose count is not known.
      wire, torus: the links and the shape of the slice.
    """
    chips = math.prod(torus)
    listed = _collectives(text, chips)
    found: dict[str, dict] = {}
    for way, branch in {"ordinary": 0, "update": 1}.items():
        program: dict[str, Any] = hlo.parse_hlo(_decided(text, branch, passes))
        count, total, largest, seconds = Counter(), Counter(), Counter(), 0.0
        for name, (op, size) in listed.items():
            times = program["mult_of"].get(name, 0)
            if times:
                count[op] += times
                total[op] += times * size
                largest[op] = max(largest[op], size)
                seconds += times * _on_wire(op, size, wire, torus)
        found[way] = {
            "cycles": program["estimated_cycles"],
            "without_estimate": program["without_estimate"],
            "collectives": {
                k: {"count": count[k], "bytes": total[k], "largest": largest[k]} for k in count
            },
            "wire_seconds": seconds,
        }
    inside = _of_branches(text, 1)
    sizes = [size for _, size in _collectives(inside, chips).values()]
    found["update"]["largest_collective_of_update"] = max(sizes, default=0)
    found["update"]["sorts"] = len(re.findall(r" sort\(", inside))
    return found


def _computations(text: str) -> dict[str, str]:
    """The bodies of the computations of a program by name."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\s*\n(.*?)^\}", text, flags=re.M | re.S)
    return dict(found)


def _collectives(text: str, chips: int) -> dict[str, tuple[str, int]]:
    """By the name of the instruction: the kind, and the bytes of the whole array, before it is
    scattered or after it is gathered.

    What runs beside computation is a fusion around the collective, in up to three parts of which the
    first counts; a scattered sum is one around a sum.
    """
    found, inner = {}, {}
    for computation, body in _computations(text).items():
        for name, shape, op, start in re.findall(
            rf"%([\w.\-]+) = (.*?) ({COLLECTIVES})(-start)?\(", body
        ):
            size = _bytes(shape, start) * (chips if op == "reduce-scatter" else 1)
            found[name] = inner[computation] = op, size
    for name, callee in re.findall(r"%([\w.\-]+) = [^\n]* fusion\([^\n]*calls=%?([\w.\-]+)", text):
        if callee not in inner:
            continue
        if callee.startswith("all-reduce-scatter"):
            found[name] = "reduce-scatter", inner[callee][1]
        elif name.startswith("async-collective-start"):
            found[name] = inner[callee]
    return found


def _bytes(shape: str, start: str) -> int:
    """Of the result. What starts a collective returns its operand, too, and tokens."""
    sizes = [hlo.shape_bytes(part) for part in re.findall(r"\w+\[[\d,]*\]", shape)]
    return max(sizes) if start else sum(sizes)


def _decided(text: str, branch: int, passes: int) -> str:
    """The program with one branch per conditional, and every loop's count known."""

    def choose(match):
        line = match.group(0)
        both = re.search(r"branch_computations=\{([^}]*)\}", line)
        if both:
            names = both.group(1).split(",")
            if len(names) == 2:
                return line.replace(
                    both.group(0), f"branch_computations={{{names[branch].strip()}}}"
                )
            return line
        other = ("true", "false")[branch]
        return re.sub(rf"{other}_computation=%?[\w.\-]+,? ?", "", line)

    text = re.sub(r"^.* conditional\(.*$", choose, text, flags=re.M)
    known = f', "known_trip_count":{{"n":"{passes}"}}'
    # Loops that count up to a constant are known by their condition.
    comps = {name: {"lines": body.splitlines()} for name, body in _computations(text).items()}

    def count(match):
        line = match.group(0)
        if "known_trip_count" in line or hlo.trip_count(line, comps) is not None:
            return line
        return line + known

    return re.sub(r"^.* while\(.*$", count, text, flags=re.M)


def _of_branches(text: str, branch: int) -> str:
    """The computations that run only if conditionals go this way."""
    bodies, roots = _computations(text), []
    for line in re.findall(r"^.* conditional\(.*$", text, flags=re.M):
        both = re.search(r"branch_computations=\{([^}]*)\}", line)
        if both:
            roots.append(both.group(1).split(",")[branch].strip().lstrip("%"))
        else:
            side = ("false", "true")[branch]
            roots += re.findall(rf"{side}_computation=%?([\w.\-]+)", line)
    seen: set[str] = set()
    while roots:
        name = roots.pop()
        if name in bodies and name not in seen:
            seen.add(name)
            called = r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
            roots += re.findall(r"[\w.\-]+", " ".join(re.findall(called, bodies[name])))
    header = "%{} () {{\n{}}}\n"
    return "".join(header.format(name, bodies[name]) for name in sorted(seen))


def _on_wire(op: str, size: int, wire: Wire, torus: list[int]) -> float:
    """Seconds of a collective over all chips of `size` bytes: a ring along each axis, both directions
    used, and the way to the farthest chip."""
    n, axes = math.prod(torus), len(torus)
    if op == "collective-permute":
        return size / wire.speed + wire.hop
    rounds = 2 if op == "all-reduce" else 1
    speed = 2 * axes * wire.speed
    return rounds * (size * (n - 1) / n / speed + wire.hop * sum(t // 2 for t in torus))


def measure(case: Case, passes: int = 6, keep: pathlib.Path | None = None) -> dict[str, Any]:
    """Compiles a case; `error` is set if the compiler refuses it.

    Args:
      case: what to compile.
      passes: rounds of a loop of the search, which has two.
      keep: a directory for the text of the program.
    """
    start = time.process_time()
    config, data = configure(case)
    devices = devices_of(case.topology)
    generation = case.topology.split(":")[0]
    tx = None
    if case.method == "jaxpruner":
        tx = jaxpruner.pruning(make_optimizer(config), config.sparsity, EVERY)
    with gpu_static.as_if_on(devices[0]):
        lowered, state, shards = lower(config, data, devices, tx)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    number = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    out: dict[str, Any] = {
        "case": str(case),
        "chips": devices.size,
        "parameters": number(state.params),
        "state_bytes": size(state),
        "state_bytes_per_chip": size(shards),
    }
    try:
        program: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+[GM]) of ([\d.]+[GM]) hbm", str(error))
        out["error"] = used.group(0) if used else str(error)[:500]
        return out | {"cpu_seconds": round(time.process_time() - start)}
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    clock = next((chip.clock for chip in CHIPS.values() if chip.gen == generation), math.nan)
    parts = {
        k: int(getattr(memory, f"{k}_size_in_bytes"))
        for k in ("argument", "output", "temp", "alias", "generated_code")
    }
    total = sum(parts.values()) - 2 * parts["alias"]
    out["memory"] = parts | {"total": total, "of": HBM[generation]}
    out["flops"] = cost.get("flops")
    out["clock"] = None if math.isnan(clock) else clock
    text = program.as_text()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{case}.hlo".replace("/", "_")).write_text(text)
    out |= steps_of(text, passes, WIRES[generation], _torus(case.topology))
    return out | {"cpu_seconds": round(time.process_time() - start)}


# -- Tables ----------------------------------------------------------------------------------------


def milliseconds(row: dict[str, Any], way: str) -> float:
    """XLA's estimate of a step, without collectives."""
    return 1e3 * row[way]["cycles"] / row["clock"] if row["clock"] else math.nan


def added(row: dict[str, Any]) -> tuple[float, float]:
    """What an update adds to an ordinary step, in milliseconds: on the chip, and on the wires."""
    wire = row["update"]["wire_seconds"] - row["ordinary"]["wire_seconds"]
    return milliseconds(row, "update") - milliseconds(row, "ordinary"), 1e3 * wire


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: one table for each model, topology and strategy."""
    out = []
    groups: dict[str, list[Case]] = {}
    for case in CASES:
        if str(case) in rows:
            groups.setdefault(f"{case.model}, {case.topology}, {case.parallel}", []).append(case)
    for title, cases in groups.items():
        first = rows[str(cases[0])]
        out.append(
            f"### {title}\n\n{first['parameters']:,} parameters, {first['chips']} chips\n\n"
            "| method | memory of a chip, GB | state of a chip, MB (of all / chips) | TFLOP, loop bodies once | "
            "ordinary step, ms | of dense | update adds, ms (+ wires) | over 100 steps | "
            "collectives: ordinary | more at an update | largest of these |\n" + "|---" * 11 + "|"
        )
        dense = rows.get(str(cases[0]._replace(method="dense")), {})
        for case in cases:
            out.append(_line(case.method, rows[str(case)], dense))
        out.append("")
    return "\n".join(out)


def _line(method: str, row: dict[str, Any], dense: dict[str, Any]) -> str:
    even = row["state_bytes"] / row["chips"]
    state = f"{row['state_bytes_per_chip'] / 1e6:.1f} ({row['state_bytes_per_chip'] / even:.2f})"
    if "error" in row:
        return f"| {method} | {row['error']} | {state} |" + " |" * 8
    m, ms = row["memory"], milliseconds(row, "ordinary")
    base = milliseconds(dense, "ordinary") if "memory" in dense else math.nan
    ratio = "" if math.isnan(base) else f"{ms / base:.3f}"
    more, wire = added(row)
    names = {
        way: {k: v["count"] for k, v in row[way]["collectives"].items()}
        for way in ("ordinary", "update")
    }
    extra = Counter(names["update"])
    extra.subtract(names["ordinary"])
    listed = lambda counts: ", ".join(f"{n} {k}" for k, n in counts.items() if n) or "none"
    bytes_ = sum(v["bytes"] for v in row["ordinary"]["collectives"].values())
    return (
        f"| {method} | {m['argument'] / 1e9:.2f} + {m['temp'] / 1e9:.2f} = {m['total'] / 1e9:.2f} "
        f"| {state} | {(row['flops'] or math.nan) / 1e12:.2f} | {ms:.1f} | {ratio} "
        f"| {more:.2f} + {wire:.2f} | {(more + wire) / EVERY / ms:.2%} "
        f"| {sum(names['ordinary'].values())}, {bytes_ / 1e9:.2f} GB | {listed(extra)} "
        f"| {_short(row['update']['largest_collective_of_update'])} |"
    )


def _short(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def main(argv: list[str] | None = None):
    """Measures the cases asked for that are not there yet, or prints the tables of those that are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="regular expression on the names of cases")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--table", action="store_true", help="print the tables of what is saved")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("docs/results/pod_compile.json"),
        help="where figures are kept",
    )
    parser.add_argument("--keep", type=pathlib.Path, help="a directory for the texts of programs")
    parser.add_argument("--passes", type=int, default=6, help="rounds of a loop of the search")
    args = parser.parse_args(argv)
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.table:
        print(tables(rows))
        return
    for case in CASES:
        if not re.search(args.only, str(case)):
            continue
        if args.list:
            print(case)
            continue
        if str(case) in rows:
            continue
        row = rows[str(case)] = measure(case, args.passes, args.keep)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
