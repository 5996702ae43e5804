"""One layer of 4096 x 4096 pruned from its Gram matrix, beside the published algorithms in PyTorch, on CPU.

    python -m experiments.benchmarks.post_training [--size=4096] [--only=wanda,sparsegpt] [--repeat=1]

Both sides in one process, in turns, with as many threads; medians. "Selection alone" is one pass of choosing half of
each output's weights, which is what Wanda costs at least. What PyTorch runs is written here from
the papers and the authors' code: the same steps, with PyTorch's own sort, top-k and factorizations. Without
PyTorch (`pip install torch`, which the project does not ask for) our side alone is timed. Compilation is not
counted: it is that of a shape, and is said apart.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import post_training as pt
from jaxsparse import selection

CYCLES, ALPS_STEPS = 40, 30


def layer(size: int) -> dict[str, np.ndarray]:
    """Weights [out, in], the Gram matrix of twice as many tokens, and their moments."""
    rng = np.random.default_rng(0)
    scale = np.exp(0.5 * rng.normal(size=size)).astype(np.float32)
    x = rng.normal(size=(2 * size, size)).astype(np.float32) * scale + 0.1
    w = rng.normal(size=(size, size)).astype(np.float32)
    return {"w": w, "h": x.T @ x, "mean": x.mean(0), "squares": np.mean(x**2, 0)}


def ours(data: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Our calls by name; each returns its arrays."""
    w, h = jnp.asarray(data["w"].T), jnp.asarray(data["h"])
    mean, squares = jnp.asarray(data["mean"]), jnp.asarray(data["squares"])
    pick = jax.jit(lambda x: selection.topk_mask(jnp.abs(x), x.shape[0] // 2, axis=0))
    return {
        "selection alone": lambda: pick(w),
        "Wanda": lambda: pt.wanda_core(w, jnp.diagonal(h), 0.5),
        "Wanda 2:4": lambda: pt.wanda_core(w, jnp.diagonal(h), structure="2:4"),
        "SparseGPT": lambda: pt.sparsegpt_core(w, h, 0.5),
        "SparseGPT 2:4": lambda: pt.sparsegpt_core(w, h, structure="2:4"),
        "DSnoT": lambda: pt.dsnot_core(w, mean, squares, 0.5, cycles=CYCLES, threshold=0.0),
        "ALPS": lambda: pt.alps_core(w, h, 0.5, steps=ALPS_STEPS),
    }


def theirs(data: dict[str, np.ndarray], threads: int) -> dict[str, Callable[[], Any]]:
    """The calls of PyTorch by the same names; none without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    w0, h0 = torch.from_numpy(data["w"]), torch.from_numpy(data["h"])
    mean, squares = torch.from_numpy(data["mean"]), torch.from_numpy(data["squares"])
    size = w0.shape[0]

    def wanda(n: int = 0, m: int = 0):
        w = w0.clone()
        score = w.abs() * torch.sqrt(torch.diag(h0))
        gone = torch.zeros_like(w, dtype=torch.bool)
        if m:
            for i in range(0, size, m):
                least = torch.topk(score[:, i : i + m], n, dim=1, largest=False)[1]
                gone.scatter_(1, i + least, True)
        else:
            order = torch.sort(score, dim=-1, stable=True)[1]
            gone.scatter_(1, order[:, : size // 2], True)
        w[gone] = 0
        return w

    def select():
        order = torch.sort(w0.abs(), dim=-1, stable=True)[1]
        return torch.ones_like(w0, dtype=torch.bool).scatter_(1, order[:, : size // 2], False)

    def sparsegpt(n: int = 0, m: int = 0, block: int = 128):
        w, h = w0.clone(), h0.clone()
        h.diagonal().add_(0.01 * torch.diag(h).mean())
        u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        for i1 in range(0, size, block):
            i2 = min(i1 + block, size)
            w1, u1 = w[:, i1:i2].clone(), u[i1:i2, i1:i2]
            q1, e1 = torch.zeros_like(w1), torch.zeros_like(w1)
            gone = torch.zeros_like(w1, dtype=torch.bool)
            if not m:
                score = w1**2 / torch.diag(u1) ** 2
                gone = score <= torch.sort(score.flatten())[0][int(score.numel() * 0.5)]
            for i in range(i2 - i1):
                if m and i % m == 0:
                    score = w1[:, i : i + m] ** 2 / torch.diag(u1)[i : i + m] ** 2
                    gone.scatter_(1, i + torch.topk(score, n, dim=1, largest=False)[1], True)
                q = w1[:, i].clone()
                q[gone[:, i]] = 0
                e = (w1[:, i] - q) / u1[i, i]
                w1[:, i:] -= e[:, None] * u1[i, i:]
                q1[:, i], e1[:, i] = q, e
            w[:, i1:i2] = q1
            w[:, i2:] -= e1 @ u[i1:i2, i2:]
        return w

    def dsnot():
        score = w0.abs() * torch.sqrt(squares)
        order = torch.sort(score, dim=1, stable=True)[1]
        mask = torch.ones_like(w0, dtype=torch.bool).scatter_(1, order[:, : size // 2], False)
        fresh = torch.ones_like(mask)
        c = w0 * mean
        growth = c / (squares - mean**2).clamp_min(1e-12)
        e = torch.where(mask, 0.0, c).sum(1)
        rows = torch.arange(size)
        for _ in range(CYCLES):
            sign = torch.sign(e)[:, None]
            up, grown = torch.where(~mask & fresh, growth * sign, -torch.inf).max(1)
            may_go = mask & fresh & (c * sign < 0)
            down, pruned = torch.where(may_go, score, torch.inf).min(1)
            after = e - c[rows, grown] + c[rows, pruned]
            go = (up > 0) & torch.isfinite(down) & (after.abs() < e.abs())
            r = rows[go]
            mask[r, grown[go]], mask[r, pruned[go]] = True, False
            fresh[r, grown[go]], fresh[r, pruned[go]] = False, False
            e = torch.where(go, after, e)
        return torch.where(mask, w0, 0.0)

    def alps():
        h = h0.clone()
        h.diagonal().add_(0.01 * torch.diag(h).mean())
        n = torch.sqrt(torch.diag(h))
        h, b0 = h / torch.outer(n, n), n[:, None] * w0.T
        g, k = h @ b0, b0.numel() // 2
        values, q = torch.linalg.eigh(h)

        def project(x):
            keep = torch.topk(x.abs().flatten(), k)[1]
            return (
                torch.zeros_like(x).flatten().scatter_(0, keep, x.flatten()[keep]).reshape(x.shape)
            )

        d, v, rho, before = project(b0), torch.zeros_like(b0), 0.1, None
        b = b0
        for i in range(ALPS_STEPS):
            b = q @ ((q.T @ (g - v + rho * d)) / (values + rho)[:, None])
            d = project(b + v / rho)
            v = v + rho * (b - d)
            if (i + 1) % 3 == 0:
                support = d != 0
                changed = size if before is None else int((support != before).sum())
                before, rho = support, rho * (1.3 if changed / k > 0.1 else 1.2)
        b = project(b)
        mask = b != 0
        r = torch.where(mask, g - h @ b, 0.0)
        p, rz = r, (r * r).sum(0)
        for _ in range(10):
            hp = torch.where(mask, h @ p, 0.0)
            a = rz / (p * hp).sum(0).clamp_min(1e-30)
            b, r = b + a * p, r - a * hp
            new = (r * r).sum(0)
            p, rz = r + new / rz.clamp_min(1e-30) * p, new
        return b / n[:, None]

    return {
        "selection alone": select, "Wanda": wanda, "Wanda 2:4": lambda: wanda(2, 4), "SparseGPT": sparsegpt,
        "SparseGPT 2:4": lambda: sparsegpt(2, 4), "DSnoT": dsnot, "ALPS": alps,
    }  # fmt: skip


def seconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--only", default="", help="names with commas between")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args(arguments)
    threads = len(os.sched_getaffinity(0))
    data = layer(options.size)
    mine, peers = ours(data), theirs(data, threads)
    only = [x for x in options.only.split(",") if x]
    print(f"{options.size} x {options.size}, {threads} threads, seconds\n")
    print(
        "| method | jaxsparse | PyTorch | ratio | compiling |\n| :--- | ---: | ---: | ---: | ---: |"
    )
    for name, function in mine.items():
        if only and name not in only:
            continue
        first = seconds(function)
        runs = [
            (seconds(function), seconds(peers[name]) if name in peers else float("nan"))
            for _ in range(options.repeat)
        ]
        a, b = (statistics.median(x) for x in zip(*runs))
        print(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.2f} | {max(first - a, 0):.1f} |", flush=True)


if __name__ == "__main__":
    main()
