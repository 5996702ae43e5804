"""Which parts of a pretrained model tolerate what: every part pruned alone, all others dense.

    python -m experiments.studies.compare_parts --model=minilm --workdir=runs/parts_minilm
    python -m experiments.studies.compare_parts --model=smollm2 --workdir=runs/parts_smollm2

After the ablation of the parts of Stable Diffusion ("Pruning Stable Diffusion", where magnitudes beat scores made for
language models, and quality falls off a cliff). A part is a kind of layer (queries, hidden units, the embedding) or a
third of the blocks. Every kernel is pruned once for each sparsity from what it sees in the dense model; a point is the
dense model with the pruned kernels of one part. Damage is the divergence from the dense model's predictions in nats
(SmolLM2), or one minus the cosine to the dense embeddings (MiniLM).

The cliff of a part is the sparsity at which its curve bends most (the largest second difference). From the curves of
the kinds a knapsack chooses a sparsity for each, as if damages added up, under the weights that a uniform sparsity
keeps; both are measured. Writes `results.json` after every point (what is there is not measured again), `results.md`
and `results.png`.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import minilm, smollm2
from experiments.post_training import evaluate, logits_of
from experiments.studies import compare_embeddings
from jaxsparse import post_training as pt
from jaxsparse.targets import path_name

SPARSITIES = (0.2, 0.4, 0.6, 0.8)
METHODS = ("magnitude", "wanda")
KINDS = {
    "minilm": {
        "embedding": "^embed/", "positions": "^position/", "query": "/query/", "key": "/key/",
        "value": "/value/", "out": "/out/", "up": "/up/", "down": "/down/",
    },
    "smollm2": {
        "embedding": "^embed/", "query": "/query/", "key": "/key/", "value": "/value/",
        "out": "/out/", "gate": "/gate/", "up": "/up/", "down": "/down/",
    },
}  # fmt: skip


def parts_of(kinds: dict[str, str], layers: int) -> dict[str, str]:
    """Patterns of the paths of all parts: the kinds, and thirds of the blocks.

    >>> parts_of({"up": "/up/"}, 3)["early blocks"]
    '^layers/(0)/'
    """
    cuts = [round(layers * i / 3) for i in range(4)]
    thirds = {
        f"{name} blocks": f"^layers/({'|'.join(map(str, range(a, b)))})/"
        for name, a, b in zip(("early", "middle", "late"), cuts, cuts[1:])
    }
    return kinds | thirds


def cliff(damages: list[float]) -> float:
    """The sparsity at which damage over `SPARSITIES` (none at 0) bends most.

    >>> cliff([0.0, 0.1, 5.0, 9.0])
    0.4
    """
    curve = np.asarray([0.0, *damages])
    bend = curve[2:] - 2 * curve[1:-1] + curve[:-2]
    return SPARSITIES[int(np.argmax(bend))]


def mixed(dense: Any, pruned: dict[float, Any], levels: dict[str, float]) -> Any:
    """The dense parameters, where the path matches a pattern those of its sparsity."""

    def leaf(path, x, *others):
        for pattern, sparsity in levels.items():
            if sparsity and re.search(pattern, path_name(path)):
                return others[list(pruned).index(sparsity)]
        return x

    return jax.tree_util.tree_map_with_path(leaf, dense, *pruned.values())


def split(
    curves: dict[str, list[float]], sizes: dict[str, int], sparsity: float
) -> dict[str, float]:
    """The sparsity of each kind by which the sum of damages is least, for the weights that `sparsity` keeps.

    >>> split({"a": [0.0, 0.0, 0.0, 9.0], "b": [1.0, 2.0, 3.0, 4.0]}, {"a": 10, "b": 10}, 0.4)
    {'a': 0.6, 'b': 0.2}
    """
    levels = (0.0, *SPARSITIES)
    fifths = lambda n, s: n * round(5 * (1 - s))  # of the weights that are kept, in whole numbers
    chosen = pt.knapsack(
        [[0.0, *curves[k]] for k in sizes],
        [[fifths(n, s) for s in levels] for n in sizes.values()],
        sum(fifths(n, sparsity) for n in sizes.values()),
        buckets=100_000,
    )
    return {k: levels[i] for k, i in zip(sizes, chosen)}


def load(name: str, options: argparse.Namespace) -> tuple[Any, list[Any], dict[str, Any], Callable]:
    """A model, its calibration data, arguments of `prune`, and the damage of a sparse model."""
    if name == "smollm2":
        model, tokenizer = smollm2.load(options.layers)
        data = [
            smollm2.batches(tokenizer, half, options.sequences, options.length)
            for half in ("calibration", "evaluation")
        ]
        logits = logits_of(model, data[1])
        return model, data[0], {}, lambda m: evaluate(logits, m, data[1])["divergence"]
    model, tokenizer = minilm.load()
    data = []
    for half in ("calibration", "evaluation"):
        texts = minilm.sentences(half)[: options.sequences]
        parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
        data.append([minilm.tokens(tokenizer, part, options.length) for part in parts])
    dense = compare_embeddings.embed(model, data[1])

    def damage(sparse: minilm.MiniLM) -> float:
        return 1 - float(np.mean(np.sum(dense * compare_embeddings.embed(sparse, data[1]), axis=1)))

    return model, data[0], {"mask": lambda b: b[1]}, damage


def table(
    points: dict[str, float], parts: dict[str, str], sizes: dict[str, int], total: int
) -> str:
    """Damage of every part over sparsities and methods, in Markdown."""
    head = [f"{m} {s}" for m in METHODS for s in SPARSITIES]
    lines = [
        "| part | weights | " + " | ".join(head) + " | cliff |",
        "| :--- | ---: |" + " ---: |" * (len(head) + 1),
    ]
    for part in parts:
        row = [points.get(f"{m}/{s}/{part}") for m in METHODS for s in SPARSITIES]
        curve = [points.get(f"{METHODS[-1]}/{s}/{part}") for s in SPARSITIES]
        known = [x for x in curve if x is not None]
        cells = ["" if x is None else f"{x:.4g}" for x in row]
        where = f"{cliff(known)}" if len(known) == len(SPARSITIES) else ""
        lines.append(
            f"| {part} | {sizes[part] / total:.1%} | " + " | ".join(cells) + f" | {where} |"
        )
    return "\n".join(lines)


def plot(points: dict[str, float], parts: dict[str, str], path: pathlib.Path) -> None:
    """The curves of all parts, one panel for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="tight")
    panels = figure.subplots(1, len(METHODS), sharey=True)
    for axes, method in zip(panels, METHODS):
        for i, part in enumerate(parts):
            curve = [(s, points[f"{method}/{s}/{part}"]) for s in SPARSITIES
                     if f"{method}/{s}/{part}" in points]  # fmt: skip
            if curve:
                style = "--" if part.endswith("blocks") else "-"
                axes.plot(*zip(*curve), style, marker=".", color=f"C{i % 10}", label=part)
        axes.set(title=method, xlabel="sparsity of the part, all others dense", yscale="log")
    panels[0].set_ylabel("damage")
    if panels[0].lines:
        panels[0].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--model", choices=sorted(KINDS), default="minilm")
    parser.add_argument("--layers", type=int, help="of SmolLM2, the first layers alone")
    parser.add_argument("--sequences", type=int, default=64, help="of calibration and evaluation")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence, at most")
    parser.add_argument("--uniform", type=float, default=0.4, choices=SPARSITIES)
    options = parser.parse_args(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    path: pathlib.Path = options.workdir / "results.json"
    points: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    model, calibration, more, damage = load(options.model, options)
    kinds = KINDS[options.model]
    parts = parts_of(kinds, len(model.layers))
    graph, dense, rest = nnx.split(model, nnx.Param, ...)
    named = [(path_name(p), x) for p, x in jax.tree_util.tree_flatten_with_path(dense)[0]]
    targets = "|".join(kinds.values())
    chosen = {p: x.size for p, x in named if re.search(f"({targets}).*(kernel|embedding)$", p)}
    sizes = {
        part: sum(n for p, n in chosen.items() if re.search(pattern, p))
        for part, pattern in parts.items()
    }
    total = sum(chosen.values())

    def write(lines: tuple[str, ...] = ()) -> str:
        path.write_text(json.dumps(points, indent=1) + "\n")
        command = " ".join(
            ["python -m experiments.studies.compare_parts", *(arguments or sys.argv[1:])]
        )
        found = table(points, parts, sizes, total)
        page = "\n\n".join([found, *lines, f"```\n{command}\n```"]) + "\n"
        (options.workdir / "results.md").write_text(page)
        plot(points, parts, options.workdir / "results.png")
        return page

    def measure(key: str, pruned: dict[float, Any], levels: dict[str, float]) -> float:
        if key not in points:
            params = mixed(dense, pruned, levels)
            points[key] = damage(nnx.merge(graph, params, rest))
            print(key, points[key], flush=True)
            write()
        return points[key]

    lines = []
    for method in METHODS:
        pruned: dict[float, Any] = {}
        for s in SPARSITIES:
            rule = [(f"({targets}).*(kernel|embedding)$", True), (".", False)]
            result = pt.prune(
                model, calibration, method, sparsity=s, targets=rule, propagate=False,
                errors=False, **more,
            )  # fmt: skip
            pruned[s] = jax.tree.map(jnp.asarray, result.params)
            for part, pattern in parts.items():
                measure(f"{method}/{s}/{part}", {s: pruned[s]}, {pattern: s})
        curves = {k: [points[f"{method}/{s}/{k}"] for s in SPARSITIES] for k in kinds}
        levels = split(curves, {k: sizes[k] for k in kinds}, options.uniform)
        same = measure(f"{method}/uniform", pruned, {kinds[k]: options.uniform for k in kinds})
        found = measure(f"{method}/split", pruned, {kinds[k]: s for k, s in levels.items()})
        said = ", ".join(f"{k} {s}" for k, s in levels.items())
        lines.append(
            f"All kinds together, {method}: {options.uniform} of each {same:.4g}; split by a knapsack "
            f"({said}) {found:.4g}."
        )
    print(write(tuple(lines)))


if __name__ == "__main__":
    main()
