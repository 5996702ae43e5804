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

import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from absl import logging as absl_logging

import jaxsparse
from experiments import datasets, parallel, train
from experiments.configs import base
from experiments.launch import local
from experiments.reliability import runs
from jaxsparse.analysis.page import markdown_table

METHODS = flags.DEFINE_list("methods", ["all"], "names in jaxsparse.METHODS, or all")
STEPS = flags.DEFINE_integer("steps", 500, "steps of training")
CHOSEN = flags.DEFINE_list("settings", ["all"], "names of SETTINGS to compare with one device")
RESULTS = flags.DEFINE_string("results", "runs/devices", "directory for what the settings end with")
OUT = flags.DEFINE_string("out", "", "JSON file of the results")
CHILD = flags.DEFINE_string(
    "child", "", "one setting, in a process of its own (used by this script)"
)

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
    strategy = parallel.create(config)
    data = datasets.load(config.dataset)
    task = train.make_task(config, data, strategy.axis_name, mesh=strategy.mesh)
    state = strategy.init(task.init)
    step = strategy.compile(task.train_step, donate=True)
    host = (jax.process_index(), jax.process_count())
    for batch in datasets.batches(data, config.batch_size, stop=config.steps, host=host):
        state, _ = step(state, strategy.put(batch))
    logical = parallel.to_host(strategy.to_save(state))
    sparse = jaxsparse.masking.find_states(logical.opt_state)
    by_path = lambda tree: {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    }
    return {
        "mask": by_path(jaxsparse.get_masks(logical.opt_state) if sparse else {}),
        "state": by_path((logical.params, logical.opt_state)),
    }


def child(setting: str, methods: list[str]) -> None:
    """Trains every method in this setting and saves what `final_state` gives."""
    train.initialize_from_flags()
    for method in methods:
        started = time.monotonic()
        parts = final_state(method, SETTINGS[setting][0], STEPS.value)
        if jax.process_index() == 0:
            arrays = {
                f"{kind}:{path}": x for kind, part in parts.items() for path, x in part.items()
            }
            path = _file(setting, method)
            with path.with_suffix(".part").open("wb") as out:  # whole, or not there
                np.savez(out, **arrays)  # pyright: ignore[reportArgumentType]
            path.with_suffix(".part").rename(path)
            print(f"{setting}: {method}, {time.monotonic() - started:.1f} s", flush=True)
        jax.clear_caches()


def _file(setting, method):
    return pathlib.Path(RESULTS.value) / f"{setting.replace(' ', '_')}-{method}-{STEPS.value}.npz"


def compare(methods: list[str], settings: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """By method and setting: entries of masks and of the whole state that differ from one device's, and
    the largest difference of a number of the state."""
    results = {}
    for method in methods:
        reference = dict(np.load(_file("1 device", method)))
        for setting in settings:
            other = dict(np.load(_file(setting, method)))
            unequal = runs.differences(reference, other)
            results.setdefault(method, {})[setting] = {
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
    return results


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


def main(argv):
    absl_logging.set_verbosity(absl_logging.WARNING)
    methods = list(jaxsparse.METHODS) if METHODS.value == ["all"] else METHODS.value
    if CHILD.value:
        return child(CHILD.value, methods)
    pathlib.Path(RESULTS.value).mkdir(parents=True, exist_ok=True)
    datasets.load("digits")  # prepared once
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAG}".strip()
    settings = list(SETTINGS)[1:] if CHOSEN.value == ["all"] else CHOSEN.value
    for setting in ["1 device", *settings]:
        _, processes, devices = SETTINGS[setting]
        missing = [m for m in methods if not _file(setting, m).exists()]
        if not missing:
            continue
        children = local.start(
            "experiments.reliability.devices",
            [
                f"--child={setting}", f"--methods={','.join(missing)}", f"--steps={STEPS.value}",
                f"--results={RESULTS.value}",
            ],
            processes=processes,
            devices=devices,
        )  # fmt: skip
        if code := local.wait(children):
            sys.exit(f"{setting} failed with code {code}")
    results = compare(methods, settings)
    print(table(results))
    if OUT.value:
        path = pathlib.Path(OUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"steps": STEPS.value, "methods": results}, indent=1) + "\n")
    if any(cell["masks differ"] for of in results.values() for cell in of.values()):
        sys.exit("masks differ")


if __name__ == "__main__":
    app.run(main)
