"""Claims about what pruning does to classes: `experiments.studies.claims` runs them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse
from experiments.studies.claims_tables import Rows, percent
from experiments.tickets.problem import make_problem
from jaxsparse import tickets
from jaxsparse.analysis import constraints, impact


def ceag(seeds: Sequence[int], steps: int) -> Rows:
    """With constraints per class the largest excess loss of a class on the training set falls to the tolerance."""
    problem, tolerance, sparsity = make_problem(steps=steps), 0.01, 0.9
    keys, tune = jnp.asarray(seeds), optax.adam(1e-3)
    x, y = problem.splits["train"]["x"], problem.splits["train"]["y"]
    each = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(
        problem.task.apply(p, {}, x, train=False)[0], y
    )

    @jax.jit
    @jax.vmap
    def dense(seed):
        params = problem.train(problem.init(seed), seed, 0, steps).state.params
        right = problem.evaluate(params, {}, "train")["predictions"] == y
        return params, constraints.reference(each(params, x, y), right, y, 10)

    @jax.jit
    @jax.vmap
    def pruned(params, reference, masks, seed, on):
        tx = jaxsparse.static(tune, masks=problem.ones)
        params = jaxsparse.masking.apply(params, masks)
        opt: Any = tx.init(params)

        def step(carry, i):
            params, opt, dual = carry
            at = jax.random.randint(
                jax.random.fold_in(jax.random.key(seed), i), (128,), 0, x.shape[0]
            )
            logits, _ = problem.task.apply(params, {}, x[at], train=False)
            dual = constraints.ascend(
                dual,
                logits.argmax(1) == y[at],
                y[at],
                reference,
                tolerance=tolerance,
                rate=0.02,
                active=on,
            )
            loss = lambda p: constraints.penalized_loss(
                each(p, x[at], y[at]), y[at], dual, reference
            )
            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return (optax.apply_updates(params, updates), opt, dual), None

        start = params, opt._replace(masks=masks), constraints.start(10, buffer=40)
        (params, _, dual), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return params, dual.multipliers

    def recalls(params, split):
        found = jax.vmap(lambda p: problem.evaluate(p, {}, split)["predictions"])(params)
        truth = np.asarray(problem.splits[split]["y"])
        right = np.asarray(found) == truth
        per_class = np.stack([right[:, truth == c].mean(axis=1) for c in range(10)], axis=1)
        return right.mean(axis=1), per_class, np.asarray(found)

    params, reference = dense(keys)
    masks = jax.vmap(lambda p: tickets.keep(jax.tree.map(jnp.abs, p), p, sparsity))(params)
    ends = {"dense": params}
    for name, on in (("pruned", False), ("pruned, CEAG", True)):
        ends[name], lam = pruned(params, reference, masks, keys, jnp.full(len(seeds), on))
        print(name, "multipliers", np.asarray(lam).mean(axis=0).round(2), flush=True)
    found, base = [], {split: recalls(params, split) for split in ("train", "test")}
    labels = np.asarray(problem.splits["test"]["y"])
    for name, p in ends.items():
        row: dict[str, Any] = {"network": name}
        for split in ("train", "test"):
            accuracy, per_class, predictions = recalls(p, split)
            gap = (base[split][1] - per_class) - (base[split][0] - accuracy)[:, None]
            row[f"{split} accuracy"] = percent(accuracy)
            row[f"worst excess loss, {split}"] = percent(gap.max(axis=1))
            if split == "test":
                row["classes, test"] = " ".join(f"{100 * r:.0f}" for r in per_class.mean(axis=0))
        found.append(row)
        print(row, flush=True)
        if name != "dense":
            change = impact.class_impact(base["test"][2], predictions, labels)
            exemplars = impact.identified_exemplars(base["test"][2], predictions)
            print(
                "significant classes",
                np.flatnonzero(change.significant()),
                "PIEs",
                exemplars.mean(),
            )
    return found
