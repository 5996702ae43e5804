"""The page at the end of a run: accuracy, sparsity per layer, operations, plots."""

import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse
from experiments import logs
from jaxsparse.analysis import flops, plots
from jaxsparse.analysis.report import Report


def pattern_numbers(counts) -> dict[str, object]:
    """What one look at the zero pattern gives, for the logs: counted on the host, in integers.

    `counts` has `kept`, `born` (kept now, not at the last look) and `size` of the sparse leaves.
    """
    counts = jax.tree.map(lambda x: int(np.sum(x, dtype=np.int64)), jax.device_get(counts))
    kept, born, size = counts["kept"], counts["born"], counts["size"]
    return {
        "sparsity": 1 - sum(kept.values()) / max(1, sum(size.values())),
        "density": {name: kept[name] / size[name] for name in kept},
        "churn": sum(born.values()) / max(1, sum(kept.values())),
        "layer_churn": {name: born[name] / max(1, kept[name]) for name in kept},
    }


def forward_flops(task, data, state) -> dict[str, int]:
    """Dense operations of one example's forward pass, by leaf."""
    x = jax.ShapeDtypeStruct((1, *data.shape), jnp.int32 if data.is_text else jnp.float32)
    apply = lambda params, stats, x: task.apply(params, stats, x, train=False)[0]
    return flops.forward_flops(apply, state.params, state.stats, x)


def weight_gradient(method: str, update_every: int | None) -> Literal["sparse", "dense"] | int:
    """At which weights the gradient is needed: see `jaxsparse.analysis.flops.training_flops`."""
    record = jaxsparse.METHODS[method]
    if record.dynamics in ("projected", "none"):
        return "dense"
    if record.dynamics == "dynamic" and method != "set":  # SET grows at random
        return update_every or 100
    return "sparse"


def write(config, workdir: pathlib.Path, data, task, state, evaluation) -> pathlib.Path:
    """Writes `report.md`, `report.html` and `plots/` into `workdir`; returns the HTML file."""
    history = logs.read(workdir / "metrics.jsonl")
    looks = [line for line in history if "density" in line]
    evals = [line for line in history if "eval_accuracy" in line]
    summary = jaxsparse.summarize(state.params, state.opt_state)
    dense = forward_flops(task, data, state)
    dense_total = sum(dense.values())
    rows = {row.path: row for row in summary.rows}
    final = flops.sparse_flops(
        dense, {name: rows[name].nonzeros / rows[name].size for name in dense if name in rows}
    )
    kind = weight_gradient(config.method, config.options.update_every)
    # Each look stands for the steps since the one before.
    weights = np.diff([0, *(line["step"] for line in looks)])
    per_step = [
        flops.training_flops(flops.sparse_flops(dense, line["density"]), dense_total, kind)
        for line in looks
    ]
    training = float(np.average(per_step, weights=weights)) / (3 * dense_total) if looks else None

    title = f"{config.method} on {config.dataset} with {config.model}"
    page = Report(title if config.method == "dense" else f"{title}, {summary.sparsity:.1%} sparse")
    page.table(
        ["result", ""],
        [
            ["test accuracy", f"{evaluation['accuracy']:.2%}"],
            ["test loss", f"{evaluation['loss']:.4f}"],
            ["sparsity of the sparse layers", f"{summary.sparsity:.2%}"],
            ["nonzero parameters", f"{summary.total.nonzeros:,} of {summary.total.size:,}"],
            ["operations of a forward pass", f"{final:,.0f} of {dense_total:,}"],
            ["  relative to dense", f"{final / dense_total:.3f}"],
            ["operations of training, relative to dense", f"{training:.3f}" if looks else "-"],
            ["steps, batch", f"{config.steps:,}, {config.batch_size}"],
        ],
    )
    page.text(
        "Operations are counted as in the RigL paper (multiplications and additions of linear layers "
        "and convolutions; normalisation and the optimizer neglected): what an implementation that "
        "skips zeros would need. The masks alone do not make dense hardware faster."
    )
    page.heading("Training")
    if looks:
        step = [line["step"] for line in looks]
        train_and_test = lambda key: {
            "train": (step, [line[key] for line in looks]),
            "test": ([e["step"] for e in evals], [e[f"eval_{key}"] for e in evals]),
        }
        page.figure(
            plots.curves(train_and_test("loss"), title="Loss", ylabel="loss", log=True),
            "loss",
            f"Loss: mean of {config.log_every} steps, and on the test set",
        )
        page.figure(
            plots.curves(train_and_test("accuracy"), title="Accuracy", ylabel="accuracy"),
            "accuracy",
            "Accuracy on the training batches and on the test set",
        )
        page.figure(
            plots.curves(
                {"sparsity": (step, [line["sparsity"] for line in looks])},
                title="Sparsity of the sparse layers",
                ylabel="zeros / weights",
                ylim=(0, 1),
            ),
            "sparsity",
            "Sparsity over the steps of training",
        )
        page.figure(
            plots.churn(
                step,
                [line["churn"] for line in looks],
                {
                    name: [line["layer_churn"].get(name, 0.0) for line in looks]
                    for name in list(looks[-1]["layer_churn"])[:12]
                },
            ),
            "churn",
            f"Weights that are kept now and were zero {config.log_every} steps before, as a part of "
            "the kept ones",
        )
    page.heading("Layers")
    sparse = [row for row in summary.rows if row.masked is not None] or [
        row for row in summary.rows if row.path in dense
    ]
    page.figure(
        plots.density_bars({row.path: row.nonzeros / row.size for row in sparse}),
        "density",
        "Nonzero weights of each sparse layer at the end",
    )
    page.table(
        ["layer", "shape", "weights", "nonzero", "sparsity", "operations", "of dense"],
        [
            [
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                f"{row.size:,}",
                f"{row.nonzeros:,}",
                f"{row.sparsity:.2%}",
                f"{dense[row.path] * row.nonzeros / row.size:,.0f}" if row.path in dense else "-",
                f"{dense[row.path]:,}" if row.path in dense else "-",
            ]
            for row in summary.rows
        ],
    )
    if dense.get(""):
        page.text(f"Operations without weights (attention products): {dense['']:,}.")
    page.heading("Configuration")
    page.code(config.to_json_best_effort(indent=2))
    return page.write(workdir)[1]
