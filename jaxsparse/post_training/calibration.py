"""Running a model block by block over calibration batches, and what its layers see."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import targets as targets_
from jaxsparse.post_training import models, program
from jaxsparse.post_training._checks import check_pattern, listed
from jaxsparse.post_training.program import Kernel, Program, Segment
from jaxsparse.post_training.statistics import Gram as Gram
from jaxsparse.post_training.statistics import Inputs, Statistic, Tokens, add
from jaxsparse.typing import Targets

TokenMask = Callable[[Any], Array]
"""The mask of a batch: True (or 1) at tokens that count, False at padding; of the shape of the tokens."""


class Stream:
    """Calibration batches on their way through a model: for each the values that are alive.

    Batches of one shape share a traced program; equal blocks share a compiled function. Values between
    blocks are kept on the host.
    """

    def __init__(
        self,
        model: models.Model,
        batches: Iterable[Any],
        targets: Targets,
        mask: TokenMask | None,
        blocks: str | None,
    ):
        self.model, self.batches = model, listed(batches)
        if mask is not None and not callable(mask):
            raise ValueError(
                f"mask: is one {type(mask).__name__}; give a function of a batch, which returns its mask"
            )
        if blocks is not None:
            check_pattern("blocks", blocks)
        self.chosen = targets_.select(model.params, targets)
        named = model.named()
        self.paths, leaves = [p for p, _ in named], [x for _, x in named]
        wanted = {i for i, s in enumerate(self.chosen) if s.selected}
        if not wanted:
            raise ValueError(
                "targets: no leaf is chosen; by default kernels of two or more dimensions"
            )
        traced: dict[str, tuple[Program, list[Segment]]] = {}
        self.runs = []
        for batch in self.batches:
            shape = str(jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), batch))
            if shape not in traced:
                made = program.trace(model.function, model.params, batch, wanted)
                found = program.kernels(made, self.paths, leaves, wanted)
                traced[shape] = made, program.segments(made, found, blocks)
            self.runs.append(traced[shape])
        self.segments = self.runs[0][1]
        if blocks is not None and not any(re.search(blocks, k.name) for k in self.kernels):
            raise ValueError(
                f"blocks={blocks!r}: no kernel's name matches; they look like {self.kernels[0].name!r}"
            )
        self.masks = [None if mask is None else jnp.asarray(mask(b)) != 0 for b in self.batches]
        self._compiled: dict[tuple, Callable] = {}
        self._texts: dict[tuple[int, int], str] = {}
        self.restart()

    @property
    def kernels(self) -> list[Kernel]:
        """All kernels, in the order of their use."""
        return [k for segment in self.segments for k in segment.kernels]

    def restart(self) -> None:
        """Puts the batches before the first block."""
        self.alive: list[dict[int, Any]] = []
        for batch, (made, _) in zip(self.batches, self.runs):
            self.alive.append(made.constants | dict(zip(made.inputs, jax.tree.leaves(batch))))

    def statistics(
        self, at: int, params: Sequence[Any], statistic: Statistic
    ) -> tuple[dict[str, Inputs], list[list[Any]]]:
        """The statistics of the kernels of segment `at`, and what it gives for each batch, which is not
        yet passed on."""
        total: dict[str, Inputs] = {}
        gave = []
        for i in range(len(self.batches)):
            out, found = self._run(at, i, params, statistic)
            gave.append(out)
            names = [k.name for k in self.runs[i][1][at].kernels]
            total |= {name: add(total.get(name), x) for name, x in zip(names, found)}
        return total, gave

    def outputs(self, at: int, params: Sequence[Any]) -> list[list[Any]]:
        """What segment `at` gives for each batch."""
        return [self._run(at, i, params, None)[0] for i in range(len(self.batches))]

    def fork(self) -> Stream:
        """Another stream over the same batches, which now goes its own way."""
        other = copy.copy(self)
        other.alive = [dict(x) for x in self.alive]
        return other

    def drift(
        self, at: int, params: Sequence[Any], other: Stream, theirs: Sequence[Any]
    ) -> dict[str, Array]:
        """For each kernel of segment `at` the sum over tokens of x (y - x)ᵀ `[stack, in, in]`, where x is
        what enters it here and y what enters it in the other stream."""
        total: dict[str, Array] = {}
        for i in range(len(self.batches)):
            made, segment = self.runs[i][0], self.runs[i][1][at]
            function = self._compile(i, at, "drift", functools.partial(_drift, made, segment))
            found = function(
                self._values(at, i, params), other._values(at, i, theirs), self.masks[i]
            )
            for kernel, x in zip(segment.kernels, found):
                total[kernel.name] = total[kernel.name] + x if kernel.name in total else x
        return total

    def slopes(
        self, at: int, i: int, params: Sequence[Any], scalar: Callable[..., Array], *extra: Any
    ) -> dict[int, Array]:
        """The gradient of `scalar(what segment `at` gives for batch i, *extra)` with respect to the
        parameters of the segment, by the number of the leaf."""
        made, segment = self.runs[i][0], self.runs[i][1][at]
        values = self._values(at, i, params)
        views = [
            place
            for place, v in enumerate(segment.takes)
            if v in made.views and jnp.issubdtype(jnp.result_type(values[place]), jnp.floating)
        ]

        def value(mine: list[Any], values: list[Any], *extra: Any) -> Array:
            values = list(values)
            for place, x in zip(views, mine):
                values[place] = x
            return scalar(program.run(made, segment, values, lambda *_: None), *extra)

        function = self._compile(i, at, f"slopes {scalar!r} {views}", jax.grad(value))
        total: dict[int, Array] = {}
        for place, slope in zip(views, function([values[p] for p in views], values, *extra)):
            view = made.views[segment.takes[place]]
            (back,) = jax.vjp(view, params[view.leaf])[1](slope)
            total[view.leaf] = total[view.leaf] + back if view.leaf in total else back
        return total

    def advance(self, at: int, gave: list[list[Any]]) -> None:
        """Passes on what a segment gave, and forgets what no later one takes."""
        for i, out in enumerate(gave):
            made, segments = self.runs[i]
            later = {v for s in segments[at + 1 :] for v in s.takes} | set(made.outputs)
            alive = self.alive[i] | dict(zip(segments[at].gives, map(_to_host, out)))
            self.alive[i] = {v: x for v, x in alive.items() if v in later}

    def results(self, i: int, params: Sequence[Any]) -> list[Any]:
        """What the model returns for batch i, as a list of arrays; from before the last segment."""
        made, segments = self.runs[i]
        out = self._run(len(segments) - 1, i, params, None)[0]
        alive = self.alive[i] | dict(zip(segments[-1].gives, out))
        return [
            v.value if isinstance(v, program.Constant) else self._value(made, alive, params, v)
            for v in made.outputs
        ]

    def _text(self, i: int, at: int) -> str:
        key = id(self.runs[i][0]), at
        if key not in self._texts:
            self._texts[key] = program.text(self.runs[i][0], self.runs[i][1][at])
        return self._texts[key]

    def _value(self, made: Program, alive: dict[int, Any], params: Sequence[Any], v: int) -> Any:
        if v in made.views:
            return made.views[v](params[made.views[v].leaf])
        x = alive[v]
        return jax.device_put(*x) if isinstance(x, tuple) else x

    def _values(self, at: int, i: int, params: Sequence[Any]) -> list[Any]:
        made, segment = self.runs[i][0], self.runs[i][1][at]
        return [self._value(made, self.alive[i], params, v) for v in segment.takes]

    def _compile(self, i: int, at: int, what: str, function: Callable) -> Callable:
        """`function` compiled, or that of an equal segment."""
        return self._compiled.setdefault((self._text(i, at), what), jax.jit(function))

    def _run(self, at: int, i: int, params: Sequence[Any], statistic: Statistic | None) -> Any:
        made, segment = self.runs[i][0], self.runs[i][1][at]
        run = functools.partial(watched, made, segment, statistic)
        function = self._compile(i, at, repr(statistic), run)
        return function(self._values(at, i, params), self.masks[i])


def _to_host(x: Any) -> Any:
    """A value on the host; one that is spread over devices together with how."""
    spread = isinstance(x, Array) and len(x.sharding.device_set) > 1 and x.is_fully_addressable
    return (jax.device_get(x), x.sharding) if spread else jax.device_get(x)


def watched(
    made: Program, segment: Segment, statistic: Statistic | None, values: list[Any], mask: Any
) -> tuple[list[Any], list[Inputs]]:
    """What a segment gives, and the statistics of its kernels, in their order."""
    found: dict[str, Inputs] = {}

    def watch(kernel: Kernel, x: Array, operand: Array) -> None:
        if statistic is None:
            return
        rows, tokens = kernel.geometry.rows(x, operand.shape)
        if mask is not None and not kernel.geometry.lookup:
            keep = _tokens(mask, tokens, kernel, rows)
            rows = jnp.where(keep[None, :, None], rows, 0)
        seen = statistic(rows)
        if not isinstance(seen, Inputs):
            raise ValueError(
                f"statistic={statistic!r}: returned {type(seen).__name__}; return post_training.Inputs, "
                "as Norms() and Gram() do"
            )
        found[kernel.name] = add(found.get(kernel.name), seen)

    out = program.run(made, segment, values, watch)
    return out, [found[k.name] for k in segment.kernels] if statistic is not None else []


def _drift(
    made: Program, segment: Segment, values: list[Any], others: list[Any], mask: Any
) -> list[Array]:
    here, there = (watched(made, segment, Tokens(), v, mask)[1] for v in (values, others))
    rows = [(a.rows, b.rows) for a, b in zip(here, there)]
    return [
        jnp.einsum("sti,stj->sij", x, y - x, precision=jax.lax.Precision.HIGHEST)
        for x, y in rows
        if x is not None and y is not None
    ]


def _tokens(mask: Array, tokens: tuple[int, ...], kernel: Kernel, rows: Array) -> Array:
    """The mask of the rows of an input whose axes of tokens were `tokens`."""
    if kernel.geometry.stack == () and kernel.geometry.convolution is None:
        flat = mask.reshape(-1)
        if tokens == mask.shape or tokens == flat.shape:
            return flat
        if tokens[: mask.ndim] == mask.shape:
            return jnp.repeat(flat, rows.shape[1] // flat.shape[0])
    raise ValueError(
        f"mask: has shape {mask.shape}, and the tokens that enter {kernel.name!r} have {tokens}; give a mask "
        "of the shape of the tokens, or leave the leaf out by targets="
    )


def calibrate(
    model: Any,
    batches: Iterable[Any],
    statistic: Statistic,
    *,
    targets: Targets = None,
    mask: TokenMask | None = None,
    forward: models.Forward | None = None,
    blocks: str | None = None,
) -> dict[str, Inputs]:
    """What enters the layers of a model, over batches.

    Args:
      model: an `nnx.Module`, `(linen module, params)` or `(function, params)`, see `models`; it is traced,
        and nothing of it is changed.
      batches: of calibration data.
      statistic: `Norms()`, `Gram()`, or a function of tokens `[stack, tokens, in]` whose results add.
      targets: which leaves, see `jaxsparse.targets`; by default kernels.
      mask: a function of a batch that says which of its tokens count; padding then enters no sum.
      forward: `forward(model, batch)`, in place of the usual call.
      blocks: a regular expression for the names of blocks.

    Returns:
      The statistics by the name of the kernel: its path, and `path[i]` for layer i of a stacked leaf (or
      any other part of a leaf). Add those of two runs by `jax.tree.map(jnp.add, a, b)`.

    >>> model = (lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((2, 3))})
    >>> stats = calibrate(model, [jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0]])], Gram())
    >>> stats["kernel"].gram[0].tolist()
    [[1.0, 2.0], [2.0, 5.0]]

    Raises:
      ValueError: no batch; a target that no input is multiplied with; a mask that does not fit; inputs that
        are not finite; a statistic that is no function, or returns something else.
    """
    if isinstance(statistic, type) or not callable(statistic):
        raise ValueError(f"statistic={statistic!r}: give Norms(), Gram(), or a function of tokens")
    whole = models.of(model, forward)
    stream = Stream(whole, batches, targets, mask, blocks)
    params = jax.tree.leaves(whole.params)
    found: dict[str, Inputs] = {}
    for at in range(len(stream.segments)):
        stats, gave = stream.statistics(at, params, statistic)
        for name, x in stats.items():
            finite(name, x)
        found |= stats
        if len(found) == len(stream.kernels):
            break
        stream.advance(at, gave)
    return found


def finite(name: str, x: Inputs) -> None:
    """Raises `ValueError` if a statistic is not finite."""
    if not all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(x)):
        raise ValueError(
            f"batches: the inputs of {name!r} hold NaN or infinity; look for them in the batches and the "
            "weights, and run the model in float32 if they overflow"
        )


def finite_weights(name: str, leaf: Any) -> None:
    """Raises `ValueError` if a weight is not finite, which no method would tell from a large one."""
    if not bool(jnp.all(jnp.isfinite(leaf))):
        raise ValueError(
            f"model: the weights of {name!r} hold NaN or infinity; restore them, or leave the leaf out by "
            f"targets=[({name!r}, False)]"
        )
