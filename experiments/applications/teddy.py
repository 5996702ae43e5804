r"""TEDDY: a graph network on a graph whose edges were trimmed by degrees, with weights projected to few nonzeros.

  python -m experiments.applications.teddy

1. `jaxsparse.tickets.keep_edges` removes the edges of least score, once, from degrees alone.
2. The network is trained on what is left with $CE + \lambda\, KL(dense \| network)$, from the logits of a network that was
   trained on the whole graph.
3. After every step of Adam the $\lceil n s \rceil$ smallest |w| of ALL parameters together become 0; they may return,
   for Adam goes on with them.

(Seo, Yun & Yang, TEDDY: trimming edges with degree-based discrimination strategy, 2024.)
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.report.page import markdown_table
from jaxsparse import selection, tickets
from jaxsparse._counts import scale_count


def sparsest(sparsity: float) -> optax.GradientTransformation:
    """The projection on so few nonzeros, over all leaves together: to stand after an optimizer in `optax.chain`.

    Args:
      sparsity: of all parameters, biases too; $\\lceil n s \\rceil$ of n are 0 after each step.

    >>> tx = optax.chain(optax.sgd(1.0), sparsest(0.5))
    >>> params = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> [x.tolist() for x in jax.tree.leaves(optax.apply_updates(params, updates))]
    [[0.0, 4.0], [3.0, 0.0]]

    Raises:
      ValueError: a sparsity not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("update needs the parameters: call tx.update(grads, state, params)")
        us, treedef = jax.tree.flatten(updates)
        ws = treedef.flatten_up_to(params)
        total = sum(w.size for w in ws)
        kept = scale_count(total, 1 - sparsity)
        masks = selection.topk_masks([jnp.abs(w + u) for w, u in zip(ws, us)], kept, together=True)
        return treedef.unflatten([jnp.where(m, u, -w) for m, u, w in zip(masks, us, ws)]), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Graph(NamedTuple):
    """Features `[nodes, d]`, labels, edges `[2, E]` in both directions, and which nodes are trained on."""

    x: Array
    y: Array
    edges: np.ndarray
    train: Array


def communities(nodes: int, classes: int, *, inside: float, across: float, seed: int = 0) -> Graph:
    """A random graph in which nodes of one class know each other more often, with noisy features."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, nodes)
    chance = np.where(y[:, None] == y, inside, across)
    upper = np.triu(rng.random((nodes, nodes)) < chance, 1)
    u, v = np.nonzero(upper)
    edges = np.stack([np.concatenate([u, v]), np.concatenate([v, u])])
    x = np.eye(classes)[y] + 1.5 * rng.normal(size=(nodes, classes))
    x = np.concatenate([x, rng.normal(size=(nodes, 8))], axis=1)
    return Graph(
        jnp.asarray(x, jnp.float32), jnp.asarray(y), edges, jnp.asarray(rng.random(nodes) < 0.1)
    )


def propagation(edges: np.ndarray, nodes: int) -> Array:
    r"""$D^{-1/2} (A + 1) D^{-1/2}$ of the edges that are left, with their own degrees; dense, for small graphs."""
    a = np.eye(nodes)
    a[edges[0], edges[1]] = 1
    d = a.sum(axis=1) ** -0.5
    return jnp.asarray(d[:, None] * a * d, jnp.float32)


def init(key: Array, width: int, d: int, classes: int) -> Any:
    """Weights of a graph convolutional network of two layers."""
    a, b = jax.random.split(key)
    glorot = jax.nn.initializers.glorot_uniform()
    return {
        "first": {"kernel": glorot(a, (d, width)), "bias": jnp.zeros(width)},
        "second": {"kernel": glorot(b, (width, classes)), "bias": jnp.zeros(classes)},
    }


def gcn(params: Any, spread: Array, x: Array) -> Array:
    """Logits of all nodes."""
    h = jax.nn.relu(spread @ (x @ params["first"]["kernel"]) + params["first"]["bias"])
    return spread @ (h @ params["second"]["kernel"]) + params["second"]["bias"]


def train(
    graph: Graph,
    edges: np.ndarray,
    params: Any,
    *,
    sparsity: float = 0.0,
    teacher: Array | None = None,
    distill: float = 10.0,
    steps: int = 200,
    learning_rate: float = 0.01,
) -> Any:
    """Trains on the given edges; see above.

    Args:
      graph: nodes and labels.
      edges: those that are left.
      params: the start.
      sparsity: of the weights, after every step; 0: plain training.
      teacher: logits of the dense network, or None.
      distill: $\\lambda$.
      steps, learning_rate: of Adam, with a decay of 5e-4.
    """
    spread = propagation(edges, graph.x.shape[0])
    inner = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(learning_rate))
    tx = optax.chain(inner, sparsest(sparsity)) if sparsity else inner

    def loss(params):
        found = gcn(params, spread, graph.x)
        each = optax.softmax_cross_entropy_with_integer_labels(found, graph.y)
        total = jnp.sum(each * graph.train) / jnp.sum(graph.train)
        if teacher is not None:
            target = jax.nn.softmax(teacher)
            gap = target * (jax.nn.log_softmax(teacher) - jax.nn.log_softmax(found))
            total = total + distill * jnp.mean(jnp.sum(gap, axis=1))
        return total

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])
    return run(params)


def accuracy(graph: Graph, edges: np.ndarray, params: Any) -> float:
    """On the nodes that were not trained on."""
    found = gcn(params, propagation(edges, graph.x.shape[0]), graph.x).argmax(axis=1) == graph.y
    return float(jnp.sum(found * ~graph.train) / jnp.sum(~graph.train))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(argv)
    rows = []
    for level in (0, 4, 8, 14, 20):
        p, s = 1 - 0.95**level, 1 - 0.9**level
        found: dict[str, list[float]] = {
            "teddy": [],
            "random edges": [],
            "without distillation": [],
        }
        for seed in range(args.seeds):
            graph = communities(400, 4, inside=0.04, across=0.01, seed=seed)
            start = init(jax.random.key(seed), 64, graph.x.shape[1], 4)
            dense = train(graph, graph.edges, start)
            teacher = gcn(dense, propagation(graph.edges, 400), graph.x)
            kept = graph.edges[:, tickets.keep_edges(graph.edges, 400, p)]
            rng = np.random.default_rng(seed)
            one = graph.edges[:, graph.edges[0] < graph.edges[1]]
            some = one[:, rng.permutation(one.shape[1])[: kept.shape[1] // 2]]
            some = np.concatenate([some, some[::-1]], axis=1)
            for name, edges, t in (
                ("teddy", kept, teacher), ("random edges", some, teacher), ("without distillation", kept, None)
            ):  # fmt: skip
                end = train(graph, edges, start, sparsity=s, teacher=t)
                found[name].append(100 * accuracy(graph, edges, end))
        cells = [f"{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}" for v in found.values()]
        rows.append([f"{p:.0%}", f"{s:.0%}", *cells])
        print(rows[-1], flush=True)
    print(markdown_table(["edges gone", "weights gone", *found], rows))


if __name__ == "__main__":
    main()
