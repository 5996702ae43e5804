"""Pictures of sparse networks: masks, weights around zero, connections, fronts, memory.

They share the look of `plots`: each returns a `matplotlib.figure.Figure` that a notebook shows as it
is, dark on a light card whatever the reader's style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsparse.analysis.plots import _COLORS, _INK, _MARKERS, _figure, _style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EMPTY = "#E8E8E8"


def masks(
    by_name: Mapping[str, Any],
    *,
    changed_from: Mapping[str, Any] | None = None,
    columns: int = 3,
    xlabel: str = "outputs",
    ylabel: str = "inputs",
) -> Figure:
    """Each mask as a picture: a pixel per weight, blue where it is kept.

    Args:
      by_name: boolean arrays, or weights (kept where they are not zero), of two dimensions; of more,
        the leading ones are merged, as a convolution's kernel is a matrix `[inputs, outputs]`.
      changed_from: earlier masks of the same names; what was grown since is then green, what was
        dropped orange.
      columns: pictures side by side.
      xlabel, ylabel: what the columns and the rows of a mask are.

    Example:
      >>> figure = masks({"a layer": np.eye(4) > 0})
      >>> [axes.get_title() for axes in figure.axes]
      ['a layer, 25 % kept']

    Raises:
      ValueError: no mask at all, a mask of one dimension, an earlier mask of another shape.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if not by_name:
        raise ValueError("by_name is empty: give at least one mask")
    now = {name: _matrix(name, mask) for name, mask in by_name.items()}
    before = {name: _matrix(name, (changed_from or by_name)[name]) for name in now}
    for name in now:
        if now[name].shape != before[name].shape:
            raise ValueError(
                f"changed_from[{name!r}] has shape {before[name].shape}, the mask {now[name].shape}"
            )
    colors = ListedColormap([_EMPTY, _COLORS[1], _COLORS[2], _COLORS[0]])
    columns = min(columns, len(now))
    rows = -(-len(now) // columns)
    heights = [m.shape[0] / m.shape[1] for m in now.values()]
    width = 9.0 / columns if columns > 1 else 5.0
    height = min(4.5, width * max(0.3, min(1.5, max(heights)))) + 0.6
    figure = _blank(columns * width, rows * height + (0.3 if changed_from else 0))
    for i, (name, mask) in enumerate(now.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(
            before[name] + 2 * mask,
            cmap=colors,
            vmin=0,
            vmax=3,
            interpolation="nearest",
            aspect="auto" if not 0.3 <= heights[i] <= 1.5 else "equal",
        )
        axes.set_title(f"{name}, {100 * mask.mean():.3g} % kept", fontsize=9, color=_INK)
        axes.set_xlabel(xlabel, fontsize=8, color=_INK)
        axes.set_ylabel(ylabel, fontsize=8, color=_INK)
        axes.tick_params(colors=_INK, labelsize=7)
    if changed_from is not None:
        names = {"kept": _COLORS[0], "grown": _COLORS[2], "dropped": _COLORS[1]}
        figure.legend(
            handles=[Patch(color=color, label=name) for name, color in names.items()],
            loc="outside lower center",
            ncols=3,
            frameon=False,
            labelcolor=_INK,
        )
    return figure


def weight_histogram(
    weights: Mapping[str, Any],
    *,
    limit: float | None = None,
    bins: int = 81,
    title: str = "Weights around zero",
) -> Figure:
    """How many weights lie where around zero, one line per entry; exact zeros are not drawn but
    counted in the legend, for a sparse network has little else.

    Args:
      weights: arrays or trees of arrays, by name; such as raw and sparse weights of one layer.
      limit: the range is [-limit, limit]; by default it holds 99.5 % of what is not zero.
      bins: an odd number, so that one bin is centred on zero.
      title: title of the plot.

    Example:
      >>> figure = weight_histogram({"sparse": np.array([0.0, 0.0, -0.5, 0.5])}, bins=5)
      >>> figure.axes[0].get_legend().get_texts()[0].get_text()
      'sparse (50 % zeros)'

    Raises:
      ValueError: an even number of bins, a limit that is not positive.
    """
    import jax

    if bins < 1 or bins % 2 == 0:
        raise ValueError(f"bins={bins}: give an odd number, so that one bin is centred on zero")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit}: must be positive")
    flat = {
        name: np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(tree)])
        for name, tree in weights.items()
    }
    if limit is None:
        sizes = np.concatenate([np.abs(x[x != 0]) for x in flat.values()] or [np.zeros(0)])
        limit = float(np.quantile(sizes, 0.995)) if sizes.size else 1.0
    edges = np.linspace(-limit, limit, bins + 1)
    figure, axes = _figure()
    for i, (name, x) in enumerate(flat.items()):
        counts, _ = np.histogram(x[x != 0], edges)
        zeros = f" ({100 * np.mean(x == 0):.3g} % zeros)" if np.any(x == 0) else ""
        axes.stairs(counts, edges, label=name + zeros, linewidth=1.3, **_style(i))
        axes.stairs(counts, edges, fill=True, alpha=0.15, color=_COLORS[i % len(_COLORS)])
    axes.set(title=title, xlabel="weight", ylabel="weights per bin", xlim=(-limit, limit))
    axes.legend(frameon=False, labelcolor=_INK, fontsize="small")
    return figure


def crossings(
    raw: Any, sparse: Any, threshold: Any = None, *, title: str = "Raw and sparse weights"
) -> Figure:
    """The course of single weights over training: raw values as thin lines, the sparse ones as thick
    ones that lie on zero while the weight is pruned.

    Args:
      raw: `[steps, weights]`.
      sparse: `[steps, weights]`, exactly zero where pruned.
      threshold: `[steps]`, drawn as a band around zero; None: no band.
      title: title of the plot.

    Example:
      >>> steps = np.linspace(-1, 1, 9)[:, None]
      >>> figure = crossings(steps, np.where(np.abs(steps) > 0.5, steps, 0.0), np.full(9, 0.5))
      >>> len(figure.axes[0].lines)
      2

    Raises:
      ValueError: shapes that differ.
    """
    raw, sparse = np.asarray(raw), np.asarray(sparse)
    if raw.shape != sparse.shape or raw.ndim != 2:
        raise ValueError(
            f"raw has shape {raw.shape}, sparse {sparse.shape}: both must be [steps, weights]"
        )
    figure, axes = _figure()
    steps = np.arange(len(raw))
    if threshold is not None:
        band = np.asarray(threshold)
        axes.fill_between(steps, -band, band, color="0.5", alpha=0.15, linewidth=0)
    for i in range(raw.shape[1]):
        color = _COLORS[i % len(_COLORS)]
        axes.plot(steps, raw[:, i], color=color, linewidth=0.8, alpha=0.8)
        axes.plot(steps, sparse[:, i], color=color, linewidth=2)
    axes.set(title=title, xlabel="step", ylabel="thin: raw, thick: what the model sees")
    return figure


def connectivity(kernels: Sequence[Any], *, title: str = "Connections") -> Figure:
    """A small network as a graph: a column of dots per layer of units, a line per weight that is not
    zero, blue if positive and orange if negative, wider the larger it is. Units without any input or
    output left are hollow.

    Args:
      kernels: the kernels `[in, out]` of consecutive fully connected layers.
      title: title of the plot.

    Example:
      >>> figure = connectivity([np.eye(3), np.ones((3, 1))])
      >>> len(figure.axes[0].collections[0].get_segments())
      6

    Raises:
      ValueError: layers that do not fit together, or too many connections to be seen.
    """
    from matplotlib.collections import LineCollection

    layers = [np.asarray(k, np.float32) for k in kernels]
    for i, (a, b) in enumerate(zip(layers, layers[1:])):
        if a.shape[1] != b.shape[0]:
            raise ValueError(
                f"kernels[{i}] has {a.shape[1]} outputs, kernels[{i + 1}] {b.shape[0]} inputs"
            )
    total = sum(int(np.count_nonzero(k)) for k in layers)
    if total > 20_000:
        raise ValueError(f"{total} connections: more than 20,000 make a black picture")
    widths = [layers[0].shape[0], *(k.shape[1] for k in layers)]
    figure = _blank(2.2 + 2.4 * len(layers), 5.0)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title, color=_INK)
    place = lambda n: np.linspace(1, 0, n + 2)[1:-1]
    segments, colors, sizes = [], [], []
    for i, k in enumerate(layers):
        rows, columns = np.nonzero(k)
        left, right = place(k.shape[0]), place(k.shape[1])
        largest = np.abs(k).max() or 1.0
        segments += [((i, left[r]), (i + 1, right[c])) for r, c in zip(rows, columns)]
        colors += [_COLORS[0] if k[r, c] > 0 else _COLORS[1] for r, c in zip(rows, columns)]
        sizes += [0.2 + 1.3 * abs(k[r, c]) / largest for r, c in zip(rows, columns)]
    alpha = min(0.9, max(0.15, 300 / max(total, 1)))
    axes.add_collection(LineCollection(segments, colors=colors, linewidths=sizes, alpha=alpha))
    for i, n in enumerate(widths):
        sees = np.any(layers[i - 1] != 0, axis=0) if i else np.ones(n, bool)
        seen = np.any(layers[i] != 0, axis=1) if i < len(layers) else np.ones(n, bool)
        live = sees & seen
        axes.scatter(
            np.full(n, i),
            place(n),
            s=min(40, 900 / n),
            zorder=3,
            linewidths=0.6,
            facecolors=[_INK if x else "white" for x in live],
            edgecolors=_INK,
        )
        axes.text(
            i,
            -0.03,
            f"{n} units\n{int(live.sum())} live",
            ha="center",
            va="top",
            fontsize=8,
            color=_INK,
        )
    axes.set_xlim(-0.2, len(layers) + 0.2)
    axes.set_ylim(-0.12, 1.02)
    return figure


def accuracy_over_flops(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    x: str = "forward_flops",
    dense: float | None = None,
    title: str = "Accuracy over operations",
) -> Figure:
    """One line per method, the spread of its seeds as error bars, and the front of all: the points
    that no other beats in both accuracy and operations.

    Args:
      results: by method, points with the key `x` (operations relative to dense), `accuracy` and
        `deviation`.
      x: the key of the horizontal axis.
      dense: accuracy of the dense network, drawn as a horizontal line.
      title: title of the plot.

    Raises:
      ValueError: a point without one of the keys.
    """
    points = [(p, name) for name, ps in results.items() for p in ps]
    for p, name in points:
        missing = {x, "accuracy", "deviation"} - set(p)
        if missing:
            raise ValueError(f"a point of {name!r} lacks {', '.join(sorted(missing))}")
    figure, axes = _figure(8.0, 5.0)
    if dense is not None:
        axes.axhline(dense, color="0.4", linestyle="--", linewidth=1, label="dense")
    for i, (method, ps) in enumerate(results.items()):
        ps = sorted(ps, key=lambda p: p[x])
        axes.errorbar(
            [p[x] for p in ps],
            [p["accuracy"] for p in ps],
            [p["deviation"] for p in ps],
            label=method,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4,
            linewidth=1,
            capsize=2,
            elinewidth=0.8,
            **_style(i),
        )
    front = pareto_front([(p[x], p["accuracy"]) for p, _ in points])
    if front:
        axes.step(
            *zip(*front),
            where="post",
            color="0.6",
            linewidth=4,
            alpha=0.5,
            zorder=0,
            label="front of all",
        )
    axes.set_xscale("log")
    ticks = [
        t
        for t in (1, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
        if points and min(p[x] for p, _ in points) / 1.2 <= t <= max(p[x] for p, _ in points) * 1.2
    ]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set(title=title, xlabel="operations / dense", ylabel="test accuracy")
    axes.legend(
        frameon=False,
        labelcolor=_INK,
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of pairs (cost, value) those that no other pair beats with less or equal cost and more value,
    in the order of cost.

    Example:
      >>> pareto_front([(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8)])
      [(1, 0.5), (3, 0.9)]
    """
    front, best = [], -math.inf
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if value > best:
            front.append((cost, value))
            best = value
    return front


def memory_bars(
    memory: Mapping[str, Mapping[str, int]], *, title: str = "Bytes kept between steps"
) -> Figure:
    """A stacked bar per run: see `jaxsparse.analysis.memory.training_memory`.

    Example:
      >>> figure = memory_bars({"rigl": {"weights": 4000, "masks": 1000}})
      >>> [t.get_text() for t in figure.legends[0].get_texts()]
      ['weights', 'masks']
    """
    parts = list(dict.fromkeys(part for run in memory.values() for part in run))
    parts = [p for p in parts if any(run.get(p, 0) for run in memory.values())]
    largest = max(sum(run.values()) for run in memory.values())
    unit, name = next(
        ((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if largest >= u),
        (1, "bytes"),
    )
    figure, axes = _figure(height=max(2.4, 1.4 + 0.35 * len(memory)))
    left = np.zeros(len(memory))
    for i, part in enumerate(parts):
        sizes = np.array([run.get(part, 0) / unit for run in memory.values()])
        axes.barh(range(len(memory)), sizes, left=left, label=part, color=_COLORS[i % len(_COLORS)])
        left += sizes
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.3g}", va="center", fontsize=8, color=_INK)
    axes.set_yticks(range(len(memory)), list(memory), fontsize=8)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=name, xlim=(0, 1.1 * float(left.max())))
    axes.grid(visible=False, axis="y")
    figure.legend(
        frameon=False, labelcolor=_INK, fontsize="small", ncols=5, loc="outside lower center"
    )
    return figure


def _blank(width: float, height: float) -> Figure:
    """A figure of the common look without axes."""
    figure, axes = _figure(width, height)
    axes.remove()
    return figure


def _matrix(name: str, mask) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim < 2:
        raise ValueError(f"by_name[{name!r}] has shape {mask.shape}: give a matrix")
    return (mask != 0).reshape(-1, mask.shape[-1])
