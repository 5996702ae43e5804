"""Claims about tickets and averages: `experiments.studies.claims` runs them."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.claims_tables import Rows, percent
from experiments.tickets import averages, plant
from experiments.tickets.problem import Problem, make_problem
from experiments.tickets.rounds import by_magnitude, rounds
from jaxsparse.analysis import connectivity


def connected(seeds: Sequence[int], steps: int) -> Rows:
    """Runs from a late enough step are linearly connected; how late depends on the noise of training."""
    found, keys = [], jnp.asarray(seeds)
    for rate, part in ((0.1, 0), (0.4, 0), (0.4, 5), (0.4, 20)):
        problem = make_problem(steps=steps, optimizer="sgd", learning_rate=rate, warmup_steps=0)
        k = steps * part // 100

        @jax.jit
        @jax.vmap
        def pair(seed, k=k, problem=problem):
            early = problem.train(problem.init(seed), seed, 0, k).state if k else problem.init(seed)
            orders = seed + 1000 * jnp.arange(1, 3)
            run = lambda order: problem.train(early, order, k, problem.steps).state.params
            ends = jax.vmap(run)(orders)
            return jax.tree.map(lambda x: x[0], ends), jax.tree.map(lambda x: x[1], ends)

        barriers = _barriers(problem, *pair(keys))
        found.append({"learning rate": rate, "k": k, "barrier of the error": percent(barriers)})
        print(found[-1], flush=True)
    return found


def rewind(seeds: Sequence[int], steps: int) -> Rows:
    """Tickets rewound to step k beat those rewound to 0 where runs from 0 are not linearly connected."""
    problem = make_problem(steps=steps, optimizer="sgd", learning_rate=0.4, warmup_steps=0)
    found = []
    for part in (0, 20):
        k = steps * part // 100
        run = rounds(problem, levels=6, seeds=seeds, rewind_to=k, prune=by_magnitude(0.4))
        row: dict[str, Any] = {"k": k}
        row |= {f"{x.density:.0%} left": percent(x.accuracy) for x in run.levels[::2]}
        found.append(row)
        print(row, flush=True)
    return found


def _barriers(problem: Problem, first: Any, second: Any) -> list[float]:
    """The barriers of the error between two networks of each seed."""
    error = jax.jit(lambda p: 1 - problem.evaluate(p, {})["accuracy"])
    take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    number = jax.tree.leaves(first)[0].shape[0]
    rows = [(take(first, i), take(second, i)) for i in range(number)]
    return [connectivity.line(error, a, b, points=11).barrier for a, b in rows]


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
    settings: dict[str, dict[str, Any]] = {
        "AdamW": {},
        "SGD": {"optimizer": "sgd", "learning_rate": 0.1},
    }
    for (name, changes), dataset in itertools.product(settings.items(), ("mnist1d", "digits")):
        problem = make_problem(dataset, "mlp", steps=steps, **changes)
        phases = averages.sparse_soups(
            problem, sparsity=0.95, phases=3, members=3, seeds=seeds, retrain_from=steps // 2
        )
        for phase in phases:
            members = np.asarray(phase.members)
            best = members.max(axis=1)
            found.append(
                {
                    "data": dataset,
                    "optimizer": name,
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
