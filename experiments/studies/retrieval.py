r"""Finding what was said far away: needles and variables at growing length, through every choice of blocks.

    python -m experiments.studies.retrieval --workdir=runs/retrieval --out=docs/results

Three tasks after RULER (Hsieh et al., 2024), in symbols: a text is noise with pairs "name symbol" in it, and ends with
questions, names whose symbol comes next.

- needle: one pair, one question;
- needles: 16 pairs, of which 8 are asked for;
- tracking: four chains "a 5", "b a"; asked for b, the answer is 5.

A Transformer of SmolLM2's design (rotary positions, grouped queries), small, is trained on them with dense attention, at
mixed lengths. Then all of its layers attend through the blocks that a predictor chooses, at several densities and
lengths: the share of right answers. Training is kept in `--workdir` and not made again; so is every row.

The last part asks the question of Nawrot et al., The Sparse Frontier, 2025: at equal cost of attention, is a longer and
sparser context better, or a shorter and denser one? A context of n tokens at density d costs $d n^2 / 2$ pairs; the
shorter context is the end of the same text, of which it has not seen the beginning.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.benchmarks.timing import machine
from experiments.models import smollm2
from experiments.studies import compare_attention as study
from jaxsparse import attention
from jaxsparse.attention import Layout

NAMES, VALUES, NOISE = 32, 32, 32
TASKS = ("needle", "needles", "tracking")
CONFIG = smollm2.Config(
    layers=3, width=64, hidden=128, heads=2, groups=1, vocabulary=NAMES + VALUES + NOISE, rope_base=1e8, rope="halves"
)  # fmt: skip
LAYOUT = Layout(16, 16)
PREDICTORS = ("oracle", "streaming", "minference", "flexprefill", "moba", "sparge", "nsa", "mra", "seer", "dsv")  # fmt: skip


class Texts(NamedTuple):
    """Texts with questions.

    Attributes:
      tokens: int32 `[batch, length]`: names, then values, then noise.
      asked: bool of that shape: the next token is an answer.
    """

    tokens: np.ndarray
    asked: np.ndarray


def draw(task: str, rng: np.random.Generator, batch: int, length: int, *, needles: int = 16,
         questions: int = 8, chains: int = 4) -> Texts:  # fmt: skip
    """Texts of one task.

    Args:
      task: one of `TASKS`.
      rng: what is drawn from.
      batch, length: sizes.
      needles, questions: pairs of the task "needles", and how many are asked for.
      chains: of "tracking".

    Raises:
      ValueError: an unknown task, or more pairs than the length has room for.

    >>> texts = draw("needle", np.random.default_rng(0), 2, 16)
    >>> texts.tokens.shape, texts.asked.sum(1).tolist()
    ((2, 16), [1, 1])
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {TASKS}")
    number = {"needle": 1, "needles": needles, "tracking": 2 * chains}[task]
    asking = {"needle": 1, "needles": questions, "tracking": chains}[task]
    body = length - 2 * asking
    if not asking <= number <= min(NAMES, body // 2):
        raise ValueError(
            f"{number} pairs and {asking} questions do not fit length={length} and {NAMES} names"
        )
    tokens = NAMES + VALUES + rng.integers(0, NOISE, (batch, length))
    asked = np.zeros((batch, length), bool)
    asked[:, body::2] = True
    for row in tokens:
        names = rng.permutation(NAMES)[:number]
        values = NAMES + rng.integers(0, VALUES, number)
        place = np.sort(rng.choice(body - number, number, replace=False)) + np.arange(number)
        symbol, answer = values, values
        if task == "tracking":  # the second half of the names stand for the first
            symbol = np.concatenate([values[:chains], names[:chains]])
            answer = np.tile(values[:chains], 2)
            turn = rng.permutation(np.tile(np.arange(chains), 2))  # whose chain goes on
            first, second = np.sort(
                np.stack([np.flatnonzero(turn == c) for c in range(chains)]), 1
            ).T
            place = place[np.concatenate([first, second])]
        row[place], row[place + 1] = names, symbol
        which = rng.permutation(number)[:asking]
        if task == "tracking":
            which = chains + rng.permutation(chains)
        row[body::2], row[body + 1 :: 2] = names[which], answer[which]
    return Texts(tokens.astype(np.int32), asked)


def mixed(rng: np.random.Generator, batch: int, length: int) -> Texts:
    """All tasks in one batch for training, with as many pairs and questions as there is room for."""
    some = min(16, length // 8)
    chains = min(8, length // 16)
    parts = [
        draw("needle", rng, batch // 8, length),
        draw("needles", rng, batch * 3 // 8, length, needles=some, questions=some),
        draw("tracking", rng, batch // 2, length, chains=chains),
    ]
    return Texts(*(np.concatenate(x) for x in zip(*parts)))


# ------------------------------------------------------------------ training


def answers(logits: Array, texts: Texts) -> tuple[Array, Array]:
    """The mean negative log-likelihood of the answers, and the share of right ones."""
    p = jax.nn.log_softmax(logits[:, :-1])
    asked, after = jnp.asarray(texts.asked[:, :-1]), jnp.asarray(texts.tokens[:, 1:])
    chosen = jnp.take_along_axis(p, after[..., None], -1)[..., 0]
    number = asked.sum()
    return -(chosen * asked).sum() / number, ((p.argmax(-1) == after) & asked).sum() / number


class Smear(nnx.RMSNorm):
    """The norm before attention, after which a part of each token is the one before it.

    Finding "name symbol" takes two steps of attention, of which the first looks at the previous token. That step takes
    small models most of their training (Olsson et al., 2022, whose smeared keys these are); here it is given.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=CONFIG.epsilon, rngs=rngs)
        self.share = nnx.Param(jnp.arange(width) % 2 * 1.0)

    def __call__(self, x_BTD: Array) -> Array:
        y_BTD = super().__call__(x_BTD)
        before = jnp.pad(y_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return y_BTD + self.share[...] * (before - y_BTD)


def build(config: smollm2.Config = CONFIG, seed: int = 0) -> smollm2.SmolLM2:
    """The model before training."""
    model = smollm2.SmolLM2(config, nnx.Rngs(seed))
    for layer in model.layers:
        layer.norm1 = Smear(config.width, rngs=nnx.Rngs(seed))
    return model


def at_length(model: smollm2.SmolLM2, length: int) -> smollm2.SmolLM2:
    """The model for texts of a length: scores grow with its logarithm, so that a match outweighs the noise of long texts as
    it does that of short ones (scalable softmax: Nakanishi, 2025)."""
    graph, state = nnx.split(model)
    stretch = np.log(length) / np.log(64)
    grow = lambda keys, x: x.replace(x[...] * stretch) if "query" in keys else x
    return nnx.merge(graph, nnx.map_state(grow, state))


class Phase(NamedTuple):
    """A part of the training: texts of one length."""

    length: int
    batch: int
    steps: int


PHASES = (Phase(64, 32, 800), Phase(64, 32, 700), Phase(512, 4, 80))


def train(model: smollm2.SmolLM2, phase: Phase, seed: int = 0) -> smollm2.SmolLM2:
    """The model after training on all tasks with dense attention, on the loss of the answers."""
    graph, state = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, min(50, phase.steps // 4), phase.steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01)
    )
    slots, rng, start = tx.init(state), np.random.default_rng((seed, *phase)), time.perf_counter()

    @jax.jit
    def step(state: Any, slots: Any, texts: Texts) -> tuple[Any, Any, Array]:
        def loss(state: Any) -> tuple[Array, Array]:
            return answers(at_length(nnx.merge(graph, state), phase.length)(texts.tokens), texts)

        (_, right), grads = jax.value_and_grad(loss, has_aux=True)(state)
        updates, slots = tx.update(grads, slots, state)
        return optax.apply_updates(state, updates), slots, right

    share: list[Array] = []
    for i in range(phase.steps):
        state, slots, right = step(state, slots, mixed(rng, phase.batch, phase.length))
        share.append(right)
        if i % 100 == 99 or i == phase.steps - 1:
            now, seconds = float(np.mean(share[-20:])), time.perf_counter() - start
            print(f"{phase}, step {i + 1}: {now:.3f} right, {seconds:.0f} s", flush=True)
    return nnx.merge(graph, state)


def trained_model(folder: pathlib.Path, phases: tuple[Phase, ...], seed: int) -> smollm2.SmolLM2:
    """The model after all phases, each of which is kept in a file and not made again."""
    model = build(seed=seed)
    for i, phase in enumerate(phases):
        path = folder / f"model_{seed}_{i}.npz"
        if not path.exists():
            leaves = jax.tree.leaves(nnx.state(train(model, phase, seed)))
            np.savez(path, *(np.asarray(x) for x in leaves))
        graph, state = nnx.split(model)
        with np.load(path) as file:
            leaves = [jnp.asarray(file[name]) for name in file.files]
        model = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
    return model


# ------------------------------------------------------------------ runs


def fits(budget: float, length: int, layout: Layout = LAYOUT) -> bool:
    """Whether a density has room for the forced blocks.

    >>> fits(0.1, 512), fits(0.1, 1024)
    (False, True)
    """
    grid = layout.grid(length, length)
    rows = attention.select.per_row(budget, layout.visible(grid), layout.forced(grid))
    return rows is not None


def run(
    model: smollm2.SmolLM2, name: str, budget: float, texts: dict[str, Texts],
    trained: list[study.Params], context: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The share of right answers of each task, with all layers attending through one predictor's choice.

    Args:
      model: the trained one.
      name, budget: of the predictor; "dense" has no budget.
      texts: of each task, all of one length.
      trained: what predictors need, by layer.
      context: of each text only so many tokens at the end are read; None: all of them.
    """
    start, length = time.perf_counter(), next(iter(texts.values())).tokens.shape[1]
    number_read = length if context is None else context
    cut = {
        task: Texts(*(x[:, length - number_read :] for x in some)) for task, some in texts.items()
    }
    cut_model = study.Model(at_length(model, number_read))
    tokens = jnp.concatenate([jnp.asarray(some.tokens) for some in cut.values()])
    x, density = study.read(cut_model, name, budget, tokens, trained, LAYOUT)
    row: dict[str, Any] = dict(name=name, budget=budget, length=length, context=number_read)
    for task, some in cut.items():
        number = some.tokens.shape[0]
        row[task] = float(answers(cut_model.logits(x[:number]), some)[1])
        x = x[number:]
    return row | dict(density=density, seconds=time.perf_counter() - start)


# ------------------------------------------------------------------ the page


def cells(rows: list[dict[str, Any]], columns: list[tuple[float, int]]) -> list[str]:
    """A table with a line for each predictor; cells have the right answers of the three tasks in percent."""
    by = {(row["name"], row["budget"], row["context"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [by.get((name, *column)) for column in columns]
        text = [
            "" if row is None else ", ".join(f"{100 * row[task]:.0f}" for task in TASKS)
            for row in found
        ]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    return lines


def write(out: pathlib.Path, results: dict[str, Any]) -> None:
    """The tables, and a plot of the worst task over the density that was read."""
    from jaxsparse.analysis import plots

    rows = results["rows"]
    lengths, budgets = (sorted({row[key] for row in rows}) for key in ("length", "budget"))
    parts = [
        "# Retrieval, the tables\n",
        f"Right answers in percent: {', '.join(TASKS)}. Made on {results['machine']}.\n",
    ]
    for length in lengths:
        some = [row for row in rows if row["length"] == length]
        parts.append(f"## {length} tokens\n")
        parts.append("| | " + " | ".join(f"{b:g}" for b in budgets) + " |")
        parts.append("| :--- |" + " ---: |" * len(budgets))
        parts += [*cells(some, [(b, length) for b in budgets]), ""]
    read = {(r["name"], r["budget"]): r["density"] for r in rows if r["length"] == lengths[-1]}
    parts.append(f"Density that was read, {lengths[-1]} tokens:\n")
    parts.append("| | " + " | ".join(f"{b:g}" for b in budgets) + " |")
    parts.append("| :--- |" + " ---: |" * len(budgets))
    for name in dict.fromkeys(name for name, _ in read):
        numbers = [read.get((name, b)) for b in budgets]
        text = ["" if d is None else f"{d:.3f}" for d in numbers]
        parts.append(f"| {name} | " + " | ".join(text) + " |")
    frontier = results["frontier"]
    if frontier:
        columns = sorted({(row["context"], row["budget"]) for row in frontier})
        parts.append(f"\n## Equal cost, texts of {frontier[0]['length']} tokens\n")
        parts.append("| | " + " | ".join(f"last {n} at {b:g}" for n, b in columns) + " |")
        parts.append("| :--- |" + " ---: |" * len(columns))
        parts += cells(frontier, [(b, n) for n, b in columns])
    (out / "retrieval_tables.md").write_text("\n".join(parts) + "\n")

    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["density"]):
        if row["length"] == lengths[-1] and row["name"] != "dense":
            x, y = curves.setdefault(row["name"], ([], []))
            x.append(row["density"])
            y.append(min(row[task] for task in TASKS))
    figure = plots.curves(
        curves,
        title=f"The worst of three tasks, {lengths[-1]} tokens",
        xlabel="density that was read",
        ylabel="right answers",
    )
    figure.savefig(out / "retrieval.png", dpi=150, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, help="folder for tables and plots")
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--budgets", default="0.0625,0.125,0.25")
    parser.add_argument("--predictors", default=",".join(PREDICTORS))
    parser.add_argument("--texts", type=int, default=32, help="of each task")
    parser.add_argument("--shortest", type=int, default=512, help="context of the last part")
    parser.add_argument("--steps", type=int, default=300, help="of training gates and projections")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    path = options.workdir / f"results_{options.seed}.json"
    empty: dict[str, Any] = dict(rows=[], frontier=[])
    results = json.loads(path.read_text()) if path.exists() else empty
    results["machine"] = machine()
    lengths = [int(n) for n in options.lengths.split(",")]
    budgets = tuple(float(b) for b in options.budgets.split(","))
    names = [n for n in options.predictors.split(",") if n]
    model = trained_model(options.workdir, PHASES, options.seed)

    points = study.equal_cost(lengths[-1], options.shortest)
    asked = {b for b in (*budgets, *(b for _, b in points)) if b < 1}
    trained: list[study.Params] = [{} for _ in model.layers]
    if {"seer", "dsv", "minference"} & set(names):
        tokens = jnp.asarray(mixed(np.random.default_rng(options.seed + 1), 16, lengths[0]).tokens)
        whole = study.Model(at_length(model, lengths[0]))
        trained = study.prepare(whole, tokens, tuple(sorted(asked)), options.steps, LAYOUT)

    keys = ("name", "budget", "length", "context")

    def save(kind: str, name: str, budget: float, texts: Any, context: int | None = None) -> None:
        length = texts["needle"].tokens.shape[1]
        key = (name, budget, length, length if context is None else context)
        found = {
            part: {tuple(row[k] for k in keys): row for row in results[part]}
            for part in ("rows", "frontier")
        }
        if key in found[kind]:
            return
        row = found["rows"].get(key) or run(model, name, budget, texts, trained, context)
        results[kind].append(row)
        path.write_text(json.dumps(results, indent=1))
        print(row, flush=True)

    for length in lengths:
        rng = np.random.default_rng(options.seed + 2)
        texts = {task: draw(task, rng, options.texts, length) for task in TASKS}
        save("rows", "dense", 1.0, texts)
        for name in names:
            for budget in (b for b in budgets if fits(b, length)):
                save("rows", name, budget, texts)
    for context, budget in points:
        for name in ["dense"] if budget == 1 else names:
            save("frontier", name, budget, texts, context)
    if options.out is not None:
        write(options.out, results)


if __name__ == "__main__":
    main()
