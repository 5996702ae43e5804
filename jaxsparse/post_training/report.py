"""What `prune` returns: a model, masks, and a table that can be printed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxsparse.post_training._layer import Pruned
from jaxsparse.post_training.program import Kernel


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one kernel. Errors are squared errors of its outputs, relative to the outputs, of
    `masked` (the mask alone) and of `pruned` (its weights); None without Gram matrices."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    masked: float | None
    pruned: float | None
    damping: float | None
    seconds: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """What `prune` returns.

    Attributes:
      model: of the kind that was given, with sparse parameters.
      params: its parameters.
      masks: a tree like them: bool where pruned, None elsewhere.
      layers: a report for each kernel, in the order of their use.
      dense: the leaves that were left dense, and why.
      output_error: squared error of what the model returns on the calibration data, relative to it; None
        without `errors`.
      details: what the method returned for each kernel, layer by layer of its stack (codes and scales of
        quantized weights, permutations).
      kernels: where each of them is in its leaf.
    """

    model: Any
    params: Any
    masks: Any
    layers: tuple[LayerReport, ...]
    dense: dict[str, str]
    output_error: float | None
    details: dict[str, list[Pruned]]
    kernels: tuple[Kernel, ...] = dataclasses.field(default=(), repr=False)

    @property
    def sparsity(self) -> float:
        """Of all pruned leaves together."""
        sizes = [int(np.prod(r.shape)) for r in self.layers]
        return sum(r.sparsity * n for r, n in zip(self.layers, sizes)) / sum(sizes)

    def __str__(self) -> str:
        shown = lambda x: "" if x is None else f"{x:.4f}"
        rows = [("layer", "shape", "sparsity", "error of mask", "error", "seconds", "")]
        for r in self.layers:
            shape = "x".join(map(str, r.shape))
            errors = (shown(r.masked), shown(r.pruned))
            rows.append((r.name, shape, f"{r.sparsity:.4f}", *errors, f"{r.seconds:.2f}", r.note))
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = ["  ".join(c.ljust(n) for c, n in zip(row, widths)).rstrip() for row in rows]
        seconds = sum(r.seconds for r in self.layers)
        error = (
            "" if self.output_error is None else f"error of the outputs {self.output_error:.4f}, "
        )
        lines.append(f"all: sparsity {self.sparsity:.4f}, {error}{seconds:.1f} s in the method")
        reasons: dict[str, list[str]] = {}
        for path, why in self.dense.items():
            reasons.setdefault(why, []).append(path)
        for why, paths in reasons.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines.append(f"dense ({why}): {', '.join(paths[:3])}{more}")
        return "\n".join(lines)
