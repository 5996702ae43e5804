"""Accuracy of runs that are stored next to the same runs under masks.

    python -m experiments.studies.compare_stored [--case=digits|text] [--methods=rigl,set,static,momentum]
        [--storages=masks,stored] [--sparsity=0.9] [--seeds=3] [--steps=1500] [--sketch=2]

The training job's own step with AdamW on the same batches. `digits`: those of scikit-learn, an MLP
64-128-128-10, blocks of 4 x 4. `text`: the next character of `stdlib_text`, a Transformer of two layers of
64 on 64 characters, blocks of 8 x 8. A stored run and its masked run have other initial patterns and values (other draws from the same
distributions), so they agree as two seeds do. `momentum` grows by a sketch of the average gradient, of 2 x 2 numbers
for each block; no masked method is the same run. Prints test accuracy, mean and range over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import datasets
from experiments.benchmarks.timing import machine
from experiments.configs import digits_mlp, text_transformer
from experiments.task import make_task


def digits() -> Any:
    """The config of the MLP."""
    c: Any = digits_mlp.get_config()
    c.structure, c.options.targets = "block:4x4", "layers/[01]/kernel"
    c.model_options.hidden = (128, 128)
    return c


def text() -> Any:
    """The config of the Transformer."""
    c: Any = text_transformer.get_config()
    c.structure, c.options.targets = "block:8x8", "layers/.*kernel"
    c.model_options.update(dim=64, depth=2, heads=2)
    c.length, c.batch_size, c.learning_rate = 64, 16, 3e-3
    return c


EVALUATED = 64  # batches of the test set, at most: all of the digits
CASES = {"digits": digits, "text": text}


def accuracies(method: str, storage: str, args: argparse.Namespace) -> list[float]:
    """Test accuracy of each seed, in percent."""
    c: Any = CASES[args.case]()
    c.method, c.storage, c.sparsity = method, storage, args.sparsity
    if method == "momentum":
        c.method, c.sketch = "rigl", args.sketch
    c.options.allocation, c.steps = "uniform", args.steps
    if method != "static":
        c.options.update_every = 50
    data = datasets.load(c.dataset, length=c.length)
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
            for batch in itertools.islice(
                datasets.evaluation_batches(data, c.batch_size, host=(0, 1)), EVALUATED
            )
        ]
        total = jax.tree.map(lambda *x: sum(float(v) for v in x), *sums)
        found.append(100 * total["accuracy"] / total["count"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(CASES), default="digits")
    parser.add_argument("--methods", default="rigl,set,static")
    parser.add_argument("--storages", default="masks,stored")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--sketch", type=int, default=2, help="sides of the sketch of a block")
    args = parser.parse_args()
    print(f"{machine()}\n\n| method | storage | test accuracy | range |\n|---|---|---|---|")
    for method in args.methods.split(","):
        for storage in args.storages.split(","):
            if (method, storage) == ("momentum", "masks"):
                continue
            a = accuracies(method, storage, args)
            print(
                f"| {method} | {storage} | {np.mean(a):.1f} % | {min(a):.1f} to {max(a):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
