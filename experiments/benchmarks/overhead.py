"""What a sparse training method adds to a step of the bare inner optimizer.

    python -m experiments.benchmarks.overhead [--methods=static,rigl] [--inner=adamw,momentum]
    python -m experiments.benchmarks.overhead --compile [--methods=static,rigl]
    python -m experiments.benchmarks.overhead --mlp
    python -m experiments.benchmarks.overhead --resnet50 [--batch=16] [--methods=static,rigl]

The first form times the optimizer's step alone (`update` and `apply_updates`, donated buffers) on
the parameters of a ResNet-50, 25.6M in 161 leaves: an ordinary step, a step that updates the masks,
and the bytes that the state holds besides the inner one's. JaxPruner's algorithm (an argsort and a
scatter per leaf at an update, `uint8` masks multiplied to the parameters) is timed in the same
rounds. The second form times the compilation of that step instead, in seconds of all cores, and prints
the memory that it takes besides its arguments. The third form times whole training steps of the default MLP, 40-256-256-10 at a batch of
128: methods that hold masks, between two of their updates, and straight-through methods at their
full sparsity, next to JaxPruner's straight-through step, which sorts every leaf at every step.
The fourth form times whole training steps of a ResNet-50 on images of 224 x 224; dense steps have two
turns in each round, and by how much their medians differ is what the other ratios may be off by.
Ratios are to the step without sparsity in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxsparse
from experiments.benchmarks.jaxpruner import pruning, straight_through
from experiments.benchmarks.timing import machine, medians
from experiments.models.resnet import ResNet

SPARSITY, EVERY = 0.9, 1000  # masks are updated at step 1000, and not in the steps after it
INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "momentum": lambda: optax.sgd(1e-1, momentum=0.9),
}


def resnet50() -> dict[str, jax.Array]:
    """Parameters of the shapes of a ResNet-50 (He et al., 2016)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name, size, c_in, c_out):
        shapes[f"{name}/kernel"] = (size, size, c_in, c_out)
        shapes[f"{name}/norm_scale"] = shapes[f"{name}/norm_bias"] = (c_out,)

    conv("stem", 7, 3, 64)
    c_in = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name = f"stage{stage}/block{block}"
            conv(f"{name}/a", 1, c_in, width)
            conv(f"{name}/b", 3, width, width)
            conv(f"{name}/c", 1, width, 4 * width)
            if block == 0:
                conv(f"{name}/shortcut", 1, c_in, 4 * width)
            c_in = 4 * width
    shapes["head/kernel"], shapes["head/bias"] = (2048, 1000), (1000,)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {n: 0.05 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def runner(step: Callable[..., Any], carry: list[Any]) -> Callable[..., Any]:
    """A function that takes one step from where the last one ended; the counter of a sparse method, whose
    state comes last, is set to `at` before it."""

    def run(at: int | None = None):
        if at is not None:
            carry[-1] = carry[-1]._replace(count=jnp.int32(at))
        carry[:] = step(*carry)
        return carry[0]

    return run


def stepper(tx, params, grads) -> Callable[..., Any]:
    """A `runner` of the optimizer alone."""

    @jax.jit
    def start(params):
        return jax.tree.map(jnp.copy, params), tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    return runner(lambda params, state: step(params, state, grads), list(start(params)))


def size_of(tx, params) -> int:
    """Bytes of the state."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def build(name: str, inner, **options):
    """The method with what it needs of sparsity, length and frequency."""
    known = jaxsparse.METHODS[name].options
    given = dict(
        sparsity=SPARSITY, total_steps=10_000, update_every=EVERY, begin_step=EVERY, **options
    )
    if not jaxsparse.METHODS[name].controls_sparsity:
        del given["sparsity"]
    return jaxsparse.make(name, inner, **{k: v for k, v in given.items() if k in known})


def overhead(inner_name: str, args: argparse.Namespace) -> None:
    """One table: all methods around one inner optimizer."""
    timed = functools.partial(medians, seconds=60, clock=args.clock)
    params = resnet50()
    grads = jax.tree.map(lambda p: 0.01 * jnp.sin(100 * p), params)
    inner = INNERS[inner_name]()
    bare, weights = size_of(inner, params), sum(p.size for p in params.values() if p.ndim > 1)
    print(f"### {inner_name}: {sum(p.size for p in params.values()):,} parameters\n")
    print(
        "| | ordinary step | step with an update | bytes of state per weight |\n|---|---|---|---|"
    )
    candidates: dict[str, Any] = {}
    for name in args.methods:
        for packed in (False, True) if args.packed else (False,):
            label = f"{name}, packed masks" if packed else name
            candidates[label] = build(name, inner, pack_masks=packed)
    if args.jaxpruner:
        candidates["argsort per leaf, uint8 masks, as JaxPruner"] = pruning(inner, SPARSITY, EVERY)
    dense = stepper(inner, params, grads)
    for label, tx in candidates.items():
        step = stepper(tx, params, grads)
        # Apart: an update leaves caches and memory in a state that the next step would pay for.
        step(EVERY + 1)
        often = {"bare": dense, "step": step}
        ordinary = timed(often, rounds=5 * args.rounds)
        rare = {"bare": dense, "step": functools.partial(step, EVERY)}
        update = timed(rare, rounds=args.rounds)
        more = (size_of(tx, params) - bare) / weights
        print(
            f"| {label} | {ordinary['step'] / ordinary['bare']:.2f} ({1e3 * ordinary['step']:.0f} ms) "
            f"| {update['step'] / update['bare']:.1f} | {more:.3f} |",
            flush=True,
        )
    print()


def compilation(inner_name: str, args: argparse.Namespace) -> None:
    """The time that the step of the optimizer takes to be traced and compiled, without any arrays."""
    params, inner = jax.eval_shape(resnet50), INNERS[inner_name]()
    print(f"### {inner_name}: compilation for one device\n")
    print("| | traced (s) | compiled (s) | temporary MB |\n|---|---|---|---|")
    for name in ["without sparsity", *args.methods]:
        tx = inner if name == "without sparsity" else build(name, inner)

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        start = time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
        middle = time.process_time()
        compiled: Any = lowered.compile()
        end, size = time.process_time(), compiled.memory_analysis().temp_size_in_bytes
        print(
            f"| {name} | {middle - start:.1f} | {end - middle:.1f} | {size / 1e6:.0f} |", flush=True
        )
    print()


# -- The small network -----------------------------------------------------------------------------


def mlp(args: argparse.Namespace) -> None:
    """Whole training steps with straight-through methods, which project at every step."""
    sizes, batch = (40, 256, 256, 10), 128
    keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    params = {
        f"layer{i}": {
            "kernel": jax.random.normal(k, (a, b)) / a**0.5,
            "bias": jnp.zeros(b),
        }
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:]))
    }
    x = jax.random.normal(keys[-1], (batch, sizes[0]))
    y = jax.random.randint(keys[-2], (batch,), 0, sizes[-1])

    def loss(params):
        h = x
        for i in range(len(sizes) - 1):
            h = h @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
            h = jax.nn.relu(h) if i < len(sizes) - 2 else h
        return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()

    def training(tx):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        carry = [params, tx.init(params)]

        def run():
            for _ in range(10):
                carry[:] = step(*carry)
            return carry[0]

        return run

    inner = optax.adam(1e-3)
    runs = {"dense": training(inner)}
    for name in ("magnitude_ste", "st3", "st3_sigma", "sr_ste", "autosparse", "str"):
        given: dict[str, Any] = {"sparsity": SPARSITY, "total_steps": 20, "update_every": 1}
        if name == "sr_ste":  # the last layer has 10 outputs, which are no groups of 4
            given["sparsity"], given["structure"] = None, jaxsparse.structures.NM(2, 4, axis=-1)
            given["targets"] = [("layer2", False), ("kernel", True)]
        method = jaxsparse.METHODS[name]
        known = method.options if method.controls_sparsity else method.options - {"sparsity"}
        tx = jaxsparse.make(name, inner, **{k: v for k, v in given.items() if k in known})
        runs[name] = training(tx)
    for name in ("static", "set", "rigl"):  # between two updates of their masks
        runs[name] = training(build(name, inner))
    runs["argsort per leaf, as JaxPruner's STE"] = training(straight_through(inner, SPARSITY))
    for _ in range(4):  # past the ramps
        for run in runs.values():
            jax.block_until_ready(run())
    t = medians(runs, rounds=args.rounds * 3, seconds=60, clock=args.clock)
    shape = "-".join(map(str, sizes))
    print(f"### Training step, {shape}, batch {batch}, adam\n\n| | ratio | ms |\n|---|---|---|")
    for name, seconds in t.items():
        print(f"| {name} | {seconds / t['dense']:.2f} | {100 * seconds:.2f} |")


# -- A whole step of a large network ---------------------------------------------------------------


def training_step(args: argparse.Namespace) -> None:
    """Whole training steps of a ResNet-50: what masks add between two updates and at one."""
    model = ResNet((224, 224, 3), 1000, depth=50, rngs=nnx.Rngs(0))
    graph, weights, statistics = nnx.split(model, nnx.Param, ...)
    kx, ky = jax.random.split(jax.random.key(0))
    x = jax.random.normal(kx, (args.batch, 224, 224, 3))
    y = jax.random.randint(ky, (args.batch,), 0, 1000)

    def loss(weights, statistics):
        model = nnx.merge(graph, weights, statistics, copy=True)
        logits = model(x)
        statistics = nnx.split(model, nnx.Param, ...)[2]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), statistics

    def training(tx):
        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(weights, statistics, state):
            grads, statistics = jax.grad(loss, has_aux=True)(weights, statistics)
            updates, state = tx.update(grads, state, weights)
            return optax.apply_updates(weights, updates), statistics, state

        return runner(step, [*jax.tree.map(jnp.copy, (weights, statistics)), tx.init(weights)])

    timed = functools.partial(medians, rounds=args.rounds, seconds=240, clock=args.clock)
    print(f"### Training step, ResNet-50, {args.batch} images of 224 x 224\n")
    print(
        "| | dense (s) | dense again | ordinary step | step with an update |\n|---|---|---|---|---|"
    )
    for inner_name in args.inner:
        inner = INNERS[inner_name]()
        dense = training(inner)
        for name in args.methods:
            step = training(build(name, inner))
            update = functools.partial(step, EVERY)
            t = timed({"dense": dense, "step": step, "again": dense, "update": update})
            ratios = (f"{t[key] / t['dense']:.3f}" for key in ("again", "step", "update"))
            print(f"| {name}, {inner_name} | {t['dense']:.2f} | {' | '.join(ratios)} |", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `clock` is the function that seconds are counted by."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = lambda text: text.split(",")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    methods = ["static", "set", "rigl", "magnitude", "global_magnitude"]
    add("--methods", type=names, default=methods, help="methods to time")
    add("--inner", type=names, default=["adamw", "momentum"], help="inner optimizers")
    add("--packed", action=switch, default=True, help="also with pack_masks=True")
    add("--jaxpruner", action=switch, default=True, help="also JaxPruner's algorithm")
    add("--compile", action=switch, default=False, help="the compilation of that step instead")
    add("--mlp", action=switch, default=False, help="training steps of a small network instead")
    add("--resnet50", action=switch, default=False, help="whole training steps of a ResNet-50")
    add("--batch", type=int, default=16, help="images in a step of the ResNet-50")
    add("--cpu_time", action=switch, default=False, help="seconds of all cores, not of the wall")
    add("--rounds", type=int, default=9, help="interleaved rounds; medians are printed")
    args = parser.parse_args(argv)
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    unit = "seconds of all cores" if args.cpu_time or args.compile else "wall clock"
    print(f"{machine()}; {unit}, medians of interleaved rounds, ratios to the bare step\n")
    if args.mlp:
        return mlp(args)
    if args.resnet50:
        return training_step(args)
    for name in args.inner:
        (compilation if args.compile else overhead)(name, args)


if __name__ == "__main__":
    main()
