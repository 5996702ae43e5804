"""Trains a grid of methods and sparsities on one small data set, and draws accuracy over sparsity.

  python -m experiments.studies.compare --methods=rigl,set,st3 --sparsities=0.8,0.9,0.95,0.98 --seeds=3
  python -m experiments.studies.compare --dataset=digits --model=cnn
  python -m experiments.studies.compare --methods=dsr --sparsities=0.98 --options=allocation=erk,threshold=0.03

Made to be quick: the data set lies on the device, a method compiles once, all its seeds and sparsities
train at once (`vmap`), and a run is one `scan`. Results are saved after each method: the same command
goes on where it was stopped, and one with more methods or sparsities adds what is missing.

All share the optimizer, its schedule, the order of the data and the number of steps; each has its own
default options. Exceptions are listed in `NEEDS` (without which a method would not be itself), and
`SETTINGS` (methods that cannot be asked for a sparsity appear at the ones that these options lead to).
"""

import argparse
import importlib
import json
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from jax import lax

import jaxsparse
from experiments import datasets, fields
from experiments.configs import base
from experiments.report.page import markdown_table
from experiments.report.result import forward_flops
from experiments.studies.commands import commands_block, read_options
from experiments.task import Task, make_task
from jaxsparse import nn
from jaxsparse.analysis import flops, plots
from jaxsparse.state import find_states
from jaxsparse.targets import is_kernel, path_name

HEADLINE = ("static", "set", "rigl", "magnitude", "granet", "top_kast", "st3")

# Fields of the config that a method needs to be itself. GSM lives of a decay inside a strong momentum.
NEEDS: dict[str, dict[str, Any]] = {
    "gsm": {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.98, "weight_decay": 5e-4},
}

# What methods that cannot be asked for a sparsity are swept over: fields of the config, by label.
_NM = {label: {"structure": label} for label in ("2:4", "1:4", "1:8")}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sr_ste": _NM,
    "mdgf": _NM,
    "sdgf": _NM,
    "bi_mask": _NM,
    "bdwp": _NM,
    "slope": _NM,
    # Thresholds start high, for the runs are short; STR's move by weight decay only.
    "str": {
        f"decay {decay}, s {s}": {"weight_decay": decay, "options.threshold_init": s}
        for decay, s in ((0.3, -3.0), (1.0, -4.0), (1.0, -3.0))
    },
    "autosparse": {
        f"alpha {alpha}, s {s}": {"options.alpha": alpha, "options.threshold_init": s}
        for alpha, s in ((0.5, -5.0), (0.5, -2.0), (0.1, -2.0))
    },
    # Scores share the optimizer of the weights here, whose learning rate is low for them.
    "soft_movement": {
        f"strength {s}": {"options.strength": s, "options.threshold": 0.4} for s in (30.0, 300.0)
    },
    "sap": {f"a round of {n} steps": {"options.update_every": n} for n in (100, 300)},
}

# These are trained with layers that have two views of their weights.
TWO_VIEW = ("bi_mask", "bdwp", "slope")

FAMILIES = {
    "Sparse from the first step": ("fixed", "dynamic"),
    "Dense at first": ("gradual",),
    "Raw weights kept": ("projected",),
}


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
    return {key: jnp.asarray(np.stack([e[key] for e in examples])) for key in examples[0]}


def sweep(method: str, sparsities: Sequence[float]) -> list[tuple[str | None, list]]:
    """What to train: a label of `SETTINGS`, or None, and the sparsities to ask for with it."""
    if method in SETTINGS:
        return [(label, [None]) for label in SETTINGS[method]]
    return [(None, list(sparsities) if jaxsparse.METHODS[method].controls_sparsity else [None])]


def configure(
    config,
    data: datasets.Dataset,
    method: str,
    setting: str | None,
    changed: Mapping[str, Any] | None = None,
):
    """The config of a method: its needs, its setting, what is `changed`, and N:M where groups divide."""
    config = config.copy_and_resolve_references()
    config.method = method
    values = NEEDS.get(method, {}) | (SETTINGS[method][setting] if setting else {})
    for name, value in (changed or {}).items():
        own = name.removeprefix("config.")
        values[own if own != name or name == "structure" else f"options.{name}"] = value
    with config.unlocked():
        config.update_from_flattened_dict(values)
        if method in TWO_VIEW:
            config.model_options.two_view = True
        if config.structure:
            config.options.targets = _divisible(config, data)
    fields.check(config)
    return config


def _divisible(config, data) -> str:
    """The kernels whose inputs and outputs the groups divide: the same ones for one view and for two."""
    kind: Any = jaxsparse.structures.parse(config.structure)
    plain = config.copy_and_resolve_references()
    plain.method, plain.options = "dense", {}
    params = jax.eval_shape(make_task(plain, data).init).params
    paths = [
        path_name(path)
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
        if is_kernel(path_name(path), x) and not any(x.shape[axis] % kind.m for axis in (-2, -1))
    ]
    if not paths:
        raise ValueError(f"groups of {kind.m} divide both sides of no kernel")
    return f"^({'|'.join(map(re.escape, paths))})$"


def _refreshed(task: Task, method: str):
    """`init` and `train_step` of the task, with the second view brought up to date."""
    if method not in TWO_VIEW:
        return task.init, task.train_step
    fresh = lambda s: s._replace(stats=nn.refresh(s.stats, s.params, s.opt_state))

    def train_step(state, batch):
        state, numbers = task.train_step(state, batch)
        return fresh(state), numbers

    return lambda: fresh(task.init()), train_step


def make_run(config, data: datasets.Dataset, splits: dict[str, dict[str, jax.Array]]):
    """The function `(seeds [P], sparsities [P] or None) -> results [P]` that trains P networks on the
    splits "train" and "test" of `on_device`."""
    size, batch_size = splits["train"]["y"].shape[0], config.batch_size
    per_epoch = size // batch_size

    def run(splits, seed, sparsity):
        task = make_task(config, data, seed=seed, sparsity=sparsity)
        init, train_step = _refreshed(task, config.method)
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
            batch = jax.tree.map(lambda x: x[rows], splits["train"])
            state, numbers = train_step(state, batch)
            return (state, order), numbers["loss"]

        (state, _), losses = lax.scan(step, (init(), jnp.arange(size)), jnp.arange(config.steps))
        test = splits["test"] | {"weight": jnp.ones(splits["test"]["y"].shape[0])}
        sums = task.eval_step(state, test)
        leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
        return {
            "accuracy": sums["accuracy"] / sums["count"],
            "loss": sums["loss"] / sums["count"],
            "train_loss": jnp.mean(losses[-per_epoch:]),
            "nonzeros": {path_name(path): jnp.sum(p != 0) for path, p in leaves},
        }

    compiled = jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))
    return lambda seeds, sparsities: compiled(splits, seeds, sparsities)


def compare(
    config,
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    *,
    done: Sequence[dict] = (),
    save: Callable[[list[dict]], Any] = lambda points: None,
    changed: Mapping[str, Any] | None = None,
    command: str = "",
) -> list[dict[str, Any]]:
    """Trains the grid; returns the points as they are written to the JSON file.

    `done` are points of an earlier run that are not to be repeated; `save` is called with all points
    after each method; `changed` are options that are not the methods' defaults (dense has none);
    `command` is noted in each new point. A method that cannot be trained so has a point with the
    reason.
    """
    data = datasets.load(config.dataset, data_dir=config.data_dir)
    splits = {split: on_device(data, split) for split in ("train", "test")}
    points = list(done)
    known = {(p["method"], p["setting"], p["asked"]) for p in points}
    for method in methods:
        own = {} if method == "dense" else dict(changed or {})
        for setting, asked in sweep(method, sparsities):
            label = " ".join([setting or "", *(f"{k}={v}" for k, v in own.items())]).strip() or None
            left = [s for s in asked if (method, label, s) not in known]
            if not left:
                continue
            started = time.monotonic()
            try:
                now = configure(config, data, method, setting, own)
                new = _points(now, data, splits, left, seeds)
            except ValueError as error:
                new = [{"asked": s, "error": str(error)} for s in left]
            seconds = (time.monotonic() - started) / len(left)
            told = {"seconds": seconds, "command": command}
            new = [{"method": method, "setting": label, **p, **told} for p in new]
            for point in new:
                print(_line(point), flush=True)
            points += new
            save(points)
            jax.clear_caches()
    return points


def _points(
    config, data, splits, asked: Sequence[float | None], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One point per sparsity, all trained in one program."""
    count = len(seeds)
    every = jnp.tile(jnp.asarray(seeds), len(asked))
    wanted = None if asked[0] is None else jnp.repeat(jnp.asarray(asked, jnp.float32), count)
    results = jax.device_get(make_run(config, data, splits)(every, wanted))
    task = make_task(config, data)
    state = jax.eval_shape(task.init)
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    sizes = {path_name(p): x.size for p, x in leaves}
    dense_flops = forward_flops(task, data, state)
    of = _masked_leaves(state) or list(dense_flops)
    points = []
    for i, s in enumerate(asked):
        mine = jax.tree.map(lambda x, i=i: x[i * count : (i + 1) * count], results)
        kept = {name: float(np.mean(n)) for name, n in mine["nonzeros"].items()}
        densities = {name: kept[name] / sizes[name] for name in dense_flops if name in sizes}
        forward = flops.sparse_flops(dense_flops, densities)
        points.append(
            {
                "asked": s,
                "sparsity": 1 - sum(kept[n] for n in of) / sum(sizes[n] for n in of),
                "accuracy": float(np.mean(mine["accuracy"])),
                "deviation": float(np.std(mine["accuracy"], ddof=min(1, count - 1))),
                "accuracies": [float(a) for a in mine["accuracy"]],
                "test_loss": float(np.mean(mine["loss"])),
                "train_loss": float(np.mean(mine["train_loss"])),
                "forward_flops": forward / sum(dense_flops.values()),
            }
        )
    return points


def _masked_leaves(state) -> list[str]:
    """The paths of the leaves that have a mask."""
    if not find_states(state.opt_state):
        return []
    masks = jax.eval_shape(jaxsparse.get_masks, state.opt_state)
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(masks)[0]]


def _name(point) -> str:
    """The row of a point: its method, and options that are not its defaults."""
    changed = point["setting"] if point["asked"] is not None else None
    return f"{point['method']} {changed or ''}".strip()


def _line(point) -> str:
    name = f"{_name(point):>17} {point['asked'] or point['setting'] or '-'!s:>5}: "
    if "error" in point:
        return name + point["error"]
    return (
        f"{name}accuracy {point['accuracy']:.4f} +- {point['deviation']:.4f}, sparsity "
        f"{point['sparsity']:.4f}, {point['seconds']:.1f} s"
    )


def write(
    facts: dict[str, Any], points: list[dict], out: pathlib.Path, headline: Sequence[str] = ()
) -> list[pathlib.Path]:
    """Writes two plots, the table and the points; returns their paths."""
    name = f"compare_{facts['dataset']}_{facts['model']}"
    paths = [out / f"{name}{ending}" for ending in (".png", "_headline.png", ".md", ".json")]
    out.mkdir(parents=True, exist_ok=True)
    sound = [p for p in points if "error" not in p]
    dense = next((p for p in sound if p["method"] == "dense"), None)
    series: dict[str, list] = {}
    for point in sound:
        if point["method"] != "dense":
            series.setdefault(_name(point), []).append(point)
    level = dense["accuracy"] if dense else None
    title = f"{facts['dataset']}, {facts['model']}, {len(facts['seeds'])} seeds"
    nm = {m: p for m, p in series.items() if m in SETTINGS and SETTINGS[m] is _NM}
    panels = {
        family: {
            m: p
            for m, p in series.items()
            if m not in nm and jaxsparse.METHODS[p[0]["method"]].dynamics in kinds
        }
        for family, kinds in FAMILIES.items()
    } | {"N:M patterns": nm}
    panels = {family: members for family, members in panels.items() if members}
    plots.accuracy_panels(panels, dense=level, title=title).savefig(paths[0])
    small = {m: series[m] for m in headline if m in series}
    plots.accuracy_over_sparsity(small, dense=level, title=title).savefig(paths[1])
    paths[2].write_text(_page(facts, points, series, small, dense, paths))
    save_points(facts, points, paths[3])
    return paths


def save_points(facts, points, path: pathlib.Path):
    """The points, and what they have in common."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, "points": points}, indent=1) + "\n")


def load_points(facts, path: pathlib.Path) -> list[dict]:
    """The points of an earlier run.

    Raises:
      ValueError: of a run with other facts.
    """
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    other = {k: (old["facts"].get(k), v) for k, v in facts.items() if old["facts"].get(k) != v}
    if other:
        told = "; ".join(f"{k} {a} there, {b} here" for k, (a, b) in other.items())
        raise ValueError(f"{path} holds points of another run ({told}); give another --out")
    return old["points"]


def _cell(p) -> str:
    return f"{100 * p['accuracy']:.1f} ± {100 * p['deviation']:.1f}"


def _by_sparsity(series) -> str:
    """A table with a column per sparsity, best first at the highest."""
    asked = sorted({p["asked"] for ps in series.values() for p in ps})
    rows = []
    for method, ps in series.items():
        found = {p["asked"]: p for p in ps}
        rows.append(
            (
                [-found[s]["accuracy"] if s in found else 0.0 for s in reversed(asked)],
                [method, *(_cell(found[s]) if s in found else "-" for s in asked)],
            )
        )
    return markdown_table(
        ["method", *(f"{s:.0%}" for s in asked)], [cells for _, cells in sorted(rows)]
    )


def _page(facts, points, series, headline, dense, paths):
    controlled = {m: ps for m, ps in series.items() if ps[0]["asked"] is not None}
    own = {m: ps for m, ps in series.items() if ps[0]["asked"] is None}
    parts = [
        f"# {facts['dataset']} with {facts['model']}: test accuracy over sparsity",
        f"Mean and standard deviation over {len(facts['seeds'])} seeds, in per cent; "
        f"{facts['steps']} steps of {facts['batch_size']} examples, {facts['parameters']:,} "
        "parameters. Every method has its default options and the same optimizer, schedule and data, "
        "but for what `experiments/studies/compare.py` lists in `NEEDS`.",
        commands_block(points),
        f"![Accuracy over sparsity]({paths[0].name})",
    ]
    if dense:
        parts.append(f"Dense: {_cell(dense)}.")
    if controlled:
        parts.append(_by_sparsity(controlled))
    if own:
        rows = [
            [
                f"{m} {p['setting'] or ''}".strip(),
                f"{p['sparsity']:.2%}",
                _cell(p),
                f"{p['forward_flops']:.3f}",
            ]
            for m, ps in own.items()
            for p in ps
        ]
        parts.append(
            "Methods that learn their sparsity, and N:M patterns, which fix it (in layers whose sides "
            "their groups divide; the others are dense):"
        )
        parts.append(
            markdown_table(["method", "sparsity", "accuracy", "forward FLOPs / dense"], rows)
        )
    if headline:
        parts.append(f"![A few of them]({paths[1].name})")
    off = [
        f"{m} at {p['asked']:.0%}: {p['sparsity']:.2%}"
        for m, ps in controlled.items()
        for p in ps
        if abs(p["sparsity"] - p["asked"]) > 2e-3
    ]
    if off:
        parts.append(
            "Reached sparsity (weights that are exactly zero) where it is not the one asked for: "
            + "; ".join(off)
            + "."
        )
    failed = [f"{p['method']} ({p['error']})" for p in points if "error" in p]
    if failed:
        parts.append("Without a result: " + "; ".join(failed) + ".")
    total = sum(p["seconds"] for p in points)
    parts.append(f"Wall-clock of the whole grid, compilation included: {total / 60:.1f} minutes.")
    return "\n\n".join(parts) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with lists as lists."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = lambda text: [part for part in text.split(",") if part]
    add = parser.add_argument
    add("--methods", type=names, default=["all"], help="names, or all; dense is always run")
    add("--sparsities", type=names, default=["0.8", "0.9", "0.95", "0.98"], help="what to ask for")
    add("--seeds", type=int, default=3, help="networks per point, trained together")
    add("--first_seed", type=int, default=0, help="the first of the seeds")
    add("--dataset", default="mnist1d", help="a small data set of experiments/datasets")
    add("--model", default="mlp", help="a model of experiments/models")
    add(
        "--model_option",
        action="append",
        default=[],
        help="an argument of the model that is not that of the config: features=(25,25,25)",
    )
    add("--steps", type=int, help="training steps; default: those of the config")
    add(
        "--options",
        type=names,
        default=[],
        help="options of these methods that are not their defaults: allocation=erk,drop_fraction=0.2; a "
        "field of the config by config.cycles=2. Such points have a row of their own",
    )
    add("--headline", type=names, default=HEADLINE, help="methods of the small plot and table")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/compare"), help="of the results")
    add("--data_dir", help="where TFDS keeps its files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        config: Any = make_config(args.dataset, args.model)
        config.data_dir = args.data_dir
        with config.model_options.unlocked():
            config.model_options.update(read_options(args.model_option))
        config.steps = args.steps or config.steps
        names = list(jaxsparse.METHODS) if args.methods == ["all"] else args.methods
        methods = ["dense", *(m for m in names if m != "dense")]
        for method in [*methods, *args.headline]:
            jaxsparse.METHODS[method]  # an unknown name stops here, not after an hour
        sparsities = [float(s) for s in args.sparsities]
        bad = [s for s in sparsities if not 0 <= s < 1]
        if bad:
            raise ValueError(f"sparsities={bad}: must be in [0, 1)")
        if args.seeds < 1 or args.first_seed < 0:
            raise ValueError(
                f"seeds={args.seeds}, first_seed={args.first_seed}: at least one network, and no seed "
                "below 0"
            )
        seeds = list(range(args.first_seed, args.first_seed + args.seeds))
        facts = {
            "dataset": config.dataset,
            "model": config.model,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seeds": seeds,
            "parameters": _size(config),
        }
        changed = read_options(args.options)
        path = args.out / f"compare_{config.dataset}_{config.model}.json"
        done = load_points(facts, path)
    except ValueError as error:
        sys.exit(f"error: {error}")
    command = ["python -m experiments.studies.compare", *_without_paths(argv)]
    points = compare(
        config,
        methods,
        sparsities,
        seeds,
        done=done,
        save=lambda points: save_points(facts, points, path),
        changed=changed,
        command=" ".join(command),
    )
    paths = write(facts, points, args.out, args.headline)
    print("wrote " + ", ".join(map(str, paths)))


def _size(config) -> int:
    data = datasets.load(config.dataset, data_dir=config.data_dir)
    task = make_task(configure(config, data, "dense", None), data)
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(task.init).params))


def _without_paths(argv: Sequence[str]) -> list[str]:
    """The arguments that decide the result, quoted for a shell."""
    other = ("--out", "--data_dir", "--headline")
    return [shlex.quote(a) for a in argv if not a.startswith(other)]


if __name__ == "__main__":
    main()
