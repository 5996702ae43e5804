"""Measures tile sizes of the GPU kernels on this machine's device, and keeps the best.

    python -m pallas_kernels.tune [--only "product 16 bits"] [--again]

For each kernel and class of arguments (`product 16 bits, 128`: blocks of 128 columns in bfloat16) it times
the sizes of the table and their neighbours, in turn, leaves out what does not compile or gives other
numbers, and writes the fastest to `~/.cache/pallas_kernels/tuned.json` (`PALLAS_KERNELS_CACHE` names
another file), by the kind of device. From then on the kernels read it. Some minutes for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import BlockMask, BlockSparse, Grid, NMSparse, _gpu
from pallas_kernels._gpu import Config
from pallas_kernels.block_sparse_attention import gpu as attention
from pallas_kernels.block_sparse_attention import gpu_decode
from pallas_kernels.block_sparse_attention.inputs import Inputs
from pallas_kernels.block_sparse_matmul import gpu as matmul
from pallas_kernels.nm_matmul import gpu as nm_matmul

Problem = tuple[Callable[..., Any], tuple[Any, ...]]
SIZE = 4096  # rows, columns, positions
_ROUNDS = 5


def _numbers(size: str) -> tuple[Any, str | None, int]:
    """Dtype, precision and the number of a class such as `exact, 64`."""
    kind, number = size.split(", ")
    dtype = jnp.bfloat16 if kind == "16 bits" else jnp.float32
    return dtype, "highest" if kind == "exact" else None, int(number)


def _product(gradient: bool, size: str, length: int) -> Problem:
    dtype, precision, block = _numbers(size)
    key = jax.random.key(0)
    w = BlockSparse.random(key, (length, length), (block, block), density=0.25, dtype=dtype)
    x = jax.random.normal(key, (length, length), dtype)
    if gradient:
        run = lambda x, w: matmul.weight_gradient(x, x, w, precision=precision)
    else:
        run = lambda x, w: matmul.matmul(x, w, precision=precision)
    return run, (x, w)


def _attention(backward: bool, size: str, length: int) -> Problem:
    dtype, _, dim = _numbers(size)
    q, k, v = (
        jax.random.normal(key, (1, 8, length, dim), dtype)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    keep = np.random.default_rng(0).random((8, length // 128, length // 128)) < 0.25
    inputs = Inputs(q, k, v, BlockMask.from_dense(keep, (128, 128)), None, dim**-0.5, None)
    if not backward:
        return attention.forward, (inputs,)
    lse = delta = jnp.ones(q.shape[:3], jnp.float32)
    return attention.backward, (inputs, lse, delta, q)


def _decode(size: str, length: int) -> Problem:
    dtype, _, dim = _numbers(size)
    cache = jax.random.normal(jax.random.key(0), (8, 8, length, dim), dtype)
    keep = np.random.default_rng(0).random((8, 8, 1, length // 64)) < 0.25
    mask = BlockMask.from_dense(keep, Grid(1, length, block_q=1, block_kv=64))
    run = lambda *args: gpu_decode.decode(*args, scale=dim**-0.5)
    return run, (cache[:, :, 0].repeat(4, 1), cache, cache, mask, jnp.full((8,), length))


def _nm(size: str, length: int) -> Problem:
    dtype, _, rows = _numbers(size)
    dense = jax.random.normal(jax.random.key(0), (length, length), dtype)
    return nm_matmul.matmul, (dense[:rows], NMSparse.from_dense(dense, 2, 4))


KERNELS: dict[str, tuple[_gpu.Table, Callable[[str, int], Problem]]] = {
    "product": (matmul.PRODUCT, lambda size, n: _product(False, size, n)),
    "gradient": (matmul.GRADIENT, lambda size, n: _product(True, size, n)),
    "attention": (attention.FORWARD, lambda size, n: _attention(False, size, n)),
    "attention_dkv": (attention.DKV, lambda size, n: _attention(True, size, n)),
    "attention_dq": (attention.DQ, lambda size, n: _attention(True, size, n)),
    "attention_decode": (gpu_decode.DECODE, _decode),
    "nm_matmul": (nm_matmul.DECODE, _nm),
}
"""By name: the table of sizes, and a problem for a class of it and a length."""


def candidates(best: Config) -> Iterator[Config]:
    """The sizes themselves, then their neighbours.

    >>> list(candidates(Config(16, 32, 4, 2)))[:2]
    [Config(tile=16, depth=32, warps=4, stages=2), Config(tile=16, depth=32, warps=4, stages=3)]
    """
    yield best
    near = lambda n: [m for m in (n, n // 2, 2 * n) if 16 <= m <= 256]
    for tile, depth, warps, stages in itertools.product(
        near(best.tile), near(best.depth), (4, 8), (2, 3, 4)
    ):
        one = Config(tile, depth, warps, stages)
        changed = sum(a != b for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(best)))
        if 0 < changed <= 2:
            yield one


def seconds(run: Callable[[], Any]) -> float:
    """The median of a few runs, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        jax.block_until_ready([run() for _ in range(4)])
        times.append(time.perf_counter() - begun)
    return statistics.median(times) / 4


def tune(
    kernel: str,
    size: str,
    *,
    length: int = SIZE,
    sizes: Sequence[Config] | None = None,
    measure: Callable[[Callable[[], Any]], float] = seconds,
) -> tuple[Config, dict[Config, float | str]]:
    """The fastest sizes of a kernel for a class of its arguments.

    Args:
      kernel, size: a key of `KERNELS`, and of its table.
      length: of the problem.
      sizes: what to try, the first of which is trusted; by default the table's and its neighbours.
      measure: returns seconds.

    Returns:
      The best, and for all that were tried the seconds, or why they were left out.

    Raises:
      ValueError: for an unknown kernel or class.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is unknown; choose one of {sorted(KERNELS)}")
    table, problem = KERNELS[kernel]
    known = table[_gpu.chip().name]
    if size not in known:
        raise ValueError(f"size={size!r} is no class of {kernel}; choose one of {sorted(known)}")
    function, arguments = problem(size, length)
    found: dict[Config, float | str] = {}
    expected: list[Array] = []
    for one in sizes if sizes is not None else candidates(known[size]):
        with _gpu.forced(kernel, size, one):
            run = jax.jit(lambda *args: function(*args))  # traced anew for each
            try:
                got = jax.tree.leaves(run(*arguments))
            except Exception as error:  # too much shared memory, registers, an unlucky shape
                found[one] = f"{type(error).__name__}: {error}"[:200]
                continue
            expected = expected or got
            if not all(_near(a, b) for a, b in zip(got, expected)):
                found[one] = "other numbers than the table's sizes"
                continue
            found[one] = measure(lambda run=run: run(*arguments))
    timed = {one: t for one, t in found.items() if isinstance(t, float)}
    if not timed:
        raise ValueError(
            f"{kernel} {size}: nothing ran; the first reason: {next(iter(found.values()))}"
        )
    return min(timed, key=lambda one: timed[one]), found


def _near(a: Array, b: Array) -> bool:
    got, want = (np.asarray(x, np.float32) for x in (a, b))
    return bool(np.abs(got - want).max(initial=0) <= 2e-2 * max(1.0, np.abs(want).max(initial=0)))


def save(path: pathlib.Path, kind: str, name: str, best: Config) -> None:
    """Adds what was found to the file of tuned sizes."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found.setdefault(kind, {})[name] = dataclasses.asdict(best)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Tunes what is asked for on the first device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="part of the name of a kernel and its class")
    parser.add_argument("--again", action="store_true", help="also what is in the file already")
    args = parser.parse_args(argv)
    if (reason := _gpu.why_not(False)) is not None:
        raise SystemExit(f"nothing to tune here: {reason}")
    path, kind = _gpu.cache_path(), jax.devices()[0].device_kind
    done = json.loads(path.read_text()).get(kind, {}) if path.exists() else {}
    for kernel, (table, _) in KERNELS.items():
        for size in table[_gpu.chip().name]:
            name = f"{kernel} {size}"
            if args.only not in name or (name in done and not args.again):
                continue
            best, found = tune(kernel, size)
            first = next(iter(found.values()))
            gain = f"{first / found[best]:.2f} times as fast as" if isinstance(first, float) else ""  # pyright: ignore
            print(f"{name}: {best}, {gain} the table's; {len(found)} tried", flush=True)
            save(path, kind, name, best)


if __name__ == "__main__":
    main()
