"""Whether training has the same bits on 1 device, on 8, and on 2 processes with 4 each, for every method.

  python -m experiments.reliability.devices --out=docs/results/devices.json

Trains a small MLP on the digits with `--config.microbatches=8`, by the training job's own task and
strategies: on one device, under pmap and with sharded parameters (fsdp) on 8 virtual CPU devices, and
under pmap on 2 processes with 4 devices each, joined through Gloo. Compares all masks, parameters and
optimizer states with those of the one device, bit by bit. Exits with 1 if a mask differs. What
is in --results already is not trained again: a run that was stopped goes on.

On CPU this sets --xla_cpu_max_isa=AVX, which has no fused multiply-add: whether XLA fuses a product with
the sum after it, and rounds once instead of twice, depends on the program around.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging

import jaxsparse
from experiments import datasets, hosts, parallel
from experiments.configs import base
from experiments.launch import local
from experiments.reliability import runs
from experiments.report.page import markdown_table
from experiments.task import make_task
from jaxsparse.state import find_states

TWO_VIEW = ("bdwp", "bi_mask", "slope")
XLA_FLAG = "--xla_cpu_max_isa=AVX"

# setting: (parallel, processes, devices of each)
SETTINGS = {
    "1 device": ("none", 1, 1),
    "8 devices: pmap": ("pmap", 1, 8),
    "2 processes x 4: pmap": ("pmap", 2, 4),
    "8 devices: fsdp": ("fsdp", 1, 8),
}


def make_config(method: str, steps: int) -> Any:
    """The small run: the digits, an MLP with a hidden layer of 32, batches of 64."""
    c: Any = base.get_config()
    c.dataset, c.model, c.method = "digits", "mlp", method
    c.model_options.hidden = (32,)
    c.batch_size, c.microbatches, c.learning_rate = 64, 8, 3e-3
    c.steps, c.warmup_steps = steps, min(20, steps // 4)
    if "update_every" in jaxsparse.METHODS[method].options:
        c.options.update_every = max(1, steps // 50)
    if method == "sr_ste":
        c.structure = "2:4"
    if method in TWO_VIEW:  # its layers have a product for each; ten outputs do not divide by four
        c.model_options.two_view = True
        c.structure, c.options.targets = "2:4", "layers/0/kernel"
    return c


def final_state(method: str, strategy_name: str, steps: int):
    """Parameters, optimizer state and masks after so many steps, by path, on this host."""
    config = make_config(method, steps)
    config.parallel = strategy_name
    strategy = parallel.create(
        strategy_name, batch_size=config.batch_size, microbatches=config.microbatches
    )
    data = datasets.load(config.dataset)
    task = make_task(config, data, strategy.axis_name, mesh=strategy.mesh)
    state = strategy.init(task.init)
    step = strategy.compile(task.train_step, donate=True)
    host = (jax.process_index(), jax.process_count())
    for batch in datasets.batches(data, config.batch_size, stop=config.steps, host=host):
        state, _ = step(state, strategy.put(batch))
    logical = hosts.to_host(strategy.to_save(state))
    sparse = find_states(logical.opt_state)
    by_path = lambda tree: {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    }
    return {
        "mask": by_path(jaxsparse.get_masks(logical.opt_state) if sparse else {}),
        "state": by_path((logical.params, logical.opt_state)),
    }


def child(setting: str, methods: list[str], results: pathlib.Path, steps: int) -> None:
    """Trains every method in this setting and saves what `final_state` gives."""
    for method in methods:
        started = time.monotonic()
        parts = final_state(method, SETTINGS[setting][0], steps)
        if jax.process_index() == 0:
            arrays = {
                f"{kind}:{path}": x for kind, part in parts.items() for path, x in part.items()
            }
            path = _file(results, setting, method, steps)
            with path.with_suffix(".part").open("wb") as out:  # whole, or not there
                np.savez(out, **arrays)  # pyright: ignore[reportArgumentType]
            path.with_suffix(".part").rename(path)
            print(f"{setting}: {method}, {time.monotonic() - started:.1f} s", flush=True)
        jax.clear_caches()


def _file(results: pathlib.Path, setting: str, method: str, steps: int) -> pathlib.Path:
    return results / f"{setting.replace(' ', '_')}-{method}-{steps}.npz"


def compare(
    methods: list[str], settings: list[str], results: pathlib.Path, steps: int
) -> dict[str, dict[str, dict[str, int]]]:
    """By method and setting: entries of masks and of the whole state that differ from one device's, and
    the largest difference of a number of the state."""
    found = {}
    for method in methods:
        reference = dict(np.load(_file(results, "1 device", method, steps)))
        for setting in settings:
            other = dict(np.load(_file(results, setting, method, steps)))
            unequal = runs.differences(reference, other)
            found.setdefault(method, {})[setting] = {
                "mask entries": sum(x.size for p, x in reference.items() if p.startswith("mask")),
                "masks differ": sum(n for p, n in unequal.items() if p.startswith("mask")),
                "state entries": sum(x.size for p, x in reference.items() if p.startswith("state")),
                "state differs": sum(n for p, n in unequal.items() if p.startswith("state")),
                "largest difference": max(
                    (
                        float(np.max(np.abs(reference[p].astype(float) - other[p].astype(float))))
                        for p in unequal
                        if p.startswith("state")
                    ),
                    default=0.0,
                ),
            }
    return found


def table(results) -> str:
    """The results as a table: entries of the masks, and of the state, that differ."""
    count = lambda n: "equal" if n == 0 else f"{n:,} differ"
    settings = [s for s in SETTINGS if any(s in of for of in results.values())]

    def cell(of):
        return f"{count(of['masks differ'])}, {count(of['state differs'])}"

    def entries(of):
        return next(iter(of.values()))["mask entries"]

    rows = [
        [
            f"`{method}`",
            f"{entries(of):,}" if entries(of) else "none",
            *(cell(of[s]) for s in settings),
        ]
        for method, of in results.items()
    ]
    header = ["method", "mask entries", *(f"{s} (masks, state)" for s in settings)]
    return markdown_table(header, rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. `--child` and what `local.start` gives are for the processes of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = lambda text: text.split(",")
    add = parser.add_argument
    add("--methods", type=names, default=list(jaxsparse.METHODS), help="in jaxsparse.METHODS")
    add("--steps", type=int, default=500, help="steps of training")
    add(
        "--settings",
        type=names,
        default=list(SETTINGS)[1:],
        help="of SETTINGS, to compare with one device",
    )
    add("--results", type=pathlib.Path, default=pathlib.Path("runs/devices"), help="their arrays")
    add("--out", type=pathlib.Path, help="JSON file of the results")
    add("--child", help=argparse.SUPPRESS)
    add("--coordinator_address", help=argparse.SUPPRESS)
    add("--num_processes", type=int, help=argparse.SUPPRESS)
    add("--process_id", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    args = parse(argv)
    if args.child:
        hosts.initialize(args.coordinator_address, args.num_processes, args.process_id)
        return child(args.child, args.methods, args.results, args.steps)
    args.results.mkdir(parents=True, exist_ok=True)
    datasets.load("digits")  # prepared once
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAG}".strip()
    for setting in ["1 device", *args.settings]:
        _, processes, devices = SETTINGS[setting]
        missing = [
            m for m in args.methods if not _file(args.results, setting, m, args.steps).exists()
        ]
        if not missing:
            continue
        children = local.start(
            "experiments.reliability.devices",
            [
                f"--child={setting}",
                f"--methods={','.join(missing)}",
                f"--steps={args.steps}",
                f"--results={args.results}",
            ],
            processes=processes,
            devices=devices,
        )
        if code := local.wait(children):
            sys.exit(f"{setting} failed with code {code}")
    found = compare(args.methods, args.settings, args.results, args.steps)
    print(table(found))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"steps": args.steps, "methods": found}, indent=1) + "\n")
    if any(cell["masks differ"] for of in found.values() for cell in of.values()):
        sys.exit("masks differ")


if __name__ == "__main__":
    main()
