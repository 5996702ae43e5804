"""Methods of post-training pruning side by side: perplexity over sparsity, of SmolLM2.

    python -m experiments.studies.compare_post_training --workdir=runs/compare_post_training

Writes `results.json`, `results.md` and `results.png` after every run; a run that is there already is not made again,
so that a comparison that was stopped goes on, and commands add to one table. A budget is a sparsity, an N:M structure,
or a share of channels (`20%`), for the methods that remove whole channels. Compiled programs are kept in the work
folder, where later runs find them.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.models import smollm2
from experiments.post_training import STRUCTURED, arguments, evaluate, logits_of, prepare, run
from jaxsparse import post_training as pt

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "Wanda": ("wanda", {}),
    "RIA": ("ria", {}),
    "DSnoT": ("dsnot", {"cycles": 10}),
    "Wanda++": ("wanda_plus_plus", {}),
    "Wanda, refitted": ("wanda", {"refit": 10}),
    "magnitude, refitted": ("magnitude", {"refit": 10}),
    "SparseGPT": ("sparsegpt", {}),
    "SparseGPT, corrected": ("sparsegpt", {"correct": 0.5}),
    "ALPS": ("alps", {"steps": 30}),
    "Wanda, OWL": ("wanda", {"allocation": "owl"}),
    "SparseGPT, OWL": ("sparsegpt", {"allocation": "owl"}),
    "Wanda, EvoPress": ("evopress", {}),
    "GQSA, 4 bits": ("gqsa", {"group": 8}),
    "OBD": ("obd", {}),
    "WoodFisher": ("woodfisher", {}),
    "M-FAC": ("mfac", {"steps": 4}),
    "CHITA": ("chita", {"steps": 4}),
    "FLAP": ("flap", {}),
    "Wanda-sp": ("wanda_sp", {}),
    "CFSP": ("cfsp", {}),
    "SliceGPT": ("slicegpt", {}),
}
NOT_WITH_N_M = ("gqsa", "evopress")  # nor with an allocation
BUDGETS = ("0.3", "0.5", "0.7", "2:4", "4:8", "20%")


def fits(name: str, budget: str) -> bool:
    """Whether a method is measured at a budget."""
    method, more = METHODS[name]
    if (method in STRUCTURED) != budget.endswith("%"):
        return False
    return not (":" in budget and (method in NOT_WITH_N_M or "allocation" in more))


def settings_of(budget: str) -> dict[str, Any]:
    """A budget as arguments of `prune`.

    >>> settings_of("2:4"), settings_of("0.5"), settings_of("20%")
    ({'structure': '2:4'}, {'sparsity': 0.5}, {'sparsity': 0.2})
    """
    if ":" in budget:
        return {"structure": budget}
    return {"sparsity": float(budget[:-1]) / 100 if budget.endswith("%") else float(budget)}


def evopress(
    dense: smollm2.SmolLM2,
    calibration: list[jax.Array],
    evaluation: list[jax.Array],
    logits: list[np.ndarray],
    sparsity: float,
    generations: int = 8,
    offspring: int = 6,
) -> dict[str, Any]:
    """The row of Wanda's masks at the levels that a search finds, by the loss on calibration data: one
    sequence in the first round, one batch in the second."""
    start = time.perf_counter()
    key = dense.layers[0].attention.key.kernel  # the smallest kernel
    base = pt.level_database(
        dense, calibration, "wanda", sparsity=sparsity, step=key.size // 8, levels=(-2, -1, 0, 1, 2),
        structure="unstructured",
    )  # fmt: skip

    def fitness(levels: tuple[int, ...], generation: int, round_: int) -> float:
        tokens = calibration[generation % len(calibration)]
        tokens = tokens[:1] if round_ == 0 else tokens
        return smollm2.nats_per_token(base.model(levels), [tokens])

    levels, history = pt.evolve(
        base.levels, fitness, generations=generations, offspring=offspring, survivors=(2, 1)
    )
    row = {"sparsity": sparsity, "method": "evopress", "history": history}
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row | evaluate(logits, base.model(levels), evaluation)


def table(rows: list[dict[str, Any]], whole: bool) -> str:
    """Perplexities (of slices: divergences) of methods over sparsities, in Markdown."""
    value = "perplexity" if whole else "divergence"
    found = {row["budget"] for row in rows}
    budgets = [b for b in BUDGETS if b in found] + sorted(found - set(BUDGETS))
    by = {(row["name"], row["budget"]): row for row in rows}
    names = [n for n in METHODS if any(n == name for name, _ in by)]
    lines = [
        "| method | " + " | ".join(budgets) + " | seconds |",
        "| :--- |" + " ---: |" * (len(budgets) + 1),
    ]
    if whole and rows:
        dense = f"{rows[0]['dense_perplexity']:.1f}"
        lines.append("| dense | " + " | ".join([dense] * len(budgets)) + " | |")
    for name in names:
        cells = [f"{by[name, b][value]:.4g}" if (name, b) in by else "" for b in budgets]
        seconds = [by[name, b]["seconds"] for b in budgets if (name, b) in by]
        took = " to ".join(dict.fromkeys(f"{x:.0f}" for x in (min(seconds), max(seconds))))
        lines.append(f"| {name} | " + " | ".join([*cells, took]) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: pathlib.Path, whole: bool) -> None:
    """Every method that was measured at two sparsities or more, up to fifty times the dense perplexity: above that
    no method is worth a comparison."""
    from jaxsparse.analysis import plots

    value = "perplexity" if whole else "divergence"
    lines: dict[str, tuple[list[float], list[float]]] = {}
    ylim = None
    for name in METHODS:
        points = sorted(
            (float(row["budget"]), row[value])
            for row in rows
            if row["name"] == name and row["budget"].replace(".", "").isdigit()
        )
        if len(points) > 1:
            lines[name] = [s for s, _ in points], [v for _, v in points]
    if whole and lines:
        ends = [choose(x for xs, _ in lines.values() for x in xs) for choose in (min, max)]
        dense = rows[0]["dense_perplexity"]
        lines["dense"], ylim = (ends, [dense] * 2), (0.9 * dense, 50 * dense)
    figure = plots.curves(
        lines, title="SmolLM2, pruned", xlabel="sparsity of every kernel", ylabel=value, log=True,
        ylim=ylim,
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def main(arguments_: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = arguments()
    parser.add_argument("--methods", default="all", help="names with ; between, see METHODS")
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    options = parser.parse_args(arguments_)
    options.workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(options.workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    path: pathlib.Path = options.workdir / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    done = {(row["name"], row["budget"]) for row in rows}
    names = list(METHODS) if options.methods == "all" else options.methods.split(";")
    if unknown := sorted(set(names) - set(METHODS)):
        raise ValueError(f"--methods: no {unknown[0]!r}; there are {'; '.join(METHODS)}")
    model, calibration, evaluation = prepare(options)
    logits = logits_of(model, evaluation)
    command = " ".join(
        ["python -m experiments.studies.compare_post_training", *(arguments_ or sys.argv[1:])]
    )
    whole = options.layers is None

    def write() -> str:
        path.write_text(json.dumps(rows, indent=1) + "\n")
        page = f"{table(rows, whole)}\n\n```\n{command}\n```\n"
        (options.workdir / "results.md").write_text(page)
        plot(rows, options.workdir / "results.png", whole)
        return page

    for budget in options.budgets.split(","):
        for name in names:
            if (name, budget) in done or not fits(name, budget):
                continue
            method, more = METHODS[name]
            settings = settings_of(budget) | more
            if method == "evopress":
                row = evopress(model, calibration, evaluation, logits, settings["sparsity"])
            else:
                if method not in STRUCTURED:
                    settings |= {"errors": False}
                _, row = run(model, calibration, evaluation, method, logits, **settings)
            rows.append({"name": name, "budget": budget} | row)
            write()
            print(name, budget, row["perplexity"], row["divergence"], row["seconds"], flush=True)
    print(write())


if __name__ == "__main__":
    main()
