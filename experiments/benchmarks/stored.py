"""Time and memory of a whole training step: masked dense, stored, and the ideal.

    python -m experiments.benchmarks.stored [--case mlp|transformer] [--densities=0.5,0.1] [--small] [--single]
    python -m experiments.benchmarks.stored --peers

Both runs are RigL on blocks around AdamW: under masks (`jaxsparse.rigl`), and stored (`jaxsparse.stored`
of `BlockSparseLinear`), on CPU in float32, taking turns in one process. With `--single` they store single
weights, as many of each output (`FanIn`, `CondensedLinear` with its C++ kernels). An *ordinary* step is one between
two updates, a *moving* step one that drops and grows. Memory: *kept* is what stays between steps, weights
and slots; *kept + gradients* adds the gradients, which is what the papers count; *peak* is that and all
temporaries, as the compiler plans them (`memory_analysis`). Ratios are to the masked step; ideal is the
density.

`--rounds=0` compiles and times nothing: the bytes alone.

`--peers` times the training step of one sparse layer (forward, and both gradients) of a size that all can
train: stored blocks, JAX's BCOO, and PyTorch's CSR where PyTorch is installed. The schedule of the scores of absent blocks on a TPU:

    python -m tools.tpu_static experiments.benchmarks.stored:tpu_scores --topology v5e:2x2
    python -m tools.tpu_static experiments.benchmarks.stored:tpu_gradient --topology v5e:2x2

and that of a whole step between two updates, stored or (`"stored": false`) under masks:

    python -m tools.tpu_static experiments.benchmarks.stored:tpu_step --topology v5e:2x2 --all-kernels --kw '{"density": 0.1}'
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import sparse

import jaxsparse
from experiments.benchmarks.timing import machine, medians
from experiments.models.transformer import Block
from jaxsparse.nn import BlockSparseLinear, CondensedLinear, Trained
from jaxsparse.structures import Block as Blocks
from jaxsparse.structures import FanIn
from jaxsparse.targets import named_leaves
from pallas_kernels import block_scores, block_sparse_matmul

EVERY = 100
SIZES = {"mlp": dict(width=4096, hidden=16384, rows=256), "transformer": dict(width=2048, rows=256)}
SMALL = {"mlp": dict(width=1024, hidden=4096, rows=64), "transformer": dict(width=512, rows=64)}


class MLP(nnx.Module):
    """width - hidden - width."""

    def __init__(self, make: Callable[[int, int], nnx.Module], width: int, hidden: int):
        self.up, self.down = make(width, hidden), make(hidden, width)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def transformer(make: Callable[[int, int], nnx.Module] | None, width: int) -> nnx.Module:
    """One block of a Transformer, all six of its matrices made by `make`."""
    block: Any = Block(width, max(2, width // 128), rngs=nnx.Rngs(0))
    if make is not None:
        attention = block.attention
        for name in ("query", "key", "value", "out"):
            setattr(attention, name, make(width, width))
        block.up, block.down = make(width, 4 * width), make(4 * width, width)
    return block


class Run(NamedTuple):
    """A compiled training step: its two kinds, and its bytes."""

    ordinary: Callable[[], Any]
    moving: Callable[[], Any]
    kept: int
    gradients: int
    peak: int


def run_of(model: nnx.Module, tx, wrt, x: jax.Array, run: bool) -> Run:
    """The step of a model with a transformation, compiled; unless `run`, nothing of it is computed."""
    graph, params, rest = nnx.split(model, wrt, ...)
    params = nnx.to_pure_dict(params)

    def loss(params):
        return ((nnx.merge(graph, params, rest)(x) - jnp.roll(x, 1, -1)) ** 2).mean()

    def step(params, state):
        value, grads = jax.value_and_grad(loss, allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(tx.init)(params) if run else jax.eval_shape(tx.init, params)
    if run and hasattr(state, "masks"):
        params = jaxsparse.apply_masks(params, state)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    memory: Any = compiled.memory_analysis()
    trained = [p for p in jax.tree.leaves(params) if jnp.issubdtype(p.dtype, jnp.floating)]
    carry = [params, state]

    def take(count: int, due: int):
        named: dict[str, Any] = dict(named_leaves(carry[0]))

        def flag(path, leaf):  # as many as are candidates
            parent, _, name = path.rpartition("/")
            if name != "due":
                return leaf
            candidates = named[f"{parent}/scores".lstrip("/")].shape[0]
            return (jnp.arange(leaf.size) < due * candidates).astype(leaf.dtype)

        flat = [flag(path, leaf) for path, leaf in named.items()]
        carry[0] = jax.tree.unflatten(jax.tree.structure(carry[0]), flat)
        carry[1] = carry[1]._replace(count=jnp.int32(count))
        *carry[:], value = compiled(*carry)
        return value

    return Run(
        functools.partial(take, EVERY + 1, 0),
        functools.partial(take, EVERY, 1),
        memory.alias_size_in_bytes,
        sum(p.size * p.dtype.itemsize for p in trained),
        memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    )


def make_run(
    case: str, size: Mapping[str, int], density: float, block: int | None, stored: bool, run: bool
) -> Run:
    """The masked or the stored run of a case, of blocks or (None) of single weights."""
    size, rngs = dict(size), nnx.Rngs(0)
    rows, inner, timing = size.pop("rows"), optax.adamw(1e-3), dict(total_steps=1000, seed=0)
    shape = (8, rows // 8, size["width"]) if case == "transformer" else (rows, size["width"])
    x = jax.random.normal(jax.random.key(1), shape)

    def make(i, o):
        options: Any = dict(density=density, use_bias=False, rngs=rngs)
        if not stored:
            return nnx.Linear(i, o, use_bias=False, rngs=rngs)
        if block is None:
            return CondensedLinear(i, o, **options)
        return BlockSparseLinear(i, o, block_shape=(block, block), **options)

    model = transformer(make, **size) if case == "transformer" else MLP(make, **size)
    if stored:
        return run_of(model, jaxsparse.stored(inner, rule="rigl", **timing), Trained, x, run)
    structure = FanIn() if block is None else Blocks(block, block)
    options: Any = dict(structure=structure, allocation="uniform", update_every=EVERY, **timing)
    return run_of(model, jaxsparse.rigl(inner, 1 - density, **options), nnx.Param, x, run)


def table(case: str, size: Mapping[str, int], densities, block: int | None, rounds: int) -> None:
    """One row for each density."""
    sizes = ", ".join(f"{name} {n}" for name, n in size.items())
    what = "single weights" if block is None else f"blocks of {block}"
    print(f"### {case}: {sizes}, {what}\n")
    print(
        "| density = ideal | ordinary step | moving step | step, on average of 100 | kept | kept + gradients "
        "| peak |\n|---|---|---|---|---|---|---|"
    )
    for density in densities:
        masked, stored = (
            make_run(case, size, density, block, s, rounds > 0) for s in (False, True)
        )
        runs = {
            f"{name} {kind}": getattr(run, kind)
            for name, run in (("masked", masked), ("stored", stored))
            for kind in ("ordinary", "moving")
        }
        times = "| - | - | - "
        if rounds:
            t = medians(runs, rounds=rounds, seconds=150)
            mean = {
                n: (99 * t[f"{n} ordinary"] + t[f"{n} moving"]) / 100 for n in ("masked", "stored")
            }
            times = (
                f"| {t['stored ordinary'] / t['masked ordinary']:.3f} "
                f"({1e3 * t['stored ordinary']:.0f} of {1e3 * t['masked ordinary']:.0f} ms) "
                f"| {t['stored moving'] / t['masked moving']:.3f} "
                f"| {mean['stored'] / mean['masked']:.3f} "
            )
        both = stored.kept + stored.gradients, masked.kept + masked.gradients
        print(
            f"| {density:g} {times}"
            f"| {stored.kept / masked.kept:.3f} ({stored.kept / 1e6:.0f} of {masked.kept / 1e6:.0f} MB) "
            f"| {both[0] / both[1]:.3f} | {stored.peak / masked.peak:.3f} "
            f"({stored.peak / 1e6:.0f} of {masked.peak / 1e6:.0f} MB) |",
            flush=True,
        )
        del masked, stored, runs
    print()


# -- Others that train ---------------------------------------------------------------------------------


def peers(width: int, rows: int, densities, rounds: int) -> None:
    """Forward and both gradients of one layer `[width, width]`, next to the dense layer."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(rows, width)), jnp.float32) for _ in range(2))
    dense = jnp.asarray(rng.normal(size=(width, width)), jnp.float32)

    def products(multiply, values) -> Callable[[], Any]:
        @jax.jit
        def run(x, values, dy):
            y, pull = jax.vjp(multiply, x, values)
            return y, *pull(dy)

        return lambda: run(x, values, dy)

    print(f"### One layer {width} x {width}, {rows} rows: forward and both gradients, to dense\n")
    print("| density | stored blocks of 64 | BCOO | PyTorch CSR |\n|---|---|---|---|")
    for density in densities:
        w = BlockSparseLinear(
            width, width, block_shape=(64, 64), density=density, rngs=nnx.Rngs(0)
        ).weight
        mask = rng.random((width, width)) < density
        bcoo = sparse.BCOO.fromdense(jnp.asarray(np.asarray(dense) * mask))
        candidates = {
            "dense": products(jnp.matmul, dense),
            "blocks": products(
                lambda x, v, w=w: block_sparse_matmul(x, w.with_values(v)), w.values
            ),
            "bcoo": products(
                lambda x, v, m=bcoo: x @ sparse.BCOO((v, m.indices), shape=m.shape), bcoo.data
            ),
        }
        if (
            torch_step := _torch(np.asarray(x), np.asarray(dy), np.asarray(dense) * mask)
        ) is not None:
            candidates["torch dense"], candidates["torch"] = torch_step
        t = medians(candidates, rounds=rounds, seconds=60)
        torch_ratio = f"{t['torch'] / t['torch dense']:.2f}" if "torch" in t else "not installed"
        print(
            f"| {density:g} | {t['blocks'] / t['dense']:.2f} | {t['bcoo'] / t['dense']:.2f} "
            f"| {torch_ratio} |",
            flush=True,
        )
    print()


def _torch(x: np.ndarray, dy: np.ndarray, weight: np.ndarray):
    """The steps of PyTorch's dense and CSR layer, y = W x for x with the batch last; None without
    PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    xt, dyt = (torch.tensor(a.T.copy()).requires_grad_(g) for a, g in ((x, True), (dy, False)))
    full = torch.tensor(weight.T.copy()).requires_grad_(True)
    csr = torch.tensor(weight.T.copy()).to_sparse_csr().requires_grad_(True)

    def step(w):
        xt.grad = w.grad = None
        (w @ xt).backward(dyt)
        return np.zeros(())

    return functools.partial(step, full), functools.partial(step, csr)


# -- Scores on TPU, by the schedule of its compiler ----------------------------------------------------


def tpu_scores(rows: int = 2048, width: int = 4096, block: int = 128):
    """For `tools.tpu_static`: the scores of a weight `[width, width]` in bfloat16."""
    a = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    meta = {"useful_flops": 2 * rows * width * width}
    return functools.partial(block_scores, block_shape=(block, block)), (a, a), meta


def tpu_gradient(rows: int = 2048, width: int = 4096):
    """For `tools.tpu_static`: the gradient itself, which scores do without."""
    a = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    product = lambda x, dy: jnp.matmul(x.T, dy, preferred_element_type=jnp.float32)
    return product, (a, a), {"useful_flops": 2 * rows * width * width}


def tpu_step(
    stored: bool = True, density: float = 0.1, width: int = 2048, rows: int = 2048, block: int = 128
):
    """For `tools.tpu_static`: an ordinary step of the MLP width - 4 width - width with AdamW on a fixed
    pattern, products in bfloat16; stored, or under masks."""
    inner, rngs = optax.adamw(1e-3), nnx.Rngs(0)

    def make(i, o):
        options: Any = dict(use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        if not stored:
            return nnx.Linear(i, o, **options)
        return BlockSparseLinear(i, o, block_shape=(block, block), density=density, **options)

    tx = (
        jaxsparse.stored(inner, rule="static")
        if stored
        else jaxsparse.static(inner, 1 - density, structure=Blocks(block, block))
    )
    graph, params, rest = nnx.split(
        MLP(make, width, 4 * width), Trained if stored else nnx.Param, ...
    )
    params = nnx.to_pure_dict(params)

    def step(params, state, x):
        loss = lambda p: (nnx.merge(graph, p, rest)(x).astype(jnp.float32) ** 2).mean()
        updates, state = tx.update(jax.grad(loss, allow_int=True)(params), state, params)
        return optax.apply_updates(params, updates), state

    # Places stay what they are: the lists of blocks are followed.
    shape = lambda x: (
        x if jnp.issubdtype(x.dtype, jnp.integer) else jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    args = jax.tree.map(shape, (params, tx.init(params)))
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    return step, (*args, x), {"useful_flops": int(6 * 8 * density * rows * width**2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(SIZES), action="append")
    parser.add_argument("--densities", default="0.5,0.25,0.1,0.05,0.02,0.01")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--single", action="store_true", help="single weights, not blocks")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    densities = [float(d) for d in args.densities.split(",")]
    block = None if args.single else args.block
    print(f"{machine()}\n")
    if args.peers:
        peers(1024, 128, densities, args.rounds)
        return
    for case in args.case or sorted(SIZES):
        table(case, (SMALL if args.small else SIZES)[case], densities, block, args.rounds)


if __name__ == "__main__":
    main()
