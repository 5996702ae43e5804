"""`prune`: any method on any model, block by block."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import allocations, structures
from jaxsparse.choose import check_sparsity
from jaxsparse.leaves import Leaf
from jaxsparse.post_training import _registry, models, program
from jaxsparse.post_training._layer import Pruned, relative_error
from jaxsparse.post_training.calibration import Stream, TokenMask, calibrate, finite
from jaxsparse.post_training.owl import OWL
from jaxsparse.post_training.program import Kernel
from jaxsparse.post_training.refit import refit_core
from jaxsparse.post_training.statistics import Gram, Inputs, Norms
from jaxsparse.structures import Structure
from jaxsparse.typing import AllocationLike, Targets


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
    """

    model: Any
    params: Any
    masks: Any
    layers: tuple[LayerReport, ...]
    dense: dict[str, str]
    output_error: float | None
    details: dict[str, list[Pruned]]

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


def prune(
    model: Any,
    batches: Iterable[Any],
    method: str | _registry.Method = "sparsegpt",
    *,
    sparsity: float | None = None,
    structure: Structure | str | None = None,
    allocation: AllocationLike | str | OWL = "uniform",
    targets: Targets = None,
    mask: TokenMask | None = None,
    forward: models.Forward | None = None,
    blocks: str | None = None,
    propagate: bool = True,
    refit: bool = False,
    errors: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Result:
    """Prunes a trained model with calibration data.

    Block by block: the inputs of a block's kernels are seen with the blocks before it already pruned; its
    kernels are pruned, all from what was seen with the block still dense; and its outputs with the pruned
    weights are the inputs of the next. Memory is that of one block, its Gram matrices, and the values
    between two blocks for all batches on the host. Blocks that are equal are compiled once.

    Args:
      model: an `nnx.Module`, `(linen module, params)` or `(function, params)`, see `models`. It is not
        changed. Put it into evaluation mode first.
      batches: of calibration data, what the model is called with.
      method: a name of `METHODS`, or a `Method`.
      sparsity: the fraction of zeros of each layer, in [0, 1); may be left out with an N:M structure.
      structure: which patterns are allowed, of every kernel as `[in, out]`; by default the method's own.
      allocation: how sparsity is split over layers: a rule of shapes of `jaxsparse.allocations`, a
        mapping from path patterns, "owl" or `OWL(...)`.
      targets: which leaves, see `jaxsparse.targets`; by default kernels, the output layer too.
      mask: a function of a batch that says which tokens count.
      forward: `forward(model, batch)`, in place of the usual call.
      blocks: a regular expression for the names of blocks; by default up to the first number in the path.
      propagate: whether a block sees the inputs that pruned blocks make; otherwise those of the dense
        model, in one pass.
      refit: solve the kept weights anew by least squares, whatever the method.
      errors: report the errors of layers, which takes Gram matrices from methods that need norms alone,
        and of the whole network, which runs the dense model once more.
      progress: called after each part of the model with how many are done, and of how many.
      **options: of the method, such as `block=` of SparseGPT.

    Returns:
      The sparse model, its masks, and a report that can be printed.

    >>> model = (lambda params, x: x @ params["kernel"], {"kernel": jnp.array([[1.0], [2.0]])})
    >>> result = prune(model, [jnp.array([[9.0, 1.0]])], "wanda", sparsity=0.5)
    >>> result.params["kernel"].tolist(), result.masks["kernel"].tolist()
    ([[1.0], [0.0]], [[True], [False]])

    Raises:
      ValueError: an unknown method or option, a sparsity or structure that a layer cannot have, a target
        that no input is multiplied with, inputs that are not finite.
    """
    method = _registry.resolve(method)
    if unknown := sorted(set(options) - set(method.options)):
        raise ValueError(
            f"{unknown[0]}: {method.name!r} has no such option; it has {', '.join(method.options) or 'none'}"
        )
    kind = None if structure is None else structures.resolve(structure)
    sparsity = check_sparsity(sparsity, kind)
    whole = models.of(model, forward)
    batches = list(batches)
    stream = Stream(whole, batches, targets, mask, blocks)
    params, tree = jax.tree.flatten(whole.params)
    wanted = _sparsities(stream, params, allocation, sparsity, kind, whole, targets, mask, blocks)
    statistic = Gram() if method.gram or refit or errors else Norms()
    dense = list(params)
    masks: list[Any] = [None] * len(params)
    reports, details = [], {}
    for at, segment in enumerate(stream.segments):
        if progress is not None:
            progress(at, len(stream.segments))
        if not segment.kernels:
            if errors or at + 1 < len(stream.segments):
                stream.advance(at, stream.outputs(at, params))
            continue
        seen, gave = stream.statistics(at, params, statistic)
        for kernel in segment.kernels:
            x, leaf = seen[kernel.name], kernel.view.leaf
            finite(kernel.name, x)
            found, report = _kernel(
                kernel, dense[leaf], x, method, wanted[kernel.name], kind, refit, options
            )
            details[kernel.name] = found
            reports.append(report)
            matrix, kept = (jnp.stack([getattr(p, f) for p in found]) for f in ("weights", "mask"))
            params[leaf] = kernel.put(params[leaf], matrix)
            before = jnp.ones(params[leaf].shape, bool) if masks[leaf] is None else masks[leaf]
            put = kernel.put(before.astype(jnp.float32), kept)
            masks[leaf] = put > 0
        stream.advance(at, stream.outputs(at, params) if propagate else gave)
    if progress is not None:
        progress(len(stream.segments), len(stream.segments))
    pruned_tree = tree.unflatten(params)
    return Result(
        whole.rebuild(pruned_tree),
        pruned_tree,
        tree.unflatten(masks),
        tuple(reports),
        {s.path: s.why for s in stream.chosen if not s.selected},
        _output_error(stream, dense, params, propagate) if errors else None,
        details,
    )


def _kernel(
    kernel: Kernel,
    leaf: Array,
    x: Inputs,
    method: _registry.Method,
    sparsity: float | None,
    structure: Structure | None,
    refit: bool,
    options: Mapping[str, Any],
) -> tuple[list[Pruned], LayerReport]:
    """Prunes the layers of one kernel."""
    start = time.perf_counter()
    stack = kernel.take(leaf).astype(jnp.float32)
    found, masked, pruned, unseen = [], 0.0, 0.0, 0
    for i, w in enumerate(stack):
        here = jax.tree.map(lambda a, i=i: a[i], x)
        try:
            one = method.core(w, *method.what(here), sparsity, structure=structure, **options)
        except ValueError as error:
            raise ValueError(f"{kernel.name!r} {tuple(w.shape)}: {error}") from None
        if refit and here.gram is not None:
            one = refit_core(w, here.gram, one)
        found.append(one)
        unseen += int(here.count == 0)
        if here.gram is not None:
            masked += float(relative_error(here.gram, w, jnp.where(one.mask, w, 0.0)))
            pruned += float(relative_error(here.gram, w, one.weights))
    layers, known = len(stack), x.gram is not None
    damping = max([float(p.damping) for p in found if p.damping is not None], default=None)
    notes = []
    if damping is not None and damping > options.get("damping", 0.01) * 1.01:
        notes.append(f"damping raised to {damping:.3g}")
    if unseen:
        notes.append(f"{unseen} of {layers} saw no token: by magnitude")
    elif float(jnp.min(x.count)) < stack.shape[1]:
        notes.append(f"{int(jnp.min(x.count))} tokens for {stack.shape[1]} inputs")
    zeros = sum(int(p.mask.size - jnp.sum(p.mask)) for p in found)
    report = LayerReport(
        kernel.name,
        tuple(stack.shape[1:]) if layers == 1 else tuple(stack.shape),
        zeros / stack.size,
        masked / layers if known else None,
        pruned / layers if known else None,
        damping,
        time.perf_counter() - start,
        "; ".join(notes),
    )
    return found, report


def _sparsities(
    stream: Stream, params, allocation, sparsity, structure, whole, targets, mask, blocks
) -> Mapping[str, float | None]:
    """The sparsity of each kernel."""
    kernels = stream.kernels
    shapes = {k.name: k.shape(params[k.view.leaf]) for k in kernels}
    if structure is not None and structure.sparsity is not None:
        return dict.fromkeys(shapes, sparsity)
    if allocation == "owl" or isinstance(allocation, OWL):
        rule = OWL() if allocation == "owl" else allocation
        return _by_outliers(rule, kernels, params, sparsity, whole, stream, targets, mask, blocks)
    rule = allocations.resolve(allocation)
    if isinstance(rule, allocations.Global):
        raise ValueError(
            f"allocation={allocation!r}: layers are pruned one after the other; give a rule of shapes, a "
            "mapping from path patterns to sparsities, or 'owl'"
        )
    leaves = [
        Leaf(i, k.name, shapes[k.name][1:], 0, structure or structures.Unstructured())
        for i, k in enumerate(kernels)
    ]
    return dict(zip(shapes, rule.sparsities(leaves, sparsity)))


def _by_outliers(rule: OWL, kernels, params, sparsity, whole, stream, targets, mask, blocks):
    pair = (lambda p, *batch: whole.function(p, batch[0]), whole.params)
    norms = calibrate(
        pair, [(b,) for b in stream.batches], Norms(), targets=targets, blocks=blocks,
        mask=None if mask is None else lambda b: mask(b[0]),
    )  # fmt: skip
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(program.block_of(kernel, blocks), []).append(kernel)
    outliers, sizes = [], []
    for group in groups.values():
        layers = [
            (w, s)
            for k in group
            for w, s in zip(k.take(params[k.view.leaf]), norms[k.name].squares)
        ]
        outliers.append(rule.outliers(layers))
        sizes.append(sum(w.size for w, _ in layers))
    found = rule.sparsities(outliers, sizes, sparsity)
    return {k.name: s for group, s in zip(groups.values(), found) for k in group}


def _output_error(stream: Stream, dense: list[Any], params: list[Any], propagated: bool) -> float:
    """Of all floating-point outputs, over the batches."""

    def results(weights, run: bool):
        if run:
            stream.restart()
            for at in range(len(stream.segments)):
                stream.advance(at, stream.outputs(at, weights))
        return stream.results(weights)

    pruned = results(params, run=not propagated)
    different = total = 0.0
    for old, new in zip(results(dense, run=True), pruned):
        for a, b in zip(old, new):
            if jnp.issubdtype(jnp.result_type(a), jnp.floating):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                different, total = different + np.sum((a - b) ** 2), total + np.sum(a**2)
    return float(different / total) if total else 0.0
