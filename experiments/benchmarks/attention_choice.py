"""Attention with the choice of its blocks, next to dense attention: what a predictor adds, and what is left of dense.

    python -m experiments.benchmarks.attention_choice --cpu --tpu --decode --out docs/results

CPU: ratios of medians of interleaved runs in one process, at 8192 tokens, whole attention with its predictor over XLA's
dense attention (`jax.nn.dot_product_attention`, causal). TPU: the real compiler's static schedule of the predictor's
program, of the kernel with as many blocks of each row, and of splash attention, at 32768 tokens (libtpu needs no TPU;
see `tools.tpu_static`): cycles, not times. Decode: a token with Quest, the bytes of HBM that the compiled programs read over
those of the chosen pages.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import block_sparse_attention as kernels
from experiments.benchmarks.timing import machine, medians
from jaxsparse import attention
from jaxsparse.attention import Layout, State
from pallas_kernels import BlockMask, block_sparse_decode
from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.block_sparse_attention.inputs import Inputs

MODULE = "experiments.benchmarks.attention_choice"
HEADS, DIM, DENSITY = 8, 128, 0.1
Results = dict[str, Any]


def predictors(layout: Layout) -> dict[str, attention.Predictor]:
    """Those that need no training, at one density."""
    return {
        "moba": attention.moba(density=DENSITY, layout=layout),
        "sparge": attention.sparge(density=DENSITY, layout=layout),
        "minference": attention.minference(density=DENSITY, layout=layout),
        "nsa": attention.nsa(density=DENSITY, layout=layout),
    }


# -------------------------------------------------------------------- CPU


def measure_cpu(results: Results, length: int, heads: int, block: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, heads, length, DIM)), jnp.float32) for _ in range(3))
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    dense = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(swap(q), swap(k), swap(v), is_causal=True)
    )
    layout = Layout(block, block)
    runs: dict[str, Callable[[], object]] = {"dense": functools.partial(dense, q, k, v)}
    rows: dict[str, Any] = {}
    for name, choose in predictors(layout).items():
        whole = jax.jit(lambda q, k, v, choose=choose: attention.attend(q, k, v, choose))
        alone = jax.jit(lambda q, k, choose=choose: choose(q, k, None, State()))
        runs[name], runs[f"{name}, choice"] = (
            functools.partial(whole, q, k, v),
            functools.partial(alone, q, k),
        )
        rows[name] = dict(density=float(attention.density(alone(q, k)).mean()))
    times = medians(runs, rounds=rounds, seconds=600)
    for name, row in rows.items():
        row |= dict(
            ratio=times[name] / times["dense"], choice=times[f"{name}, choice"] / times["dense"]
        )
        print(name, row, flush=True)
    results["cpu"] = dict(
        rows=rows, length=length, heads=heads, block=block, dense=times["dense"], machine=machine()
    )


# -------------------------------------------------------------------- TPU: cases for tpu_static


def choosing(name: str, length: int, block: int):
    """A predictor's program up to the lists that the forward pass reads."""
    choose = predictors(Layout(block, block))[name]
    x = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)

    def built(q, k):
        mask = choose(q, k, None, State())
        return mask.row_starts, mask.row_entries, mask.offsets, mask.dropped

    return jax.jit(built), (x, x)


def attending(length: int, block: int):
    """The kernel with as many blocks of each row as the density says, drawn before the own one."""
    layout = Layout(block, block)
    grid = layout.grid(length, length)
    visible, forced = layout.visible(grid), layout.forced(grid)
    rows = attention.select.per_row(DENSITY, visible, forced)
    assert rows is not None
    draw = np.random.default_rng(0).random((HEADS, *visible.shape))
    draw = np.where(forced, 2.0, np.where(visible, draw, -1.0))
    keep = draw.argsort(-1).argsort(-1) >= draw.shape[-1] - rows[:, None]
    mask = BlockMask.from_dense(keep & visible, grid) & BlockMask.causal(grid)
    x = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    run = lambda q, k, v, mask: tpu.forward(Inputs(q, k, v, mask, None, DIM**-0.5, None))
    pairs = float(np.asarray(mask.counts).sum()) * block * block / kernels.PAIR
    return run, (x, x, x, mask), dict(pairs=pairs)


def dense_splash(length: int):
    return kernels.splash(kind="causal", length=length)


def deciding(length: int, page: int, budget: int):
    """Quest's choice for a token, up to the list that decoding reads."""
    choose = attention.quest(budget=budget, page=page)
    q = jax.ShapeDtypeStruct((1, HEADS, 1, DIM), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    bounds = jax.ShapeDtypeStruct((1, HEADS, length // page, DIM), jnp.bfloat16)

    def run(q, k, low, high):
        bounds = attention.Pages(low, high)
        mask = choose(q, k, None, State(params=bounds, lengths=jnp.full(1, length, jnp.int32)))
        return mask.row_entries, mask.counts

    return jax.jit(run), (q, cache, bounds, bounds)


def decoding(length: int, page: int, budget: int, implementation: str | None = None):
    """A token against as many pages, drawn at random."""
    draw = np.random.default_rng(0).random((1, HEADS, 1, length // page))
    keep = draw.argsort(-1).argsort(-1) < budget // page
    mask = BlockMask.from_dense(keep, (1, page), capacity=budget // page)
    q = jax.ShapeDtypeStruct((1, HEADS, DIM), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    run = functools.partial(block_sparse_decode, implementation=implementation)
    return run, (q, cache, cache, mask, np.full(1, length, np.int32))


def _read(report: dict[str, Any]) -> float:
    """Bytes of HBM that a program's kernels and fusions move, and those that XLA copies beside them."""
    moved = sum(k["hbm_bytes"] for k in report["kernels"])
    return moved + report["hlo"]["prefetched_bytes"]


def measure_decode(results: Results, topology: str, length: int, pages: list[int]) -> None:
    from tools.tpu_static import analyze

    root = str(pathlib.Path(__file__).parents[2])
    largest = max(pages)
    budget = round(DENSITY * length / largest) * largest
    chosen = 2.0 * HEADS * budget * DIM * 2  # keys and values, 16 bits
    table = results.setdefault("decode", {}).setdefault(topology.split(":")[0], {})
    table |= dict(length=length, budget=budget, chosen_bytes=chosen)
    for page in pages:
        row = table.setdefault(str(page), {})
        sizes = dict(length=length, page=page, budget=budget)
        for name, factory, more in (
            ("choice", "deciding", {}),
            ("kernel", "decoding", {}),
            ("gather", "decoding", dict(implementation="xla")),
        ):
            r = analyze(
                f"{MODULE}:{factory}", topology=topology, paths=[root], kwargs=sizes | more, all_kernels=True
            )  # fmt: skip
            if not r["ok"]:
                row[name] = r["error"][-300:]
                continue
            row[name] = dict(read=_read(r) / chosen, scheduled=r["schedule_total_cycles_dma"])
            print(topology, page, name, row[name], flush=True)


def measure_tpu(results: Results, topology: str, length: int, blocks: list[int]) -> None:
    from tools.tpu_static import analyze

    root = str(pathlib.Path(__file__).parents[2])
    report = lambda factory, **more: analyze(
        f"{MODULE}:{factory}", topology=topology, paths=[root], **more
    )
    table = results.setdefault("tpu", {}).setdefault(topology.split(":")[0], dict(length=length))
    r = report("dense_splash", kwargs=dict(length=length))
    table["splash"] = kernels._costs(r, "forward", False) if r["ok"] else r["error"][-300:]
    print("splash", table["splash"], flush=True)
    for block in blocks:
        row = table.setdefault(str(block), {})
        r = report("attending", kwargs=dict(length=length, block=block))
        row["kernel"] = kernels._costs(r, "forward", False) if r["ok"] else r["error"][-300:]
        for name in predictors(Layout(block, block)):
            r = report(
                "choosing", kwargs=dict(name=name, length=length, block=block), all_kernels=True
            )
            if not r["ok"]:
                row[name] = r["error"][-300:]
                continue
            sorts = [k["cycles"] for k in r["kernels"] if k["name"].startswith("sort")]
            row[name] = dict(estimate=r["hlo"]["estimated_cycles"], sorts=sum(sorts),
                             scheduled=r["schedule_total_cycles_dma"],
                             temp_bytes=r["memory"]["temp"])  # fmt: skip
            print(topology, block, name, row[name], flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tpu", action="store_true")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--length", type=int, default=8192, help="of the CPU's run")
    parser.add_argument("--heads", type=int, default=4, help="of the CPU's run")
    parser.add_argument("--block", type=int, default=128, help="of the CPU's run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--tpu-length", type=int, default=32768)
    parser.add_argument("--tpu-blocks", default="128,256")
    parser.add_argument("--pages", default="16,64,128")
    options = parser.parse_args(arguments)
    path = options.out / "attention_choice.json"
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    save = lambda: path.write_text(json.dumps(results, indent=1) + "\n")
    if options.cpu:
        measure_cpu(results, options.length, options.heads, options.block, options.rounds)
        save()
    if options.tpu:
        blocks = [int(b) for b in options.tpu_blocks.split(",")]
        measure_tpu(results, options.topology, options.tpu_length, blocks)
        save()
    if options.decode:
        pages = [int(n) for n in options.pages.split(",")]
        measure_decode(results, options.topology, options.tpu_length, pages)
        save()


if __name__ == "__main__":
    main()
