"""Block-sparse attention next to dense XLA, `jax.nn.dot_product_attention`, splash attention and
JAX's flash attention.

    python -m experiments.benchmarks.block_sparse_attention --out docs/kernels

TPU: the real compiler's static schedule (libtpu needs no TPU; see `tpu_static`), so cycles, not
times. CPU: ratios of medians of interleaved runs in one process. Writes one Markdown file with the
tables and, beside it, the plots.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockMask, block_sparse_attention
from pallas_kernels.block_sparse_attention import tpu

MODULE = "experiments.benchmarks.block_sparse_attention"
HEADS, DIM = 8, 128
PAIR = 128 * 128


def make_mask(kind: str, length: int, blocks: tuple[int, int], per_row: int = 16) -> BlockMask:
    """`random` keeps `per_row` blocks of 128 keys per row on average, differently per head."""
    sizes = dict(block_q=blocks[0], block_kv=blocks[1])
    if kind == "causal":
        return BlockMask.causal(length, **sizes)
    if kind == "local":
        return BlockMask.local(length, window=1024, **sizes)
    rows, cols = length // blocks[0], length // blocks[1]
    keep = np.random.default_rng(0).random((HEADS, rows, cols)) < per_row * 128 / length
    return BlockMask.from_dense(keep, **sizes, capacity=int(keep.sum((1, 2)).max()))


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


def _visible(kind: str, length: int) -> float:
    """Visible pairs of all heads, in units of 128 x 128."""
    i = np.arange(length)
    shown = np.minimum(i + 1, 1024 if kind == "local" else length)
    return HEADS * float(shown.sum()) / PAIR


def ours(
    kind: str = "random",
    length: int = 8192,
    blocks: tuple[int, int] = (128, 128),
    backward: bool = False,
    per_row: int = 16,
):
    mask = make_mask(kind, length, (blocks[0], blocks[1]), per_row)
    shape = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16)
    if kind == "random":
        pairs = float(np.asarray(mask.counts).sum()) * blocks[0] * blocks[1] / PAIR
    else:
        pairs = _visible(kind, length)
    # The kernels' entry points: tpu_static follows concrete lists to them, but not through the
    # custom derivative around them.
    if not backward:
        run = lambda q, k, v, mask: tpu.forward(q, k, v, mask, None, DIM**-0.5, None)
        return _finish(run, [shape] * 3, False, pairs, mask)
    rows = jax.ShapeDtypeStruct((1, HEADS, length), jnp.float32)

    def both(q, k, v, mask, delta, dout):
        out, lse = tpu.forward(q, k, v, mask, None, DIM**-0.5, None)
        return out, *tpu.backward(q, k, v, mask, None, DIM**-0.5, None, lse, delta, dout)

    return both, (shape, shape, shape, mask, rows, shape), _finish(both, [shape], True, pairs)[2]


def splash(
    kind: str = "causal",
    length: int = 8192,
    block: int = 1024,
    compute: int = 512,
    backward: bool = False,
    per_row: int = 16,
):
    """Splash attention; kind 'random' gives every head its own static mask of 128-blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if kind == "causal":
        heads, pairs = [masks.CausalMask((length, length))] * HEADS, _visible(kind, length)
    elif kind == "local":
        one = masks.LocalMask((length, length), (1023, 0), 0)
        heads, pairs = [one] * HEADS, _visible(kind, length)
    else:
        mask = make_mask(kind, length, (128, 128), per_row)
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
    return _finish(lambda q, k, v: run(q, k, v), [shape] * 3, backward, pairs)


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


def build_mask(length: int = 8192):
    """Making the lists from booleans under `jit`, the cost that a dynamic mask adds."""
    blocks = length // 128
    keep = jax.ShapeDtypeStruct((HEADS, blocks, blocks), jnp.bool_)
    return jax.jit(BlockMask.from_dense), (keep,)


def _dense(q, k, v, causal=True):
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
    weights = jax.nn.softmax(scores * DIM**-0.5, -1).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


CASES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "Per-head random lists, 8192 tokens": [
        ("blocks 128 x 128, 16 per row", "ours", dict(blocks=(128, 128))),
        ("blocks 128 x 128, 8 per row", "ours", dict(blocks=(128, 128), per_row=8)),
        ("blocks 128 x 128, 32 per row", "ours", dict(blocks=(128, 128), per_row=32)),
        ("blocks 256 x 128, 16 per row", "ours", dict(blocks=(256, 128))),
        ("splash, 128, same lists (static)", "splash", dict(kind="random", block=128, compute=128)),
    ],
    "Causal, 4096 tokens": [
        ("blocks 256 x 256", "ours", dict(kind="causal", length=4096, blocks=(256, 256))),
        ("blocks 512 x 512", "ours", dict(kind="causal", length=4096, blocks=(512, 512))),
        ("splash 1024/512", "splash", dict(length=4096)),
        ("flash 1024", "flash", dict(length=4096)),
        ("jax.nn.dot_product_attention", "jax_nn", dict(length=4096)),
        ("dense XLA", "dense_xla", dict(length=4096)),
    ],
    "Causal, 8192 tokens": [
        ("blocks 512 x 512", "ours", dict(kind="causal", blocks=(512, 512))),
        ("splash 1024/512", "splash", dict()),
        ("flash 1024", "flash", dict()),
    ],
    "Local window of 1024, 4096 tokens": [
        ("blocks 128 x 128", "ours", dict(kind="local", length=4096)),
        ("blocks 512 x 512", "ours", dict(kind="local", length=4096, blocks=(512, 512))),
        ("splash 512", "splash", dict(kind="local", length=4096, block=512)),
    ],
}


def tpu_table(title: str, topology: str, peers: bool) -> tuple[str, list[tuple[str, float, float]]]:
    """Markdown and (case, forward, forward and backward) in cycles per visible pair."""
    from experiments.benchmarks.tpu_static import analyze

    lines = [
        f"### {title}, {topology.split(':')[0]}",
        "",
        "| case | pairs | forward k cycles / with DMA | per pair | backward kernels k | per pair |"
        " backward / forward |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    figures = []
    for label, factory, options in CASES[title]:
        if factory != "ours" and not peers:
            continue
        total, pairs = [], 0.0
        for backward in (False, True):
            report = analyze(
                f"{MODULE}:{factory}",
                topology=topology,
                kwargs=options | dict(backward=backward),
                paths=[str(pathlib.Path(__file__).parents[2])],
                all_kernels=factory in ("dense_xla", "jax_nn"),
            )
            if not report["ok"]:
                total.append((float("nan"), float("nan")))
                lines.append(f"<!-- {label}: {report['error'].splitlines()[-1][:200]} -->")
                continue
            pairs = report["meta"]["pairs"]
            if factory in ("dense_xla", "jax_nn"):
                total.append((report["schedule_total_cycles"], report["schedule_total_cycles_dma"]))
            else:
                kernels = report["kernels"]
                total.append(tuple(sum(k[n] for k in kernels) for n in ("cycles", "cycles_dma")))
        (f, f_dma), (b, _) = total
        back = b - f
        lines.append(
            f"| {label} | {pairs:,.0f} | {f / 1e3:,.0f} / {f_dma / 1e3:,.0f} | {f / pairs:.1f} "
            f"| {back / 1e3:,.0f} | {back / pairs:.1f} | {back / f:.2f} |"
        )
        print(lines[-1], flush=True)
        figures.append((label, f / pairs, back / pairs))
    return "\n".join(lines) + "\n", figures


# -------------------------------------------------------------------- CPU


def cpu_table(length: int = 4096, heads: int = 4, rounds: int = 5) -> str:
    """Ratios to dense XLA, which computes every pair."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, heads, length, DIM)), jnp.float32) for _ in range(3))
    blocks = length // 128
    masks = [
        BlockMask.from_dense(rng.random((heads, blocks, blocks)) < p) for p in (0.1, 0.25, 0.5)
    ]
    sparse = functools.partial(block_sparse_attention, implementation="xla")

    def differentiate(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2)))

    def nn(q, k, v):
        return jax.nn.dot_product_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))

    dense = functools.partial(_dense, causal=False)
    lines = [
        f"### CPU, {length} tokens, {heads} heads of {DIM}, float32, blocks of 128",
        "",
        "| case | kept | forward / dense | over kept | gradient / dense | over kept | temporary MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    cases = [("dense XLA", dense, ()), ("jax.nn.dot_product_attention", nn, ())]
    cases += [("block-sparse", sparse, (m,)) for m in masks]
    seconds, memory = [], []
    for wrap in (jax.jit, differentiate):
        runs = [(wrap(f), (q, k, v, *extra)) for _, f, extra in cases]
        reports: list[Any] = [f.lower(*a).compile().memory_analysis() for f, a in runs]
        memory.append([r.temp_size_in_bytes for r in reports])
        for f, args in runs:
            jax.block_until_ready(f(*args))
        samples = [[] for _ in runs]
        for _ in range(rounds):
            for (f, args), sample in zip(runs, samples):
                start = time.perf_counter()
                jax.block_until_ready(f(*args))
                sample.append(time.perf_counter() - start)
        seconds.append([float(np.median(s)) for s in samples])
    for i, (label, _, extra) in enumerate(cases):
        kept = float(extra[0].density.mean()) if extra else 1.0
        f, g = (s[i] / s[0] for s in seconds)
        lines.append(
            f"| {label} | {kept:.3f} | {f:.3f} | {f / kept:.2f} | {g:.3f} | {g / kept:.2f} "
            f"| {max(m[i] for m in memory) / 1e6:.0f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def plot(figures: list[tuple[str, float, float]], path: pathlib.Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels, forward, backward = zip(*figures)
    y = np.arange(len(labels))
    fig, ax = plt.subplots(figsize=(8, 0.6 * len(labels) + 1.5))
    ax.barh(y - 0.2, forward, 0.4, label="forward (ideal 64)")
    ax.barh(y + 0.2, backward, 0.4, label="backward (ideal 160)")
    ax.set_yticks(y, labels)
    ax.invert_yaxis()
    ax.set_xlabel("cycles per visible 128 x 128 pair (static schedule)")
    ax.set_title(title)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/kernels"))
    # The peers are compiled for the first one only.
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--no-cpu", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [
        "<!-- Written by `python -m experiments.benchmarks.block_sparse_attention`. -->\n",
        f"jax {jax.__version__}. 8 heads of 128, bf16 on TPU. A pair is 128 queries by 128 keys that"
        " see each other: ideal 64 cycles forward and 160 backward on v5e. Cycles are the"
        " compiler's schedule; nothing ran on a TPU.\n",
    ]
    target = args.out / "block_sparse_attention_tables.md"
    for topology in args.topologies:
        for i, title in enumerate(CASES):
            table, figures = tpu_table(title, topology, peers=topology == args.topologies[0])
            parts.append(table)
            if topology == args.topologies[0]:
                name = f"block_sparse_attention_{i}.png"
                plot(figures, args.out / name, f"{title}, {topology.split(':')[0]}")
                parts.append(f"![{title}]({name})\n")
            target.write_text("\n".join(parts))
    if args.topologies:
        from experiments.benchmarks.tpu_static import analyze

        report = analyze(f"{MODULE}:build_mask", all_kernels=True)
        parts.append(
            "Building the lists from booleans under `jit`, 8192 tokens, 8 heads, 128 x 128 blocks: "
            f"{report['schedule_total_cycles'] / 1e3:,.0f} k cycles on v5e.\n"
        )
    if not args.no_cpu:
        parts.append(cpu_table())
    target.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
