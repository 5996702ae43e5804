"""Trains a grid of methods and sparsities on one small data set, and draws accuracy over sparsity.

  python -m experiments.compare --methods=rigl,set,st3 --sparsities=0.8,0.9,0.95,0.98 --seeds=3
  python -m experiments.compare --dataset=digits --model=cnn

Made to be quick: the data set lies on the device, all seeds train at once (`vmap`), a run is one
`scan`, and a method compiles once, for its sparsity is an argument. Methods that cannot be asked for a
sparsity appear once, at the one they reach. All share the optimizer, its schedule, the order of the
data and the number of steps; each has its own default options.
"""

import importlib
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from jax import lax

import jaxsparse
from experiments import datasets, report
from experiments.configs import base
from experiments.train import make_task
from jaxsparse.analysis import flops, plots
from jaxsparse.analysis.page import markdown_table
from jaxsparse.targets import path_name

METHODS = flags.DEFINE_list("methods", ["all"], "methods to compare, or all; dense is always run")
SPARSITIES = flags.DEFINE_list("sparsities", ["0.8", "0.9", "0.95", "0.98"], "what to ask for")
SEEDS = flags.DEFINE_integer("seeds", 3, "networks per point, trained together", lower_bound=1)
DATASET = flags.DEFINE_string("dataset", "mnist1d", "a small data set of experiments/datasets")
MODEL = flags.DEFINE_string("model", "mlp", "a model of experiments/models")
STEPS = flags.DEFINE_integer("steps", None, "training steps; default: those of the config")
OUT = flags.DEFINE_string("out", "", "directory of the results; default: runs/compare")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where TFDS keeps its files")


# SR-STE is defined for N:M patterns: it is swept over these instead.
NM_STRUCTURES = ("2:4", "1:4", "1:8")


def make_config(dataset: str, model: str):
    """That of `configs/<dataset>_<model>.py` where it exists, else the defaults with both set."""
    try:
        return importlib.import_module(f"experiments.configs.{dataset}_{model}").get_config()
    except ModuleNotFoundError:
        config = base.get_config()
        config.dataset, config.model = dataset, model
        return config


def on_device(data: datasets.Dataset, split: str) -> dict[str, jax.Array]:
    """A whole split, prepared."""
    source = data.splits[split]
    examples = [data.prepare(source[i], None) for i in range(len(source))]
    return {key: jnp.stack([e[key] for e in examples]) for key in examples[0]}


def _sweep(method: str, sparsities) -> list[tuple[float | None, str | None]]:
    """What to train: pairs of a sparsity and an N:M structure, one of them at most."""
    if method == "sr_ste":
        return [(None, structure) for structure in NM_STRUCTURES]
    if not jaxsparse.METHODS[method].controls_sparsity:
        return [(None, None)]
    return [(sparsity, None) for sparsity in sparsities]


def make_run(config, data: datasets.Dataset, method: str, structure: str | None = None):
    """The function `(seeds [S], sparsity) -> results [S]` that trains the networks of one point."""
    config = _with_method(config, method)
    if structure is not None:
        config.options.structure = structure
    splits = {split: on_device(data, split) for split in ("train", "test")}
    size, batch_size = splits["train"]["y"].shape[0], config.batch_size
    per_epoch = size // batch_size

    def run(splits, seed, sparsity):
        task = make_task(config, data, seed=seed, sparsity=sparsity)
        order_key = jax.random.key(seed)

        def step(carry, i):
            state, order = carry
            epoch, position = i // per_epoch, i % per_epoch
            # The predicates here and in the methods depend on the step only, not on the seed, so that
            # `vmap` keeps these branches branches.
            order = lax.cond(
                position == 0,
                lambda: jax.random.permutation(jax.random.fold_in(order_key, epoch), size),
                lambda: order,
            )
            rows = lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
            state, numbers = task.train_step(
                state, jax.tree.map(lambda x: x[rows], splits["train"])
            )
            return (state, order), numbers["loss"]

        carry = (task.init(), jnp.arange(size))
        (state, _), losses = lax.scan(step, carry, jnp.arange(config.steps))
        test = splits["test"] | {"weight": jnp.ones(splits["test"]["y"].shape[0])}
        sums = task.eval_step(state, test)
        leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
        return {
            "accuracy": sums["accuracy"] / sums["count"],
            "loss": sums["loss"] / sums["count"],
            "train_loss": jnp.mean(losses[-per_epoch:]),
            "nonzeros": {path_name(path): jnp.sum(p != 0) for path, p in leaves},
        }

    vmapped = jax.jit(jax.vmap(run, in_axes=(None, 0, None)))
    return lambda seeds, sparsity: vmapped(splits, seeds, sparsity)


def compare(config, methods, sparsities, num_seeds: int) -> dict[str, Any]:
    """Trains the grid; returns the points as they are written to the JSON file."""
    data = datasets.load(config.dataset, data_dir=config.data_dir)
    dense_task = make_task(_with_method(config, "dense"), data)
    state = jax.eval_shape(dense_task.init)
    sizes = {path_name(p): x.size for p, x in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    dense_flops = report.forward_flops(dense_task, data, state)
    seeds = jnp.arange(num_seeds)
    points = []
    for method in methods:
        masked = _masked_leaves(config, data, method)
        run, compiled_for = None, ""
        for sparsity, structure in _sweep(method, sparsities):
            if run is None or structure != compiled_for:
                run, compiled_for = make_run(config, data, method, structure), structure
            started = time.monotonic()
            result = jax.device_get(run(seeds, sparsity))
            seconds = time.monotonic() - started
            kept = {name: float(np.mean(n)) for name, n in result["nonzeros"].items()}
            of = masked or [name for name in sizes if name in dense_flops]
            forward = flops.sparse_flops(
                dense_flops, {n: kept[n] / sizes[n] for n in dense_flops if n in sizes}
            )
            point = {
                "method": method,
                "asked": sparsity,
                "structure": structure,
                "sparsity": 1 - sum(kept[n] for n in of) / sum(sizes[n] for n in of),
                "accuracy": float(np.mean(result["accuracy"])),
                "deviation": float(np.std(result["accuracy"], ddof=min(1, num_seeds - 1))),
                "accuracies": [float(a) for a in result["accuracy"]],
                "test_loss": float(np.mean(result["loss"])),
                "train_loss": float(np.mean(result["train_loss"])),
                "forward_flops": forward / sum(dense_flops.values()),
                "seconds": seconds,
            }
            points.append(point)
            print(
                f"{method:>17} {sparsity or structure or '-'!s:>5}: accuracy "
                f"{point['accuracy']:.4f} +- {point['deviation']:.4f}, sparsity "
                f"{point['sparsity']:.4f}, {seconds:.1f} s",
                flush=True,
            )
    return {
        "dataset": config.dataset,
        "model": config.model,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seeds": num_seeds,
        "parameters": sum(sizes.values()),
        "points": points,
    }


def write(results: dict[str, Any], out: pathlib.Path, command: str) -> list[pathlib.Path]:
    """Writes the plot, the table and the points; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    name = f"compare_{results['dataset']}_{results['model']}"
    points = results["points"]
    dense = next((p for p in points if p["method"] == "dense"), None)
    series: dict[str, list] = {}
    for point in points:
        if point["method"] != "dense":
            series.setdefault(point["method"], []).append(point)
    title = f"{results['dataset']}, {results['model']}, {results['seeds']} seeds"
    figure = plots.accuracy_over_sparsity(
        series, dense=dense["accuracy"] if dense else None, title=title
    )
    paths = [out / f"{name}.{ending}" for ending in ("png", "md", "json")]
    figure.savefig(paths[0])
    paths[1].write_text(_page(results, series, dense, command, paths[0].name))
    paths[2].write_text(json.dumps(results | {"command": command}, indent=1) + "\n")
    return paths


def _page(results, series, dense, command, image):
    asked = sorted({p["asked"] for ps in series.values() for p in ps if p["asked"] is not None})
    cell = lambda p: f"{100 * p['accuracy']:.1f} ± {100 * p['deviation']:.1f}"
    controlled, own = [], []
    for method, ps in series.items():
        by_asked = {p["asked"]: p for p in ps}
        if None in by_asked:
            for p in ps:
                name = f"{method} {p['structure']}" if p["structure"] else method
                own.append([name, f"{p['sparsity']:.2%}", cell(p), f"{p['forward_flops']:.3f}"])
        else:
            controlled.append([method, *(cell(by_asked[s]) for s in asked)])
    parts = [
        f"# {results['dataset']} with {results['model']}: test accuracy over sparsity",
        f"Mean and standard deviation over {results['seeds']} seeds, in per cent; {results['steps']} "
        f"steps of {results['batch_size']} examples, {results['parameters']:,} parameters. Every "
        "method has its default options and the same optimizer, schedule and data.",
        f"```\n{command}\n```",
        f"![Accuracy over sparsity]({image})",
    ]
    if dense:
        parts.append(f"Dense: {cell(dense)}.")
    if controlled:
        parts.append(markdown_table(["method", *(f"{s:.0%}" for s in asked)], controlled))
    if own:
        parts.append("Methods that learn their sparsity, and N:M patterns, which fix it:")
        parts.append(
            markdown_table(["method", "sparsity", "accuracy", "forward FLOPs / dense"], own)
        )
    off = [
        f"{p['method']} at {p['asked']:.0%}: {p['sparsity']:.2%}"
        for ps in series.values()
        for p in ps
        if p["asked"] is not None and abs(p["sparsity"] - p["asked"]) > 2e-3
    ]
    if off:
        parts.append(
            "Reached sparsity (weights that are exactly zero) where it is not the one asked for: "
            + "; ".join(off)
            + "."
        )
    total = sum(p["seconds"] for p in results["points"])
    parts.append(f"Wall-clock of the whole grid, compilation included: {total / 60:.1f} minutes.")
    return "\n\n".join(parts) + "\n"


def _with_method(config, method):
    config = config.copy_and_resolve_references()
    config.method = method
    return config


def _masked_leaves(config, data, method):
    """The paths of the leaves that have a mask."""
    state = jax.eval_shape(make_task(_with_method(config, method), data).init)
    if not jaxsparse.masking.find_states(state.opt_state):
        return []
    masks = jax.eval_shape(jaxsparse.get_masks, state.opt_state)
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(masks)[0]]


def main(argv):
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        config = make_config(DATASET.value, MODEL.value)
        config.data_dir = DATA_DIR.value
        config.steps = STEPS.value or config.steps
        names = list(jaxsparse.METHODS) if METHODS.value == ["all"] else METHODS.value
        methods = ["dense", *(m for m in names if m != "dense")]
        for method in methods:
            jaxsparse.METHODS[method]  # an unknown name stops here, not after an hour
        sparsities = [float(s) for s in SPARSITIES.value]
        bad = [s for s in sparsities if not 0 <= s < 1]
        if bad:
            raise ValueError(f"sparsities={bad}: must be in [0, 1)")
        results = compare(config, methods, sparsities, SEEDS.value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    command = " ".join(["python -m experiments.compare", *(a for a in argv_without_paths())])
    paths = write(results, pathlib.Path(OUT.value or "runs/compare"), command)
    print("wrote " + ", ".join(map(str, paths)))


def argv_without_paths() -> list[str]:
    """The arguments that decide the result."""
    return [a for a in sys.argv[1:] if not a.startswith(("--out", "--data_dir"))]


if __name__ == "__main__":
    app.run(main)
