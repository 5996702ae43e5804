"""Accuracy of runs that are stored next to the same runs under masks.

    python -m experiments.studies.compare_stored [--methods=rigl,set,static] [--storages=masks,stored]
        [--sparsity=0.9] [--seeds=3] [--steps=1500]

The training job's own step on scikit-learn's digits: an MLP 64-128-128-10, blocks of 4 x 4, AdamW, the same
batches. A stored run and its masked run have other initial patterns and values (other draws from the same
distributions), so they agree as two seeds do. Prints test accuracy, mean and range over the seeds.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import datasets
from experiments.benchmarks.timing import machine
from experiments.configs import digits_mlp
from experiments.task import make_task


def accuracies(method: str, storage: str, args: argparse.Namespace) -> list[float]:
    """Test accuracy of each seed, in percent."""
    c: Any = digits_mlp.get_config()
    c.method, c.storage, c.structure, c.sparsity = method, storage, "block:4x4", args.sparsity
    c.model_options.hidden, c.options.targets = (128, 128), "layers/[01]/kernel"
    c.options.allocation, c.steps = "uniform", args.steps
    if method != "static":
        c.options.update_every = 50
    data = datasets.load(c.dataset)
    first, found = make_task(c, data), []

    @jax.jit
    def run(state, batches):  # the seed is drawn at `init`; ties of the rule keep that of the first
        step = lambda state, batch: (first.train_step(state, batch)[0], None)
        return jax.lax.scan(step, state, batches)[0]

    for seed in range(args.seeds):
        c.seed = seed
        task = make_task(c, data)
        batches = list(datasets.batches(data, c.batch_size, start=0, stop=c.steps, seed=seed))
        stacked = {k: jnp.stack([b[k] for b in batches]) for k in batches[0]}
        state = run(jax.jit(task.init)(), stacked)
        sums = [
            jax.jit(task.eval_step)(state, batch)
            for batch in datasets.evaluation_batches(data, c.batch_size, host=(0, 1))
        ]
        total = jax.tree.map(lambda *x: sum(float(v) for v in x), *sums)
        found.append(100 * total["accuracy"] / total["count"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="rigl,set,static")
    parser.add_argument("--storages", default="masks,stored")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    print(f"{machine()}\n\n| method | storage | test accuracy | range |\n|---|---|---|---|")
    for method in args.methods.split(","):
        for storage in args.storages.split(","):
            a = accuracies(method, storage, args)
            print(
                f"| {method} | {storage} | {np.mean(a):.1f} % | {min(a):.1f} to {max(a):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
