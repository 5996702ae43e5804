"""`prune`: any method on any model, block by block."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import allocations, structures
from jaxsparse._checks import check_count
from jaxsparse.choose import check_sparsity
from jaxsparse.post_training import _registry, budgets, gradients, models
from jaxsparse.post_training._layer import Pruned, relative_error
from jaxsparse.post_training.budgets import ECoFLaP
from jaxsparse.post_training.calibration import Stream, TokenMask, finite, finite_weights
from jaxsparse.post_training.correction import corrected
from jaxsparse.post_training.gradients import Loss, LossGradients
from jaxsparse.post_training.owl import OWL
from jaxsparse.post_training.program import Kernel
from jaxsparse.post_training.refit import refit_core
from jaxsparse.post_training.report import LayerReport, Result
from jaxsparse.post_training.resume import Folder, Layers, digest
from jaxsparse.post_training.statistics import Gram, Inputs, Norms, Statistic, Tokens
from jaxsparse.structures import Structure
from jaxsparse.typing import AllocationLike, Targets


def prune(
    model: Any,
    batches: Iterable[Any],
    method: str | _registry.Method = "sparsegpt",
    *,
    sparsity: float | None = None,
    structure: Structure | str | None = None,
    allocation: AllocationLike | str | OWL | ECoFLaP = "uniform",
    targets: Targets = None,
    mask: TokenMask | None = None,
    forward: models.Forward | None = None,
    blocks: str | None = None,
    loss: Loss | None = None,
    stages: int = 1,
    propagate: bool = True,
    correct: float = 0.0,
    refit: bool | int = False,
    errors: bool = True,
    checkpoint: str | os.PathLike | None = None,
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
      batches: of calibration data, what the model is called with. Methods that read gradients take one from
        each batch: give them batches of one example.
      method: a name of `METHODS`, or a `Method`.
      sparsity: the fraction of zeros of each layer, in [0, 1); may be left out with an N:M structure.
      structure: which patterns are allowed, of every kernel as `[in, out]`; by default the method's own.
      allocation: how sparsity is split over layers: a rule of shapes of `jaxsparse.allocations`, a
        mapping from path patterns, "owl" or `OWL(...)`, "ecoflap" or `ECoFLaP(...)`.
      targets: which leaves, see `jaxsparse.targets`; by default kernels, the output layer too.
      mask: a function of a batch that says which tokens count.
      forward: `forward(model, batch)`, in place of the usual call.
      blocks: a regular expression for the names of blocks; by default up to the first number in the path.
      loss: `loss(outputs, batch)`, a number, for methods and allocations that ask for it.
      stages: in how many steps of growing sparsity a block is pruned, with new gradients in each, by
        methods that read gradients.
      propagate: whether a block sees the inputs that pruned blocks make, and gradients of a loss at them;
        otherwise those of the dense model, in one pass: one backward pass of each batch for all blocks,
        where the gradients of all kernels for all batches stay on the host.
      correct: how far kernels first make up for the pruned blocks before them, in [0, 1]; see
        `correction.py`.
      refit: solve the kept weights anew by least squares, whatever the method; a number is that of the
        steps of conjugate gradients at most.
      errors: report the errors of layers, which takes Gram matrices from methods that need norms alone,
        and of the whole network, which runs the dense model once more.
      checkpoint: a folder that keeps what became of each block. A run that was killed goes on from there,
        when it is called in the same way, with the same result to the bit.
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
        that no input is multiplied with, inputs or weights that are not finite, a method that needs a `loss`
        without one or whose loss is no number, an allocation with an N:M structure, a model that changes itself when it is called, a checkpoint of another run.
    """
    method = _registry.resolve(method)
    kind = None if structure is None else structures.resolve(structure)
    sparsity = float(check_sparsity(sparsity, kind))
    _check(method, options, kind, allocation, loss, stages, correct, propagate, refit)
    whole = models.of(model, forward)
    stream = Stream(whole, batches, targets, mask, blocks)
    params, tree = jax.tree.flatten(whole.params)
    slopes = None if loss is None else LossGradients(stream, loss)
    losses = None if slopes is None else slopes.losses
    wanted = budgets.of_kernels(stream, params, allocation, sparsity, kind, blocks, losses)
    at_dense = None
    if slopes is not None and method.gradients == "loss" and not propagate:
        at_dense = slopes.at_once(params)
    job = _Job(
        method, kind, wanted, stages, correct, refit, errors, options, stream, slopes, at_dense
    )
    folder = None
    if checkpoint is not None:
        facts = {k: str(v) for k, v in vars(job).items() if k not in ("stream", "slopes", "dense")}
        names = [[k.name for k in segment.kernels] for segment in stream.segments]
        facts |= {
            "method": method.name,
            "propagate": str(propagate),
            "blocks": digest([str(names)]),
            "mask": digest([stream.masks]),
            "data": digest([params, stream.batches]),
        }
        folder = Folder(checkpoint, facts)
    dense = list(params)
    ahead = stream.fork() if correct else None
    masks: list[Any] = [None] * len(params)
    reports, details = [], {}
    for at, segment in enumerate(stream.segments):
        if progress is not None:
            progress(at, len(stream.segments))
        layers, gave = (None, None) if folder is None else (folder.load(at), None)
        if segment.kernels and layers is None:
            layers, gave = job.segment(at, params, ahead, dense)
            if folder is not None:
                folder.save(at, layers)
        elif segment.kernels and not propagate:
            _, gave = stream.statistics(at, params, job.statistic())
        for kernel, (found, report) in zip(segment.kernels, layers or []):
            details[kernel.name] = found
            reports.append(report)
            params = _put(kernel, params, found)
            leaf = kernel.view.leaf
            before = jnp.ones(params[leaf].shape, bool) if masks[leaf] is None else masks[leaf]
            kept = jnp.stack([p.mask for p in found])
            masks[leaf] = kernel.put(before.astype(jnp.float32), kept) > 0
        if at + 1 < len(stream.segments):
            stream.advance(at, stream.outputs(at, params) if propagate or gave is None else gave)
            if ahead is not None:
                ahead.advance(at, ahead.outputs(at, dense))
    if progress is not None:
        progress(len(stream.segments), len(stream.segments))
    pruned_tree = tree.unflatten(params)
    return Result(
        whole.rebuild(pruned_tree),
        pruned_tree,
        tree.unflatten(masks),
        tuple(reports),
        {s.path: s.why for s in stream.chosen if not s.selected},
        _output_error(stream, dense, params, propagate and not _otherwise(stream))
        if errors
        else None,
        details,
        tuple(stream.kernels),
    )


def _check(
    method: _registry.Method,
    options: Mapping[str, Any],
    structure: Structure | None,
    allocation: Any,
    loss: Loss | None,
    stages: int,
    correct: float,
    propagate: bool,
    refit: bool | int,
) -> None:
    if unknown := sorted(set(options) - set(method.options)):
        raise ValueError(
            f"{unknown[0]}: {method.name!r} has no such option; it has {', '.join(method.options) or 'none'}"
        )
    if method.gradients == "loss" and loss is None:
        raise ValueError(
            f"loss: {method.name!r} reads gradients of a loss; give loss=lambda outputs, batch: a number"
        )
    if stages < 1 or (stages > 1 and not method.gradients):
        raise ValueError(
            f"stages={stages}: a positive number, above 1 for methods that read gradients"
        )
    if stages > 1 and structure is not None and structure.sparsity is not None:
        raise ValueError(
            f"stages={stages}: structure={structure} has one sparsity and no stages to it"
        )
    fixed = structure is not None and structure.sparsity is not None
    if fixed and allocation != "uniform" and not isinstance(allocation, allocations.Uniform):
        raise ValueError(
            f"allocation={allocation!r}: with structure={structure} every layer has the same sparsity; leave "
            "allocation out, or keep layers dense with targets="
        )
    if not isinstance(refit, bool):
        check_count("refit", refit)
    if not 0.0 <= correct <= 1.0 or (correct and not propagate):
        raise ValueError(
            f"correct={correct}: a number in [0, 1], and 0 without propagate=True, where nothing is to be made up"
        )


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is done to every block."""

    method: _registry.Method
    structure: Structure | None
    sparsities: Mapping[str, float | None]
    stages: int
    correct: float
    refit: bool | int
    errors: bool
    options: Mapping[str, Any]
    stream: Stream
    slopes: LossGradients | None
    dense: Mapping[str, np.ndarray] | None  # the gradients of the dense model, in one pass

    def statistic(self) -> Statistic:
        """What is kept of the inputs."""
        if self.method.rows:
            return Tokens()
        gram = self.method.gram or self.refit or self.errors or self.correct
        return Gram() if gram else Norms()

    def segment(
        self, at: int, params: list[Any], ahead: Stream | None, dense: Sequence[Any]
    ) -> tuple[Layers, list[list[Any]]]:
        """Prunes the kernels of a segment; and what the segment gave before."""
        statistic, kernels = self.statistic(), self.stream.segments[at].kernels
        seen, gave = self.stream.statistics(at, params, statistic)
        tune = self.method.tune
        mine = {k: v for k, v in self.options.items() if k in self.method.tune_options}
        if tune is not None and mine:

            def pruned(now: list[Any]) -> list[Any]:
                for kernel, (found, _) in zip(kernels, self._layers(at, now, self._seen(at, now))):
                    now = _put(kernel, now, found)
                return now

            params = tune(self.stream, at, params, gave, pruned, **mine)
            seen = self.stream.statistics(at, params, statistic)[0]
        if ahead is not None:
            drift = self.stream.drift(at, params, ahead, dense)
            params = list(params)
            for k in kernels:
                leaf = params[k.view.leaf]
                gram = seen[k.name].gram
                assert gram is not None  # `statistic` asks for it
                moved = [
                    corrected(w, g, d, self.correct)
                    for w, g, d in zip(k.take(leaf), gram, drift[k.name])
                ]
                params[k.view.leaf] = k.put(leaf, jnp.stack(moved))
        start, layers = params, []
        for stage in range(1, self.stages + 1):
            done = 1 - (1 - stage / self.stages) ** 3
            layers = self._layers(at, params, seen, start, done, first=stage == 1)
            for kernel, (found, _) in zip(kernels, layers):
                params = _put(kernel, params, found)
        return layers, gave

    def _seen(self, at: int, params: list[Any]) -> dict[str, Inputs]:
        return self.stream.statistics(at, params, self.statistic())[0]

    def _layers(
        self,
        at: int,
        params: list[Any],
        seen: Mapping[str, Inputs],
        start: list[Any] | None = None,
        done: float = 1.0,
        first: bool = True,
    ) -> Layers:
        """The kernels of a segment pruned, each from `params`, compared with `start`."""
        found: dict[str, Array] = {}
        kernels = self.stream.segments[at].kernels
        if self.method.gradients == "region":
            found = gradients.regional(self.stream, at, params)
        elif self.dense is not None and first:
            found = {k.name: jnp.asarray(self.dense[k.name]) for k in kernels}
        elif self.method.gradients == "loss" and self.slopes is not None:
            found = self.slopes(at, params)
        layers: Layers = []
        for kernel in kernels:
            x, leaf = seen[kernel.name], kernel.view.leaf
            finite(kernel.name, x)
            finite_weights(kernel.name, params[leaf])
            if found:
                x = x._replace(gradients=found[kernel.name])
                if not bool(jnp.all(jnp.isfinite(found[kernel.name]))):
                    raise ValueError(f"loss: the gradients of {kernel.name!r} hold NaN or infinity")
            before = params if start is None else start
            layers.append(self._kernel(kernel, params[leaf], before[leaf], x, done))
        return layers

    def _kernel(
        self, kernel: Kernel, leaf: Array, before: Array, x: Inputs, done: float
    ) -> tuple[list[Pruned], LayerReport]:
        """Prunes the layers of one kernel."""
        start = time.perf_counter()
        sparsity = self.sparsities[kernel.name]
        if done < 1 and sparsity is not None:
            sparsity = sparsity * done
        options = {k: v for k, v in self.options.items() if k not in self.method.tune_options}
        stack, dense = (kernel.take(a).astype(jnp.float32) for a in (leaf, before))
        found, masked, pruned, unseen = [], 0.0, 0.0, 0
        for i, w in enumerate(stack):
            here = jax.tree.map(lambda a, i=i: a[i], x)
            given = self.method.what(here)
            try:
                one = self.method.core(w, *given, sparsity, structure=self.structure, **options)
            except ValueError as error:
                raise ValueError(f"{kernel.name!r} {tuple(w.shape)}: {error}") from None
            if self.refit and one.codes is not None:
                raise ValueError(
                    f"refit={self.refit}: {self.method.name!r} gives integers here, and least squares would "
                    "take the weights off their grid; leave refit out"
                )
            if self.refit and here.gram is not None:
                steps = 100 if self.refit is True else int(self.refit)
                one = refit_core(dense[i], here.gram, one, steps=steps)
            found.append(one)
            unseen += int(here.count == 0)
            if here.gram is not None:
                only = jnp.where(one.mask, dense[i], 0.0)
                masked += float(relative_error(here.gram, dense[i], only))
                pruned += float(relative_error(here.gram, dense[i], one.weights))
        layers, known = len(stack), x.gram is not None
        damping = max([float(p.damping) for p in found if p.damping is not None], default=None)
        notes = ["rows are looked up: by magnitude"] if kernel.geometry.lookup else []
        if (
            self.method.gram
            and damping is not None
            and damping > options.get("damping", 0.01) * 1.01
        ):
            notes.append(f"damping raised to {damping:.3g}")
        if unseen:
            notes.append(f"{unseen} of {layers} saw no token: by magnitude")
        elif float(jnp.min(x.count)) < stack.shape[1]:
            notes.append(f"{int(jnp.min(x.count))} tokens for {stack.shape[1]} inputs")
        zeros = sum(int(p.mask.size - jnp.sum(p.mask)) for p in found)
        return found, LayerReport(
            kernel.name,
            tuple(stack.shape[1:]) if layers == 1 else tuple(stack.shape),
            zeros / stack.size,
            masked / layers if known else None,
            pruned / layers if known else None,
            damping,
            time.perf_counter() - start,
            "; ".join(notes),
        )


def _otherwise(stream: Stream) -> bool:
    """Whether a kernel is used besides its products, maybe in a block before: a tied embedding is."""
    others = stream.runs[0][0].others
    return any(k.view.leaf in others and not k.geometry.lookup for k in stream.kernels)


def _put(kernel: Kernel, params: Sequence[Any], found: Sequence[Pruned]) -> list[Any]:
    """The parameters with a pruned kernel, where they were on devices."""
    params = list(params)
    old = params[kernel.view.leaf]
    new = kernel.put(old, jnp.stack([p.weights for p in found]))
    spread = isinstance(old, Array) and len(old.sharding.device_set) > 1
    params[kernel.view.leaf] = jax.device_put(new, old.sharding) if spread else new
    return params


def _output_error(stream: Stream, dense: list[Any], params: list[Any], propagated: bool) -> float:
    """Of all floating-point outputs, over the batches. Both streams stand before the last segment, and outputs
    are those of one batch at a time: logits of all would be the largest thing in memory."""

    def to_the_last(stream: Stream, weights: list[Any]) -> Stream:
        stream.restart()
        for at in range(len(stream.segments) - 1):
            stream.advance(at, stream.outputs(at, weights))
        return stream

    before = to_the_last(stream.fork(), dense)
    after = stream if propagated else to_the_last(stream, params)
    different = total = 0.0
    for i in range(len(stream.batches)):
        for a, b in zip(before.results(i, dense), after.results(i, params)):
            if jnp.issubdtype(jnp.result_type(a), jnp.floating):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                different, total = different + np.sum((a - b) ** 2), total + np.sum(a**2)
    return float(different / total) if total else 0.0
