"""What pruning a block of a 7B decoder takes on a slice of TPUs, read off the programs of the TPU compiler.

    python -m experiments.benchmarks.post_training_compile [--topology=v5e:4x4] [--sequences=16] [--length=2048]

No TPU is needed: `libtpu` compiles for the described chips. A block of the shape of Llama 7B (width 4096, hidden 11008,
32 heads, bfloat16) has its kernels sharded over "model", by outputs where it reads the stream and by inputs where it
writes to it, and its tokens over "data". Compiled are the programs that `prune` runs: the statistics of a block's
kernels for one batch (`calibration`), and the sweep of SparseGPT on each kind of kernel, its Gram matrix on all chips
and its outputs spread over them, for rows of the published notation are independent. Memory is that of one chip.
"""

import argparse
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks.pod_compile import devices_of
from jaxsparse import post_training as pt
from jaxsparse.post_training import calibration, program

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


def sweep(mesh: Mesh, shape: tuple[int, int], structure: str | None) -> Any:
    """SparseGPT on one kernel, compiled: outputs over all chips, the Gram matrix on each."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    outputs = NamedSharding(mesh, PartitionSpec(None, ("data", "model")))
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=outputs)
    gram = jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32, sharding=everywhere)
    sparsity = None if structure else 0.5
    prune = lambda w, gram: pt.sparsegpt_core(w, gram, sparsity, structure=structure)[:3]
    return jax.jit(prune).lower(w, gram).compile()


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
    options = parser.parse_args(arguments)
    devices = devices_of(options.topology)
    mesh = Mesh(np.asarray(devices).reshape(-1, 4), ("data", "model"))
    cases = {
        "Gram matrices of a block": lambda: statistics(mesh, options.sequences, options.length)
    }
    for name, shape in (
        ("query", SHAPES["attention/query"]),
        ("up", SHAPES["up"]),
        ("down", SHAPES["down"]),
    ):
        text = "x".join(map(str, shape))
        cases[f"SparseGPT, {name} {text}"] = functools.partial(sweep, mesh, shape, None)
    cases["SparseGPT 2:4, up"] = lambda: sweep(mesh, SHAPES["up"], "2:4")
    print("| program | arguments | outputs | temporaries |\n| :--- | ---: | ---: | ---: |")
    rows = {}
    for name, case in cases.items():
        rows[name] = memory(case())
        print(
            f"| {name} | " + " | ".join(f"{x:.2f}" for x in rows[name].values()) + " |", flush=True
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
