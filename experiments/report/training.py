"""The report of a training run, from the files that the training job left in its directory."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from experiments.report.page import Page
from jaxsparse.analysis import flops, plots

_COUNTED = (
    "Operations are counted as in the RigL paper (multiplications and additions of linear layers and "
    "convolutions; normalisation and the optimizer neglected): what an implementation that skips zeros "
    "would need. The masks alone do not make dense hardware faster."
)


def report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `report.html`, `report.md` and `plots/` into the directory of a finished run; returns the
    path of the HTML page.

    The training job calls it at the end of a run. Call it again to have a page in the look of a newer
    version, or after a plot was lost: nothing is computed but the page.

    Args:
      workdir: the `--workdir` of `experiments.train`. Read are `config.json`, `metrics.jsonl` (a line
        per look: loss, accuracy, density and churn per layer) and `result.json`: the final
        `evaluation`, the `layers` as of `Summary.to_dict`, the dense `flops` of a forward pass by
        layer, and at which weights the method reads the gradient (`weight_gradient`, as for
        `flops.training_flops`).

    Raises:
      ValueError: a directory without these files.
    """
    workdir = pathlib.Path(workdir)
    for name in ("config.json", "metrics.jsonl", "result.json"):
        if not (workdir / name).is_file():
            raise ValueError(
                f"workdir={str(workdir)!r}: {name} is missing; give the --workdir of a run of "
                "experiments.train that has reached its last step"
            )
    config, result = (
        json.loads((workdir / name).read_text()) for name in ("config.json", "result.json")
    )
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return _page(config, history, result).write(workdir)[1]


def _page(config: dict[str, Any], history: list[dict[str, Any]], result: dict[str, Any]) -> Page:
    looks = [line for line in history if "density" in line]
    evals = [line for line in history if "eval_accuracy" in line]
    summary, dense, evaluation = result["summary"], result["flops"], result["evaluation"]
    layers = summary["leaves"]
    density = {name: row["nonzeros"] / max(1, row["size"]) for name, row in layers.items()}
    dense_total = sum(dense.values())
    final = flops.sparse_flops(dense, {name: density[name] for name in dense if name in density})
    training = _training_flops(looks, dense, result["weight_gradient"])

    title = f"{config['method']} on {config['dataset']} with {config['model']}"
    if config["method"] != "dense":
        title += f", {summary['sparsity']:.1%} sparse"
    page = Page(title)
    page.table(
        ["result", ""],
        [
            ["test accuracy", f"{evaluation['accuracy']:.2%}"],
            ["test loss", f"{evaluation['loss']:.4f}"],
            ["sparsity of the sparse layers", f"{summary['sparsity']:.2%}"],
            ["nonzero parameters", f"{summary['nonzeros']:,} of {summary['size']:,}"],
            ["operations of a forward pass", f"{final:,.0f} of {dense_total:,}"],
            ["  relative to dense", f"{final / dense_total:.3f}"],
            [
                "operations of training, relative to dense",
                "-" if training is None else f"{training / (3 * dense_total):.3f}",
            ],
            ["steps, batch", f"{config['steps']:,}, {config['batch_size']}"],
        ],
    )
    page.text(_COUNTED)
    page.heading("Training")
    if looks:
        _course(page, looks, evals, config["log_every"])
    page.heading("Layers")
    sparse = [name for name, row in layers.items() if row["mask_sparsity"] is not None]
    page.figure(
        plots.density_bars({name: density[name] for name in sparse or dense if name in density}),
        "density",
        "Nonzero weights of each sparse layer at the end",
    )
    page.table(
        ["layer", "shape", "weights", "nonzero", "sparsity", "operations", "of dense"],
        [
            [
                name,
                "x".join(map(str, row["shape"])) or "scalar",
                f"{row['size']:,}",
                f"{row['nonzeros']:,}",
                f"{row['sparsity']:.2%}",
                f"{dense[name] * density[name]:,.0f}" if name in dense else "-",
                f"{dense[name]:,}" if name in dense else "-",
            ]
            for name, row in layers.items()
        ],
    )
    if dense.get(""):
        page.text(f"Operations without weights (attention products): {dense['']:,}.")
    page.heading("Configuration")
    page.code(json.dumps(config, indent=2))
    return page


def _training_flops(looks, dense, weight_gradient) -> float | None:
    """The mean operations of a step; each look stands for the steps since the one before."""
    if not looks:
        return None
    total = sum(dense.values())
    per_step = [
        flops.training_flops(flops.sparse_flops(dense, look["density"]), total, weight_gradient)
        for look in looks
    ]
    weights = np.diff([0, *(look["step"] for look in looks)])
    return float(np.average(per_step, weights=weights))


def _course(page: Page, looks, evals, log_every: int) -> None:
    steps = [line["step"] for line in looks]

    def train_and_test(key):
        return {
            "train": (steps, [line[key] for line in looks]),
            "test": ([e["step"] for e in evals], [e[f"eval_{key}"] for e in evals]),
        }

    page.figure(
        plots.curves(train_and_test("loss"), title="Loss", ylabel="loss", log=True),
        "loss",
        f"Loss: mean of {log_every} steps, and on the test set",
    )
    page.figure(
        plots.curves(train_and_test("accuracy"), title="Accuracy", ylabel="accuracy"),
        "accuracy",
        "Accuracy on the training batches and on the test set",
    )
    # More layers than this cannot be told apart.
    layers = list(looks[-1]["layer_churn"])[:12]
    by_layer = lambda key: {name: [line[key].get(name, 0.0) for line in looks] for name in layers}
    page.figure(
        plots.sparsity(
            steps,
            [line["sparsity"] for line in looks],
            {name: [1 - d for d in values] for name, values in by_layer("density").items()},
        ),
        "sparsity",
        "Sparsity over the steps of training, of all sparse layers together and of each",
    )
    page.figure(
        plots.churn(steps, [line["churn"] for line in looks], by_layer("layer_churn")),
        "churn",
        f"Weights that are kept now and were zero {log_every} steps before, as a part of the kept ones",
    )
