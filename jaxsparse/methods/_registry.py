"""The registry of methods: what contract tests, sweeps and the catalogue need to know of each."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax


@dataclasses.dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
      name: its key in `METHODS`.
      fn: `fn(inner, sparsity, *, ...) -> optax.GradientTransformationExtraArgs`.
      reference: authors, title, year.
      controls_sparsity: whether a sparsity can be asked for; if not, `fn` takes none.
      keeps_raw: whether dense raw weights are kept besides the sparse ones.
      dynamics: "none", "fixed", "gradual" (dense at first, masks grow sparser), "dynamic" (masks
        change at a constant budget), "projected" (masks follow raw weights at every step).
      structures: "any", or the name of the only structure that the method is defined for.
      dense_phase: which steps are dense by design, in words; None if every step is sparse.
      starts_dense: whether the run starts dense by default.
      gradients: which gradients of weights the rule reads: "kept" (a sparse backward product would
        do), "updates" (all of them, but only where masks change), "all" (at every step).
      exact_budget: whether exactly as many weights as asked for are kept once the target is reached;
        if not, there may be fewer, or more by design.
      needs_momentum: whether the rule reads the momentum of the inner optimizer, which must have one.
    """

    name: str
    fn: Callable[..., optax.GradientTransformationExtraArgs]
    reference: str
    controls_sparsity: bool = True
    keeps_raw: bool = False
    dynamics: str = "dynamic"
    structures: str = "any"
    dense_phase: str | None = None
    starts_dense: bool = False
    gradients: str = "kept"
    exact_budget: bool = True
    needs_momentum: bool = False

    @property
    def options(self) -> frozenset[str]:
        """The names of the arguments of `fn` besides `inner`."""
        return frozenset(inspect.signature(self.fn).parameters) - {"inner"}

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return " ".join((inspect.getdoc(self.fn) or "").split("\n\n")[0].split())


_METHODS: dict[str, Method] = {}


def register(name: str, *, reference: str, **facts: Any):
    """Decorator: enters a method into `METHODS`."""

    def enter(fn):
        if name in _METHODS:
            raise ValueError(f"method {name!r} is registered twice")
        _METHODS[name] = Method(name, fn, reference, **facts)
        return fn

    return enter


class _Methods(Mapping[str, Method]):
    """Read-only; a wrong key names its neighbours."""

    def __getitem__(self, name: str) -> Method:
        if name not in _METHODS:
            close = difflib.get_close_matches(str(name), _METHODS, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise UnknownMethodError(
                f"unknown method {name!r}{hint} Methods are {', '.join(sorted(_METHODS))}"
            )
        return _METHODS[name]

    def __contains__(self, name: object) -> bool:
        return name in _METHODS

    def __iter__(self):
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)

    def __repr__(self) -> str:
        return f"METHODS({', '.join(sorted(_METHODS))})"


class UnknownMethodError(KeyError, ValueError):
    """A name that is not in `METHODS`."""

    def __str__(self) -> str:
        return str(self.args[0])


METHODS: Mapping[str, Method] = _Methods()


def make(name: str, inner: optax.GradientTransformation, **options: Any):
    """Builds the method `name` around `inner`: `METHODS[name].fn(inner, **options)`.

    >>> tx = make("static", optax.sgd(0.1), sparsity=0.5)

    Raises:
      ValueError: an unknown name (close ones are listed), an option that the method does not have.
    """
    method = METHODS[name]
    if options.get("sparsity") is not None and not method.controls_sparsity:
        raise ValueError(
            f"sparsity={options['sparsity']}: {name!r} cannot be asked for a sparsity; "
            f"{method.summary}"
        )
    unknown = sorted(set(options) - method.options)
    if unknown:
        raise ValueError(
            f"{name!r} has no option {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(sorted(method.options))}"
        )
    return method.fn(inner, **options)
