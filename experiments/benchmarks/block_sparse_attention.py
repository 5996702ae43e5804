"""Block-sparse attention next to dense XLA, `jax.nn.dot_product_attention`, splash attention and
JAX's flash attention.

    python -m experiments.benchmarks.block_sparse_attention --tpu --cpu --out docs/kernels

TPU: the real compiler's static schedule (libtpu needs no TPU; see `tools.tpu_static`), so cycles, not
times. CPU: ratios of medians of interleaved runs in one process. Every case is saved as soon as it
is measured; `--only WORD` repeats the cases whose table or label contains the word, and without
`--tpu` and `--cpu` the page and the plots are written again from the saved figures.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import machine, medians
from pallas_kernels import BlockMask, Grid, block_sparse_attention
from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.block_sparse_attention.inputs import Inputs
from pallas_kernels.block_sparse_attention.mask import within_segments

MODULE = "experiments.benchmarks.block_sparse_attention"
HEADS, DIM = 8, 128
PAIR = 128 * 128
Results = dict[str, Any]


def make_mask(
    kind: str, q_len: int, length: int, blocks: tuple[int, int], per_row: int = 16
) -> BlockMask:
    """`random` keeps `per_row` blocks of 128 keys per row on average, differently per head."""
    grid = Grid(length, length, *blocks)
    if kind == "causal":
        return BlockMask.causal(grid)
    if kind == "local":
        return BlockMask.local(grid, window=1024)
    rows, cols = q_len // blocks[0], length // blocks[1]
    keep = np.random.default_rng(0).random((HEADS, rows, cols)) < per_row * 128 / length
    return BlockMask.from_dense(keep, blocks, capacity=int(keep.sum((1, 2)).max()))


def packed_ids(length: int) -> np.ndarray:
    """Documents of 1/8, 1/4, 1/16, 5/16 and 1/4 of the length, nearly: no multiples of a block."""
    ends = np.array([1 / 8, 3 / 8, 7 / 16, 3 / 4]) * length + 40
    return np.searchsorted(ends, np.arange(length), side="right")[None].astype(np.int32)


# -------------------------------------------------------------------- cases for tpu_static


def _finish(f: Callable[..., Any], shapes: list[Any], backward: bool, pairs: float, *extra: Any):
    """(function, arguments, meta) as tpu_static takes them; pairs of 128 x 128 are per call."""
    meta = dict(pairs=pairs, useful_flops=int(pairs * 4 * PAIR * DIM * (3.5 if backward else 1)))
    if not backward:
        return f, (*shapes, *extra), meta

    def both(*args: Any) -> Any:
        qkv, rest = args[:3], args[3:-1]
        return jax.vjp(lambda *x: f(*x, *rest), *qkv)[1](args[-1])

    return both, (*shapes, *extra, shapes[0]), meta


def _visible(kind: str, length: int, packed: bool = False) -> float:
    """Visible pairs of all heads, in units of 128 x 128."""
    documents = np.bincount(packed_ids(length)[0]) if packed else [length]
    reach = 1024 if kind == "local" else length
    shown = sum(np.minimum(np.arange(n) + 1, reach).sum() for n in documents)
    return HEADS * float(shown) / PAIR


def ours(
    kind: str = "random",
    length: int = 8192,
    q_len: int | None = None,
    blocks: tuple[int, int] = (128, 128),
    backward: bool = False,
    per_row: int = 16,
    packed: bool = False,
    fetch: bool | None = None,
):
    q_len = length if q_len is None else q_len
    mask = make_mask(kind, q_len, length, (blocks[0], blocks[1]), per_row)
    if kind == "random":
        pairs = float(np.asarray(mask.counts).sum()) * blocks[0] * blocks[1] / PAIR
    else:
        pairs = _visible(kind, length, packed)
    segments = None
    if packed:
        segments = (jnp.asarray(packed_ids(length)),) * 2
        mask = within_segments(mask, *segments)
    q = jax.ShapeDtypeStruct((1, HEADS, q_len, DIM), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((1, HEADS, q_len), jnp.float32)

    # The kernels' entry points: tpu_static follows concrete lists to them, but not through the
    # custom derivative around them.
    def run(q, k, v, mask, segments, delta, dout):
        inputs = Inputs(q, k, v, mask, segments, DIM**-0.5, None)
        out, lse = tpu.forward(inputs, fetch=fetch)
        if not backward:
            return out, lse
        return out, *tpu.backward(inputs, lse, delta, dout, fetch=fetch)

    return run, (q, kv, kv, mask, segments, rows, q), _finish(run, [q], backward, pairs)[2]


def splash(
    kind: str = "causal",
    length: int = 8192,
    block: int = 1024,
    compute: int = 512,
    backward: bool = False,
    per_row: int = 16,
    packed: bool = False,
):
    """Splash attention; kind 'random' gives every head its own static mask of 128-blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if kind == "causal":
        heads, pairs = [masks.CausalMask((length, length))] * HEADS, _visible(kind, length, packed)
    elif kind == "local":
        one = masks.LocalMask((length, length), (1023, 0), 0)
        heads, pairs = [one] * HEADS, _visible(kind, length)
    else:
        mask = make_mask(kind, length, length, (128, 128), per_row)
        keep = np.asarray(mask.codes[0] != 0)
        heads = [masks.NumpyMask(np.kron(x, np.ones((128, 128), bool))) for x in keep]
        pairs = float(keep.sum())
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )
    run = kernel.make_splash_mha(
        masks.MultiHeadMask(heads), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    shape = jax.ShapeDtypeStruct((HEADS, length, DIM), jnp.bfloat16)
    ids = jnp.asarray(packed_ids(length)[0])
    segments = kernel.SegmentIds(q=ids, kv=ids) if packed else None
    f = lambda q, k, v: run(q, k, v, segment_ids=segments)
    return _finish(f, [shape] * 3, backward, pairs)


def flash(length: int = 8192, block: int = 1024, backward: bool = False):
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    names = module.BlockSizes.__dataclass_fields__
    sizes = module.BlockSizes(**{n: 1 if n == "block_b" else block for n in names})
    f = functools.partial(module.flash_attention, causal=True, block_sizes=sizes)
    shape = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    return _finish(f, [shape] * 3, backward, _visible("causal", length))


def dense_xla(length: int = 4096, backward: bool = False):
    shape = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    return _finish(_dense, [shape] * 3, backward, _visible("causal", length))


def jax_nn(length: int = 4096, backward: bool = False):
    def f(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, is_causal=True), 1, 2)

    shape = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    return _finish(f, [shape] * 3, backward, _visible("causal", length))


# What a mask is made of, by the name of its row: of booleans, or of scores.
BUILDS: dict[str, tuple[Any, Callable[..., BlockMask]]] = {
    "booleans": (
        jnp.bool_,
        lambda x, length: BlockMask.from_dense(x, capacity=20 * length // 128),
    ),
    "16 best scores": (jnp.float32, lambda x, length: BlockMask.from_scores(x, 16)),
    "16 best scores, then `& causal`": (
        jnp.float32,
        lambda x, length: BlockMask.from_scores(x, 16) & BlockMask.causal(length),
    ),
}


def making(kind: str, columns: bool, length: int = 8192):
    """A mask made under `jit`, or (`columns=False`) only what a forward pass asks of it."""
    dtype, make = BUILDS[kind]
    x = jax.ShapeDtypeStruct((HEADS, length // 128, length // 128), dtype)

    def built(x):
        mask = make(x, length)
        return mask if columns else (mask.row_starts, mask.row_entries, mask.offsets, mask.dropped)

    return jax.jit(built), (x,)


def _dense(q, k, v, causal=True):
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
    weights = jax.nn.softmax(scores * DIM**-0.5, -1).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


# table -> (label, factory, options); peers that end in ` *` are compiled for the first TPU only.
CASES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "Per-head random lists, 8192 tokens": [
        ("blocks 128 x 128, 8 per row", "ours", dict(per_row=8)),
        ("blocks 128 x 128, 16 per row", "ours", dict()),
        ("blocks 128 x 128, 32 per row", "ours", dict(per_row=32)),
        ("blocks 256 x 128, 16 per row", "ours", dict(blocks=(256, 128))),
        ("blocks 128 x 128, 16 per row, K and V fetched", "ours", dict(fetch=True)),
        (
            "blocks 256 x 128, 16 per row, K and V fetched",
            "ours",
            dict(blocks=(256, 128), fetch=True),
        ),
        (
            "splash, 128, same lists (static)",
            "splash",
            dict(kind="random", block=128, compute=128),
        ),
    ],
    "1024 queries against 131072 keys, per-head random lists": [
        ("blocks 128 x 128, 16 per row", "ours", dict(q_len=1024, length=131072)),
        ("blocks 128 x 128, 64 per row", "ours", dict(q_len=1024, length=131072, per_row=64)),
    ],
    "Causal, 4096 tokens": [
        ("blocks 256 x 256", "ours", dict(kind="causal", length=4096, blocks=(256, 256))),
        ("blocks 512 x 512", "ours", dict(kind="causal", length=4096, blocks=(512, 512))),
        ("splash 1024/512", "splash", dict(length=4096)),
        ("flash 1024", "flash", dict(length=4096)),
        ("jax.nn.dot_product_attention *", "jax_nn", dict(length=4096)),
        ("dense XLA *", "dense_xla", dict(length=4096)),
    ],
    "Causal, 8192 tokens": [
        ("blocks 256 x 256", "ours", dict(kind="causal", blocks=(256, 256))),
        ("blocks 512 x 512", "ours", dict(kind="causal", blocks=(512, 512))),
        ("splash 1024/512", "splash", dict()),
        ("flash 1024", "flash", dict()),
    ],
    "Local window of 1024, 4096 tokens": [
        ("blocks 128 x 128", "ours", dict(kind="local", length=4096)),
        ("blocks 512 x 512", "ours", dict(kind="local", length=4096, blocks=(512, 512))),
        ("splash 512", "splash", dict(kind="local", length=4096, block=512)),
    ],
    "Causal, 8192 tokens in 5 packed documents": [
        ("blocks 256 x 256", "ours", dict(kind="causal", blocks=(256, 256), packed=True)),
        ("blocks 512 x 512", "ours", dict(kind="causal", blocks=(512, 512), packed=True)),
        ("splash 1024/512", "splash", dict(packed=True)),
    ],
}
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
IDEAL = {"v5e": 64, "v5p": 32, "v6e": 16}  # cycles of the MXUs of a chip for a pair, forward
DENSE = ("dense_xla", "jax_nn")


def measure_tpu(
    results: Results, topologies: list[str], only: str, missing: bool, save: Callable
) -> None:
    from tools.tpu_static import analyze

    def report(factory: str, topology: str, options: dict, **more: Any) -> dict:
        root = str(pathlib.Path(__file__).parents[2])
        return analyze(
            f"{MODULE}:{factory}", topology=topology, kwargs=options, paths=[root], **more
        )

    for topology in topologies:
        table = results.setdefault("tpu", {}).setdefault(topology.split(":")[0], {})
        for title, cases in CASES.items():
            for label, factory, options in cases:
                elsewhere = label.endswith("*") and topology != TOPOLOGIES[0]
                done = missing and label in table.get(title, {})
                if elsewhere or done or only not in f"{title}: {label}":
                    continue
                dense = factory in DENSE
                row = {}
                for backward in (False, True):
                    if factory == "ours" and not backward:
                        continue  # one program has both, and its kernels have names
                    options = options | dict(backward=backward)
                    r = report(factory, topology, options, all_kernels=dense)
                    if not r["ok"]:
                        row["error"] = r["error"].splitlines()[-1][:300]
                        break
                    row["pairs"] = r["meta"]["pairs"]
                    row |= _costs(r, "both" if backward else "forward", dense)
                    if factory == "ours":
                        forward = [k for k in r["kernels"] if "forward" in k["name"]]
                        row |= _costs(dict(kernels=forward), "forward", dense)
                table.setdefault(title, {})[label] = row
                print(topology, label, row, flush=True)
                save()
        for label in BUILDS:
            done = missing and label in table.get("build", {})
            if done or only not in f"Making a mask: {label}":
                continue
            row = {}
            for name, lists in (("rows", 1), ("both", 2)):
                options = dict(kind=label, columns=lists == 2)
                r = report("making", topology, options, all_kernels=True)
                row[name] = r["hlo"]["estimated_cycles"]
                # The estimate leaves sorts out; equal ones have one schedule.
                sorts = [k["cycles"] for k in r["kernels"] if k["name"].startswith("sort")]
                row[f"{name}_sorts"] = lists * max(sorts)
            table.setdefault("build", {})[label] = row
            print(topology, label, row, flush=True)
            save()


def _costs(report: dict, name: str, dense: bool) -> dict[str, float]:
    """Cycles, cycles with the DMA model, and bytes of HBM of the Mosaic kernels of a program; the
    cycles of all its fusions where there are none."""
    if dense:
        cycles = report["schedule_total_cycles"], report["schedule_total_cycles_dma"]
        return dict(zip((name, f"{name}_dma"), cycles))
    total = lambda field: sum(k[field] for k in report["kernels"])
    return {
        name: total("cycles"),
        f"{name}_dma": total("cycles_dma"),
        f"{name}_bytes": total("hbm_bytes"),
    }


# -------------------------------------------------------------------- CPU


def measure_cpu(results: Results, only: str, save: Callable, length: int = 4096) -> None:
    """Ratios to dense XLA, which computes every pair; two rows at a time, so that pieces are short."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4, length, DIM)), jnp.float32) for _ in range(3))
    blocks = length // 128

    def nn(q, k, v):
        return jax.nn.dot_product_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))

    def differentiate(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2)))

    dense = functools.partial(_dense, causal=False)
    sparse = functools.partial(block_sparse_attention, implementation="xla")
    cases: dict[str, Any] = {"jax.nn.dot_product_attention": (nn, ())}
    for p in (0.1, 0.25, 0.5):
        mask = BlockMask.from_dense(rng.random((4, blocks, blocks)) < p)
        cases[f"block-sparse, {100 * p:.0f} %"] = (sparse, (mask,))
    for label, (f, extra) in cases.items():
        if only not in f"CPU: {label}":
            continue
        row: dict[str, float] = {"kept": float(extra[0].density.mean()) if extra else 1.0}
        for name, wrap in (("forward", jax.jit), ("gradient", differentiate)):
            runs = {"ours": (wrap(f), (q, k, v, *extra)), "dense": (wrap(dense), (q, k, v))}
            for who, (g, args) in runs.items():
                memory: Any = g.lower(*args).compile().memory_analysis()
                row[f"{name}_bytes_{who}"] = memory.temp_size_in_bytes
            times = medians({w: functools.partial(g, *a) for w, (g, a) in runs.items()}, rounds=5)
            row[name], row[f"{name}_seconds"] = times["ours"] / times["dense"], times["ours"]
        results.setdefault("cpu", {})[label] = row
        results["cpu_machine"] = machine()
        print(label, row, flush=True)
        save()


# -------------------------------------------------------------------- page and plots


def page(results: Results) -> str:
    """Tables and plots as Markdown."""
    lines = [
        "<!-- Written by `python -m experiments.benchmarks.block_sparse_attention`. -->",
        "# Block-sparse attention: figures",
        "",
        f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}. {HEADS} heads of "
        f"{DIM}, bfloat16 on TPU. A pair is 128 queries by 128 keys that see each other; the matrix "
        "units need at least 64 cycles for it forward and 160 backward on v5e, half of that on v5p "
        "(two cores), a quarter on v6e. Cycles are the compiler's schedule of the kernels, with DMA "
        "also the waits of a model of the memory; nothing ran on a TPU. MB: what the kernels move "
        "from and to HBM (on v5p one of the two cores, which has half of the heads; splash's backward "
        "kernels run on one core). Dense XLA and `jax.nn.dot_product_attention`: all their fusions.",
        "",
        "    python -m experiments.benchmarks.block_sparse_attention --tpu --out docs/kernels",
        "",
    ]
    for chip, tables in results.get("tpu", {}).items():
        for i, title in enumerate(CASES):
            if rows := tables.get(title):
                lines += [f"## {title}, {chip}", "", *_table(title, rows)]
                lines += [f"![{title}, {chip}](block_sparse_attention_{i}.png)", ""] * (
                    chip == next(iter(results["tpu"]))
                )
    if builds := {c: t["build"] for c, t in results.get("tpu", {}).items() if "build" in t}:
        lines += _build_table(results, builds)
    if "cpu" in results:
        lines += _cpu_table(results)
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, rows: dict[str, dict]) -> list[str]:
    lines = [
        "| case | pairs | forward, k cycles | with DMA | per pair | MB | backward, k cycles |"
        " with DMA | per pair | over forward |",
        "| --- " + "| ---: " * 9 + "|",
    ]
    for label, *_ in CASES[title]:
        row = rows.get(label)
        if row is None:
            continue
        label = label.removesuffix(" *")
        if "error" in row:
            lines.append(f"| {label} | does not compile: {row['error']} |" + " |" * 8)
            continue
        f, pairs = row["forward"], row["pairs"]
        b, b_dma = row["both"] - f, row["both_dma"] - row["forward_dma"]
        mb = f"{row['forward_bytes'] / 1e6:,.0f}" if "forward_bytes" in row else ""
        lines.append(
            f"| {label} | {pairs:,.0f} | {f / 1e3:,.0f} | {row['forward_dma'] / 1e3:,.0f} "
            f"| {f / pairs:.1f} | {mb} | {b / 1e3:,.0f} | {b_dma / 1e3:,.0f} | {b / pairs:.1f} "
            f"| {b / f:.2f} |"
        )
    return [*lines, ""]


def _build_table(results: Results, builds: dict[str, dict]) -> list[str]:
    lines = [
        "## Making a mask under `jit`",
        "",
        f"8192 tokens, {HEADS} heads, blocks of 128 x 128; thousands of cycles, XLA's estimate, and in "
        "brackets with the schedule of the sorts, which the estimate leaves out. The shares are of "
        "the passes with 16 of 64 blocks per row (25 %). A forward pass asks for the list of rows "
        "only: what makes the other falls away under `jit`.",
        "",
        "| chip | from | list of rows | of forward | both lists | of forward and backward "
        "| of forward |",
        "| --- | --- " + "| ---: " * 5 + "|",
    ]
    for chip, build in builds.items():
        rows = results["tpu"][chip].get("Per-head random lists, 8192 tokens", {})
        passes = rows.get("blocks 128 x 128, 16 per row", {})
        for label, row in build.items():
            cells = []
            for name, wholes in (("rows", ["forward"]), ("both", ["both", "forward"])):
                cost, sorts = row[name], row[f"{name}_sorts"]
                cells.append(f"{cost / 1e3:,.0f} ({(cost + sorts) / 1e3:,.0f})")
                for whole in wholes:
                    share, more = (100 * x / passes[whole] for x in (cost, cost + sorts))
                    cells.append(f"{share:.1f} % ({more:.1f} %)")
            lines.append(f"| {chip} | {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cpu_table(results: Results) -> list[str]:
    lines = [
        "## CPU, 4096 tokens, 4 heads of 128, float32, blocks of 128",
        "",
        f"{results['cpu_machine']}. Medians of interleaved runs, over those of dense XLA attention, "
        "which computes all pairs; temporary memory by XLA's analysis.",
        "",
        "    python -m experiments.benchmarks.block_sparse_attention --cpu --out docs/kernels",
        "",
        "| case | kept | forward / dense | over kept | MB (dense) | gradient / dense | over kept |"
        " MB (dense) |",
        "| --- " + "| ---: " * 7 + "|",
    ]
    for label, row in results["cpu"].items():
        cells = []
        for name in ("forward", "gradient"):
            ratio, mine, dense = (row[name + x] for x in ("", "_bytes_ours", "_bytes_dense"))
            cells += [f"{ratio:.3f}", f"{ratio / row['kept']:.2f}"]
            cells += [f"{mine / 1e6:.0f} ({dense / 1e6:.0f})"]
        lines.append(f"| {label} | {row['kept']:.3f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(results: Results, out: pathlib.Path) -> None:
    """For each table cycles per pair on the first chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chip, tables = next(iter(results["tpu"].items()))
    for i, title in enumerate(CASES):
        rows = tables.get(title, {})
        labels = [x for x, *_ in CASES[title] if "pairs" in rows.get(x, {})]
        if not labels:
            continue
        forward = [rows[x]["forward_dma"] / rows[x]["pairs"] for x in labels]
        both = [rows[x]["both_dma"] / rows[x]["pairs"] for x in labels]
        backward = [b - f for b, f in zip(both, forward)]
        y = np.arange(len(labels))
        figure, ax = plt.subplots(figsize=(9, 0.6 * len(labels) + 1.8), layout="constrained")
        for shift, values, name, ideal in (
            (-0.2, forward, "forward", IDEAL[chip]),
            (0.2, backward, "backward", 2.5 * IDEAL[chip]),
        ):
            bars = ax.barh(y + shift, values, 0.4, label=f"{name} (ideal {ideal:.0f})")
            ax.bar_label(bars, [f"{x:,.0f}" for x in values], padding=2, fontsize=7)
        ax.set_yticks(y, [x.removesuffix(" *") for x in labels])
        ax.invert_yaxis()
        ax.margins(x=0.1)
        note = ""
        if max(both) > 20 * min(forward):
            ax.set_xscale("log")
            ax.set_xlim(10, 2 * max(both))
            ax.xaxis.set_major_formatter("{x:,.0f}")
            note = ", logarithmic"
        ax.set_xlabel(f"cycles per visible 128 x 128 pair (static schedule with DMA{note})")
        ax.set_title(f"{title}, {chip}")
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
        figure.savefig(out / f"block_sparse_attention_{i}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="What block-sparse attention costs")
    parser.add_argument("--tpu", action="store_true", help="schedule figures (needs libtpu)")
    parser.add_argument("--cpu", action="store_true", help="wall-clock on this machine")
    parser.add_argument("--only", default="", help="cases whose 'table: label' contains this")
    parser.add_argument("--missing", action="store_true", help="TPU cases without a figure only")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/kernels"))
    args = parser.parse_args()
    file = args.out / "block_sparse_attention.json"
    results: Results = json.loads(file.read_text()) if file.exists() else {}
    save = lambda: file.write_text(json.dumps(results, indent=1) + "\n")
    if args.tpu:
        measure_tpu(results, args.topologies, args.only, args.missing, save)
    if args.cpu:
        measure_cpu(results, args.only, save)
    (args.out / "block_sparse_attention_tables.md").write_text(page(results))
    if "tpu" in results:
        plot(results, args.out)


if __name__ == "__main__":
    main()
