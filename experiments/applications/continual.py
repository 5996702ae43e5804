"""Learning tasks one after the other: SparCL, and one sparse mask per task.

  python -m experiments.applications.continual

Split digits: five tasks of two classes each (handwritten digits of 8 x 8 pixels, from scikit-learn).

1. Class-incremental, one head for all classes. SparCL (Wang et al., SparCL: sparse continual learning on the
   edge, 2022) adds three kinds of sparsity to replay (DER++): a weight mask that follows |w| + alpha |g| of
   the new data + beta |g| of the buffer; updates of the largest 20 % of each layer's gradient only; removal
   of examples that are never forgotten.
2. Task-incremental, the task is known. One mask per task, found by drop-and-grow in a shared store of
   weights; those used by an earlier task are frozen. Nothing is forgotten, bit for bit. (Yildirim et al.,
   Continual learning with dynamic sparse training, 2024.)
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxsparse
from experiments.report.page import markdown_table
from jaxsparse import masking, selection
from jaxsparse._counts import kept_count, scale_count
from jaxsparse.leaves import SparseLeaves, find

TASKS, CLASSES = 5, 10


class Data(NamedTuple):
    """Pixels `[n, 64]` in [0, 1] and labels `[n]`."""

    x: np.ndarray
    y: np.ndarray

    def of(self, classes) -> "Data":
        """The examples of these classes."""
        rows = np.isin(self.y, classes)
        return Data(self.x[rows], self.y[rows])


def digits() -> tuple[Data, Data]:
    """Training and test examples."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int32)
    return Data(x[300:], y[300:]), Data(x[:300], y[:300])


def classes_of(task: int) -> list[int]:
    """The two classes of a task."""
    return [2 * task, 2 * task + 1]


def init_network(seed: int, outputs: int, hidden: int = 128):
    """A network of three matrices and no biases, so that masks tell all there is to tell."""
    sizes = [64, hidden, hidden, outputs]
    init = jax.nn.initializers.he_normal()
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        f"layer{i}": {"kernel": init(k, s)}
        for i, (k, s) in enumerate(zip(keys, zip(sizes, sizes[1:])))
    }


def logits(params, x: Array) -> Array:
    """`[..., 64]` to `[..., outputs]`."""
    for i in range(3):
        x = x @ params[f"layer{i}"]["kernel"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def cross_entropy(params, x, y) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y))


def accuracy(params, data: Data) -> float:
    """The part of the examples that are classified correctly, among all classes."""
    return float(np.mean(np.argmax(logits(params, jnp.asarray(data.x)), -1) == data.y))


# --- SparCL ---------------------------------------------------------------------------------------


def importance(w: Array, g_data: Array, g_buffer: Array, alpha: float, beta: float) -> Array:
    """Continual weight importance: |w| + alpha |gradient on the task| + beta |that on the buffer|."""
    return jnp.abs(w) + alpha * jnp.abs(g_data) + beta * jnp.abs(g_buffer)


def gradient_mask(gradient: Array, weight_mask: Array, q: float) -> Array:
    """The 1 - q of *all* entries of a layer with the largest |gradient| inside the weight mask."""
    k = kept_count(gradient.size, q)
    return selection.topk_mask(jnp.abs(gradient), k, where=weight_mask)


def rewire(mask: Array, score: Array, lower: int, upper: int, key: Array) -> Array:
    """Prune to the `lower` weights of highest importance, grow random others up to `upper`."""
    kept = selection.topk_mask(score, lower, where=mask)
    grown = selection.topk_mask(jax.random.uniform(key, mask.shape), upper - lower, where=~kept)
    return kept | grown


def counts(size: int, sparsity: float, surplus: float) -> tuple[int, int, int]:
    """Weights of a layer of `size`: what a rewiring prunes to, what it grows back to, and what the
    layer is raised to when a task begins."""
    kept = kept_count(size, sparsity)
    more = scale_count(kept, surplus)
    return kept - more, kept, min(kept + more, size)


_top = jax.jit(selection.topk_mask)


def easiest(forgotten: np.ndarray, active: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` active examples that were forgotten least often; the earlier one of
    two that are equal."""
    pad = (0, -len(active) % 512)  # one shape, one compilation
    score, there = np.pad(-forgotten, pad), np.pad(active, pad)
    return np.flatnonzero(_top(jnp.asarray(score, jnp.int32), count, where=jnp.asarray(there)))


class Replay(NamedTuple):
    """What a method of the class-incremental comparison does."""

    name: str
    buffer: int = 200
    sparsity: float = 0.0
    gradient_sparsity: float = 0.0
    removed: int = 0


def class_incremental(
    method: Replay,
    train: Data,
    test: Data,
    *,
    epochs: int = 8,
    batch: int = 16,
    learning_rate: float = 0.05,
    alpha: float = 0.5,
    beta: float = 0.5,
    surplus: float = 0.05,
    seed: int = 0,
) -> dict[str, float]:
    """Trains on the tasks in turn; returns the accuracy on all classes at the end, and what was spent:
    the densest update of any layer, examples used and removed, density of the weights at the end and
    while a new task begins."""
    params = init_network(seed, CLASSES)
    plan = find(params)
    params, drawn = jaxsparse.prune(params, method.sparsity, score="random", seed=seed)
    # As much signal as the dense network passes on: the variance of weights with fewer inputs grows.
    params = jax.tree.map(lambda w: w / np.sqrt(1 - method.sparsity), params)
    masks = plan.masks(drawn)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    slots: list[tuple[np.ndarray, int, np.ndarray]] = []  # pixels, label, logits when it was stored
    seen = used = 0
    busiest = raised = 0.0
    removed, removals = 0, sorted({epochs // 4, epochs // 2})

    def replay_loss(params, bx, by, bz):
        distilled = jnp.mean((logits(params, bx) - bz) ** 2)
        return 0.5 * distilled + 0.5 * cross_entropy(params, bx, by)

    @jax.jit
    def gradients(params, x, y, bx, by, bz):
        return jax.grad(cross_entropy)(params, x, y), jax.grad(replay_loss)(params, bx, by, bz)

    @jax.jit
    def update(params, masks, fresh, buffered):
        """Plain SGD: momentum would smear the update beyond the gradient mask."""
        grads, ws = plan.take(jax.tree.map(jnp.add, fresh, buffered)), plan.take(params)
        allowed = masks
        if method.gradient_sparsity:
            allowed = [gradient_mask(g, m, method.gradient_sparsity) for g, m in zip(grads, masks)]
        new = [jnp.where(a, w - learning_rate * g, w) for w, g, a in zip(ws, grads, allowed)]
        return plan.put(params, new), jnp.max(jnp.stack([jnp.mean(a) for a in allowed]))

    @functools.partial(jax.jit, static_argnames="raised")
    def rewired(params, masks, fresh, buffered, key, raised=False):
        """Prunes and grows to the density; `raised`: only grows, by the surplus of a new task."""
        rows = zip(plan.take(params), masks, plan.take(fresh), plan.take(buffered))
        new = []
        for i, (w, m, g, b) in enumerate(rows):
            lower, kept, more = counts(m.size, method.sparsity, surplus)
            lower, upper = (kept, more) if raised else (lower, kept)
            score = importance(w, g, b, alpha, beta)
            new.append(rewire(m, score, lower, upper, jax.random.fold_in(key, i)))
        return masking.apply(params, plan.scatter(new)), new

    def density() -> float:
        return sum(int(m.sum()) for m in masks) / sum(m.size for m in masks)

    answer = jax.jit(logits)
    nothing = jax.tree.map(jnp.zeros_like, params)

    for task in range(TASKS):
        data = train.of(classes_of(task))
        active = np.ones(len(data.y), bool)
        correct = np.zeros(len(data.y), bool)
        forgotten = np.zeros(len(data.y), np.int64)
        for epoch in range(epochs):
            order = rng.permutation(np.flatnonzero(active))
            order = order[: len(order) // batch * batch]
            for i, rows in enumerate(order.reshape(-1, batch)):
                x, y = data.x[rows], data.y[rows]
                if slots:
                    picks = rng.integers(0, len(slots), batch)
                    old = (np.stack([slots[p][j] for p in picks]) for j in range(3))
                    fresh, buffered = gradients(params, x, y, *old)
                else:
                    fresh, _ = gradients(params, x, y, x, y, np.zeros((batch, CLASSES), np.float32))
                    buffered = nothing
                begins = bool(task) and epoch == 0
                due = begins or (epoch and epoch % 2 == 0 and epoch < epochs - 1)
                if method.sparsity and i == 0 and due:
                    fold = jax.random.fold_in(key, task * epochs + epoch)
                    params, masks = rewired(params, masks, fresh, buffered, fold, raised=begins)
                    raised = max(raised, density())
                params, share = update(params, masks, fresh, buffered)
                busiest = max(busiest, float(share))
                used += len(rows)
                if (
                    epoch == 0 and method.buffer
                ):  # reservoir sampling, with the logits of the moment
                    z = np.asarray(answer(params, x))
                    for j in range(batch):
                        seen += 1
                        at = len(slots) if len(slots) < method.buffer else rng.integers(0, seen)
                        item = (x[j], y[j], z[j])
                        if at == len(slots):
                            slots.append(item)
                        elif at < method.buffer:
                            slots[at] = item
            now = np.argmax(answer(params, data.x), -1) == data.y
            forgotten += correct & ~now
            correct = now
            if epoch in removals:
                done = int(np.count_nonzero(~active))
                due = method.removed * (removals.index(epoch) + 1) // len(removals)
                gone = easiest(forgotten, active, due - done)
                active[gone] = False
                removed += len(gone)
        # The sparsity that was asked for, whatever the last rewiring left.
        params, masks = _tightened(plan, params, masks, method.sparsity)
    return {
        "accuracy": accuracy(params, test),
        "update": busiest,
        "examples": used,
        "removed": removed,
        "density": density(),
        "raised": raised,
    }


def _tightened(plan, params, masks, sparsity):
    sizes = [kept_count(m.size, sparsity) for m in masks]
    new = [_top(jnp.abs(w), k, where=m) for w, m, k in zip(plan.take(params), masks, sizes)]
    return masking.apply(params, plan.scatter(new)), new


# --- One mask per task ----------------------------------------------------------------------------


class Store(NamedTuple):
    """The weights of all tasks, which of them are taken, and the mask of each task."""

    weights: Any
    frozen: list[Array]
    masks: list[list[Array]]


def subnetwork(store: Store, plan: SparseLeaves, task: int):
    """The network of a task: the store behind its mask."""
    return masking.apply(store.weights, plan.scatter(store.masks[task]))


@functools.partial(jax.jit, static_argnames=("make", "plan"))
def _learn(weights, frozen, xs, ys, seed, *, make, plan):
    tx = make(seed)
    state = tx.init(weights)
    params = jaxsparse.apply_masks(weights, state)

    def restored(params, masks):
        """A frozen weight that the mask of the task holds has the value of the store."""
        rows = zip(plan.take(params), plan.take(weights), masks, frozen)
        return plan.put(params, [jnp.where(m & f, w, p) for p, w, m, f in rows])

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(cross_entropy)(params, *batch)
        free = [jnp.where(f, 0.0, g) for f, g in zip(frozen, plan.take(grads))]
        updates, state = tx.update(plan.put(grads, free), state, params)
        params = optax.apply_updates(params, updates)
        return (restored(params, plan.masks(jaxsparse.get_masks(state))), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), (xs, ys))
    masks = plan.masks(jaxsparse.get_masks(state))
    rows = zip(plan.take(weights), plan.take(params), masks, frozen)
    merged = plan.put(weights, [jnp.where(m & ~f, p, w) for w, p, m, f in rows])
    return merged, masks


def learn_task(
    store: Store,
    plan: SparseLeaves,
    data: Data,
    task: int,
    make: Any,
    *,
    steps: int = 300,
    batch: int = 32,
    seed: int = 0,
) -> Store:
    """Finds and trains the mask of `task`, leaving frozen weights at the values of the store.
    `make(seed)` is the method that finds it."""
    rows = np.random.default_rng([seed, task]).integers(0, len(data.y), (steps, batch))
    weights, masks = _learn(
        store.weights,
        store.frozen,
        data.x[rows],
        data.y[rows] - 2 * task,
        seed * TASKS + task,
        make=make,
        plan=plan,
    )
    frozen = [f | m for f, m in zip(store.frozen, masks)]
    return Store(weights, frozen, [*store.masks, masks])


def task_incremental(
    train: Data,
    test: Data,
    *,
    method: str = "rigl",
    allocation: str = "erk",
    density: float = 0.2,
    steps: int = 300,
    update_every: int = 30,
    seed: int = 0,
) -> dict[str, Any]:
    """All tasks in turn, each with a mask found by `method`; returns the accuracy of each at the end, how many logits of earlier tasks
    changed by any bit, and the part of the weights that is taken."""
    dynamic = {"total_steps": steps, "update_every": update_every, "drop_fraction": 0.5}

    def make(seed):
        options = {k: v for k, v in dynamic.items() if k in jaxsparse.METHODS[method].options}
        return jaxsparse.make(
            method,
            optax.adam(2e-3),
            sparsity=1 - density,
            allocation=allocation,
            seed=seed,
            **options,
        )

    weights = init_network(seed, 2)
    plan = find(weights)
    store = Store(weights, [jnp.zeros(leaf.shape, bool) for leaf in plan.leaves], [])
    answer = jax.jit(logits)
    before: list[np.ndarray] = []
    changed = 0
    for task in range(TASKS):
        store = learn_task(
            store, plan, train.of(classes_of(task)), task, make, steps=steps, seed=seed
        )
        for old, stored in enumerate(before):
            now = np.asarray(answer(subnetwork(store, plan, old), test.x))
            changed += int(np.count_nonzero(now.view(np.int32) != stored.view(np.int32)))
        before.append(np.asarray(answer(subnetwork(store, plan, task), test.x)))
    found = []
    for task in range(TASKS):
        part = test.of(classes_of(task))
        right = np.argmax(answer(subnetwork(store, plan, task), part.x), -1) == part.y - 2 * task
        found.append(float(right.mean()))
    taken = sum(int(f.sum()) for f in store.frozen) / sum(f.size for f in store.frozen)
    return {"accuracies": found, "changed": changed, "capacity": taken}


def main(argv: list[str] | None = None) -> tuple[list[list[Any]], list[list[Any]]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train, test = digits()
    first = []
    for method in (
        Replay("fine-tuning", buffer=0),
        Replay("DER++"),
        Replay("SparCL, 75 %", sparsity=0.75, gradient_sparsity=0.8, removed=80),
        Replay("SparCL, 90 %", sparsity=0.9, gradient_sparsity=0.9, removed=80),
    ):
        r = class_incremental(method, train, test, epochs=args.epochs, seed=args.seed)
        first.append(
            [
                method.name,
                f"{r['accuracy']:.1%}",
                f"{r['density']:.1%}",
                f"{r['update']:.1%}",
                f"{r['examples']:,}",
            ]
        )
    print("Class-incremental split digits, accuracy on all ten classes after the last task:\n")
    head = ["method", "accuracy", "weights", "largest update of a layer", "examples seen"]
    print(markdown_table(head, first))
    second = []
    for method, allocation in (
        ("static", "erk"),
        ("set", "erk"),
        ("rigl", "erk"),
        ("rigl", "uniform"),
    ):
        r = task_incremental(
            train, test, method=method, allocation=allocation, steps=args.steps, seed=args.seed
        )
        second.append(
            [
                f"{method}, {allocation}",
                f"{np.mean(r['accuracies']):.1%}",
                r["changed"],
                f"{r['capacity']:.1%}",
            ]
        )
    print("\nTask-incremental, one mask of density 20 % per task:\n")
    head = ["masks", "accuracy", "earlier logits that changed", "weights taken"]
    print(markdown_table(head, second))
    return first, second


if __name__ == "__main__":
    main()
