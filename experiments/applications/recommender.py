"""DSL: a recommender whose embedding tables are trained sparse at a constant budget.

  python -m experiments.applications.recommender

Matrix factorisation of synthetic ratings whose users and items have power-law popularity. Drop-and-grow
(smallest |w| out, largest |g| in) within each embedding table lets popular rows keep more weights than
rare ones: the size of every embedding emerges. The gradient is accumulated over the window between two
updates of the masks: that of a single batch is zero for all rows that the batch does not name. (Wang et
al., Dynamic sparse learning: a novel paradigm for efficient recommendation, 2024.)
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxsparse
from experiments.report.page import markdown_table
from jaxsparse import engines, schedules
from jaxsparse.leaves import find


class Ratings(NamedTuple):
    """Rows `(user, item)` int32 `[n, 2]` and their ratings, float32 `[n]`."""

    pairs: np.ndarray
    values: np.ndarray


def synthetic(
    users: int = 400, items: int = 300, ratings: int = 30_000, rank: int = 12, seed: int = 0
) -> tuple[Ratings, Ratings]:
    """Training and test ratings of a model of `rank` factors plus noise; popularity ~ 1 / position."""
    rng = np.random.default_rng(seed)
    of = lambda n: (1 / np.arange(1, n + 1)) / (1 / np.arange(1, n + 1)).sum()
    pairs = np.stack(
        [rng.choice(users, ratings, p=of(users)), rng.choice(items, ratings, p=of(items))], axis=1
    ).astype(np.int32)
    u, v = rng.normal(size=(users, rank)), rng.normal(size=(items, rank))
    values = (u[pairs[:, 0]] * v[pairs[:, 1]]).sum(1) / np.sqrt(rank)
    values = (values + 0.3 * rng.normal(size=ratings)).astype(np.float32)
    cut = ratings * 4 // 5
    return Ratings(pairs[:cut], values[:cut]), Ratings(pairs[cut:], values[cut:])


def predict(params, pairs: Array) -> Array:
    """The inner products of the embeddings of each pair, `[n]`."""
    return jnp.sum(params["users"][pairs[:, 0]] * params["items"][pairs[:, 1]], axis=-1)


class Result(NamedTuple):
    """The trained tables, their masks, and the error on the test ratings."""

    params: dict[str, Array]
    masks: list[Array]
    rmse: float


def train(
    data: Ratings,
    test: Ratings,
    shape: tuple[int, int],
    *,
    dim: int = 32,
    density: float = 1.0,
    growth: str | None = "window",
    steps: int = 4000,
    update_every: int = 100,
    batch: int = 256,
    learning_rate: float = 0.01,
    drop_fraction: float = 0.5,
    seed: int = 0,
) -> Result:
    """Trains tables `users [shape[0], dim]` and `items [shape[1], dim]`.

    `growth` is "window" (the accumulated gradient), "batch" (that of the last batch) or None (the
    masks stay as drawn).
    """
    if growth not in ("window", "batch", None):
        raise ValueError(f"growth={growth!r}: give 'window', 'batch' or None")
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        name: 0.3 * jax.random.normal(k, (n, dim))
        for name, k, n in zip(("users", "items"), keys, shape)
    }
    plan = find(params)
    _, drawn = jaxsparse.prune(params, 1 - density, score="random", seed=seed)
    masks = plan.masks(drawn)
    tx = optax.adam(learning_rate)
    fraction = schedules.cosine(drop_fraction, steps * 3 // 4)
    pairs, values = jnp.asarray(data.pairs), jnp.asarray(data.values)

    def keep(tree, masks):
        return plan.put(tree, [jnp.where(m, x, 0.0) for m, x in zip(masks, plan.take(tree))])

    def loss_fn(params, rows):
        return jnp.mean((predict(params, pairs[rows]) - values[rows]) ** 2)

    def swap(carry, i):
        params, masks, total = carry
        weights, grads = ([jnp.abs(x) for x in plan.take(tree)] for tree in (params, total))
        salts = [leaf.salt(seed, i) for leaf in plan.leaves]
        new = engines.swap(plan.leaves, masks, weights, grads, fraction(i), salts=salts)
        return keep(params, new), new, jax.tree.map(jnp.zeros_like, total)

    def step(carry, i):
        params, opt, masks, total = carry
        rows = jax.random.randint(jax.random.fold_in(keys[2], i), (batch,), 0, len(values))
        grads = jax.grad(loss_fn)(params, rows)
        total = jax.tree.map(jnp.add, total, grads) if growth == "window" else grads
        updates, opt = tx.update(keep(grads, masks), opt, params)
        params = keep(optax.apply_updates(params, updates), masks)
        if growth is not None and density < 1:
            due = (i + 1) % update_every == 0
            carry = (params, masks, total)
            params, masks, total = jax.lax.cond(due, swap, lambda c, _: c, carry, i)
            # No stale moments at weights that are grown.
            opt = optax.tree.map_params(
                tx, lambda slot, m: jnp.where(m, slot, 0.0), opt, plan.scatter(masks)
            )
        return (params, opt, masks, total), None

    params = keep(params, masks)
    start = (params, tx.init(params), masks, jax.tree.map(jnp.zeros_like, params))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[0])
    params, _, masks, _ = run(start)
    error = predict(params, jnp.asarray(test.pairs)) - jnp.asarray(test.values)
    return Result(params, masks, float(jnp.sqrt(jnp.mean(error**2))))


def row_counts(result: Result) -> tuple[float, float]:
    """The mean number of weights of the most popular tenth of the items, and of the rarer half."""
    items, _ = result.masks  # leaves are in the order of their names
    rows = np.asarray(items).sum(1)
    return float(rows[: len(rows) // 10].mean()), float(rows[len(rows) // 2 :].mean())


def main(argv: list[str] | None = None) -> list[list[Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--ratings", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    data, test = synthetic(args.users, args.items, args.ratings, seed=args.seed)
    dim = 32
    small = max(1, round(dim * args.density))
    runs: list[tuple[str, dict[str, Any]]] = [
        (f"dense, {dim} dimensions", dict(dim=dim)),
        (f"dense, {small} dimensions", dict(dim=small)),
        ("fixed random masks", dict(dim=dim, density=args.density, growth=None)),
        ("grown by the last batch", dict(dim=dim, density=args.density, growth="batch")),
        ("grown by the window (DSL)", dict(dim=dim, density=args.density, growth="window")),
    ]
    rows = []
    for name, options in runs:
        result = train(
            data, test, (args.users, args.items), steps=args.steps, seed=args.seed, **options
        )
        kept = sum(int(m.sum()) for m in result.masks)
        popular, rare = row_counts(result)
        rows.append([name, f"{kept:,}", f"{result.rmse:.4f}", f"{popular:.1f}", f"{rare:.1f}"])
    print(f"Error on test ratings (the noise alone is 0.3), {args.steps} steps, one seed:\n")
    head = ["tables", "weights", "RMSE", "per popular item", "per rare item"]
    print(markdown_table(head, rows))
    return rows


if __name__ == "__main__":
    main()
