"""What pruning a block of a 7B decoder takes on a slice of TPUs, read off the programs of the TPU compiler.

    python -m experiments.benchmarks.post_training_compile [--topology=v5e:4x4] [--sequences=16] [--length=2048]
    python -m experiments.benchmarks.post_training_compile --schedule 1024 2048

No TPU is needed: `libtpu` compiles for the described chips. A block of the shape of Llama 7B (width 4096, hidden 11008,
32 heads, bfloat16) has its kernels sharded over "model", by outputs where it reads the stream and by inputs where it
writes to it, and its tokens over "data". Compiled are the programs that `prune` runs: the statistics of a block's
kernels for one batch (`calibration`), and of SparseGPT the factor of a Gram matrix, which is on every chip, and the
sweep of each kind of kernel, its outputs spread over all chips, since they are independent. Memory is that of one chip.
The second form counts cycles of the static schedule on one chip (see `tools.tpu_static`) of a square layer: the Cholesky
factor alone, the inverse factor, and the sweeps. A loop whose length is data counts once: that of the factor, which a
good Gram matrix runs once, and that over earlier blocks in the sweep, which is a product of half of the layer's size.
"""

import argparse
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks.pod_compile import devices_of
from jaxsparse import post_training as pt
from jaxsparse.post_training import _layer, calibration, program, sparsegpt
from jaxsparse.structures import NM, Structure, Unstructured

WIDTH, HIDDEN, HEADS = 4096, 11008, 32
SHAPES = {
    "attention/query": (WIDTH, WIDTH), "attention/key": (WIDTH, WIDTH),
    "attention/value": (WIDTH, WIDTH), "attention/out": (WIDTH, WIDTH),
    "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
}  # fmt: skip


def block(params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """A decoder block: attention and SwiGLU on normalized streams."""
    w = lambda name: params[f"layers/0/{name}/kernel"]
    norm = lambda x: (
        x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5).astype(x.dtype)
    )
    h_BTD = norm(x_BTD)
    split = lambda y: y.reshape(*y.shape[:2], HEADS, -1)
    q, k, v = (split(h_BTD @ w(f"attention/{n}")) for n in ("query", "key", "value"))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x_BTD = x_BTD + y.reshape(x_BTD.shape) @ w("attention/out")
    h_BTD = norm(x_BTD)
    return x_BTD + (jax.nn.silu(h_BTD @ w("gate")) * (h_BTD @ w("up"))) @ w("down")


def statistics(mesh: Mesh, sequences: int, length: int) -> Any:
    """The program of the Gram matrices of a block for one batch, compiled."""
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    writes = lambda name: name.endswith("out") or name == "down"
    spec = {n: at("model", None) if writes(n) else at(None, "model") for n in SHAPES}
    params = {f"layers/0/{n}/kernel": bf16(s, sharding=spec[n]) for n, s in SHAPES.items()}
    batch = bf16((sequences, length, WIDTH), sharding=at("data"))
    leaves = jax.tree.leaves(params)
    wanted = set(range(len(leaves)))
    made = program.trace(block, params, batch, wanted)
    found = program.kernels(made, list(params), leaves, wanted)
    (segment,) = program.segments(made, found)
    values = [leaves[made.views[v].leaf] if v in made.views else batch for v in segment.takes]
    run = functools.partial(calibration.watched, made, segment, pt.Gram())
    return jax.jit(run).lower(values, None).compile()


def factor(mesh: Mesh, inputs: int) -> Any:
    """The factor of a Gram matrix that is on every chip, compiled."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    gram = jax.ShapeDtypeStruct((inputs, inputs), jnp.float32, sharding=everywhere)
    return jax.jit(_layer.inverse_factor).lower(gram).compile()


def sweep(mesh: Mesh, shape: tuple[int, int], structure: Structure) -> Any:
    """The sweep of SparseGPT on one kernel, compiled: its outputs over all chips, the factor on each."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    outputs = NamedSharding(mesh, PartitionSpec(None, ("data", "model")))
    w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=outputs)
    u = jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32, sharding=everywhere)
    kept = jax.ShapeDtypeStruct((shape[0] // 128,), jnp.int32, sharding=everywhere)
    run = lambda w, u, kept: sparsegpt.sweep(w, u, kept, None, structure, 128, None)
    return jax.jit(run).lower(w, u, kept).compile()


def together(mesh: Mesh, inputs: int) -> Any:
    """The factor and the sweep of a kernel with four outputs for each input as one program, compiled."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    outputs = NamedSharding(mesh, PartitionSpec(None, ("data", "model")))
    w = jax.ShapeDtypeStruct((inputs, 4 * inputs), jnp.float32, sharding=outputs)
    gram = jax.ShapeDtypeStruct((inputs, inputs), jnp.float32, sharding=everywhere)
    kept = jax.ShapeDtypeStruct((inputs // 128,), jnp.int32, sharding=everywhere)

    def run(w: jax.Array, gram: jax.Array, kept: jax.Array) -> Any:
        u, _ = _layer.inverse_factor(gram)
        return sparsegpt.sweep(w, u, kept, None, Unstructured(), 128, None)

    return jax.jit(run).lower(w, gram, kept).compile()


def alone(name: str, size: int) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """A step of SparseGPT on a square layer, and what it takes, as `tools.tpu_static` asks for them."""
    matrix = jax.ShapeDtypeStruct((size, size), jnp.float32)
    kept = jax.ShapeDtypeStruct((size // 128,), jnp.int32)
    structure = NM(2, 4) if name == "sweep, 2:4" else Unstructured()
    run = lambda w, u, kept: sparsegpt.sweep(w, u, kept, None, structure, 128, None)
    steps = {
        "Cholesky factor": (functools.partial(jnp.linalg.cholesky, symmetrize_input=False), (matrix,)),
        "inverse factor": (_layer.inverse_factor, (matrix,)),
        "sweep": (run, (matrix, matrix, kept)),
        "sweep, 2:4": (run, (matrix, matrix, kept)),
    }  # fmt: skip
    return steps[name]


def schedule(sizes: list[int], topology: str) -> None:
    """Cycles of the static schedule of each step, in thousands, with the model of the memory."""
    from tools.tpu_static import analyze

    root = str(pathlib.Path(__file__).parents[2])
    print("| thousands of cycles | " + " | ".join(map(str, sizes)) + " |")
    print("| :--- |" + " ---: |" * len(sizes))
    for name in ("Cholesky factor", "inverse factor", "sweep", "sweep, 2:4"):
        cells = []
        for size in sizes:
            report = analyze(
                f"{__spec__.name if __spec__ else __name__}:alone", topology=topology, paths=[root],
                kwargs={"name": name, "size": size}, all_kernels=True,
            )  # fmt: skip
            if not report["ok"]:
                raise RuntimeError(f"{name} of {size}: {report['error'][-300:]}")
            cells.append(f"{report['schedule_total_cycles_dma'] / 1e3:,.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def memory(compiled: Any) -> dict[str, float]:
    """GiB of one chip."""
    m = compiled.memory_analysis()
    parts = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
    }
    return {name: round(size / 2**30, 3) for name, size in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument(
        "--factors", type=int, nargs="*", default=[512], help="sizes; 4096 takes minutes"
    )
    parser.add_argument(
        "--together",
        type=int,
        nargs="*",
        default=[],
        help="sizes of factor and sweep in one program",
    )
    parser.add_argument("--schedule", type=int, nargs="*", default=[], help="sizes of layers")
    options = parser.parse_args(arguments)
    if options.schedule:
        return schedule(options.schedule, options.topology)
    devices = devices_of(options.topology)
    mesh = Mesh(np.asarray(devices).reshape(-1, 4), ("data", "model"))
    cases = {
        "Gram matrices of a block": lambda: statistics(mesh, options.sequences, options.length)
    }
    for name in ("attention/query", "up", "down"):
        text = "x".join(map(str, SHAPES[name]))
        case = functools.partial(sweep, mesh, SHAPES[name], Unstructured())
        cases[f"sweep, {name} {text}"] = case
    cases["sweep 2:4, up"] = lambda: sweep(mesh, SHAPES["up"], NM(2, 4))
    for size in options.factors:
        cases[f"factor {size}x{size}"] = functools.partial(factor, mesh, size)
    for size in options.together:
        cases[f"factor and sweep in one, {size}"] = functools.partial(together, mesh, size)
    print("| program | arguments | outputs | temporaries | compiling |")
    print("| :--- | ---: | ---: | ---: | ---: |")
    rows = {}
    for name, case in cases.items():
        start = time.perf_counter()
        rows[name] = memory(case())
        cells = [f"{x:.2f}" for x in rows[name].values()]
        cells.append(f"{time.perf_counter() - start:.0f} s")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
