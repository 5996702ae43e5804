"""What the GPU kernels cost next to dense, to cuDNN and to torch, on this machine's GPU.

    python -m experiments.benchmarks.gpu --out docs/kernels [--only matmul]
    python -m experiments.benchmarks.gpu --expected h100
    python -m experiments.benchmarks.gpu --static h100

Block-sparse products and attention, forward and with their gradients, over density; decoding. The peers
take turns in one process: dense products of XLA (cuBLAS), `jax.nn.dot_product_attention` of cuDNN
(causal), and where torch is installed its block-sparse product and flex attention. Figures go to `gpu.json`
after each case, from which the table (`gpu_tables.md`) and the plot with the roofline are made. `--tiny`
tries every case in a small size on whatever device there is. `--expected` needs no GPU: it prints the time
that bytes and operations take at least on a chip, which is what figures are to be compared with. Nor does
`--static`: it compiles the kernels and prints registers, shared memory and instructions.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import machine, medians
from pallas_kernels import (
    BlockMask,
    BlockSparse,
    Grid,
    NMSparse,
    block_sparse_attention,
    block_sparse_decode,
    block_sparse_matmul,
    nm_matmul,
)

DENSITIES = (0.05, 0.1, 0.25, 0.5)
_CALLS = 8  # in a row for one reading: what it takes to launch them overlaps


class Chip(NamedTuple):
    """Data sheet: operations of bfloat16 per second without sparsity, bytes per second."""

    flops: float
    bandwidth: float


CHIPS = {"h100": Chip(989e12, 3.35e12), "a100": Chip(312e12, 2.04e12), "l4": Chip(121e12, 3.0e11)}


class Case(NamedTuple):
    """What is measured: `ours` is what the peers are compared with.

    Attributes:
      kernel, what, density: its name.
      flops, bytes: at least, of ours.
      candidates: makes what is timed, by name.
    """

    kernel: str
    what: str
    density: float
    flops: float
    bytes: float
    candidates: Callable[[], dict[str, Callable[[], Any]]]

    def __str__(self) -> str:
        return f"{self.kernel}, {self.what}, {self.density}"

    def seconds(self, chip: Chip) -> float:
        """The least that the chip needs."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


def _run(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    jitted = jax.jit(function)
    return lambda: [jitted(*args) for _ in range(_CALLS)]


def _keep(grid: tuple[int, ...], density: float) -> np.ndarray:
    """So many of each row, at random places: at least one."""
    ranks = np.random.default_rng(0).random(grid).argsort(-1).argsort(-1)
    return ranks < max(1, round(density * grid[-1]))


# ---- products -----------------------------------------------------------------------------------


def _matmul(rows: int, size: int, block: int, density: float, gradients: bool):
    key = jax.random.key(0)
    keep = _keep((size // block, size // block), density)
    dense = jax.random.normal(key, (size, size), jnp.bfloat16) * size**-0.5
    w = BlockSparse.from_block_mask(dense, keep, (block, block))
    x = jax.random.normal(key, (rows, size), jnp.bfloat16)

    def ours(x, values, dy):
        y, pull = jax.vjp(lambda x, v: block_sparse_matmul(x, w.with_values(v)), x, values)
        return pull(dy) if gradients else y

    def theirs(x, dense, dy):
        y, pull = jax.vjp(jnp.matmul, x, dense)
        return pull(dy) if gradients else y

    found = {"ours": _run(ours, x, w.values, x), "dense": _run(theirs, x, dense, x)}
    if not gradients and importlib.util.find_spec("torch"):
        found["torch, block sparse"] = _torch_matmul(np.asarray(dense, np.float32), x, block, keep)
    return found


def _torch(x: Any) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.from_numpy(np.array(x, np.float32)).to(device, kind)


def _torch_calls(function: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    def run() -> None:
        for _ in range(_CALLS):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _torch_matmul(dense: np.ndarray, x: jax.Array, block: int, keep: np.ndarray):
    masked = _torch(dense * np.kron(keep, np.ones((block, block))))
    w, right = masked.T.contiguous().to_sparse_bsr((block, block)), _torch(x).T.contiguous()
    return _torch_calls(lambda: w @ right)


def _matmul_cases(size: int) -> Iterator[Case]:
    for block in (64, 128) if size >= 1024 else (16,):
        for density in DENSITIES:
            stored = density * size * size
            for what, products, moved in (
                ("forward", 1, 2 * size * size + stored),
                ("gradients", 2, 3 * size * size + 2 * stored),
            ):
                yield Case(
                    f"matmul, blocks of {block}",
                    what,
                    density,
                    2.0 * products * size * stored,
                    2.0 * moved,
                    functools.partial(_matmul, size, size, block, density, what == "gradients"),
                )


# ---- attention ----------------------------------------------------------------------------------


def _attention(length: int, dim: int, heads: int, block: int, density: float, gradients: bool):
    q, k, v, dout = (
        jax.random.normal(key, (1, heads, length, dim), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    )
    keep = _keep((heads, length // block, length // block), density)
    mask = BlockMask.from_dense(keep, Grid(length, block_q=block, block_kv=block))

    def with_gradients(attend, q, k, v, dout):
        y, pull = jax.vjp(attend, q, k, v)
        return (y, pull(dout)) if gradients else y

    kept = lambda q, k, v: block_sparse_attention(q, k, v, mask)
    ours = functools.partial(with_gradients, kept)
    found = {"ours": _run(ours, q, k, v, dout)}
    on_gpu = jax.default_backend() == "gpu"
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn" if on_gpu else "xla"
    )
    turned = [jnp.swapaxes(x, 1, 2) for x in (q, k, v, dout)]
    found["cuDNN, causal" if on_gpu else "XLA, causal"] = _run(
        functools.partial(with_gradients, attend), *turned
    )
    if not gradients and importlib.util.find_spec("torch"):
        found["torch, flex attention"] = _torch_attention(q, k, v, keep, block)
    return found


def _torch_attention(q: jax.Array, k: jax.Array, v: jax.Array, keep: np.ndarray, block: int):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tensors = [_torch(x) for x in (q, k, v)]
    device = tensors[0].device
    kept = torch.from_numpy(keep).to(device)
    mask = create_block_mask(
        lambda b, h, i, j: kept[h, i // block, j // block],
        1,
        q.shape[1],
        q.shape[2],
        k.shape[2],
        device=device,
        BLOCK_SIZE=block,
    )
    run: Any = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    return _torch_calls(lambda: run(*tensors, block_mask=mask))


def _attention_cases(length: int, dim: int, heads: int, block: int) -> Iterator[Case]:
    for density in DENSITIES:
        pairs = heads * density * length * length
        for what, products, arrays in (("forward", 2, 4), ("with gradients", 2 + 7, 4 + 10)):
            yield Case(
                f"attention, {length} tokens, d = {dim}",
                what,
                density,
                2.0 * products * pairs * dim,
                2.0 * arrays * heads * length * dim,
                functools.partial(
                    _attention, length, dim, heads, block, density, what != "forward"
                ),
            )


# ---- decoding -----------------------------------------------------------------------------------


def _decode(batch: int, length: int, dim: int, density: float):
    cache = jax.random.normal(jax.random.key(0), (batch, 8, length, dim), jnp.bfloat16)
    keep = _keep((batch, 8, 1, length // 64), density)
    mask = BlockMask.from_dense(keep, (1, 64), capacity=max(1, int(keep[0, 0].sum())))
    q, lengths = jnp.repeat(cache[:, :, 0], 4, 1), jnp.full((batch,), length)
    whole = lambda q, k, v: jax.nn.dot_product_attention(
        q[:, None], jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    )
    return {
        "ours": _run(lambda q, k, v: block_sparse_decode(q, k, v, mask, lengths), q, cache, cache),
        "dense": _run(whole, q, cache, cache),
    }


def _nm(rows: int, size: int, n: int):
    dense = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    w, x = NMSparse.from_dense(dense, n, 4), dense[:rows]
    return {"ours": _run(nm_matmul, x, w), "dense": _run(jnp.matmul, x, dense)}


def _decode_cases(batch: int, length: int, size: int) -> Iterator[Case]:
    for density in DENSITIES:
        moved = 2.0 * 2 * batch * 8 * density * length * 128
        make = functools.partial(_decode, batch, length, 128, density)
        yield Case("decode, 32 heads, 8 of keys", f"{batch} x {length}", density, 0, moved, make)
    for n in (1, 2):
        moved = size * size * (2 * n / 4 + n / 4 / 4)
        make = functools.partial(_nm, 1, size, n)
        yield Case(f"N:M decoding, {n}:4", f"1 x {size} x {size}", n / 4, 0, moved, make)


def cases(tiny: bool = False) -> list[Case]:
    """Every case, in full size or tiny."""
    if tiny:
        return [*_matmul_cases(128), *_attention_cases(128, 32, 2, 32), *_decode_cases(1, 256, 256)]
    return [
        *_matmul_cases(8192),
        *_attention_cases(8192, 128, 16, 128),
        *_decode_cases(8, 32_768, 8192),
    ]


# ---- compiled for a GPU that is not here --------------------------------------------------------


def _static_cases() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """What it is, a function, and what it is called with."""
    shape = jax.ShapeDtypeStruct
    for kind, dtype, precision in (
        ("bfloat16", "bfloat16", None),
        ("tf32", "float32", None),
        ("float32", "float32", "highest"),
    ):
        for block in (128, 64) if kind == "bfloat16" else (128,):
            blocks = (8192 // block) ** 2 // 4

            def products(x, values, places, block=block, precision=precision):
                w = BlockSparse(values, places, (8192, 8192), (block, block))
                multiply = lambda x, v: block_sparse_matmul(
                    x, w.with_values(v), precision=precision
                )
                y, pull = jax.vjp(multiply, x, values)
                return y, pull(x)

            args = shape((8192, 8192), dtype), shape((blocks, block, block), dtype)
            yield f"{kind}, blocks of {block}", products, (*args, shape((3, blocks), "int32"))
    for dim in (64, 128, 256):
        grid = Grid(8192, block_q=128, block_kv=128)
        make = lambda s, grid=grid: BlockMask.from_scores(s, 16, grid) & BlockMask.causal(grid)
        mask = jax.eval_shape(make, shape((8, grid.q_blocks, grid.kv_blocks), "float32"))

        def attend(q, k, v, mask):
            out, pull = jax.vjp(lambda q, k, v: block_sparse_attention(q, k, v, mask), q, k, v)
            return out, pull(q)

        q, k = (shape((1, heads, 8192, dim), "bfloat16") for heads in (8, 2))
        yield f"bfloat16, d = {dim}, causal", attend, (q, k, k, mask)
    grid = Grid(1, 32_768, block_q=1, block_kv=64)
    make = lambda s: BlockMask.from_scores(s, 128, grid)
    mask = jax.eval_shape(make, shape((8, 8, 1, grid.kv_blocks), "float32"))
    cache = shape((8, 8, 32_768, 128), "bfloat16")
    args = shape((8, 32, 128), "bfloat16"), cache, cache, mask, shape((8,), "int32")
    yield "bfloat16, d = 128", block_sparse_decode, args
    run = lambda x, values, codes: nm_matmul(x, NMSparse(values, codes, (4096, 4096), 2, 4, 1))
    values, codes = shape((2, 1024, 4096), "bfloat16"), shape((2, 64, 4096), "int32")
    yield "bfloat16, 2:4, 1 row", run, (shape((1, 4096), "bfloat16"), values, codes)


def static(target: str) -> str:
    """Markdown: registers, spills, shared memory and instructions of the kernels, compiled for a target."""
    from tools import gpu_static

    out = [
        "| kernel | for | threads | registers | spills, bytes | shared, bytes | programs | in the text |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    shared = dict(h100=233_472, a100=167_936)[target]
    for name, function, args in _static_cases():
        report = gpu_static.analyze(function, args, target)
        for kernel in report["kernels"]:
            if not kernel["name"].startswith(("block_sparse", "nm_matmul")):
                continue
            launch = next(x for x in report["launches"] if x["name"] == kernel["name"])
            registers = -(-kernel["registers"] // 8) * 8 * launch["threads"]
            fit = min(65_536 // registers, shared // (launch["shared"] + 1024))
            found = ", ".join(f"{n} {k}" for k, n in kernel["instructions"].items())
            out.append(
                f"| `{kernel['name']}` | {name} | {launch['threads']} | {kernel['registers']} "
                f"| {kernel['spill_bytes']} | {launch['shared']:,} | {fit} | {found} |"
            )
    return "\n".join(out) + "\n"


# ---- figures ------------------------------------------------------------------------------------


def chip_of(kind: str) -> Chip | None:
    """The data sheet of a device by its kind."""
    return next((chip for name, chip in CHIPS.items() if name.upper() in kind.upper()), None)


def tables(results: dict[str, Any]) -> str:
    """Markdown: seconds of ours, of the roofline, and ratios to the peers."""
    known = {str(case): case for case in cases()}
    out = [
        f"Measured on: {results['machine']}. Times in milliseconds; a ratio below 1 is faster than "
        "the peer.\n",
        "| kernel | pass | density | ours | least by the data sheet | ours / peer |",
        "|---|---|--:|--:|--:|---|",
    ]
    chip = chip_of(results["machine"])
    for name, times in results["seconds"].items():
        ours = times["ours"]
        peers = ", ".join(f"{ours / t:.2f} ({p})" for p, t in times.items() if p != "ours")
        case = known.get(name)
        least = f"{1e3 * case.seconds(chip):.3f}" if case and chip else ""
        kernel, what, density = name.rsplit(", ", 2)
        out.append(f"| {kernel} | {what} | {density} | {1e3 * ours:.3f} | {least} | {peers} |")
    return "\n".join(out) + "\n"


def expected(chip: Chip) -> str:
    """Markdown: what bytes and operations of each case take at least."""
    out = [
        "| kernel | pass | density | TFLOP | MB | least, ms | bound by |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for case in cases():
        bound = "operations" if case.flops / chip.flops > case.bytes / chip.bandwidth else "bytes"
        out.append(
            f"| {case.kernel} | {case.what} | {case.density} | {case.flops / 1e12:.3f} "
            f"| {case.bytes / 1e6:.0f} | {1e3 * case.seconds(chip):.3f} | {bound} |"
        )
    return "\n".join(out) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Speed-up over the first peer against density, with the roofline of the chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chip, series = chip_of(results["machine"]), {}
    known = {str(case): case for case in cases()}
    for name, times in results["seconds"].items():
        kernel, what, density = name.rsplit(", ", 2)
        peer = next(t for p, t in times.items() if p != "ours")
        at = series.setdefault(f"{kernel}, {what}", ([], [], []))
        least = known[name].seconds(chip) if chip and name in known else float("nan")
        for values, one in zip(at, (float(density), peer / times["ours"], peer / least)):
            values.append(one)
    figure, axes = plt.subplots(figsize=(8, 5))
    for label, (density, speed, roof) in series.items():
        (line,) = axes.plot(density, speed, marker="o", markersize=3, label=label)
        axes.plot(density, roof, ":", color=line.get_color())
    axes.plot([], [], "k:", label="roofline of the data sheet")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="density", ylabel="speed-up over the first peer", xscale="log", yscale="log")
    axes.legend(fontsize=6)
    axes.set_title(results["machine"], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/kernels"), help="a directory")
    parser.add_argument("--only", default="", help="part of the name of a case")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument(
        "--expected", choices=sorted(CHIPS), help="print what a chip needs at least"
    )
    parser.add_argument("--static", choices=("a100", "h100"), help="print what the compiler makes")
    args = parser.parse_args(argv)
    if args.static:
        print(static(args.static))
        return
    if args.expected:
        print(expected(CHIPS[args.expected]))
        return
    if jax.default_backend() != "gpu" and not args.tiny:
        raise SystemExit(f"this measures a GPU, and JAX runs on {jax.default_backend()}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"seconds": {}}
    results["machine"] = machine()
    for case in cases(args.tiny):
        if args.only not in str(case) or str(case) in results["seconds"]:
            continue
        times = medians(case.candidates(), rounds=3 if args.tiny else 9)
        results["seconds"][str(case)] = {name: t / _CALLS for name, t in times.items()}
        print(case, results["seconds"][str(case)], flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "gpu_tables.md").write_text(tables(results))
    plot(results, args.out / "gpu.png")


if __name__ == "__main__":
    main()
