"""What a mask costs, in units of one pass over the scores: `jnp.sum(jnp.abs(w))`.

    python -m experiments.benchmarks.selection [--size=25000000] [--rounds=7] [--slow]

Prints Markdown tables: exact top-k masks of this library next to the algorithms in use elsewhere,
the number of passes that the search takes on easy and on adversarial scores, and N:M masks.
`--slow` includes the sorts at the full size.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.jaxpruner import argsort_mask, argsort_nm_mask
from experiments.benchmarks.timing import machine, medians
from jaxsparse import selection, structures

ROUNDS = 7  # interleaved; medians are printed


# -- The algorithms in use elsewhere ---------------------------------------------------------------


def top_k_mask(x, k: int):
    """`lax.top_k` and a scatter."""
    _, kept = lax.top_k(x.ravel(), k)
    return jnp.zeros(x.size, bool).at[kept].set(True).reshape(x.shape)


def sort_mask(x, k):
    """A sort for the threshold; not exact where scores are equal."""
    return x >= jnp.sort(x.ravel())[x.size - k]


def top_k_nm_mask(x, n: int, m: int):
    """`lax.top_k` within groups, and a one-hot sum."""
    _, kept = lax.top_k(x.reshape(-1, m), n)
    return jnp.any(kept[..., None] == jnp.arange(m), axis=1).reshape(x.shape)


# -- Scores ----------------------------------------------------------------------------------------


def scores(size: int) -> dict[str, jax.Array]:
    """Magnitudes as they occur, and as they hurt."""
    side = int(size**0.5)
    normal = jnp.abs(jax.random.normal(jax.random.key(0), (side, side)))
    zero = jax.random.uniform(jax.random.key(1), normal.shape) < 0.9
    return {
        "normal": normal,
        "heavy-tailed": normal**9,
        "rounded to bfloat16": normal.astype(jnp.bfloat16).astype(jnp.float32),
        "90 % zeros": jnp.where(zero, 0.0, normal),
        "all equal": jnp.ones_like(normal),
    }


# -- Tables ----------------------------------------------------------------------------------------

one_pass = jax.jit(lambda x: jnp.sum(jnp.abs(x)))
topk = jax.jit(selection.topk_mask)
hashed = jax.jit(lambda x, k: selection.topk_mask(x, k, ties="hash", seed=0))
fused = jax.jit(lambda x, k: selection.topk_mask(x, k, score=jnp.abs))


def table_topk(x: jax.Array, kept: float, sorts: bool) -> None:
    """Masks that keep the same fraction, by every algorithm."""
    k = round(kept * x.size)
    flat = np.asarray(x).ravel()
    runs = {
        "one pass, `jnp.sum(jnp.abs(w))`": lambda: one_pass(x),
        "**`selection.topk_mask`**": lambda: topk(x, k),
        "**the same, of raw weights with `score=jnp.abs`**": lambda: fused(x, k),
        "**the same, ties by a hash**": lambda: hashed(x, k),
        "`numpy.partition` (threshold only)": lambda: np.partition(flat, flat.size - k),
    }
    if sorts:
        argsort, sort = jax.jit(argsort_mask), jax.jit(sort_mask)
        top_k = jax.jit(top_k_mask, static_argnums=1)
        runs["`jnp.sort` (not exact at ties)"] = lambda: sort(x, k)
        runs["`lax.top_k` and a scatter"] = lambda: top_k(x, k)
        runs["argsort and a scatter, as JaxPruner"] = lambda: argsort(x, k)
    times = medians(runs, rounds=ROUNDS, seconds=90)
    show(f"Top-k mask of {x.size:,} float32 magnitudes, {kept:.0%} kept", times)


def reads_of(x: jax.Array, k: int) -> int:
    """How often the search reads the scores, besides the pass that makes the mask."""
    reads = []

    def score(x):
        jax.debug.callback(lambda: reads.append(None))
        return x

    jax.block_until_ready(selection.topk_mask(x, k, score=score))
    jax.effects_barrier()
    return len(reads) - 1


def table_passes(size: int) -> None:
    """What decides the cost: how often the scores are read, and the total."""
    print("### Passes over the data by kind of scores\n")
    print("| scores | kept | reads | time in passes |\n|---|---|---|---|")
    for name, x in scores(size).items():
        for kept in (0.5, 0.1, 0.01):
            k = round(kept * x.size)
            times = medians(
                {"pass": lambda x=x: one_pass(x), "topk": lambda x=x, k=k: topk(x, k)}, rounds=5
            )
            reads = reads_of(x, k)
            print(f"| {name} | {kept:.0%} | {reads} | {times['topk'] / times['pass']:.1f} |")
    print()


def table_nm(side: int, n: int, m: int) -> None:
    """N:M masks by every algorithm, groups along the last and the first axis."""
    x = jnp.abs(jax.random.normal(jax.random.key(0), (side, side)))
    argsort = jax.jit(lambda x: argsort_nm_mask(x, n, m))
    top_k = jax.jit(lambda x: top_k_nm_mask(x, n, m))

    def ours(kind):
        return jax.jit(lambda x: structures.topk(kind, x, n))

    last, first = (ours(structures.NM(n, m, axis=axis)) for axis in (-1, 0))
    strided = ours(structures.NM(n, m, axis=0, strided=True))
    runs = {
        "one pass, `jnp.sum(jnp.abs(w))`": lambda: one_pass(x),
        "**`NM`, last axis**": lambda: last(x),
        "**`NM`, first axis**": lambda: first(x),
        "**`NM`, first axis, strided groups**": lambda: strided(x),
        "`lax.top_k` in groups": lambda: top_k(x),
        "two argsorts, as JaxPruner": lambda: argsort(x),
    }
    show(
        f"{n}:{m} mask of {side} x {side} float32",
        medians(runs, rounds=3 * ROUNDS, seconds=60),
    )


def show(title: str, times: dict[str, float]) -> None:
    """One table, in units of its first row."""
    unit = next(iter(times.values()))
    print(f"### {title}\n\n| | passes | ms |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds / unit:.1f} | {1e3 * seconds:.1f} |")
    print(flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=25_000_000, help="number of scores")
    parser.add_argument("--slow", action="store_true", help="sorts at the full size (a minute)")
    args = parser.parse_args(argv)
    print(f"{machine()}; medians of interleaved rounds\n")
    size = args.size
    x = scores(size)["normal"]
    for kept in (0.5, 0.1, 0.01):
        table_topk(x, kept, sorts=args.slow and kept == 0.1)
    if not args.slow:
        table_topk(x[: max(1, size // 25 // x.shape[1])], 0.1, sorts=True)
    table_passes(size)
    for n, m in ((2, 4), (1, 4), (4, 8)):
        table_nm(2048, n, m)


if __name__ == "__main__":
    main()
