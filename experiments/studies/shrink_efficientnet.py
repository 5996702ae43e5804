"""EfficientNet-Lite0 with its ImageNet weights, shrunk without training: agreement with the dense network.

  python -m experiments.studies.shrink_efficientnet

Hidden channels of the inverted-residual blocks go (what widens, the depthwise kernel and both norms, the rows of
what narrows): whole channels behind batch norms, so that zeroed is removed, and the stream between blocks keeps
its width. Once as they are, once with the narrowing convolution solved anew by least squares on calibration crops,
which gives it the inputs that the narrower network has and the outputs that the dense one had.

Crops of five photographs calibrate, other crops of the same photographs are compared: top-1 agreement with the
dense network, and the correlation of logits. No labels, no training.
"""

import argparse
import collections
import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import efficientnet
from experiments.studies.least_squares import solve_towards
from jaxsparse import channels
from jaxsparse.channels import Groups, Shrunk
from jaxsparse.post_training import refit_core
from jaxsparse.post_training._layer import Pruned

DAMPING = 1e-3


def hidden_groups(model: efficientnet.EfficientNet, size: int = efficientnet.SIZE) -> Groups:
    """The hidden channels of all blocks: those that a depthwise kernel goes along with."""
    found = channels.find(model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    inside = [n for n, g in found.items() if any("depthwise" in m.path for m in g.members)]
    return found.only(inside)


@nnx.jit
def inputs_and_outputs(
    model: efficientnet.EfficientNet, x: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """Of every block what its narrowing convolution reads and makes, `[positions, channels]`."""
    x, found = jax.nn.relu6(model.stem(x)), []
    flat = lambda y: y.reshape(-1, y.shape[-1])
    for block in model.blocks:
        y = x if block.expand is None else jax.nn.relu6(block.expand(x))
        y = jax.nn.relu6(block.depthwise(y))
        made = block.project.conv(y)
        found.append((flat(y), flat(made)))
        z = block.project.norm(made)
        x = x + z if block.residual else z
    return found


def reconstruct(
    dense: efficientnet.EfficientNet, small: efficientnet.EfficientNet, x: np.ndarray
) -> None:
    """Solves the narrowing convolutions of `small` one block after the other, in place: its own inputs, the
    outputs of the dense network."""
    wanted = [made for _, made in inputs_and_outputs(dense, jnp.asarray(x))]
    for i, block in enumerate(small.blocks):
        own, _ = inputs_and_outputs(small, jnp.asarray(x))[i]
        gram, cross = np.asarray(own.T @ own, np.float64), np.asarray(own.T @ wanted[i], np.float64)
        kernel = block.project.conv.kernel
        new = solve_towards(kernel[...][0, 0], gram, cross, DAMPING)
        kernel.set_value(jnp.asarray(new[None, None]))


def refit(
    dense: efficientnet.EfficientNet, small: Shrunk, groups: Groups, x: np.ndarray
) -> nnx.Module:
    """The same from the dense network's statistics alone, by `post_training.refit_core`: one pass."""
    model = small.model
    assert isinstance(model, efficientnet.EfficientNet)
    seen = inputs_and_outputs(dense, jnp.asarray(x))
    readers = {m.path: n for n, g in groups.items() for m in g.members if m.side == "in"}
    for i, (block, wide) in enumerate(zip(model.blocks, dense.blocks)):
        kept = small.kept[readers[f"blocks/{i}/project/conv/kernel"]]
        rows = np.isin(np.arange(seen[i][0].shape[-1]), kept)
        w = wide.project.conv.kernel[...][0, 0]
        mask = jnp.broadcast_to(jnp.asarray(rows)[:, None], w.shape)
        pruned = Pruned(jnp.where(mask, w, 0), mask)
        gram = seen[i][0].T @ seen[i][0] / len(seen[i][0])
        new = refit_core(w, gram, pruned, damping=DAMPING).weights
        block.project.conv.kernel.set_value(new[kept][None, None])
    return model


@nnx.jit
def logits(model: efficientnet.EfficientNet, x: jax.Array) -> jax.Array:
    return model(x)


def compare(
    model: efficientnet.EfficientNet, x: np.ndarray, dense: np.ndarray
) -> tuple[float, float]:
    """Top-1 agreement with the dense logits, and the correlation with them."""
    found = np.asarray(logits(model, jnp.asarray(x)))
    same = float((found.argmax(1) == dense.argmax(1)).mean())
    return same, float(np.corrcoef(found.ravel(), dense.ravel())[0, 1])


def serving_time(model: efficientnet.EfficientNet, x: np.ndarray, repeats: int = 5) -> float:
    """The least of several times of one call in seconds."""
    run, times = (lambda: jax.block_until_ready(logits(model, jnp.asarray(x)))), []
    run()
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def _cut(dense: efficientnet.EfficientNet, groups: Groups, sparsity: float, size: int) -> Shrunk:
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return channels.prune(dense, shape, sparsity, target="flops", groups=groups, tolerance=0.02)


def study(
    sparsities: Sequence[float], crops: int, size: int, timed: bool = True
) -> list[dict[str, float]]:
    """One row for every share of operations that goes."""
    dense = efficientnet.load()
    groups = hidden_groups(dense, size)
    x = efficientnet.crops(size, crops, seed=0)
    test = efficientnet.crops(size, crops, seed=1)
    goal = np.asarray(logits(dense, jnp.asarray(test)))
    base = serving_time(dense, test[:1]) if timed else float("nan")
    rows = []
    for sparsity in sparsities:
        plain, sequential, one_pass = (_cut(dense, groups, sparsity, size) for _ in range(3))
        small = sequential.model
        assert isinstance(small, efficientnet.EfficientNet) and isinstance(
            plain.model, efficientnet.EfficientNet
        )
        row: dict[str, float] = collections.OrderedDict(
            operations=plain.report.flops[1] / plain.report.flops[0],
            parameters=plain.report.parameters[1] / plain.report.parameters[0],
        )
        row["plain"], row["plain_r"] = compare(plain.model, test, goal)
        refitted = refit(dense, one_pass, groups, x)
        assert isinstance(refitted, efficientnet.EfficientNet)
        row["refit"], row["refit_r"] = compare(refitted, test, goal)
        reconstruct(dense, small, x)
        row["solved"], row["solved_r"] = compare(small, test, goal)
        row["time"] = serving_time(small, test[:1]) / base if timed else float("nan")
        rows.append(row)
        print({k: round(v, 3) for k, v in row.items()}, flush=True)
    return rows


def table(rows: Sequence[dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| operations kept | parameters kept | as it is | refit on dense inputs | solved block by block | time, batch 1 |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        pair = lambda name, r=r: f"{100 * r[name]:.0f} % ({r[name + '_r']:.2f})"
        lines.append(
            f"| {100 * r['operations']:.0f} % | {100 * r['parameters']:.0f} % | {pair('plain')} | {pair('refit')} "
            f"| {pair('solved')} | {r['time']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sparsities", default="0.1,0.2,0.3,0.4,0.5")
    parser.add_argument("--crops", type=int, default=12, help="of each photograph")
    parser.add_argument("--size", type=int, default=efficientnet.SIZE)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    rows = study([float(s) for s in options.sparsities.split(",")], options.crops, options.size)
    print(table(rows))
    if options.out:
        options.out.write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
