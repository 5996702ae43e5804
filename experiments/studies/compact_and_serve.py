"""Train with block-structured RigL, compact the network, serve it: the whole way in one file.

    python -m experiments.studies.compact_and_serve

Handwritten digits (shipped with scikit-learn), an MLP whose wide kernels keep a tenth of their
16 x 16 blocks. Training is plain Flax NNX with one line changed; serving runs without masks.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsparse
from jaxsparse.nn import compact


class MLP(nnx.Module):
    """64 -> width -> width -> 10, relu between."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and test images `[n, 64]` in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = (data.data[order] / 16).astype(np.float32), data.target[order]
    return x[300:], y[300:], x[:300], y[:300]


def train(width: int, steps: int, sparsity: float) -> tuple[MLP, nnx.Optimizer, float]:
    """The trained model, its optimizer (which holds the masks), and the test accuracy."""
    images, labels, test_images, test_labels = load()
    model = MLP(width, nnx.Rngs(0))
    tx = jaxsparse.rigl(
        optax.adam(1e-3),
        sparsity=sparsity,
        total_steps=steps,
        update_every=max(1, steps // 20),
        structure=jaxsparse.structures.Block(16, 16),
        allocation="uniform",
        targets=[("^out/", False)],
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(len(labels), size=128)
        step(model, optimizer, images[batch], labels[batch])
    accuracy = float((jnp.argmax(model(jnp.asarray(test_images)), -1) == test_labels).mean())
    return model, optimizer, accuracy


def milliseconds(model: nnx.Module, x: jax.Array, rounds: int = 20) -> float:
    """Median time of a forward pass."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    jax.block_until_ready(run(state, x))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(state, x))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main(argv: list[str] | None = None) -> dict:
    """Run it and return what was printed."""
    parser = argparse.ArgumentParser(description="Train sparse, compact, serve")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sparsity", type=float, default=0.9)
    args = parser.parse_args(argv)
    model, optimizer, accuracy = train(args.width, args.steps, args.sparsity)
    sparse, report = compact(model, optimizer)
    for line in report:
        print(line)
    x = jnp.asarray(load()[2])
    difference = float(jnp.abs(sparse(x) - model(x)).max())
    size = lambda m: sum(a.nbytes for a in jax.tree.leaves(nnx.state(m)))
    result = dict(
        accuracy=accuracy,
        largest_difference=difference,
        bytes_dense=size(model),
        bytes_sparse=size(sparse),
        ms_dense=milliseconds(model, x),
        ms_sparse=milliseconds(sparse, x),
    )
    for name, value in result.items():
        print(f"{name}: {value:.4g}")
    return result


if __name__ == "__main__":
    main()
