"""A Transformer that does not fit dense: trained as stored here, and compiled for a pod.

    python -m experiments.studies.large_stored [--dim=4096] [--depth=17] [--density=0.05] [--steps=100]
    python -m experiments.studies.large_stored --pod [--dim=8192] [--depth=25]

The first form trains on `stdlib_text`, one sequence at a time, with stored blocks of 128 x 128 that RigL
moves (AdamW, float32), and prints the loss, the seconds, and the most memory that the process has had. The
second compiles the same training step for 16 TPU v5e, with blocks and batch shared by the chips and bfloat16
products, and prints the memory of a chip as the compiler plans it. No TPU is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import datasets, parallel
from experiments.benchmarks.timing import machine
from experiments.configs import base
from experiments.task import make_task

# Else XLA on CPU keeps copies of the moments while they are updated, and of random bits while they are drawn.
COPY_LESS: Any = {"xla_cpu_copy_insertion_use_region_analysis": True}


def configure(args: argparse.Namespace) -> Any:
    """The config of the run."""
    c: Any = base.get_config()
    c.dataset, c.model, c.method = "stdlib_text", "transformer", "rigl"
    c.storage, c.structure, c.options.targets = "stored", "block:128x128", "layers/.*kernel"
    c.sparsity, c.options.allocation = 1.0 - args.density, "uniform"
    c.options.update_every = args.update_every
    c.model_options.update(dim=args.dim, depth=args.depth, heads=args.dim // 128)
    c.model_options.update(scan_layers=args.scan, remat=args.remat)
    c.length, c.batch_size, c.steps = args.length, args.batch, args.steps
    c.learning_rate, c.warmup_steps, c.decay = (
        args.learning_rate,
        min(10, args.steps // 2),
        "linear",
    )
    return c


def dense_gigabytes(args: argparse.Namespace) -> float:
    """Weights of the blocks and two moments, in float32, if they were dense."""
    return 3 * 4 * 12 * args.dim**2 * args.depth / 1e9


def return_freed_memory() -> None:
    """Gives back to the system what the compiler has freed: half a gigabyte, which glibc keeps for later."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def train(args: argparse.Namespace) -> None:
    """Trains here."""
    config = configure(args)
    data = datasets.load(config.dataset, length=config.length)
    task = make_task(config, data)
    batches = datasets.batches(data, config.batch_size, start=0, stop=config.steps, seed=0)
    shapes = {k: jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32) for k in ("x", "y")}
    init = jax.jit(task.init).lower().compile(COPY_LESS)
    step = jax.jit(task.train_step, donate_argnums=0).lower(jax.eval_shape(task.init), shapes)
    step = step.compile(COPY_LESS)
    return_freed_memory()
    state = init()
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    print(machine())
    print(
        f"weights and moments if dense: {dense_gigabytes(args):.1f} GB; stored: {held / 1e9:.2f} GB"
    )
    memory: Any = step.memory_analysis()
    planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"the step as the compiler plans it: {planned / 1e9:.2f} GB", flush=True)
    losses, start = [], time.monotonic()
    for i, batch in enumerate(batches, 1):
        state, numbers = step(state, {k: jnp.asarray(v) for k, v in batch.items()})
        losses.append(float(numbers["loss"]))
        if i == 1 or i % 10 == 0:
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            seconds = (time.monotonic() - start) / i
            mean = np.mean(losses[-10:])
            print(f"step {i}: loss {mean:.3f}, {seconds:.1f} s a step, {most:.2f} GB", flush=True)


def pod(args: argparse.Namespace) -> None:
    """Compiles for 16 chips."""
    from experiments.benchmarks.pod_compile import devices_of, lower

    args.batch, args.length, args.steps = 16, 256, 1000
    config = configure(args)
    config.model_options.dtype = "bfloat16"
    config.parallel = "fsdp"
    data = datasets.Dataset("text", {}, lambda record, rng: dict(record), (2048,), 32_768, True)
    devices = devices_of("v5e:4x4")
    mesh = parallel.Fsdp(batch_size=config.batch_size, devices=devices).mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered, state, shards = lower(config, data, devices)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9
    print(
        f"{12 * args.dim**2 * args.depth / 1e9:.1f}e9 dense-equivalent weights of blocks, weights and "
        f"moments if dense {dense_gigabytes(args):.0f} GB; stored {size(state):.1f} GB, {size(shards):.2f} "
        "GB a chip",
        flush=True,
    )
    start = time.monotonic()
    memory: Any = lowered.compile().memory_analysis()
    print(
        f"compiled in {time.monotonic() - start:.0f} s: a chip holds "
        f"{memory.argument_size_in_bytes / 1e9:.2f} GB of state and {memory.temp_size_in_bytes / 1e9:.2f} GB "
        "of temporaries, of 16 GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pod", action="store_true")
    parser.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        help="stack the layers, so that one is compiled for all; by default with --pod, whose compiler takes "
        "minutes for each",
    )
    parser.add_argument(
        "--remat",
        action=argparse.BooleanOptionalAction,
        help="compute the activations of a layer again in the backward pass; by default with --pod",
    )
    parser.add_argument("--dim", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--update-every", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    args.scan = args.pod if args.scan is None else args.scan
    args.remat = args.pod if args.remat is None else args.remat
    args.dim, args.depth = (
        args.dim or (8192 if args.pod else 4096),
        args.depth or (25 if args.pod else 17),
    )
    (pod if args.pod else train)(args)


if __name__ == "__main__":
    main()
