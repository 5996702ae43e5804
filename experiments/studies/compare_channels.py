"""Methods on whole channels at equal operations: accuracy of the shrunk network.

  python -m experiments.studies.compare_channels --task=digits --sparsity=0.75

Each method trains a network, decides on channels until the middle of the run, and has the other half to recover
in, with a learning rate that starts anew; then `channels.shrink` makes the narrower network that is tested. Every
group loses the same share, so that all methods end with the same operations. Beside them stand a dense network of
the same widths that trains from scratch for as many steps, under the same schedule and under one that falls once.
Each method's strength is chosen of three by the accuracy on validation data, from seeds that are not tested.

Finished runs are kept in --workdir: the same command goes on where it was stopped.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import jaxsparse
from experiments.datasets import load
from experiments.models.cnn import CNN
from experiments.models.resnet import ResNet
from jaxsparse import channels

# By method what is tried: the option that says how hard it presses, and three values of it.
STRENGTHS = ("strength", (1e-4, 1e-3, 1e-2))
METHODS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "hspg": STRENGTHS,
    "hesso": ("periods", (1, 5, 20)),
    "ssl": ("families", tuple({"units": s} for s in STRENGTHS[1])),
    "wgsef": ("strength", (1e-6, 1e-5, 1e-4)),
    "slimming": STRENGTHS,
    "mask_sparsity": STRENGTHS,
    "polarization": STRENGTHS,
    "depgraph": STRENGTHS,
    "group_slimming": STRENGTHS,
    "magnitude": ("update_every", (1, 10, 50)),
    "random_pruning": ("seed", (0,)),
}
VALIDATION_SEED = 100


# The accuracy of a run, and the share of the operations that its network has.
Result = tuple[float, float]


class Convolutions(nnx.Module):
    """Two convolutions with batch norms, a mean over space, a linear layer."""

    def __init__(self, widths: tuple[int, int], *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.first, self.second = conv(1, widths[0]), conv(*widths)
        self.norms = nnx.List([nnx.BatchNorm(w, momentum=0.9, rngs=rngs) for w in widths])
        self.head = nnx.Linear(widths[1], 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norms[0](self.first(x)))
        x = nnx.relu(self.norms[1](self.second(nnx.avg_pool(x, (2, 2), (2, 2)))))
        return self.head(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, and networks for it with a share of the channels, from a seed."""

    data: str
    build: Callable[[float, nnx.Rngs], nnx.Module]


def _width(full: int, share: float) -> int:
    return full - int(np.floor(full * (1 - share)))


TASKS = {
    "digits": Task(
        "digits",
        lambda share, rngs: Convolutions((_width(16, share), _width(32, share)), rngs=rngs),
    ),
    "mnist1d": Task(
        "mnist1d",
        lambda share, rngs: CNN((40, 1), 10, features=(_width(24, share),) * 3, rngs=rngs),
    ),
    "resnet": Task(
        "digits",
        lambda share, rngs: ResNet((8, 8, 1), 10, depth=8, width=_width(16, share), rngs=rngs),
    ),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """One task at one sparsity: trains, shrinks and tests.

    Attributes:
      task: the network and its data.
      sparsity: the share of the channels of every group that goes.
      steps: the length of all runs.
      rate: the largest learning rate, of Adam.
    """

    task: Task
    sparsity: float
    steps: int
    rate: float = 3e-3

    @functools.cached_property
    def splits(self) -> dict[str, tuple[Array, Array]]:
        """Inputs and labels to train on, to choose strengths on (a sixth of the training set), and to test on."""
        data = load(self.task.data)
        pair = lambda part: (jnp.asarray(part["x"]), jnp.asarray(part["y"]))
        (x, y), test = pair(data.arrays("train")), pair(data.arrays("test"))
        n = len(y) // 6
        return {"train": (x[n:], y[n:]), "validation": (x[:n], y[:n]), "test": test}

    def wide(self, seed: int, share: float = 1.0) -> nnx.Module:
        return self.task.build(share, nnx.Rngs(seed))

    @property
    def twice(self) -> optax.Schedule:
        """Down to 0 in the first half of the run, and again in the second."""
        half = self.steps // 2
        falls = [optax.cosine_decay_schedule(self.rate, n) for n in (half, self.steps - half)]
        return optax.join_schedules(falls, [half])

    @property
    def once(self) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.rate, self.steps)

    def train(
        self, tx: optax.GradientTransformation, seeds: Iterable[int], share: float = 1.0
    ) -> Iterator[tuple[nnx.Module, Any]]:
        """The trained networks and the states of their optimizer, by seed; one compilation for all."""
        x, y = map(np.asarray, self.splits["train"])

        def loss(params, graph, rest, x, y):
            model = nnx.merge(graph, params, rest, copy=True)
            logits = model(x)  # pyright: ignore[reportCallIssue]
            found = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return found, nnx.state(model, nnx.Not(nnx.Param))

        @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
        def step(graph, carry, x, y):
            params, rest, state = carry
            grads, rest = jax.grad(loss, has_aux=True)(params, graph, rest, x, y)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), rest, state

        for seed in seeds:
            graph, params, rest = nnx.split(self.wide(seed, share), nnx.Param, ...)
            carry = (params, rest, tx.init(params))
            rng = np.random.default_rng(seed)
            for _ in range(self.steps):  # inside of scan convolutions are slow on CPU
                at = rng.integers(0, len(y), 64)
                carry = step(graph, carry, x[at], y[at])
            params, rest, state = carry
            yield nnx.merge(graph, params, rest), state

    def accuracy(self, model: object, split: str) -> float:
        """In per cent, with the running averages of norms."""
        x, y = self.splits[split]
        serving = nnx.view(model, use_running_average=True, raise_if_not_found=False)  # pyright: ignore[reportArgumentType]
        return 100 * float((nnx.jit(lambda m: m(x))(serving).argmax(1) == y).mean())

    def method(self, name: str, value: object, groups: channels.Groups):
        """The method with all its budgets alike, that has decided at half of the run."""
        options: dict[str, Any] = {METHODS[name][0]: value, "total_steps": self.steps}
        known = jaxsparse.METHODS[name].options
        if "end_step" in known:
            options["end_step"] = self.steps // 2
        if "allocation" in known:
            options["allocation"] = "uniform"
        if "bunches" in known:  # a threshold for each group
            names = [g.name for g in groups.structure(sides=("out", "with")).groups]
            options["bunches"] = {f"^{re.escape(n)}$": self.sparsity for n in names}
        if "groups" in known:
            options["groups"] = groups
        else:
            options["structure"] = groups.structure()
        return jaxsparse.make(name, optax.adam(self.twice), sparsity=self.sparsity, **options)

    def shrunk(
        self, tx, groups: channels.Groups, seeds: Iterable[int], split: str
    ) -> Iterator[Result]:
        """Accuracies and shares of the operations of the shrunk networks, by seed."""
        for model, state in self.train(tx, seeds):
            small = channels.shrink(model, groups, state, exact=False)
            yield self.accuracy(small.model, split), small.report.flops[1] / small.report.flops[0]


@dataclasses.dataclass(frozen=True)
class Finished:
    """Results of single runs in a file, one line each.

    Attributes:
      path: of the file, which need not exist.
      common: what all runs of this study share.
    """

    path: pathlib.Path
    common: dict[str, Any]

    def results(
        self, run: Callable[[list[int]], Iterator[Result]], seeds: list[int], **which: Any
    ) -> tuple[list[float], list[float]]:
        """Accuracies and shares of the operations; seeds that the file lacks are run and written to it."""
        key = self.common | which
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [row for row in map(json.loads, lines) if row["run"] == key]
        known = {row["seed"]: (row["accuracy"], row["operations"]) for row in rows}
        missing = [seed for seed in seeds if seed not in known]
        for seed, (accuracy, operations) in zip(missing, run(missing)):
            known[seed] = accuracy, operations
            row = {"run": key, "seed": seed, "accuracy": accuracy, "operations": operations}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"  {' '.join(map(str, which.values()))}, seed {seed}: {accuracy:.1f}", flush=True
            )
        return [known[seed][0] for seed in seeds], [known[seed][1] for seed in seeds]


def study(
    it: Study, seeds: int, names: list[str], chosen: dict[str, str], finished: Finished
) -> list[tuple[str, float, float, float, str]]:
    """Name, mean and deviation of the accuracy, operations kept, the value that was chosen."""
    x, _ = it.splits["test"]
    groups = channels.find(it.wide(0), x[:1])
    tested, rows = list(range(seeds)), []

    def add(name: str, scores: list[float], operations: float, how: str = "") -> None:
        rows.append((name, float(np.mean(scores)), float(np.std(scores)), operations, how))
        print(f"{name}: {np.mean(scores):.1f} ± {np.std(scores):.1f} {how}", flush=True)

    if "dense" in names:
        narrow, small = 1 - it.sparsity, "dense of the small size, from scratch"
        for share, schedule, label, how in (
            (1.0, it.once, "dense, all channels", ""),
            (narrow, it.once, small, "rate falls once"),
            (narrow, it.twice, small, "rate falls twice"),
        ):
            operations = channels.find(it.wide(0, share), x[:1]).flops() / groups.flops()
            run_dense = lambda seeds, share=share, schedule=schedule, operations=operations: (
                (it.accuracy(model, "test"), operations)
                for model, _ in it.train(optax.adam(schedule), seeds, share)
            )
            scores, _ = finished.results(run_dense, tested, method=label, value=how, split="test")
            add(label, scores, operations, how)
    for name in [n for n in names if n != "dense"]:

        def run(value: Any, seeds: list[int], split: str, name: str = name):
            train = lambda seeds: it.shrunk(it.method(name, value, groups), groups, seeds, split)
            return finished.results(train, seeds, method=name, value=_short(value), split=split)

        option, values = METHODS[name]
        values = [v for v in values if chosen.get(name) in (None, _short(v))]
        trials = [0.0]
        if len(values) > 1:
            trials = [run(v, [VALIDATION_SEED], "validation")[0][0] for v in values]
            print(f"  {name}: {dict(zip(map(_short, values), trials))}", flush=True)
        best = values[int(np.argmax(trials))]
        scores, kept = run(best, tested, "test")
        add(name, scores, float(np.mean(kept)), f"{option}={_short(best)}")
    return rows


def _short(value: object) -> str:
    return str(next(iter(value.values())) if isinstance(value, dict) else value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", type=lambda t: t.split(","), default=["dense", *METHODS])
    parser.add_argument(
        "--chosen", default="", help="values that are not tried again: hesso=5,magnitude=10"
    )
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/compare_channels"),
        help="where finished runs are kept",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    chosen = dict(pair.split("=") for pair in options.chosen.split(",") if pair)
    it = Study(TASKS[options.task], options.sparsity, options.steps)
    common = {"task": options.task, "sparsity": it.sparsity, "steps": it.steps, "rate": it.rate}
    finished = Finished(options.workdir / f"{options.task}.jsonl", common)
    rows = study(it, options.seeds, options.methods, chosen, finished)
    lines = ["| method | accuracy | operations kept | chosen |", "|---|---|---|---|"]
    lines += [f"| {n} | {m:.1f} ± {d:.1f} | {100 * o:.1f} % | {c} |" for n, m, d, o, c in rows]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
