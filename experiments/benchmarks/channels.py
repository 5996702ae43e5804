"""Time of shrunk networks next to dense ones, in one process, in turns.

  python -m experiments.benchmarks.channels

`channels.prune` leaves half of the operations, or the share that --operations asks for, with widths that are multiples
of 8. Serving and a training step (forward, backward, SGD).
Ratios are of medians of process time, which a loaded machine disturbs less than the wall clock.
"""

import argparse
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import models
from experiments.benchmarks import timing
from jaxsparse import channels

SHAPE = (32, 32, 3)


def serving(model: nnx.Module, x: jax.Array) -> Callable[[], object]:
    """A compiled call."""
    view = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graph, state = nnx.split(view)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda: call(state, x)


def training(model: nnx.Module, x: jax.Array) -> Callable[[], object]:
    """A compiled step of SGD with momentum on the squares of the logits."""
    view = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graph, params, rest = nnx.split(view, nnx.Param, ...)
    tx = optax.sgd(1e-3, momentum=0.9)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x):
        loss = lambda p: jnp.mean(nnx.merge(graph, p, rest)(x) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return lambda: step(params, state, x)


def rows(name: str, batches: list[int], operations: float, seconds: float) -> list[str]:
    """Lines of the table for one network."""
    dense = models.create(name, SHAPE, 10, rngs=nnx.Rngs(0))
    example = jnp.zeros((2, *SHAPE))
    small = channels.prune(
        dense, example, 1 - operations, target="flops", round_to=8, tolerance=0.1
    )
    assert isinstance(small.model, nnx.Module)
    kept = small.report.flops[1] / small.report.flops[0]
    lines = []
    for batch in batches:
        x = jax.random.normal(jax.random.key(0), (batch, *SHAPE))
        for what, make in (("serving", serving), ("training step", training)):
            found = timing.medians(
                {"dense": make(dense, x), "shrunk": make(small.model, x)},
                seconds=seconds,
                clock=time.process_time,
            )
            ratio = found["shrunk"] / found["dense"]
            lines.append(
                f"| {name} | {what} | {batch} | {100 * kept:.0f} % | {1e3 * found['dense']:.1f} ms | "
                f"{1e3 * found['shrunk']:.1f} ms | {ratio:.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", default="cnn,vit,resnet")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--operations", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    batches = [int(b) for b in options.batches.split(",")]
    lines = [
        "| network | what | batch | operations kept | dense | shrunk | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in options.networks.split(","):
        lines += rows(name, batches, options.operations, options.seconds)
    print(timing.machine())
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
