"""SmolLM2-135M with its weights, made smaller without training: perplexity over what goes.

  python -m experiments.studies.shrink_smollm2 [--layers=30] [--kinds=hidden,groups,width,layers]

What goes, each by itself: hidden units of the perceptrons; whole groups of attention, a head of keys and
values with the query heads that share it; the width of the residual stream, where root-mean-square norms
take their statistics over what is left; whole blocks, those that turn the stream least (Men et al.,
ShortGPT: Layers in large language models are more redundant than you expect, 2024). Channels go by
magnitude, a share of every layer.

Once as it is, once *solved*: block after block, the two kernels that write into the stream are solved by
least squares on calibration text, from the inputs that the smaller model has to the stream that the dense
one had, so that they make up for what went before. Perplexity is of text that was not seen.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import smollm2
from experiments.models.smollm2 import Block, SmolLM2
from experiments.studies.least_squares import solve_towards
from jaxsparse import channels

KINDS = ("hidden", "groups", "width", "layers")
DAMPING = 1e-2


@nnx.jit
def attention_half(block: Block, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the output kernel of attention reads, and the stream after it."""
    heads = block.attention.mix(block.norm1(x_BTD))
    return heads, x_BTD + block.attention.out(heads)


@nnx.jit
def perceptron_half(block: Block, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the last kernel of the perceptron reads, and the stream after it."""
    hidden = block.hidden(block.norm2(x_BTD))
    return hidden, x_BTD + block.down(hidden)


HALVES = ((attention_half, lambda b: b.attention.out), (perceptron_half, lambda b: b.down))


def streams(model: SmolLM2, tokens: Sequence[jax.Array]) -> list[list[np.ndarray]]:
    """For each half of each block the stream after it, one array for each batch."""
    found, xs = [], [model.embed(t) for t in tokens]
    for block in model.layers:
        for half, _ in HALVES:
            xs = [half(block, x)[1] for x in xs]
            found.append([np.asarray(x) for x in xs])
    return found


@jax.jit
def _sums(inputs, wanted):
    flat = lambda a: a.reshape(-1, a.shape[-1])
    a, b = flat(inputs), flat(wanted)
    return jnp.matmul(a.T, a, precision="highest"), jnp.matmul(a.T, b, precision="highest")


def solve(
    small: SmolLM2,
    tokens: Sequence[jax.Array],
    goals: Sequence[Sequence[np.ndarray]],
    stays: np.ndarray,
) -> None:
    """Solves the writing kernels of all blocks in place.

    Args:
      small: the smaller model.
      tokens: calibration batches.
      goals: of each half of its blocks, in their order, the dense stream after it.
      stays: the coordinates of the stream that it has.
    """
    xs, goal = [small.embed(t) for t in tokens], iter(goals)
    for block in small.layers:
        for half, kernel_of in HALVES:
            wanted = next(goal)
            gram = cross = np.zeros(())
            for x, w in zip(xs, wanted):
                a, b = _sums(half(block, x)[0], jnp.asarray(w[..., stays]) - x)
                gram, cross = gram + np.asarray(a, np.float64), cross + np.asarray(b, np.float64)
            kernel = kernel_of(block).kernel
            kernel.set_value(jnp.asarray(solve_towards(kernel[...], gram, cross, DAMPING)))
            xs = [half(block, x)[1] for x in xs]


def turns(model: SmolLM2, tokens: Sequence[jax.Array]) -> np.ndarray:
    """How far each block turns the stream: 1 - the mean cosine of what enters and what leaves."""
    after = streams(model, tokens)[1::2]
    before = [[np.asarray(model.embed(t)) for t in tokens], *after[:-1]]

    def mean_cosine(xs, ys):
        norm = lambda a: np.linalg.norm(a, axis=-1)
        return np.mean([((x * y).sum(-1) / (norm(x) * norm(y))).mean() for x, y in zip(xs, ys)])

    return np.array([1 - mean_cosine(x, y) for x, y in zip(before, after)])


def smaller(
    dense: SmolLM2, kind: str, share: float, tokens: Sequence[jax.Array]
) -> tuple[SmolLM2, list[int], np.ndarray]:
    """The model without a share of one kind: itself, the blocks that stay, the coordinates that stay.

    Raises:
      ValueError: an unknown kind.
    """
    stays = np.arange(dense.config.width)
    if kind == "layers":
        gone = np.argsort(turns(dense, tokens))[: round(share * len(dense.layers))]
        left = channels.drop_layers(dense, "layers", gone)
        assert isinstance(left.model, SmolLM2)
        return left.model, list(left.kept), stays
    found = channels.find(dense, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    ends = {"hidden": "gate/kernel:1", "groups": "query/kernel:1.0", "width": "embedding:1"}
    if kind not in ends:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
    chosen = [name for name in found if name.endswith(ends[kind])]
    shrunk = channels.prune(dense, tokens[0][:1, :16], share, groups=found.only(chosen))
    assert isinstance(shrunk.model, SmolLM2)
    if kind == "width":
        stays = np.asarray(shrunk.kept[chosen[0]])
    return shrunk.model, list(range(len(dense.layers))), stays


def size(model: SmolLM2) -> int:
    """The number of parameters."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def study(
    layers: int | None, kinds: Sequence[str], shares: Sequence[float], sequences: int, length: int
) -> list[dict[str, float | str]]:
    """One row for every kind and share; the first is the dense model."""
    dense, tokenizer = smollm2.load(layers)
    data = lambda half: smollm2.batches(tokenizer, half, sequences, length)
    calibration, evaluation = data("calibration"), data("evaluation")
    perplexity = lambda model: float(np.exp(smollm2.nats_per_token(model, evaluation)))
    goals = streams(dense, calibration)
    rows: list[dict[str, float | str]] = [
        dict(kind="dense", share=0.0, parameters=1.0, plain=perplexity(dense))
    ]
    print(rows[0], flush=True)
    for kind in kinds:
        for share in shares:
            begin = time.perf_counter()
            model, blocks, stays = smaller(dense, kind, share, calibration)
            row: dict[str, float | str] = dict(kind=kind, share=share)
            row["parameters"] = size(model) / size(dense)
            row["plain"] = perplexity(model)
            # A block is to leave the stream as it was where the next one begins.
            last = [*(b - 1 for b in blocks[1:]), len(dense.layers) - 1]
            after = [goals[g] for b, l in zip(blocks, last) for g in (2 * b, 2 * l + 1)]
            solve(model, calibration, after, stays)
            row["solved"] = perplexity(model)
            row["seconds"] = time.perf_counter() - begin
            rows.append(row)
            print(row, flush=True)
    return rows


def table(rows: Sequence[dict[str, float | str]]) -> str:
    """The rows as Markdown."""
    names = {
        "hidden": "hidden units",
        "groups": "groups of heads",
        "width": "width of the stream",
        "layers": "whole blocks",
    }
    lines = ["| what goes | share | parameters kept | as it is | solved |", "|---|---|---|---|---|"]
    for r in rows:
        cell = lambda name, r=r: f"{r[name]:,.1f}" if name in r else ""
        share = f"{float(r['share']):.0%}" if r["share"] else ""
        name = names.get(str(r["kind"]), "nothing")
        lines.append(
            f"| {name} | {share} | {float(r['parameters']):.0%} | {cell('plain')} | {cell('solved')} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, help="the first layers alone; all of them by default")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--shares", default="0.1,0.2,0.334")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    shares = [float(s) for s in options.shares.split(",")]
    rows = study(
        options.layers, options.kinds.split(","), shares, options.sequences, options.length
    )
    print(table(rows))
    if options.out:
        options.out.write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
