"""What block-sparse and N:M products cost next to the dense product.

    python -m experiments.benchmarks.block_sparse_matmul --tpu --cpu --out docs/kernels

`--tpu` compiles the kernels for TPU generations with libtpu (no TPU needed) and reads cycles off the
compiler's schedule, `--cpu` measures wall-clock on this machine: dense and sparse in one process, in
turn, medians of their ratio. Both write into `block_sparse_matmul.json`, from which the tables
(`block_sparse_matmul.md`) and the plot are made; `--tables` only does that.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockSparse, NMSparse, block_sparse_matmul, nm_matmul

TOKENS = 8192


# ---- TPU: cases for the schedule tool, one function each (it calls them in a fresh process) -------


def _pattern(k: int, n: int, block: int, sparsity: float, balanced: bool) -> np.ndarray:
    rng, grid = np.random.default_rng(0), (k // block, n // block)
    if balanced:  # the same number of blocks in every block column
        ranks = np.stack([rng.permutation(grid[0]) for _ in range(grid[1])], 1)
        return ranks < max(1, round((1 - sparsity) * grid[0]))
    return rng.random(grid) < 1 - sparsity


def tpu_block_sparse(product="forward", size=4096, block=128, sparsity=0.75, balanced=True):
    """One product of x `[8192, size]` with w `[size, size]`, for the schedule tool."""
    from pallas_kernels.block_sparse_matmul import tpu

    mask = _pattern(size, size, block, sparsity, balanced)
    with jax.ensure_compile_time_eval():
        shape, blocks = (size, size), (block, block)
        w = BlockSparse.from_block_mask(jnp.zeros(shape, jnp.int8), mask, blocks)
        pattern = np.asarray(w.pattern)
    x = jax.ShapeDtypeStruct((TOKENS, size), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((w.num_blocks, block, block), jnp.bfloat16)
    build = lambda v, p: BlockSparse(v, p, shape, blocks)
    meta = dict(useful_flops=2 * TOKENS * w.num_blocks * block**2, density=float(mask.mean()))
    if product == "weight gradient":
        run = lambda x, dy, v, p: tpu.weight_gradient(x, dy, build(v, p))
        return run, (x, x, values, pattern), meta
    transposed = product == "input gradient"
    run = lambda x, v, p: tpu.matmul(x, build(v, p), transposed=transposed)
    return run, (x, values, pattern), meta


def tpu_dense(size=4096):
    """The dense product of the same shapes, by XLA."""
    x = jax.ShapeDtypeStruct((TOKENS, size), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return jnp.matmul, (x, w), dict(useful_flops=2 * TOKENS * size**2, density=1.0)


def tpu_n_of_m(rows=16, size=4096, n=2, m=4):
    """Decoding: a few rows of x with an N:M matrix."""
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    codes = jax.ShapeDtypeStruct((n, size // m * 2 // 32, size), jnp.int32)
    run = lambda x, v, c: nm_matmul(x, NMSparse(v, c, (size, size), n, m, 1), implementation="tpu")
    return run, (bf16((rows, size)), bf16((n, size // m, size)), codes), dict(density=n / m)


def _tpu_rows():
    """Name of the factory, its arguments, and whether it is run for other chips than v5e, too."""
    sparse = "tpu_block_sparse"
    for block, sparsities in ((128, (0.75, 0.906, 0.5)), (256, (0.75, 0.5, 0.875)), (512, (0.75,))):
        for sparsity in sparsities:
            yield sparse, dict(block=block, sparsity=sparsity), sparsity == 0.75
    for n in (2, 1):
        yield "tpu_n_of_m", dict(n=n), True
    for product in ("weight gradient", "input gradient"):
        for block in (128, 256, 512):
            yield sparse, dict(product=product, block=block), block == 256
    for block, sparsity in ((128, 0.75), (128, 0.9), (256, 0.75)):
        yield sparse, dict(block=block, sparsity=sparsity, balanced=False), False
    for block, sparsity in ((128, 0.75), (128, 0.906)):
        yield sparse, dict(size=8192, block=block, sparsity=sparsity), False


def measure_tpu(results: dict, topologies: list[str], save: Callable[[], None]) -> None:
    """Fill `results["tpu"]`; what is there already is kept, and `save` is called after each case."""
    from experiments.benchmarks.tpu_static import analyze

    done = results.setdefault("tpu", {})
    results["tpu_versions"] = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    for topology in topologies:
        cases = [("tpu_dense", dict(size=4096), True), ("tpu_dense", dict(size=8192), False)]
        for factory, kwargs, everywhere in [*cases, *_tpu_rows()]:
            key = json.dumps([topology, factory, kwargs])
            if key in done or not (everywhere or topology.startswith("v5e")):
                continue
            report = analyze(
                f"experiments.benchmarks.block_sparse_matmul:{factory}",
                topology=topology,
                kwargs=kwargs,
                paths=[os.getcwd()],
                all_kernels=factory == "tpu_dense",
            )
            if not report["ok"]:
                raise RuntimeError(f"{key} does not compile: {report['error']}")
            cycles = report.get("schedule_total_cycles_dma") or report["total_cycles_dma"]
            useful = report.get("useful", {})
            done[key] = dict(
                cycles=cycles,
                schedule=report.get("schedule_total_cycles") or report["total_cycles"],
                per_tile=useful.get("cycles_per_128_tile_dma"),
                density=report["meta"]["density"],
                hbm=sum(k["hbm_bytes"] * k["times"] for k in report["kernels"] if k["mosaic"]),
                compile_s=report["compile_s"],
            )
            print(key, f"{cycles / 1e3:.0f} k cycles", flush=True)
            save()


# ---- CPU: wall-clock ------------------------------------------------------------------------------


def _ratios(dense, candidates: dict, rounds: int) -> dict:
    """Median time of each candidate over that of dense, run in turn in one process."""
    runs = {"dense": dense, **candidates}
    times = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["dense"])
    out = {name: statistics.median(t) / base for name, t in times.items() if name != "dense"}
    return dict(dense_ms=1e3 * base, **out)


def _step(product):
    """Forward and both gradients of `product(x, w)`, jitted."""

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    return run


def cpu_block_sparse(size: int, block: int, density: float, rows: int, rounds: int) -> dict:
    """Forward and training step with blocks, next to dense and to the peers that are installed."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = BlockSparse.random(keys[0], (size, size), (block, block), density=density)
    dense = w.to_dense()
    x, dy = (jax.random.normal(k, (rows, size)) for k in keys[1:])
    matmul, sparse = jax.jit(jnp.matmul), jax.jit(block_sparse_matmul)
    forward = {"ours": lambda: sparse(x, w)}
    if importlib.util.find_spec("scipy") and rows <= 256:
        import scipy.sparse

        bsr = scipy.sparse.bsr_matrix(np.asarray(dense).T, blocksize=(block, block))
        x_t = np.ascontiguousarray(np.asarray(x).T)
        forward["scipy BSR"] = lambda: bsr @ x_t
    if rows <= 32:
        from jax.experimental import sparse as jsparse

        bcsr = jsparse.BCSR.fromdense(dense.T)
        peer = jax.jit(lambda x, m: m @ x.T)
        forward["jax BCSR"] = lambda: peer(x, bcsr)
    if importlib.util.find_spec("torch"):
        import torch

        t_bsr = torch.from_numpy(np.array(dense).T.copy()).to_sparse_bsr((block, block))
        t_x = torch.from_numpy(np.array(x).T.copy())
        forward["torch BSR"] = lambda: t_bsr @ t_x
    dense_step, sparse_step = _step(jnp.matmul), _step(block_sparse_matmul)
    step = _ratios(
        lambda: dense_step(x, dense, dy), {"ours": lambda: sparse_step(x, w, dy)}, rounds
    )
    return dict(
        forward=_ratios(lambda: matmul(x, dense), forward, rounds),
        step=step,
        density=w.num_blocks * block**2 / size**2,
    )


def cpu_n_of_m(size: int, n: int, m: int, share: int, rows: int, rounds: int) -> dict:
    """Forward with an N:M pattern that `share` outputs have in common."""
    keys = jax.random.split(jax.random.key(0), 2)
    dense = jax.random.normal(keys[0], (size, size))
    w = NMSparse.from_dense(dense, n, m, share=share)
    x = jax.random.normal(keys[1], (rows, size))
    matmul, sparse = jax.jit(jnp.matmul), jax.jit(nm_matmul)
    run = {"ours": lambda: sparse(x, w)}
    return dict(forward=_ratios(lambda: matmul(x, dense), run, rounds), density=n / m)


def measure_cpu(results: dict) -> None:
    """Replace `results["cpu"]`."""
    done = results["cpu"] = {}
    for rows in (32, 256, 2048):
        rounds = 5 if rows > 256 else 11
        for block in (32, 64, 128):
            for density in (0.5, 0.25, 0.1):
                if rows > 256 and (block == 32 or density == 0.5):
                    continue
                key = json.dumps(["block", 4096, block, density, rows])
                done[key] = cpu_block_sparse(4096, block, density, rows, rounds)
                print(key, done[key], flush=True)
        for n, m, share in ((2, 4, 32), (2, 4, 128), (1, 4, 32), (1, 4, 128)):
            key = json.dumps(["nm", 4096, f"{n}:{m}", share, rows])
            done[key] = cpu_n_of_m(4096, n, m, share, rows, rounds)
            print(key, done[key], flush=True)
    results["cpu_machine"] = dict(
        processor=platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        jax=importlib.metadata.version("jax"),
    )


# ---- tables and plot ------------------------------------------------------------------------------


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines = ["# Block-sparse and N:M products: what they cost", ""]
    if "tpu" in results:
        lines += _tpu_tables(results)
    if "cpu" in results:
        lines += _cpu_tables(results)
    return "\n".join(lines) + "\n"


def _tpu_tables(results: dict) -> list[str]:
    versions = results["tpu_versions"]
    lines = [
        "## TPU, by the compiler's schedule",
        "",
        f"x `[{TOKENS}, K]`, w `[K, K]`, bfloat16, one device; jax {versions['jax']}, libtpu "
        f"{versions['libtpu']}. Nothing was run on a TPU: the real compiler's schedule is walked "
        "with a model of the memory traffic (`experiments/benchmarks/tpu_static.py` says how far "
        "to trust it). *ratio*: cycles over those of the dense product by XLA; *per tile*: cycles "
        "for each stored 128 x 128 x 128 product. Small operations before the kernel are included.",
        "",
        "    python -m experiments.benchmarks.block_sparse_matmul --tpu --out docs/kernels",
        "",
    ]
    rows = [(*json.loads(key), r) for key, r in results["tpu"].items()]
    for topology in dict.fromkeys(r[0] for r in rows):
        here = [r for r in rows if r[0] == topology]
        dense = {r[2].get("size", 4096): r[3]["cycles"] for r in here if r[1] == "tpu_dense"}
        lines += [
            f"### {topology.split(':')[0]}",
            "",
            "| product | K | block | pattern | density | k cycles | ratio | speed-up | ideal | "
            "per tile | compile s |",
            "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for _, factory, kw, r in here:
            if factory == "tpu_n_of_m":
                continue
            size = kw.get("size", 4096)
            ratio = r["cycles"] / dense[size]
            what = "dense (XLA)" if factory == "tpu_dense" else kw.get("product", "forward")
            block = "" if factory == "tpu_dense" else kw.get("block", 128)
            pattern = "random" if kw.get("balanced") is False else "balanced"
            lines.append(
                f"| {what} | {size} | {block} | {pattern if block else ''} | {r['density']:.3f} | "
                f"{r['cycles'] / 1e3:.0f} | {ratio:.3f} | {1 / ratio:.2f} | {1 / r['density']:.2f} "
                f"| {r['per_tile']:.1f} | {r['compile_s']:.0f} |"
            )
        lines.append("")
        decode = [r for r in here if r[1] == "tpu_n_of_m"]
        if decode:
            lines += [
                f"Decoding on {topology.split(':')[0]}, 16 rows of x, 4096 x 4096 (reading the "
                "dense weights takes 33.6 MB):",
                "",
                "| pattern | HBM bytes over dense | k cycles |",
                "| --- | ---: | ---: |",
            ]
            for _, _, kw, r in decode:
                share = r["hbm"] / (2 * 4096**2)
                lines.append(
                    f"| {kw['n']}:{kw.get('m', 4)} | {share:.3f} | {r['cycles'] / 1e3:.1f} |"
                )
            lines.append("")
    return lines


def _cpu_tables(results: dict) -> list[str]:
    machine = results["cpu_machine"]
    lines = [
        "## CPU, wall-clock",
        "",
        f"Ratio of times to the dense XLA product in the same process (below 1: faster), medians "
        f"of interleaved repeats, float32, 4096 x 4096, row-major x; {machine['cores']} cores "
        f"({machine['processor']}), jax {machine['jax']}. The machine was shared (load average "
        f"{machine['load']:.1f} at the end): take the ratios as rough.",
        "",
        "    python -m experiments.benchmarks.block_sparse_matmul --cpu --out docs/kernels",
        "",
        "| block | density | rows | dense ms | forward | training step | peers, forward |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for key, r in results["cpu"].items():
        kind, _, block, _, rows = json.loads(key)
        if kind != "block":
            continue
        peers = {p: t for p, t in r["forward"].items() if p not in ("ours", "dense_ms")}
        lines.append(
            f"| {block} | {r['density']:.3f} | {rows} | {r['forward']['dense_ms']:.1f} | "
            f"{r['forward']['ours']:.2f} | {r['step']['ours']:.2f} | "
            + ", ".join(f"{p} {t:.2f}" for p, t in peers.items())
            + " |"
        )
    lines += [
        "",
        "N:M with a pattern that neighbouring outputs share; the element-wise form runs dense:",
        "",
        "| pattern | outputs that share it | rows | forward |",
        "| --- | ---: | ---: | ---: |",
    ]
    for key, r in results["cpu"].items():
        kind, _, pattern, share, rows = json.loads(key)
        if kind == "nm":
            lines.append(f"| {pattern} | {share} | {rows} | {r['forward']['ours']:.2f} |")
    return [*lines, ""]


def plot(results: dict, path: Path) -> None:
    """Speed-up over dense against density, with the line of the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    series: dict = {}
    for key, r in results.get("tpu", {}).items():
        topology, factory, kw = json.loads(key)
        if factory == "tpu_block_sparse" and kw.get("product", "forward") == "forward":
            size = kw.get("size", 4096)
            dense = results["tpu"][json.dumps([topology, "tpu_dense", {"size": size}])]["cycles"]
            name = f"{topology.split(':')[0]}, blocks of {kw['block']}"
            name += ", random" if kw.get("balanced") is False else ""
            if size == 4096:
                series.setdefault((0, name), []).append((r["density"], dense / r["cycles"]))
    for key, r in results.get("cpu", {}).items():
        kind, _, block, _, rows = json.loads(key)
        if kind == "block" and rows == 256:
            point = (r["density"], 1 / r["forward"]["ours"])
            series.setdefault((1, f"forward, blocks of {block}"), []).append(point)
            point = (r["density"], 1 / r["step"]["ours"])
            series.setdefault((1, f"step, blocks of {block}"), []).append(point)
    for (side, name), points in series.items():
        points.sort()
        style = "--" if "random" in name or "step" in name else "-"
        axes[side].plot(*zip(*points), style, marker="o", markersize=3, label=name)
    ideal = np.linspace(0.09, 1, 100)
    for ax, title in zip(axes, ("TPU, schedule, x [8192, 4096]", "CPU, wall-clock, 256 rows")):
        ax.plot(ideal, 1 / ideal, "k:", label="ideal: 1 / density")
        ax.set(title=title, xlabel="density", xscale="log", yscale="log")
        ticks = [0.1, 0.25, 0.5, 1]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        ax.legend(fontsize=6)
    axes[0].set_ylabel("speed-up over dense")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="What block-sparse and N:M products cost")
    parser.add_argument("--tpu", action="store_true", help="schedule figures (needs libtpu)")
    parser.add_argument("--cpu", action="store_true", help="wall-clock on this machine")
    parser.add_argument("--tables", action="store_true", help="only tables and plot, from the file")
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--out", type=Path, default=Path("docs/kernels"))
    args = parser.parse_args()
    file = args.out / "block_sparse_matmul.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    save = lambda: file.write_text(json.dumps(results, indent=1) + "\n")
    if args.tpu:
        measure_tpu(results, args.topologies, save)
    if args.cpu:
        measure_cpu(results)
        save()
    (args.out / "block_sparse_matmul.md").write_text(
        tables(results) + "\n![speed-up over density](block_sparse_matmul.svg)\n"
    )
    plot(results, args.out / "block_sparse_matmul.svg")


if __name__ == "__main__":
    main()
