"""Methods of post-training pruning side by side on an encoder of sentences, MiniLM.

    python -m experiments.studies.compare_embeddings --workdir=runs/compare_embeddings

Calibration and evaluation are paragraphs of disjoint halves of Python's reference. Of the evaluation it
measures the mean cosine between dense and sparse embeddings, and how many of the ten nearest neighbours of
each sentence are the same. All kernels of the six blocks are pruned. Writes `results.json` after every run
(a run that is there already is not made again) and `results.md`.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.models import minilm
from jaxsparse import post_training as pt

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "Wanda": ("wanda", {}),
    "RIA": ("ria", {}),
    "DSnoT": ("dsnot", {"cycles": 10}),
    "Wanda++": ("wanda_plus_plus", {}),
    "magnitude, refitted": ("magnitude", {"refit": 20}),
    "Wanda, refitted": ("wanda", {"refit": 20}),
    "SparseGPT": ("sparsegpt", {}),
    "SparseGPT, corrected": ("sparsegpt", {"correct": 0.5}),
    "ALPS": ("alps", {"steps": 60}),
}


@nnx.jit
def _embed(model: minilm.MiniLM, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return model(tokens, mask)


def embed(model: minilm.MiniLM, batches: list[tuple[jax.Array, jax.Array]]) -> np.ndarray:
    """The vectors of all sentences."""
    return np.concatenate([np.asarray(_embed(model, *b)) for b in batches])


def overlap(a: np.ndarray, b: np.ndarray, k: int = 10) -> float:
    """The share of the k nearest neighbours among themselves that two sets of vectors have in common."""

    def nearest(x: np.ndarray) -> list[set[int]]:
        close = x @ x.T
        np.fill_diagonal(close, -np.inf)
        return [set(row) for row in np.argsort(-close, axis=1, kind="stable")[:, :k].tolist()]

    return float(np.mean([len(p & q) / k for p, q in zip(nearest(a), nearest(b))]))


def table(rows: list[dict[str, Any]]) -> str:
    """Cosine and overlap of methods over budgets, in Markdown."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    by = {(row["name"], row["budget"]): row for row in rows}
    lines = [
        "| method | " + " | ".join(budgets) + " | seconds |",
        "| :--- |" + " ---: |" * (len(budgets) + 1),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [by.get((name, b)) for b in budgets]
        cells = [f"{r['cosine']:.3f}, {r['neighbours']:.2f}" if r else "" for r in mine]
        seconds = [r["seconds"] for r in mine if r]
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {min(seconds):.0f} to {max(seconds):.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--sentences", type=int, default=256, help="of calibration and evaluation")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--budgets", default="0.3,0.5,0.7,2:4,4:8")
    options = parser.parse_args(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    path: pathlib.Path = options.workdir / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    done = {(row["name"], row["budget"]) for row in rows}
    model, tokenizer = minilm.load()
    halves = []
    for half in ("calibration", "evaluation"):
        texts = minilm.sentences(half)[: options.sentences]
        parts = [texts[i : i + 32] for i in range(0, len(texts) - len(texts) % 32, 32)]
        halves.append([minilm.tokens(tokenizer, part, options.length) for part in parts])
    calibration, evaluation = halves
    dense = embed(model, evaluation)
    for budget in options.budgets.split(","):
        settings = {"structure": budget} if ":" in budget else {"sparsity": float(budget)}
        for name in options.methods.split(";"):
            if (name, budget) in done:
                continue
            method, more = METHODS[name]
            start = time.perf_counter()
            result = pt.prune(
                model, calibration, method, mask=lambda b: b[1], errors=False, **settings, **more
            )
            seconds = round(time.perf_counter() - start, 1)
            sparse = embed(result.model, evaluation)
            cosine = float(np.mean(np.sum(dense * sparse, axis=1)))
            row = {"cosine": cosine, "neighbours": overlap(dense, sparse), "seconds": seconds}
            rows.append({"name": name, "budget": budget, "sparsity": result.sparsity} | row)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, budget, row, flush=True)
    command = " ".join(
        ["python -m experiments.studies.compare_embeddings", *(arguments or sys.argv[1:])]
    )
    page = f"{table(rows)}\n\n```\n{command}\n```\n"
    (options.workdir / "results.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
