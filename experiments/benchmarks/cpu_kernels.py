"""Products with stored weights on CPU, next to the dense product of XLA, in one process.

    python -m experiments.benchmarks.cpu_kernels [--side=4096] [--rows=32,256] [--rounds=7]
        [--clock=cpu]

Prints Markdown tables of ratios of time (lower is better): the forward product, the gradients with
respect to the input and to the stored values, and the three together, which is what a training step of a
layer costs. Unstructured weights are stored as `Condensed` (constant fan-in), blocks as `BlockSparse`.
`--clock=cpu` counts the seconds of all cores, which other programs disturb less than the wall clock.
SciPy's CSR and, where it is installed, PyTorch's stand beside the forward product.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from experiments.benchmarks.timing import machine, medians
from pallas_kernels import BlockSparse, Condensed, block_sparse_matmul, condensed_matmul

PRODUCTS = ("forward", "of the input", "of the values")


def constant_fan_in(side: int, density: float) -> Condensed:
    """A matrix `[side, side]` of which every column stores as many values at random places."""
    rng, fan_in = np.random.default_rng(0), max(1, round(density * side))
    rows = np.sort(np.argsort(rng.random((side, side)), 1)[:, :fan_in], 1).astype(np.int32)
    values = jnp.asarray(rng.normal(size=rows.shape), jnp.float32)
    return Condensed(values, jnp.asarray(rows), jnp.arange(side, dtype=jnp.int32), (side, side))


Calls = dict[str, Callable[[], object]]


def three_products(multiply, x, dy, w) -> Calls:
    """Calls of the three compiled products of `y = multiply(x, w)`."""
    forward = jax.jit(multiply)
    of_x = jax.jit(lambda x, w, dy: jax.vjp(lambda x: multiply(x, w), x)[1](dy))

    def of_values(x, w, dy):
        values = w.values if hasattr(w, "values") else w
        replace = w.with_values if hasattr(w, "values") else lambda v: v
        return jax.vjp(lambda v: multiply(x, replace(v)), values)[1](dy)

    of_values = jax.jit(of_values)
    calls = lambda: forward(x, w), lambda: of_x(x, w, dy), lambda: of_values(x, w, dy)
    return dict(zip(PRODUCTS, calls))


def peers(x: jax.Array, w: Condensed) -> Calls:
    """The forward product by other libraries' compressed rows."""
    dense = np.asarray(w.to_dense())
    scipy_w, xt = scipy.sparse.csr_matrix(dense.T), np.ascontiguousarray(np.asarray(x).T)
    found: Calls = {"SciPy CSR": lambda: scipy_w @ xt}
    if importlib.util.find_spec("torch") is not None:
        import torch  # pyright: ignore[reportMissingImports]

        torch_w = torch.from_numpy(dense.T.copy()).to_sparse_csr()
        torch_x = torch.from_numpy(xt)
        found["PyTorch CSR"] = lambda: torch_w @ torch_x
    return found


def compare(multiply, x, dy, w, dense_times, dense, options, others=()) -> list[float]:
    """Ratios to dense, interleaved with it: the three products, all of them, then the others."""
    calls = three_products(multiply, x, dy, w)
    runs = {f"dense {name}": call for name, call in dense.items()} | calls | dict(others)
    times = medians(runs, seconds=60, **options)
    base = {name: times[f"dense {name}"] for name in PRODUCTS}
    ratios = [times[name] / base[name] for name in PRODUCTS]
    step = sum(times[name] for name in PRODUCTS) / sum(base.values())
    dense_times.append(sum(base.values()))
    return [*ratios, step, *(times[name] / base["forward"] for name in dict(others))]


def table(side: int, rows: int, options: dict) -> None:
    rng = np.random.default_rng(1)
    x, dy, w = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(rows, side)] * 2 + [(side, side)]
    )
    dense = three_products(lambda x, w: x @ w, x, dy, w)
    names = list(peers(x[:1], constant_fan_in(side, 1 / side)))
    heads = ["stored", "sparsity", *PRODUCTS, "step", *(f"{n}, forward" for n in names)]
    print(f"### {side} x {side}, {rows} rows\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    dense_times: list[float] = []

    def row(kind, sparsity, ratios):
        cells = [f"{r:.2f}" for r in ratios] + ["-"] * (4 + len(names) - len(ratios))
        cells[3] = f"**{cells[3]}**"
        print(f"| {kind} | {sparsity:.0%} | {' | '.join(cells)} |", flush=True)

    for sparsity in (0.9, 0.95, 0.99):
        stored = constant_fan_in(side, 1 - sparsity)
        ratios = compare(
            condensed_matmul, x, dy, stored, dense_times, dense, options, peers(x, stored)
        )
        row("unstructured", sparsity, ratios)
    for block in (16, 32, 64):
        for sparsity in (0.75, 0.9):
            stored = BlockSparse.random(
                jax.random.key(0), (side, side), (block, block), density=1 - sparsity
            )
            ratios = compare(block_sparse_matmul, x, dy, stored, dense_times, dense, options)
            row(f"blocks of {block}", sparsity, ratios)
    print(f"\nDense: {1e3 * float(np.median(dense_times)):.0f} ms for the three products.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--rows", default="32,256", help="rows of the batch, by commas")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each candidate")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is counted")
    args = parser.parse_args()
    clock = dict(wall=time.perf_counter, cpu=time.process_time)[args.clock]
    print(f"On {machine()}; {args.clock} clock.\n")
    for rows in map(int, args.rows.split(",")):
        table(args.side, rows, dict(rounds=args.rounds, clock=clock))


if __name__ == "__main__":
    main()
