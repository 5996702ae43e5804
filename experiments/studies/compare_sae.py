"""All families of sparse autoencoders on the same activations: what is recovered at how many active latents.

  python -m experiments.studies.compare_sae --data=planted [--seeds=3] [--out=docs/results]
  python -m experiments.studies.compare_sae --data=smollm2 --whole [--seeds=3] [--steps=200] [--batch-size=256] [--settings=1,3]
  python -m experiments.studies.compare_sae --data=smollm2 --whole --site=layers/3/down --text=code

*planted*: rows of a known dictionary with noise; the measure is the mean over true atoms of the largest cosine with
a learned one. *smollm2*: a layer of SmolLM2-135M, by default the residual stream over prose; the measure is the share
of the loss that is recovered when the reconstruction takes the place of the activations, 1 for the activations
themselves and 0 for zeros. Every family has some settings of its sparsity, the same number of steps, the same batches.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
from ml_collections import config_dict

from experiments import train_sae
from experiments.configs import sae_planted, sae_smollm2
from experiments.models import smollm2

# Options by family: what sets the number of active latents, from few to many.
SETTINGS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "planted": {
        "TopK": [{"k": k} for k in (2, 3, 5)],
        "BatchTopK": [{"k": k} for k in (2, 3, 5)],
        "MatryoshkaTopK": [{"ks": (1, k), "k": k} for k in (2, 3, 5)],
        "FeatureChoice": [{"k": k} for k in (2, 3, 5)],
        "ReLU": [{"l1": x} for x in (1.6, 0.8, 0.4)],
        "Gated": [{"l1": x} for x in (6.4, 3.2, 1.6)],
        "JumpReLU": [{"target_l0": float(k), "l0": 3.0} for k in (2, 3, 5)],
    },
    "smollm2": {
        "TopK": [{"k": k} for k in (16, 32, 64)],
        "BatchTopK": [{"k": k} for k in (16, 32, 64)],
        "MatryoshkaTopK": [{"ks": (k // 2, k), "k": k} for k in (16, 32, 64)],
        "FeatureChoice": [{"k": k} for k in (16, 32, 64)],
        "ReLU": [{"l1": x} for x in (8.0, 4.0, 2.0)],
        "Gated": [{"l1": x} for x in (8.0, 4.0, 2.0)],
        "JumpReLU": [{"target_l0": float(k), "l0": 100.0} for k in (16, 32, 64)],
    },
}
MEASURE = {"planted": "recovery", "smollm2": "loss_recovered"}


def configuration(args: argparse.Namespace, family: str, options: dict[str, Any], seed: int) -> Any:
    """The config of one run of the command `args`."""
    config: Any = (sae_planted if args.data == "planted" else sae_smollm2).get_config()
    for name in ("steps", "batch_size", "site", "text"):
        setattr(config, name, getattr(args, name) or config[name])
    if family in ("BatchTopK", "FeatureChoice"):
        options = options | {"threshold_from": config.steps // 2}
    with config.unlocked():
        config.options = config_dict.ConfigDict(options, convert_dict=False)
    config.family, config.seed = family, seed
    config.noise, config.eval_sequences = 0.05, 8
    config.sparsity_warmup = config.steps // 4
    config.log_every = config.checkpoint_every = config.steps
    config.keep_checkpoints = 1
    config.dead_after = 20 * config.batch_size
    return config


def study(args: argparse.Namespace, families: list[str]) -> list[dict[str, Any]]:
    """Measures of every run.

    Rows are written to a file as they are found, and read from there: the same command goes on where it stopped.
    """
    path = args.workdir / f"{args.data}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows: list[dict[str, Any]] = []
    loaded: dict[int, train_sae.Data] = {}
    for seed in range(args.seeds):
        for family in families:
            for number in args.settings:
                options = SETTINGS[args.data][family][number - 1]
                config = configuration(args, family, options, seed)
                asked = json.loads(config.to_json_best_effort()) | {"whole": args.whole}
                row = next((row for row in known if row["config"] == asked), None)
                if row is None:
                    # One network and its activations for all; of planted rows a draw for each seed.
                    key = seed if args.data == "planted" else 0
                    if key not in loaded:
                        whole = smollm2.load()[0] if args.whole and args.data == "smollm2" else None
                        loaded[key] = train_sae.load(config, whole)
                    with tempfile.TemporaryDirectory() as scratch:
                        model = train_sae.fit(config, scratch, loaded[key])
                    found = train_sae.evaluate(config, model, loaded[key])
                    row = dict(family=family, options=options, seed=seed, config=asked) | found
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                rows.append(row | {"options": options})
                print(
                    f"{family} {options} {seed}: L0 {row['l0']:.1f}, {row[MEASURE[args.data]]:.3f}",
                    flush=True,
                )
    return rows


def means(rows: list[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """Over the seeds of each family and setting: L0, the measure with its deviation, variance explained, dead."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['family']} {row['options']}", []).append(row)
    found = []
    for group in groups.values():
        values = [row[MEASURE[data]] for row in group]
        mean = lambda name, group=group: float(np.mean([row[name] for row in group]))
        found.append(
            dict(
                family=group[0]["family"],
                options=group[0]["options"],
                l0=mean("l0"),
                seeds=len(group),
                measure=float(np.mean(values)),
                deviation=float(np.std(values)),
                explained=mean("explained_variance"),
                dead=mean("dead"),
            )
        )
    return found


def others(file: pathlib.Path, families: list[str]) -> list[dict[str, Any]]:
    """What an earlier run found of families that this one leaves out."""
    rows = json.loads(file.read_text()) if file.exists() else []
    as_given = lambda value: tuple(value) if isinstance(value, list) else value
    options = lambda row: {name: as_given(value) for name, value in row["options"].items()}
    return [row | {"options": options(row)} for row in rows if row["family"] not in families]


def table(found: list[dict[str, Any]], data: str) -> str:
    """Markdown."""
    what = {"planted": "mean best cosine", "smollm2": "loss recovered"}[data]
    lines = [
        f"| family | setting | L0 | {what} | variance explained | dead |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        setting = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        lines.append(
            f"| {row['family']} | {setting} | {row['l0']:.1f} | {row['measure']:.3f} ± {row['deviation']:.3f} "
            f"| {row['explained']:.3f} | {row['dead']:.0%} |"
        )
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], data: str, path: pathlib.Path) -> None:
    """The measure over L0, one line for each family."""
    from jaxsparse.analysis import plots

    lines: dict[str, tuple[list[float], list[float]]] = {}
    order = list(SETTINGS[data])  # one colour for each family, in all plots
    for row in sorted(found, key=lambda row: (order.index(row["family"]), row["l0"])):
        xs, ys = lines.setdefault(row["family"], ([], []))
        xs.append(row["l0"])
        ys.append(row["measure"])
    names = {"planted": "mean best cosine of true atoms", "smollm2": "loss recovered"}
    figure = plots.curves(
        lines,
        title=f"Sparse autoencoders, {data}",
        xlabel="active latents per token",
        ylabel=names[data],
    )
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", choices=tuple(SETTINGS), default="planted")
    parser.add_argument(
        "--families", help="by commas, all by default; what was found of others is kept"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, help="rows of a step")
    parser.add_argument(
        "--settings", type=lambda text: [int(i) for i in text.split(",")], default=[1, 2, 3],
        help="which of the three settings of each family, by commas",
    )  # fmt: skip
    parser.add_argument("--site", help="smollm2: the layer, by its path")
    parser.add_argument("--text", choices=("prose", "code"), help="smollm2: what it reads")
    parser.add_argument(
        "--whole", action="store_true", help="smollm2: the loss is that of all 30 blocks"
    )
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/compare_sae"),
        help="where finished runs are kept",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    args = parser.parse_args(argv)
    families = args.families.split(",") if args.families else list(SETTINGS[args.data])
    if unknown := sorted(set(families) - set(SETTINGS[args.data])):
        parser.error(f"--families={','.join(unknown)}: use {', '.join(SETTINGS[args.data])}")
    if not set(args.settings) <= {1, 2, 3}:
        parser.error(f"--settings={args.settings}: use some of 1, 2, 3")
    if args.data == "planted" and (args.site or args.text):
        parser.error("--site and --text are of --data=smollm2")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = study(args, families)
    parts = ("sae", args.data, args.site and args.site.replace("/", "."), args.text)
    file = args.out / ("_".join(filter(None, parts)) + ".json")
    found = means(rows, args.data) + others(file, families)
    found.sort(key=lambda row: list(SETTINGS[args.data]).index(row["family"]))
    file.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.data, file.with_suffix(".png"))
    print(table(found, args.data))


if __name__ == "__main__":
    main()
