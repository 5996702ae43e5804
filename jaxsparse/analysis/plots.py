"""The plots of a report. Each function returns a `matplotlib.figure.Figure`; matplotlib is imported
when the first is made, and its global state is left alone."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by readers with any colour vision; then dashes, then markers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX<>"
_INK = "#222222"

Points = tuple[Sequence[float], Sequence[float]]


def _figure(width: float = 6.4, height: float = 3.8) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # Every colour is set here: a dark style of the reader's must not meet our light background, and
    # on a dark page the figure stays a card that can be read.
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110, facecolor="white")
    # Notebooks show a figure that is the value of a cell, whether or not pyplot was imported.
    setattr(figure, "_repr_png_", functools.partial(_png, figure))  # noqa: B010
    return figure, _inked(figure.add_subplot(facecolor="white"))


def _inked(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(which="both", colors=_INK)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK)
    axes.grid(alpha=0.25, color="0.5")
    axes.set_axisbelow(True)
    return axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _style(i: int) -> dict[str, Any]:
    return {
        "color": _COLORS[i % len(_COLORS)],
        "linestyle": ("-", "--", ":")[i // len(_COLORS) % 3],
    }


def curves(
    series: Mapping[str, Points],
    *,
    title: str,
    ylabel: str,
    xlabel: str = "step",
    log: bool = False,
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """One line per entry of `series`, each a pair `(x, y)`; the legend is left out for a single one.

    Example:
      >>> figure = curves({"train": ([1, 2], [0.5, 0.4])}, title="Loss", ylabel="loss")
      >>> [axes.get_title() for axes in figure.axes]
      ['Loss']
    """
    figure, axes = _figure()
    if log:
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # 0.1, and 1.6, not powers of ten
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    for i, (label, (x, y)) in enumerate(series.items()):
        few = "o" if len(x) <= 30 else None
        axes.plot(x, y, label=label, marker=few, markersize=3.5, **_style(i))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if ylim is not None:  # None would freeze the limits as they are now
        axes.set_ylim(ylim)
    if len(series) > 1:  # many names would cover lines: they stand beside
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(series) > 10 else {}
        axes.legend(frameon=False, labelcolor=_INK, fontsize="small", **place)
    return figure


def density_bars(densities: Mapping[str, float], *, title: str = "Density per layer") -> Figure:
    """A bar per layer, in the order given, with the fraction of its weights that is not zero."""
    names = list(densities)
    figure, axes = _figure(height=max(2.2, 0.9 + 0.26 * len(names)))
    bars = axes.barh(range(len(names)), [densities[n] for n in names], color=_COLORS[0])
    axes.bar_label(
        bars, [f"{100 * densities[n]:.3g} %" for n in names], padding=3, fontsize=8, color=_INK
    )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="nonzero weights / weights", xlim=(0, 1.12))
    axes.grid(visible=False, axis="y")
    return figure


def signed_bars(
    values: Mapping[str, float], marked: Sequence[bool], *, title: str, xlabel: str
) -> Figure:
    """A bar per name, to the left or right of 0, in the order given; those that are `marked` are filled."""
    names = list(values)
    figure, axes = _figure(height=max(2.2, 0.9 + 0.26 * len(names)))
    colors = [_COLORS[1] if values[n] < 0 else _COLORS[0] for n in names]
    faces = [c if m else "white" for c, m in zip(colors, marked, strict=True)]
    bars = axes.barh(range(len(names)), [values[n] for n in names], color=faces, edgecolor=colors)
    axes.bar_label(bars, [f"{values[n]:+.1f}" for n in names], padding=3, fontsize=8, color=_INK)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set(title=title, xlabel=xlabel)
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    return figure


def sparsity(
    steps: Sequence[float], total: Sequence[float], layers: Mapping[str, Sequence[float]]
) -> Figure:
    """The sparsity over the steps of training, of all sparse layers together and of each.

    Example:
      >>> figure = sparsity([0, 1], [0.5, 0.8], {"first": [0.4, 0.7], "last": [0.6, 0.9]})
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['first', 'last', 'all']
    """
    return _with_layers(
        steps, total, layers, title="Sparsity", ylabel="zeros / weights", ylim=(0, 1.02)
    )


def churn(
    steps: Sequence[float], total: Sequence[float], layers: Mapping[str, Sequence[float]]
) -> Figure:
    """How much of the mask is new since the last look, in total and per layer, over the steps.

    Example:
      >>> churn([0, 1], [0.3, 0.1], {"first": [0.3, 0.1]}).axes[0].get_ylabel()
      'newly kept / kept'
    """
    return _with_layers(
        steps,
        total,
        layers,
        title="New weights at each look at the mask",
        ylabel="newly kept / kept",
        ylim=(0, None),
    )


def _with_layers(steps, total, layers, *, title, ylabel, ylim) -> Figure:
    """A thick line for all, a thin one per layer."""
    figure, axes = _figure()
    for i, (name, values) in enumerate(layers.items()):
        axes.plot(steps, values, label=name, linewidth=0.9, alpha=0.8, **_style(i + 1))
    axes.plot(steps, total, label="all", color=_COLORS[0], linewidth=2)
    axes.set(title=title, xlabel="step", ylabel=ylabel, ylim=ylim)
    if 0 < len(layers) <= 12:
        axes.legend(frameon=False, labelcolor=_INK, fontsize="x-small")
    return figure


def accuracy_over_sparsity(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    dense: float | None = None,
    title: str = "Accuracy over sparsity",
) -> Figure:
    """One line per method, with the spread of its seeds as error bars.

    Args:
      results: by method, points with `sparsity`, `accuracy` and `deviation`.
      dense: accuracy of the dense network, drawn as a horizontal line.
      title: title of the plot.

    The axis of sparsity is that of the remaining density, logarithmic: 90 % to 95 % is as far as 95 %
    to 97.5 %, as in the memory that it saves.
    """
    figure, axes = _figure(8.0, 5.0)
    _draw_accuracy(axes, results, dense, title)
    return figure


def accuracy_panels(
    panels: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    *,
    dense: float | None = None,
    title: str = "Accuracy over sparsity",
) -> Figure:
    """`accuracy_over_sparsity` for many methods: one panel for each group of them, in two columns with
    the same scale of accuracy.

    Example:
      >>> point = {"sparsity": 0.9, "accuracy": 0.8, "deviation": 0.01}
      >>> figure = accuracy_panels({"fixed": {"static": [point]}, "pruned": {"magnitude": [point]}})
      >>> [axes.get_title() for axes in figure.axes]
      ['fixed', 'pruned']
    """
    rows = math.ceil(len(panels) / 2)
    figure, first = _figure(13.0, 1.0 + 4.4 * rows)
    first.remove()
    figure.suptitle(title, color=_INK)
    shared = None
    for i, (name, results) in enumerate(panels.items()):
        shared = _inked(figure.add_subplot(rows, 2, i + 1, sharey=shared, facecolor="white"))
        _draw_accuracy(shared, results, dense, name)
    return figure


def _draw_accuracy(axes: Axes, results, dense: float | None, title: str) -> None:
    if dense is not None:
        axes.axhline(dense, color="0.4", linestyle="--", linewidth=1, label="dense")
    densities: list[float] = []
    for i, (method, points) in enumerate(results.items()):
        points = sorted(points, key=lambda p: p["sparsity"])
        density = [max(1e-4, 1 - p["sparsity"]) for p in points]
        densities += density
        axes.errorbar(
            # A small shift per method keeps the error bars from hiding each other.
            [d * 1.012 ** (i - len(results) / 2) for d in density],
            [p["accuracy"] for p in points],
            [p["deviation"] for p in points],
            label=method,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            elinewidth=0.8,
            **_style(i),
        )
    axes.set_xscale("log")
    axes.invert_xaxis()
    usual = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
    ticks = [t for t in usual if _covers(densities, t)]
    few = sorted({round(d, 3) for d in densities})
    odd = any(all(abs(d / t - 1) > 0.05 for t in usual) for d in few)
    if odd and len(few) <= 4 and all(b > 1.4 * a for a, b in zip(few, few[1:])):
        ticks = few  # such as 75 % and 87.5 % of N:M patterns
    axes.set_xticks(ticks, [f"{100 * (1 - t):g} %" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set(title=title, xlabel="sparsity", ylabel="test accuracy")
    axes.legend(
        frameon=False,
        labelcolor=_INK,
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )


def _covers(values, x):
    return not values or min(values) / 1.1 <= x <= max(values) * 1.1
