"""What block-sparse, N:M and condensed products cost next to the dense product.

    python -m experiments.benchmarks.block_sparse_matmul --tpu --cpu --out docs/kernels

`--tpu` compiles the kernels for TPU generations with libtpu (no TPU needed) and reads cycles off the
compiler's schedule, `--cpu` measures wall-clock on this machine: dense and sparse in one process, in
turn, ratios of medians. Both write into `block_sparse_matmul.json` after each case, from which the
tables (`block_sparse_matmul_tables.md`) and the plot are made. A case that is in the file is not
measured again, but with `--again`; `--only TEXT` takes the cases whose key (as printed) contains
the text; without `--tpu` and `--cpu` only tables and plot are made.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import machine, medians
from pallas_kernels import (
    BlockSparse,
    Condensed,
    NMSparse,
    block_sparse_matmul,
    condensed_matmul,
    nm_matmul,
)

MODULE = "experiments.benchmarks.block_sparse_matmul"
TOKENS = 8192  # rows of x on TPU
SIZE = 4096  # of the square w, if not said otherwise


# ---- TPU: cases for the schedule tool, one function each (it calls them in a fresh process) -------


def _pattern(grid: tuple[int, int], sparsity: float, balanced: bool) -> np.ndarray:
    """A block mask. `balanced`: block columns differ by one block at most."""
    rng = np.random.default_rng(0)
    if not balanced:
        return rng.random(grid) < 1 - sparsity
    ranks = np.stack([rng.permutation(grid[0]) for _ in range(grid[1])], 1)
    each, more = divmod(round((1 - sparsity) * grid[0] * grid[1]), grid[1])
    return ranks < each + (rng.permutation(grid[1]) < more)


def tpu_block_sparse(product="forward", size=SIZE, block=128, sparsity=0.75, balanced=True):
    """One product of x `[8192, size]` with w `[size, size]`, for the schedule tool."""
    from pallas_kernels.block_sparse_matmul import tpu

    mask = _pattern((size // block, size // block), sparsity, balanced)
    with jax.ensure_compile_time_eval():
        shape, blocks = (size, size), (block, block)
        w = BlockSparse.from_block_mask(jnp.zeros(shape, jnp.int8), mask, blocks)
        pattern = np.asarray(w.places)
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


def tpu_dense(size=SIZE):
    """The dense product of the same shapes, by XLA."""
    x = jax.ShapeDtypeStruct((TOKENS, size), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return jnp.matmul, (x, w), dict(useful_flops=2 * TOKENS * size**2, density=1.0)


def tpu_n_of_m(rows=16, size=SIZE, n=2, m=4):
    """Decoding: a few rows of x with an N:M matrix."""
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    codes = jax.ShapeDtypeStruct((n, size // m * 2 // 32, size), jnp.int32)
    run = lambda x, v, c: nm_matmul(x, NMSparse(v, c, (size, size), n, m, 1), implementation="tpu")
    return run, (bf16((rows, size)), bf16((n, size // m, size)), codes), dict(density=n / m)


def _tpu_cases() -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name of the factory, its arguments, and whether it is run for other chips than v5e, too."""
    yield "tpu_dense", dict(size=4096), True
    yield "tpu_dense", dict(size=8192), False
    sparse = "tpu_block_sparse"
    for block in (128, 256, 512):
        for sparsity in (0.5, 0.75, 0.9):
            yield sparse, dict(block=block, sparsity=sparsity), sparsity == 0.75
    for block, sparsity in ((128, 0.5), (128, 0.75), (128, 0.9), (256, 0.75), (256, 0.9)):
        kwargs = dict(block=block, sparsity=sparsity, balanced=False)
        yield sparse, kwargs, (block, sparsity) == (256, 0.75)
    for sparsity in (0.75, 0.9):
        yield sparse, dict(size=8192, block=128, sparsity=sparsity), False
    for product in ("input gradient", "weight gradient"):
        for block in (128, 256, 512):
            yield sparse, dict(product=product, block=block, sparsity=0.75), block == 256
    for n in (2, 1):
        yield "tpu_n_of_m", dict(n=n), True


def measure_tpu(results: dict, topologies: list[str], wanted: Callable, save: Callable) -> None:
    """Fill `results["tpu"]` with the cases whose key is wanted; `save` after each of them."""
    from tools.tpu_static import analyze

    done = results.setdefault("tpu", {})
    results["tpu_versions"] = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    for topology in topologies:
        for factory, kwargs, everywhere in _tpu_cases():
            key = json.dumps([topology, factory, kwargs])
            if not wanted(key, done) or not (everywhere or topology.startswith("v5e")):
                continue
            report = analyze(
                f"{MODULE}:{factory}",
                topology=topology,
                kwargs=kwargs,
                paths=[os.getcwd()],
                all_kernels=factory == "tpu_dense",
            )
            if not report["ok"]:
                raise RuntimeError(f"{key} does not compile: {report['error']}")
            meta = report["meta"]
            cycles = report.get("schedule_total_cycles_dma") or report["total_cycles_dma"]
            done[key] = dict(
                cycles=round(cycles),
                per_tile=cycles * 2 * 128**3 / meta["useful_flops"]
                if "useful_flops" in meta
                else None,
                density=meta["density"],
                hbm=sum(k["hbm_bytes"] * k["times"] for k in report["kernels"] if k["mosaic"]),
                compile_s=round(report["compile_s"], 1),
            )
            print(key, f"{cycles / 1e3:.0f} k cycles, compiled in {report['compile_s']:.0f} s")
            save()


# ---- CPU: wall-clock ------------------------------------------------------------------------------


def _ratios(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each candidate over that of `dense`, and the latter in milliseconds."""
    times = medians(candidates, rounds=rounds, seconds=20)
    base = times.pop("dense")
    return dict(dense_ms=1e3 * base, **{name: t / base for name, t in times.items()})


@jax.jit
def _step(x, values, dy, w=None):
    """Forward and both gradients of x times a dense matrix, or a block-sparse w, of these values."""

    def product(x, values):
        if w is None:
            return jnp.matmul(x, values)
        return block_sparse_matmul(x, w.with_values(values))

    y, pull = jax.vjp(product, x, values)
    return y, *pull(dy)


def _peers(dense: jax.Array, x: jax.Array, block: int | None) -> dict[str, Callable[[], Any]]:
    """Forward products of other libraries that are installed, in the layout that each prefers."""
    w_t, x_t = np.ascontiguousarray(dense.T), np.ascontiguousarray(x.T)
    form, runs = ("BSR" if block else "CSR"), {}
    if importlib.util.find_spec("scipy") and len(x) <= (32 if block else 256):  # it is slow
        import scipy.sparse

        other = scipy.sparse.bsr_matrix(w_t, blocksize=(block, block)) if block else None
        other = scipy.sparse.csr_matrix(w_t) if other is None else other
        runs[f"scipy {form}"] = lambda: other @ x_t
    if len(x) <= 32:  # it makes an array of tokens x nonzeros
        from jax.experimental import sparse as jsparse

        bcsr, run = jsparse.BCSR.fromdense(w_t), jax.jit(lambda x, m: m @ x.T)
        runs["jax BCSR"] = lambda: run(x, bcsr)
    if importlib.util.find_spec("torch"):
        import torch

        t_w, t_x = torch.from_numpy(w_t), torch.from_numpy(x_t)
        t_sparse = t_w.to_sparse_bsr((block, block)) if block else t_w.to_sparse_csr()
        runs[f"torch {form}"] = lambda: t_sparse @ t_x
    return runs


def cpu_block_sparse(block: int, density: float, rows: int, rounds: int) -> dict:
    """Forward and training step with blocks, next to dense and to the peers that are installed."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = BlockSparse.random(keys[0], (SIZE, SIZE), (block, block), density=density)
    dense = w.to_dense()
    x, dy = (jax.random.normal(k, (rows, SIZE)) for k in keys[1:])
    matmul, sparse = jax.jit(jnp.matmul), jax.jit(block_sparse_matmul)
    forward = dict(dense=lambda: matmul(x, dense), ours=lambda: sparse(x, w))
    step = dict(dense=lambda: _step(x, dense, dy), ours=lambda: _step(x, w.values, dy, w))
    return dict(
        forward=_ratios({**forward, **_peers(dense, x, block)}, rounds),
        step=_ratios(step, rounds),
        density=w.num_blocks * block**2 / SIZE**2,
    )


def cpu_n_of_m(n: int, m: int, share: int, rows: int, rounds: int) -> dict:
    """Forward with an N:M pattern that `share` outputs have in common."""
    keys = jax.random.split(jax.random.key(0), 2)
    dense = jax.random.normal(keys[0], (SIZE, SIZE))
    w = NMSparse.from_dense(dense, n, m, share=share)
    x = jax.random.normal(keys[1], (rows, SIZE))
    matmul, sparse = jax.jit(jnp.matmul), jax.jit(nm_matmul)
    run = dict(dense=lambda: matmul(x, dense), ours=lambda: sparse(x, w))
    return dict(forward=_ratios(run, rounds), density=n / m)


def cpu_condensed(density: float, rows: int, rounds: int) -> dict:
    """Forward with constant fan-in at random places, next to dense and peers."""
    rng = np.random.default_rng(0)
    mask = rng.random((SIZE, SIZE)).argsort(0) < round(density * SIZE)
    dense = jnp.asarray(np.where(mask, rng.normal(size=mask.shape), 0), jnp.float32)
    w = Condensed.from_mask(dense, mask)
    x = jax.random.normal(jax.random.key(1), (rows, SIZE))
    matmul, sparse = jax.jit(jnp.matmul), jax.jit(condensed_matmul)
    run = dict(dense=lambda: matmul(x, dense), ours=lambda: sparse(x, w))
    peers = _peers(dense, x, None)
    return dict(forward=_ratios({**run, **peers}, rounds), density=w.fan_in / SIZE)


def _cpu_cases() -> Iterator[tuple[list[Any], Callable[[int], dict]]]:
    """The key of each case, and what measures it in so many rounds."""
    for rows in (32, 256, 2048):
        for block in (64, 128):
            for density in (0.25, 0.1):
                run = functools.partial(cpu_block_sparse, block, density, rows)
                yield ["block", block, density, rows], run
    for block, density in ((32, 0.25), (32, 0.1), (32, 0.5), (64, 0.5), (128, 0.5)):
        run = functools.partial(cpu_block_sparse, block, density, 256)
        yield ["block", block, density, 256], run
    shared = [
        (n, 4, share, rows) for n in (2, 1) for share in (32, 128) for rows in (32, 256, 2048)
    ]
    for n, m, share, rows in [*shared, (2, 4, 1, 256)]:
        run = functools.partial(cpu_n_of_m, n, m, share, rows)
        yield ["nm", f"{n}:{m}", share, rows], run
    for density, rows in ((0.1, 256), (0.05, 256), (0.01, 256), (0.1, 32), (0.1, 2048)):
        yield ["condensed", density, rows], functools.partial(cpu_condensed, density, rows)


def measure_cpu(results: dict, wanted: Callable, save: Callable) -> None:
    """Fill `results["cpu"]` with the cases whose key is wanted; `save` after each of them."""
    done = results.setdefault("cpu", {})
    for parts, run in _cpu_cases():
        key = json.dumps(parts)
        if not wanted(key, done):
            continue
        done[key] = run(5 if parts[-1] > 256 else 11)
        print(key, done[key], flush=True)
        results["cpu_machine"] = f"{_processor()}, {machine()}"
        save()


def _processor() -> str:
    """What the operating system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


# ---- tables and plot ------------------------------------------------------------------------------


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines = ["# Block-sparse, N:M and condensed products: tables", ""]
    lines += [f"Written by `{MODULE}`.", "", "![speed-up](block_sparse_matmul.png)", ""]
    if "tpu" in results:
        lines += _tpu_tables(results)
    if "cpu" in results:
        lines += _cpu_tables(results)
    return "\n".join(lines)


def _rows(title: str, align: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table; `align` has a letter for each column, l or r."""
    rule = " | ".join("---:" if a == "r" else "---" for a in align)
    return [f"| {title} |", f"| {rule} |", *(f"| {' | '.join(r)} |" for r in rows), ""]


def _tpu_tables(results: dict) -> list[str]:
    from tools.tpu_static import CHIPS

    versions = results["tpu_versions"]
    lines = [
        "## TPU, by the compiler's schedule",
        "",
        f"x `[{TOKENS}, K]`, w `[K, K]`, bfloat16, one device; jax {versions['jax']}, libtpu "
        f"{versions['libtpu']}. Nothing was run on a TPU: the real compiler's schedule is walked "
        "with a model of the memory traffic (`tools/tpu_static` says how far "
        "to trust it). *ratio*: cycles over those of the dense product by XLA; *per tile*: cycles "
        "for each stored 128 x 128 x 128 product. Small operations before the kernel are included.",
        "",
        f"    python -m {MODULE} --tpu --out docs/kernels",
        "",
    ]
    cases = [(*json.loads(key), r) for key, r in results["tpu"].items()]
    for topology in sorted({case[0] for case in cases}):
        here = [case[1:] for case in cases if case[0] == topology]
        dense = {kw["size"]: r["cycles"] for name, kw, r in here if name == "tpu_dense"}
        products, decode = [], []
        for name, kw, r in sorted(here, key=_order):
            if name == "tpu_n_of_m":
                share = f"{r['hbm'] / (2 * SIZE**2):.3f}"
                decode.append([f"{kw['n']}:4", share, f"{r['cycles'] / 1e3:.1f}"])
                continue
            size = kw.get("size", SIZE)
            ratio = r["cycles"] / dense[size]
            label = ["dense (XLA)", str(size), "", ""]
            if name == "tpu_block_sparse":
                pattern = "balanced" if kw.get("balanced", True) else "random"
                label = [kw.get("product", "forward"), str(size), str(kw["block"]), pattern]
            figures = [ratio, 1 / ratio, 1 / r["density"]]
            products.append(
                [*label, f"{r['density']:.3f}", f"{r['cycles'] / 1e3:.0f}", f"{ratio:.3f}"]
                + [f"{f:.2f}" for f in figures[1:]]
                + [f"{r['per_tile']:.1f}", f"{r['compile_s']:.0f}"]
            )
        title = "product | K | block | pattern | density | k cycles | ratio | speed-up | ideal"
        lines += [f"### {topology.split(':')[0]}", ""]
        lines += _rows(f"{title} | per tile | compile s", "lrrlrrrrrrr", products)
        if decode:
            chip = next(c for c in CHIPS.values() if c.gen == topology.split(":")[0])
            bound = 2 * SIZE**2 / (chip.cores * chip.hbm) * chip.clock
            lines += [f"Decoding, 16 rows of x, w `[{SIZE}, {SIZE}]`. Reading the dense w takes "]
            lines[-1] += f"{bound / 1e3:.1f} k cycles at least:"
            lines += [""]
            lines += _rows("w | HBM bytes over those of dense w | k cycles", "lrr", decode)
    return lines


def _order(case) -> tuple:
    """Dense first, then by product, size, pattern, block and sparsity."""
    name, kw, _ = case
    product = ["forward", "input gradient", "weight gradient"].index(kw.get("product", "forward"))
    where = (kw.get("size", SIZE), not kw.get("balanced", True), kw.get("block", 0))
    return (name == "tpu_block_sparse", product, *where, kw.get("sparsity", 0), -kw.get("n", 9))


def _cpu_tables(results: dict) -> list[str]:
    cases = [(*json.loads(key), r) for key, r in results["cpu"].items()]
    peers = lambda r: ", ".join(
        f"{name} {t:.2f}" for name, t in r["forward"].items() if name not in ("ours", "dense_ms")
    )
    ours = lambda r: [f"{r['forward']['dense_ms']:.1f}", f"{r['forward']['ours']:.2f}"]
    number = lambda r: f"{r['density']:.3f}"
    blocks = [
        [str(block), number(r), str(rows), *ours(r), f"{r['step']['ours']:.2f}", peers(r)]
        for _, block, _, rows, r in sorted(
            (c for c in cases if c[0] == "block"), key=lambda c: (c[3], c[1], -c[2])
        )
    ]
    n_of_m = [
        [pattern, str(share), str(rows), *ours(r)]
        for kind, pattern, share, rows, r in (c for c in cases if c[0] == "nm")
    ]
    condensed = [
        [number(r), str(rows), *ours(r), peers(r)]
        for kind, _, rows, r in (c for c in cases if c[0] == "condensed")
    ]
    return [
        "## CPU, wall-clock",
        "",
        f"Time over that of the dense XLA product in the same process (below 1: faster), medians "
        f"of interleaved repeats; float32, w `[{SIZE}, {SIZE}]`, row-major x; "
        f"{results['cpu_machine']}. *step*: the product and both gradients. Other libraries get "
        "x transposed beforehand, as they like it.",
        "",
        f"    python -m {MODULE} --cpu --out docs/kernels",
        "",
        *_rows(
            "block | density | rows of x | dense ms | forward | step | others, forward",
            "rrrrrrl",
            blocks,
        ),
        "N:M with one pattern for a number of neighbouring outputs (1: element by element, which "
        "runs dense):",
        "",
        *_rows("pattern | outputs | rows of x | dense ms | forward", "lrrrr", n_of_m),
        "Condensed (constant fan-in, random places):",
        "",
        *_rows("density | rows of x | dense ms | forward | others", "rrrrl", condensed),
    ]


def plot(results: dict, path: Path) -> None:
    """Speed-up over dense against density, with the line of the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    series: dict = {}
    for key, r in results.get("tpu", {}).items():
        topology, factory, kw = json.loads(key)
        forward = factory == "tpu_block_sparse" and kw.get("product", "forward") == "forward"
        if not (forward and topology.startswith("v5e") and kw.get("size", SIZE) == SIZE):
            continue
        dense = results["tpu"][json.dumps([topology, "tpu_dense", {"size": SIZE}])]["cycles"]
        name = f"blocks of {kw['block']}, " + ("balanced" if kw.get("balanced", True) else "random")
        series.setdefault((0, name), []).append((r["density"], dense / r["cycles"]))
    for key, r in results.get("cpu", {}).items():
        kind, block, *_, rows = json.loads(key)
        if rows != 256 or kind == "nm":
            continue
        if kind == "condensed":
            series.setdefault((1, "forward, condensed"), []).append(
                (r["density"], 1 / r["forward"]["ours"])
            )
            continue
        for what in ("forward", "step"):
            series.setdefault((1, f"{what}, blocks of {block}"), []).append(
                (r["density"], 1 / r[what]["ours"])
            )
    for (side, name), points in series.items():
        style = "--" if "random" in name or "step" in name else "-"
        axes[side].plot(*zip(*sorted(points)), style, marker="o", markersize=3, label=name)
    ideal = np.linspace(0.01, 1, 100)
    titles = (f"TPU v5e, schedule, x [{TOKENS}, {SIZE}]", "CPU, wall-clock, 256 rows")
    for ax, title in zip(axes, titles):
        ax.plot(ideal, 1 / ideal, "k:", label="ideal: 1 / density")
        ax.set(title=title, xlabel="density", xscale="log", yscale="log", ylim=(0.8, 20))
        ticks = [0.01, 0.05, 0.1, 0.25, 0.5, 1] if ax is axes[1] else [0.1, 0.25, 0.5, 1]
        ax.set_xlim(0.9 * ticks[0], 1.1)
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        ax.minorticks_off()
        ax.legend(fontsize=6)
    axes[0].set_ylabel("speed-up over dense")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="What sparse products cost next to dense")
    parser.add_argument("--tpu", action="store_true", help="schedule figures (needs libtpu)")
    parser.add_argument("--cpu", action="store_true", help="wall-clock on this machine")
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--only", default="", help="only cases whose key contains this text")
    parser.add_argument("--again", action="store_true", help="also cases that are in the file")
    parser.add_argument("--out", type=Path, default=Path("docs/kernels"))
    args = parser.parse_args()
    file = args.out / "block_sparse_matmul.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    save = lambda: file.write_text(json.dumps(results, indent=1) + "\n")
    wanted = lambda key, done: args.only in key and (args.again or key not in done)
    if args.tpu:
        measure_tpu(results, args.topologies, wanted, save)
    if args.cpu:
        measure_cpu(results, wanted, save)
    (args.out / "block_sparse_matmul_tables.md").write_text(tables(results))
    plot(results, args.out / "block_sparse_matmul.png")


if __name__ == "__main__":
    main()
