"""Prunes a pretrained language model with calibration data, and measures what is left.

    python -m experiments.post_training --method=sparsegpt --sparsity=0.5 --workdir=runs/sparsegpt
    python -m experiments.post_training --method=wanda --structure=2:4 --layers=4 --workdir=runs/slice

SmolLM2-135M from its package (see `experiments/models/smollm2.py`). Calibration and evaluation are disjoint
halves of a text that ships with Python. The work folder gets `result.json`, the table of all layers as
`layers.txt`, and `layers.png`. With fewer `--layers` the model is no language model, and what counts is the
divergence of its predictions from those of the dense slice.
"""

import argparse
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import smollm2
from experiments.studies.commands import read_options
from jaxsparse import post_training as pt

_logits = nnx.jit(lambda model, tokens: model(tokens))


@jax.jit
def _compare(dense: jax.Array, sparse: jax.Array, tokens: jax.Array) -> jax.Array:
    """Loss of both logits, and the divergence of the second from the first, per token."""
    p, q = (jax.nn.log_softmax(x[:, :-1]) for x in (dense, sparse))
    loss = smollm2.next_token_loss
    divergence = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    return jnp.stack([loss(dense, tokens), loss(sparse, tokens), divergence])


def logits_of(model: nnx.Module, tokens: list[jax.Array]) -> list[np.ndarray]:
    """What the model says of each batch, on the host."""
    return [np.asarray(_logits(model, x)) for x in tokens]


def evaluate(
    dense: nnx.Module | list[np.ndarray],
    sparse: nnx.Module | Callable,
    tokens: list[jax.Array],
) -> dict[str, float]:
    """Perplexity of the dense model, or of its logits, and of the sparse one; and the mean divergence in nats."""
    run = (lambda x: _logits(sparse, x)) if isinstance(sparse, nnx.Module) else sparse
    said = (_logits(dense, x) for x in tokens) if isinstance(dense, nnx.Module) else dense
    rows = [np.asarray(_compare(p, run(x), x)) for p, x in zip(said, tokens)]
    found = np.mean(rows, axis=0)
    return {
        "dense_perplexity": float(np.exp(found[0])),
        "perplexity": float(np.exp(found[1])),
        "divergence": float(found[2]),
    }


STRUCTURED = ("flap", "wanda_sp", "cfsp", "slicegpt")


def run(
    dense: smollm2.SmolLM2,
    calibration: list[jax.Array],
    evaluation: list[jax.Array],
    method: str,
    logits: list[np.ndarray] | None = None,
    **settings: Any,
) -> tuple[pt.Result | None, dict[str, Any]]:
    """Prunes the blocks of the model and measures it; the row of a table. Structured methods have no
    `Result`, and their sparsity is that of the parameters of the blocks. Methods that read gradients of a loss
    take them from the dense model, in one pass. `logits` are those of the dense model, if they are there already."""
    start = time.perf_counter()
    shown = {k: str(v) for k, v in settings.items() if k not in ("progress", "checkpoint") and v}
    result, row = None, {}
    if method in STRUCTURED:
        model, row["sparsity"] = _structured(dense, calibration, method, **settings)
    else:
        known = method in pt.METHODS and pt.METHODS[method].gradients
        batches = (
            [x[i : i + 1] for x in calibration for i in range(len(x))] if known else calibration
        )
        loss = smollm2.next_token_loss if known == "loss" else None
        if loss is not None:
            settings.setdefault("propagate", False)
        result = pt.prune(dense, batches, method, loss=loss, **settings)
        model, row["sparsity"] = result.model, result.sparsity
    row |= {"method": method, "settings": shown}
    row["seconds"] = round(time.perf_counter() - start, 1)
    return result, row | evaluate(logits or dense, model, evaluation)


def _structured(dense: smollm2.SmolLM2, calibration, method: str, sparsity: float) -> tuple:
    """A narrower model, and the share of the parameters of its blocks that went."""
    blocks = lambda m: sum(x.size for x in jax.tree.leaves(nnx.state(m.layers, nnx.Param)))
    if method == "slicegpt":
        small = pt.slice_stream(
            *smollm2.stream(dense), calibration, sparsity, epsilon=dense.config.epsilon
        )
        left = small.parameters() - small.embedding.size - small.head.size
        return small, 1 - left / blocks(dense)
    narrow: Any = pt.narrow(dense, calibration, cast(Any, method), sparsity=sparsity).model
    return narrow, 1 - blocks(narrow) / blocks(dense)


def plot(result: pt.Result, path: pathlib.Path) -> None:
    """The error of every layer in the order of their use."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="tight")
    axes = figure.subplots()
    kinds: dict[str, list[tuple[int, float]]] = {}
    for i, layer in enumerate(result.layers):
        if layer.pruned is not None:
            kinds.setdefault(layer.name.split("/")[-2], []).append((i, layer.pruned))
    for kind, points in kinds.items():
        axes.plot(*zip(*points), marker=".", linewidth=0.8, label=kind)
    axes.set(xlabel="layer, in the order of use", ylabel="relative error of outputs", yscale="log")
    if kinds:
        axes.legend(fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)


def arguments() -> argparse.ArgumentParser:
    """The options that a run and a comparison share."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, help="the first layers alone")
    parser.add_argument("--sequences", type=int, default=32, help="of calibration")
    parser.add_argument("--eval_sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    return parser


def prepare(
    options: argparse.Namespace,
) -> tuple[smollm2.SmolLM2, list[jax.Array], list[jax.Array]]:
    """The dense model, and tokens for calibration and evaluation."""
    model, tokenizer = smollm2.load(options.layers)
    batches = lambda half, n: smollm2.batches(tokenizer, half, n, options.length)
    calibration = batches("calibration", options.sequences)
    return model, calibration, batches("evaluation", options.eval_sequences)


def main(arguments_: list[str] | None = None) -> None:
    from tqdm import tqdm

    parser = arguments()
    parser.add_argument("--method", default="sparsegpt", choices=sorted(pt.METHODS))
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--structure")
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--correct", type=float, default=0.0)
    parser.add_argument("--option", action="append", default=[], help="name=value, of the method")
    options = parser.parse_args(arguments_)
    options.workdir.mkdir(parents=True, exist_ok=True)
    model, calibration, evaluation = prepare(options)
    with tqdm(desc=options.method, unit="block", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result, row = run(
            model, calibration, evaluation, options.method, sparsity=options.sparsity,
            structure=options.structure, allocation=options.allocation, refit=options.refit,
            correct=options.correct, progress=progress, checkpoint=options.workdir / "blocks",
            **read_options(options.option),
        )  # fmt: skip
    assert result is not None
    row["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row["command"] = " ".join(
        ["python -m experiments.post_training", *(arguments_ or sys.argv[1:])]
    )
    (options.workdir / "layers.txt").write_text(f"{result}\n")
    (options.workdir / "result.json").write_text(json.dumps(row, indent=1) + "\n")
    plot(result, options.workdir / "layers.png")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
