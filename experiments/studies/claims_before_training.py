"""Claims about masks that are found before training: `experiments.studies.claims` runs them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse
from experiments.studies.claims_tables import Rows, percent, stack
from experiments.task import make_task
from experiments.tickets import random_search
from experiments.tickets.problem import Problem, make_problem
from jaxsparse import masking, tickets
from jaxsparse.initial_scores import grasp, snip, synflow


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
    if name in ("snip", "grasp", "grasp, magnitude"):
        if name != "snip":  # the authors divide logits by 200
            loss = lambda p, b: problem.loss(p, b, state.stats, temperature=200.0)
        score = (snip if name == "snip" else grasp)(loss, state.params, [batch])
        if name == "grasp, magnitude":  # another method than the authors'
            score = jax.tree.map(jnp.abs, score)
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
    for name in ("snip", "grasp", "grasp, magnitude", "synflow"):
        for sparsity in (0.8, 0.9, 0.95):
            masks = stack([_masks_before_training(problem, name, sparsity, s) for s in seeds])
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


def gradient_flow(seeds: Sequence[int], steps: int) -> Rows:
    """GraSP raises the norm of the first gradient, which shuffling its mask within layers undoes."""
    problem, found = make_problem(), []
    train = problem.splits["train"]
    batch = train["x"][:512], train["y"][:512]
    size = jax.jit(lambda p: optax.global_norm(jax.grad(lambda q: problem.loss(q, batch, {}))(p)))
    for name in ("snip", "grasp", "grasp, magnitude", "synflow"):
        rows = []
        for seed in seeds:
            params = problem.init(seed).params
            masks = _masks_before_training(problem, name, 0.9, seed)
            moved = tickets.shuffle_within_layers(masks, seed + 1)
            norms = [size(p) for p in (params, *(masking.apply(params, m) for m in (masks, moved)))]
            rows.append([float(n / norms[0]) for n in norms[1:]])
        own, other = np.array(rows).T
        show = lambda x: f"{x.mean():.2f} ± {x.std(ddof=min(1, x.size - 1)):.2f}"
        found.append(
            {"score": name, "as scored / dense": show(own), "shuffled / dense": show(other)}
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
