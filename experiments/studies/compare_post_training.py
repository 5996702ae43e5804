"""Methods of post-training pruning side by side: perplexity over sparsity, of SmolLM2.

    python -m experiments.studies.compare_post_training --workdir=runs/compare_post_training

Writes `results.json` after every run (a run that is there already is not made again) and `results.md`.
"""

import json
import pathlib
import sys
from typing import Any

from experiments.post_training import STRUCTURED, arguments, prepare, run

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "Wanda": ("wanda", {}),
    "Wanda++": ("wanda_plus_plus", {}),
    "RIA": ("ria", {}),
    "DSnoT": ("dsnot", {"cycles": 10}),
    "Wanda, refitted": ("wanda", {"refit": 10}),
    "magnitude, refitted": ("magnitude", {"refit": 10}),
    "SparseGPT": ("sparsegpt", {}),
    "SparseGPT, corrected": ("sparsegpt", {"correct": 0.5}),
    "SparseGPT, OWL": ("sparsegpt", {"allocation": "owl"}),
    "ALPS": ("alps", {"steps": 30}),
    "GQSA, 4 bits": ("gqsa", {"group": 8}),
    "OBD": ("obd", {}),
    "WoodFisher": ("woodfisher", {}),
    "M-FAC": ("mfac", {"steps": 4}),
    "CHITA": ("chita", {}),
    "FLAP": ("flap", {}),
    "Wanda-sp": ("wanda_sp", {}),
    "CFSP": ("cfsp", {}),
    "SliceGPT": ("slicegpt", {}),
}
NOT_WITH_N_M = ("gqsa", *STRUCTURED)  # nor with an allocation


def table(rows: list[dict[str, Any]], whole: bool) -> str:
    """Perplexities (of slices: divergences) of methods over sparsities, in Markdown."""
    value = "perplexity" if whole else "divergence"
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    by = {(row["name"], row["budget"]): row for row in rows}
    lines = [
        "| method | " + " | ".join(budgets) + " | seconds |",
        "| :--- |" + " ---: |" * (len(budgets) + 1),
    ]
    if whole and rows:
        lines.append(
            "| dense | "
            + " | ".join([f"{rows[0]['dense_perplexity']:.1f}"] * len(budgets))
            + " | |"
        )
    for name in names:
        cells = [f"{by[name, b][value]:.4g}" if (name, b) in by else "" for b in budgets]
        seconds = [by[name, b]["seconds"] for b in budgets if (name, b) in by]
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {min(seconds):.0f} to {max(seconds):.0f} |"
        )
    return "\n".join(lines)


def main(arguments_: list[str] | None = None) -> None:
    parser = arguments()
    parser.add_argument("--methods", default="all", help="names with ; between, see METHODS")
    parser.add_argument("--budgets", default="0.3,0.5,0.6,0.7,2:4,4:8")
    options = parser.parse_args(arguments_)
    options.workdir.mkdir(parents=True, exist_ok=True)
    path: pathlib.Path = options.workdir / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    done = {(row["name"], row["budget"]) for row in rows}
    names = list(METHODS) if options.methods == "all" else options.methods.split(";")
    if unknown := sorted(set(names) - set(METHODS)):
        raise ValueError(f"--methods: no {unknown[0]!r}; there are {'; '.join(METHODS)}")
    model, calibration, evaluation = prepare(options)
    for budget in options.budgets.split(","):
        settings = {"structure": budget} if ":" in budget else {"sparsity": float(budget)}
        for name in names:
            method, more = METHODS[name]
            apart = ":" in budget and (method in NOT_WITH_N_M or "allocation" in more)
            if (name, budget) in done or apart:
                continue
            if method not in STRUCTURED:
                more = more | {"errors": False}
            _, row = run(model, calibration, evaluation, method, **settings, **more)
            rows.append({"name": name, "budget": budget} | row)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, budget, row["perplexity"], row["divergence"], row["seconds"], flush=True)
    command = " ".join(
        ["python -m experiments.studies.compare_post_training", *(arguments_ or sys.argv[1:])]
    )
    page = f"{table(rows, options.layers is None)}\n\n```\n{command}\n```\n"
    (options.workdir / "results.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
