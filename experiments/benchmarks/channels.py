"""Time of shrunk networks next to dense ones, in one process, in turns; or cycles of a TPU.

  python -m experiments.benchmarks.channels [--networks=cnn,vit,resnet,transformer,efficientnet] [--batches=1,64]
  python -m experiments.benchmarks.channels --tpu [--networks=vit,resnet,transformer]

`channels.prune` leaves half of the operations, or the share that --operations asks for. Serving and a training
step (forward, backward, SGD).

On CPU widths are multiples of 8, and ratios are of medians of process time, which a loaded machine disturbs less
than the wall clock. With --tpu the networks are of the size that is trained there, computed in bfloat16, widths are
multiples of 128, and the figures are XLA's own estimate for one chip of v5e, compiled without one.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import models
from experiments.benchmarks import timing
from experiments.benchmarks.pod_compile import devices_of
from experiments.models import efficientnet
from jaxsparse import channels
from tools.tpu_static import hlo

Program = tuple[Callable[..., object], tuple[Any, ...]]
"""A function to compile, and what to call it with."""

SHAPES: Mapping[str, tuple[int, ...]] = {"transformer": (128,), "efficientnet": (64, 64, 3)}
TPU_SHAPES: Mapping[str, tuple[int, ...]] = {"transformer": (1024,), "resnet": (224, 224, 3)}
TPU_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "transformer": dict(dim=2048, depth=2, heads=16, dtype="bfloat16"),
    "vit": dict(dim=1024, depth=2, heads=8, patch=4, dtype="bfloat16"),
    "resnet": dict(depth=50, dtype="bfloat16"),
}
CLASSES = {"transformer": 1024}


def network(name: str, *, tpu: bool) -> tuple[nnx.Module, tuple[int, ...]]:
    """An untrained network (EfficientNet-Lite0: the trained one) in the mode of inference, and its input's shape."""
    shape = (TPU_SHAPES if tpu else SHAPES).get(name, (32, 32, 3))
    if name == "efficientnet":
        return efficientnet.load(), shape
    options = TPU_OPTIONS[name] if tpu else {}
    made = models.create(name, shape, CLASSES.get(name, 10), rngs=nnx.Rngs(0), **options)
    view = nnx.view(made, deterministic=True, use_running_average=True, raise_if_not_found=False)
    return view, shape


def inputs(shape: tuple[int, ...], batch: int) -> jax.Array:
    """Images, or tokens where the shape has one axis."""
    if len(shape) == 1:
        return jax.random.randint(jax.random.key(0), (batch, *shape), 0, 1000)
    return jax.random.normal(jax.random.key(0), (batch, *shape))


def serving(model: nnx.Module, x: jax.Array) -> Program:
    """A call."""
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), (state, x)


def training(model: nnx.Module, x: jax.Array) -> Program:
    """A step of SGD with momentum on the squares of the logits."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.sgd(1e-3, momentum=0.9)

    def step(params, rest, state, x):
        loss = lambda p: jnp.mean(nnx.merge(graph, p, rest)(x).astype(jnp.float32) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, rest, tx.init(params), x)


KINDS = {"serving": serving, "training step": training}


def seconds_on_cpu(dense: Program, shrunk: Program, limit: float) -> tuple[float, float]:
    """Process time of both."""

    def call(program: Program) -> Callable[[], object]:
        function, args = program
        compiled = jax.jit(function)
        return lambda: compiled(*args)

    runs = {"dense": call(dense), "shrunk": call(shrunk)}
    # Seven rounds of a tenth of a millisecond would say little.
    found = timing.medians(runs, rounds=500, seconds=limit, clock=time.process_time)
    return found["dense"], found["shrunk"]


def cycles_on_tpu(program: Program) -> float:
    """XLA's estimate of the cycles of one call on one chip of v5e; operations without one count nothing."""
    function, args = program
    at = jax.sharding.SingleDeviceSharding(devices_of("v5e:2x2").flat[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), args)
    text = jax.jit(function).lower(*placed).compile().as_text() or ""
    return float(hlo.parse_hlo(text)["estimated_cycles"])


def rows(name: str, options: argparse.Namespace) -> list[str]:
    """Lines of the table for one network."""
    dense, shape = network(name, tpu=options.tpu)
    small = channels.prune(
        dense,
        inputs(shape, 2),
        1 - options.operations,
        target="flops",
        round_to=128 if options.tpu else 8,
        tolerance=0.15,
    )
    assert isinstance(small.model, nnx.Module)
    kept = small.report.flops[1] / small.report.flops[0]
    lines = []
    for batch in map(int, options.batches.split(",")):
        x = inputs(shape, batch)
        for what, make in KINDS.items():
            pair = make(dense, x), make(small.model, x)
            if options.tpu:
                wide, narrow = map(cycles_on_tpu, pair)
                cells = f"{wide / 1e3:,.0f} k | {narrow / 1e3:,.0f} k"
            else:
                wide, narrow = seconds_on_cpu(*pair, options.seconds)
                cells = f"{1e3 * wide:.1f} ms | {1e3 * narrow:.1f} ms"
            ratio = narrow / wide
            lines.append(
                f"| {name} | {what} | {batch} | {100 * kept:.0f} % | {cells} | {ratio:.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", help="by commas; all of them by default")
    parser.add_argument("--batches", help="by commas")
    parser.add_argument("--operations", type=float, default=0.5, help="the share that stays")
    parser.add_argument("--seconds", type=float, default=20.0, help="for one line")
    parser.add_argument("--tpu", action="store_true", help="cycles of v5e in place of time on CPU")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    known = (
        [*TPU_OPTIONS] if options.tpu else ["cnn", "vit", "resnet", "transformer", "efficientnet"]
    )
    options.batches = options.batches or ("32" if options.tpu else "1,64")
    names = options.networks.split(",") if options.networks else known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--networks={','.join(unknown)}: use {', '.join(known)}")
    lines = [
        "| network | what | batch | operations kept | dense | shrunk | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        lines += rows(name, options)
    print(timing.machine())
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
