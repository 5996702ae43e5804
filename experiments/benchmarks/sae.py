"""A training step of a TopK autoencoder whose decoder costs k rows, next to one with a dense decoder, on the CPU.

    python -m experiments.benchmarks.sae [--d-model=768] [--d-sae=16384] [--batch=4096] [--k=16,32,64]

Both take the same step (Adam, atoms of norm 1) to float tolerance, which is checked. Prints a Markdown table. Ratios
are of medians of process time, which a loaded machine disturbs less than the wall clock.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.benchmarks.timing import machine, medians
from jaxsparse import sae


def make_step(d_model: int, d_sae: int, k: int, sparse: bool):
    """A compiled step and its first state."""
    model = sae.TopK(d_model, d_sae, k=k, sparse=sparse, rngs=nnx.Rngs(0))
    tx = sae.unit_norm_decoder(optax.adam(3e-4))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest, state, x):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            value, _ = model.loss(x)
            return value, nnx.state(model, nnx.Not(nnx.Param))

        (_, rest), slope = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), rest, state

    return step, (params, rest, tx.init(params))


def difference(a, b) -> float:
    """The largest difference of two trees, over the largest value."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    most = max(float(jnp.abs(x).max()) for x, _ in pairs)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs) / most


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", default="16,32,64")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(args.batch, args.d_model)), jnp.float32)
    print(f"On {machine()}; d_model {args.d_model}, d_sae {args.d_sae}, batch {args.batch}.\n")
    print(
        "| k | dense decoder | k rows | ratio | largest difference of the parameters |\n|---|---|---|---|---|"
    )
    for k in map(int, args.k.split(",")):
        dense, start = make_step(args.d_model, args.d_sae, k, False)
        sparse, same = make_step(args.d_model, args.d_sae, k, True)
        apart = difference(dense(*start, x)[0], sparse(*same, x)[0])
        call = functools.partial
        runs = {"dense": call(dense, *start, x), "sparse": call(sparse, *same, x)}
        found = medians(runs, rounds=args.rounds, clock=time.process_time)
        ratio = found["sparse"] / found["dense"]
        cells = f"{found['dense']:.2f} s | {found['sparse']:.2f} s | {ratio:.2f} | {apart:.0e}"
        print(f"| {k} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
