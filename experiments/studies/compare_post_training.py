"""Methods of post-training pruning side by side: perplexity over sparsity, of SmolLM2.

    python -m experiments.studies.compare_post_training --workdir=runs/compare_post_training

Writes `results.json` after every run (a run that is there already is not made again) and `results.md`.
"""

import json
import pathlib
import sys
from typing import Any

from experiments.post_training import arguments, prepare, run

METHODS = ("magnitude", "wanda", "ria", "dsnot", "sparsegpt", "alps")


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
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", default="0.3,0.5,0.6,0.7,2:4,4:8")
    parser.add_argument(
        "--refit", action="store_true", help="magnitude and Wanda with refitted weights, too"
    )
    options = parser.parse_args(arguments_)
    options.workdir.mkdir(parents=True, exist_ok=True)
    path: pathlib.Path = options.workdir / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    done = {(row["name"], row["budget"]) for row in rows}
    model, calibration, evaluation = prepare(options)
    variants = [(m, m, False) for m in options.methods.split(",")]
    if options.refit:
        variants += [(f"{m}, refitted", m, True) for m in ("magnitude", "wanda")]
    for budget in options.budgets.split(","):
        settings = {"structure": budget} if ":" in budget else {"sparsity": float(budget)}
        for name, method, refit in variants:
            if (name, budget) in done:
                continue
            _, row = run(
                model, calibration, evaluation, method, refit=refit, errors=False, **settings
            )
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
