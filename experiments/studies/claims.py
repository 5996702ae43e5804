"""Published claims about where sparse networks come from, each as a small experiment with its figures.

  python -m experiments.studies.claims shuffle
  python -m experiments.studies.claims collapse
  python -m experiments.studies.claims rewind
  python -m experiments.studies.claims edge_popup
  python -m experiments.studies.claims planted
  python -m experiments.studies.claims soup
  python -m experiments.studies.claims swamp
  python -m experiments.studies.claims activate
  python -m experiments.studies.claims random_search

Each prints its table and writes it to `--out`; all seeds of a row train at once.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse
from experiments.report.page import markdown_table
from experiments.task import make_task
from experiments.tickets import averages, plant, random_search
from experiments.tickets.problem import Problem, make_problem
from experiments.tickets.rounds import by_magnitude, rounds
from jaxsparse import tickets
from jaxsparse.analysis import connectivity
from jaxsparse.initial_scores import grasp, snip, synflow

Rows = list[dict[str, Any]]


def percent(values: Any) -> str:
    """Mean and standard deviation in per cent."""
    x = 100 * np.asarray(values, np.float64)
    return f"{x.mean():.1f} ± {x.std(ddof=min(1, x.size - 1)):.1f}"


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _masks_before_training(problem: Problem, name: str, sparsity: float, seed: int) -> Any:
    """SNIP, GraSP, SynFlow, magnitude or random masks of the initial network of a seed."""
    state = problem.init(seed)
    train = problem.splits["train"]
    rows = np.random.default_rng(seed).choice(train["y"].shape[0], 512, replace=False)
    batch = train["x"][rows], train["y"][rows]
    loss = lambda p, b: problem.loss(p, b, state.stats)
    if name == "synflow":
        forward = lambda p, x: problem.task.apply(p, state.stats, x, train=False)[0]
        return synflow(forward, state.params, batch[0][:1], sparsity)
    if name in ("snip", "grasp"):
        if name == "grasp":  # the authors divide logits by 200
            loss = lambda p, b: problem.loss(p, b, state.stats, temperature=200.0)
        score = {"snip": snip, "grasp": grasp}[name](loss, state.params, [batch])
        return tickets.keep(score, state.params, sparsity)
    options: dict[str, Any] = {"score": name, "allocation": "global"}
    return jaxsparse.prune(state.params, sparsity, seed=seed, **options)[1]


def _train_under(problem: Problem, masks: Any, seeds: Sequence[int]) -> np.ndarray:
    """Test accuracies of networks trained under masks from step 0."""

    @jax.jit
    @jax.vmap
    def run(seed, masks):
        state = problem.with_masks(problem.init(seed), masks)
        end = problem.train(state, seed, 0, problem.steps).state
        return problem.evaluate(end.params, end.stats)["accuracy"]

    return np.asarray(run(jnp.asarray(seeds), masks))


def shuffle(seeds: Sequence[int], steps: int) -> Rows:
    """Shuffling a mask inside of its layers changes accuracy by less than a standard deviation."""
    problem = make_problem(steps=steps)
    found = []
    for name in ("snip", "grasp", "synflow"):
        for sparsity in (0.8, 0.9, 0.95):
            masks = _stack([_masks_before_training(problem, name, sparsity, s) for s in seeds])
            moved = jax.vmap(tickets.shuffle_within_layers)(masks, jnp.asarray(seeds) + 1)
            own, other = (_train_under(problem, m, seeds) for m in (masks, moved))
            found.append(
                {
                    "score": name,
                    "sparsity": f"{sparsity:.0%}",
                    "as scored": percent(own),
                    "shuffled": percent(other),
                    "difference": f"{100 * (other - own).mean():+.1f}",
                }
            )
            print(found[-1], flush=True)
    return found


def collapse(seeds: Sequence[int], steps: int) -> Rows:
    """At a compression of 10^3 SNIP and GraSP empty whole layers and SynFlow does not."""
    problem = make_problem(steps=10, model_options={"hidden": (128,) * 10}, warmup_steps=2)
    found = []
    for compression in (10, 100, 1000):
        for name in ("random", "magnitude", "snip", "grasp", "synflow"):
            empty, broken = [], 0
            for seed in seeds:
                masks = _masks_before_training(problem, name, 1 - 1 / compression, seed)
                left = [int(np.sum(m)) for m in jax.tree.leaves(masks)]
                empty.append(sum(n == 0 for n in left))
                broken += empty[-1] > 0
            found.append(
                {
                    "score": name,
                    "compression": compression,
                    "empty layers of 11": f"{np.mean(empty):.1f}",
                    "collapsed networks": f"{broken} of {len(seeds)}",
                }
            )
            print(found[-1], flush=True)
    return found


def rewind(seeds: Sequence[int], steps: int) -> Rows:
    """Tickets rewound to step k beat those rewound to 0 where runs from step k are linearly connected."""
    problem = make_problem(steps=steps, optimizer="sgd", learning_rate=0.1, warmup_steps=0)
    found, keys = [], jnp.asarray(seeds)

    for k in (0, steps // 100, steps // 20, steps // 5):
        start = jax.jit(jax.vmap(lambda s, k=k: problem.train(problem.init(s), s, 0, k).state))
        early = jax.jit(jax.vmap(problem.init))(keys) if k == 0 else start(keys)

        @jax.jit
        @jax.vmap
        def pair(state, seed, k=k):
            ends = [problem.train(state, seed + 1000 * i, k, problem.steps).state for i in (1, 2)]
            return ends[0].params, ends[1].params

        dense = _barriers(problem, *pair(early, keys))
        run = rounds(problem, levels=15, seeds=seeds, rewind_to=k)
        masks = problem.masks(run.final)
        sparse = _barriers(problem, *pair(jax.vmap(problem.with_masks)(early, masks), keys))
        row: dict[str, Any] = {"k": k, "barrier, dense": percent(dense)}
        for level in (0, 5, 10, 15):
            now = run.levels[level]
            row[f"{now.density:.0%} left"] = percent(now.accuracy)
        row["barrier, ticket"] = percent(sparse)
        found.append(row)
        print(row, flush=True)
        jax.clear_caches()
    return found


def _barriers(problem: Problem, first: Any, second: Any) -> list[float]:
    """The barriers of the error between two networks of each seed."""
    error = jax.jit(lambda p: 1 - problem.evaluate(p, {})["accuracy"])
    take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    number = jax.tree.leaves(first)[0].shape[0]
    rows = [(take(first, i), take(second, i)) for i in range(number)]
    return [connectivity.line(error, a, b, points=11).barrier for a, b in rows]


def edge_popup(seeds: Sequence[int], steps: int) -> Rows:
    """Edge-Popup on wide random networks approaches a trained dense network."""
    found = []
    for width in (64, 128, 256, 512, 1024):
        problem = make_problem(steps=steps, model_options={"hidden": (width, width)})
        row: dict[str, Any] = {"width": width}
        if width <= 256:
            row["dense, trained"] = percent(_train_under(problem, _whole(problem, seeds), seeds))
        schedule = optax.cosine_decay_schedule(0.1, steps)
        tx = jaxsparse.edge_popup(
            optax.set_to_zero(), 0.5, scores=optax.sgd(schedule, momentum=0.9)
        )
        task = make_task(problem.config, problem.data, tx=tx)

        @jax.jit
        @jax.vmap
        def run(seed, task=task, problem=problem, tx=tx):
            state = problem.init(seed)
            keys = iter(jax.random.split(jax.random.key(seed), 8))
            sign = jaxsparse.signed_constant()
            fixed = lambda x: sign(next(keys), x.shape) if x.ndim > 1 else 0 * x
            params = jax.tree.map(fixed, state.params)
            opt = tx.init(params)
            state = state._replace(params=jaxsparse.apply_masks(params, opt), opt_state=opt)
            swapped = Problem(problem.config, problem.data, problem.splits, tx, problem.ones)
            end = swapped.train(state, seed, 0, steps).state
            return swapped.evaluate(end.params, end.stats)["accuracy"]

        row["Edge-Popup, half of random weights"] = percent(run(jnp.asarray(seeds)))
        found.append({"width": width, "dense, trained": row.get("dense, trained", "-"), **row})
        print(row, flush=True)
        jax.clear_caches()
    return found


def _whole(problem: Problem, seeds: Sequence[int]) -> Any:
    return jax.tree.map(lambda m: jnp.ones((len(seeds), *m.shape), bool), problem.ones)


def planted(seeds: Sequence[int], steps: int) -> Rows:
    """Planted tickets are found by iterative pruning at moderate, and missed at their own extreme sparsity."""
    found = []
    for task in ("circle", "relu"):
        problem = plant.PlantedProblem(task, width=100, steps=steps, plants=len(seeds))
        truth = jax.tree.map(jnp.asarray, problem.planted.masks)
        goal = float(
            np.mean([np.mean(np.concatenate([np.ravel(x) for x in jax.tree.leaves(truth)]))])
        )
        levels = 6
        fraction = 1 - goal ** (1 / levels)

        def note(level, state, task=task, problem=problem, truth=truth, goal=goal):
            masks = problem.masks(state)
            recall = jax.vmap(plant.recall)(masks, truth)
            row = {
                "task": task,
                "left": f"{level.density:.2%}",
                "planted": f"{goal:.2%}",
                "recall": percent(recall),
                "score after training": percent(level.accuracy),
            }
            found.append(row)
            print(row, flush=True)

        rounds(problem, levels=levels, seeds=seeds, prune=by_magnitude(fraction), on_level=note)
        start = jax.vmap(problem.init)(jnp.asarray(seeds))
        given = jax.vmap(problem.with_masks)(start, truth)
        before = jax.vmap(problem.evaluate)(given.params, given.stats)["accuracy"]
        run = lambda s, seed, problem=problem: problem.train(s, seed, 0, steps).state
        end = jax.jit(jax.vmap(run))(given, jnp.asarray(seeds))
        after = jax.vmap(problem.evaluate)(end.params, end.stats)["accuracy"]
        row = {
            "task": task,
            "left": "the planted ticket",
            "planted": f"{goal:.2%}",
            "recall": percent(np.ones(len(seeds))),
            "score after training": f"{percent(after)} (before: {percent(before)})",
        }
        found.append(row)
        print(row, flush=True)
        jax.clear_caches()
    return found


def soup(seeds: Sequence[int], steps: int) -> Rows:
    """A soup of siblings is at least its best member."""
    found = []
    for dataset in ("mnist1d", "digits"):
        problem = make_problem(dataset, "mlp", steps=steps)
        phases = averages.sparse_soups(
            problem, sparsity=0.95, phases=3, members=3, seeds=seeds, retrain_from=steps // 2
        )
        for phase in phases:
            members = np.asarray(phase.members)
            best = members.max(axis=1)
            found.append(
                {
                    "data": dataset,
                    "left": f"{phase.density:.1%}",
                    "members": percent(members),
                    "best member": percent(best),
                    "soup": percent(phase.soup),
                    "soup at least the best": f"{int((np.asarray(phase.soup) >= best).sum())} of {len(seeds)}",
                }
            )
            print(found[-1], flush=True)
    return found


def swamp(seeds: Sequence[int], steps: int) -> Rows:
    """An average of particles beats a particle; at low sparsity it can be worse."""
    early, last = steps // 20, 3 * steps // 4
    problem = make_problem(steps=steps, constant_from=last, constant_rate=5e-4)
    found = averages.swamp(
        problem, levels=10, particles=3, seeds=seeds, rewind_to=early, average_from=last
    )
    rows = []
    for phase in found[::2]:
        rows.append(
            {
                "left": f"{phase.density:.0%}",
                "a particle (averaged over time)": percent(np.asarray(phase.members)),
                "their average": percent(phase.soup),
            }
        )
        print(rows[-1], flush=True)
    return rows


def activate(seeds: Sequence[int], steps: int) -> Rows:
    """Selective activation (AP) improves iterative magnitude pruning and leaves fewer dead neurons."""
    problem = make_problem(steps=steps, optimizer="sgd", learning_rate=0.1)
    x = problem.splits["test"]["x"].reshape(problem.splits["test"]["y"].shape[0], -1)

    @jax.jit
    @jax.vmap
    def dead(params):
        h, rows = x, []
        layers = params["layers"]
        for i in range(len(layers) - 1):
            h = jax.nn.relu(h @ layers[i]["kernel"] + layers[i]["bias"])
            rows.append(jnp.all(h == 0, axis=0))
        silent = jnp.concatenate(rows)
        return jnp.mean(silent)

    found = []
    for q in (0.0, 0.02, 0.05):
        states: dict[int, Any] = {}
        run = rounds(
            problem,
            levels=14,
            seeds=seeds,
            prune=by_magnitude(0.2, activate=q),
            on_level=lambda level, state, states=states: states.update({level.level: state}),
        )
        for n in (4, 8, 14):
            found.append(
                {
                    "q": q,
                    "left": f"{run.levels[n].density:.1%}",
                    "accuracy": percent(run.levels[n].accuracy),
                    "dead neurons": percent(dead(states[n].params)),
                }
            )
            print(found[-1], flush=True)
    return found


def random_search_(seeds: Sequence[int], steps: int) -> Rows:
    """The best of many random masks before training is no better than one after it."""
    problem, found = make_problem(steps=steps), []
    for sparsity in (0.5, 0.9):
        r = random_search.compare(problem, sparsity, number=100, seeds=seeds)
        diff = r.accuracy[0] - r.accuracy[1]
        t = diff.mean() / (diff.std(ddof=1) / len(seeds) ** 0.5)
        found.append(
            {
                "nodes pruned": f"{sparsity:.0%}",
                "first loss, best of 100": f"{r.first_loss[0].mean():.3f}",
                "first loss, one": f"{r.first_loss[1].mean():.3f}",
                "accuracy, best of 100": percent(r.accuracy[0]),
                "accuracy, one": percent(r.accuracy[1]),
                "paired t": f"{t:+.2f}",
            }
        )
        print(found[-1], flush=True)
    return found


# (experiment, seeds, steps)
CLAIMS: dict[str, tuple[Callable[[Sequence[int], int], Rows], int, int]] = {
    "shuffle": (shuffle, 5, 1500),
    "collapse": (collapse, 5, 0),
    "rewind": (rewind, 5, 1000),
    "edge_popup": (edge_popup, 3, 1500),
    "planted": (planted, 5, 2000),
    "soup": (soup, 5, 1000),
    "swamp": (swamp, 3, 1000),
    "activate": (activate, 5, 1000),
    "random_search": (random_search_, 10, 1000),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("claim", choices=sorted(CLAIMS))
    parser.add_argument("--seeds", type=int, help="runs of each row")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/claims"))
    args = parser.parse_args(argv)
    run, seeds, steps = CLAIMS[args.claim]
    seeds, steps = args.seeds or seeds, args.steps or steps
    started = time.monotonic()
    rows = run(list(range(seeds)), steps)
    facts = {"claim": args.claim, "seeds": seeds, "steps": steps}
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n"
    (args.out / f"{args.claim}.json").write_text(text)
    names = list(rows[0])
    print(f"\n{run.__doc__}\n")
    print(markdown_table(names, [[str(row[n]) for n in names] for row in rows]))
    print(f"\n{seeds} seeds, {steps} steps, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
