"""The registry of methods: what contract tests, sweeps and the catalogue need to know of each."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

Dynamics = Literal["none", "fixed", "gradual", "dynamic", "projected"]
Structures = Literal["any", "any but n:m", "unstructured", "n:m", "fan_in", "groups"]
Gradients = Literal["kept", "updates", "all"]
Timing = Callable[[Mapping[str, Any]], Mapping[str, Any]]


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
      structures: which structures `structure=` takes: "any", "any but n:m", "n:m"; of methods without
        that option what their masks are: "unstructured", "fan_in", "groups" (whole channels, those of
        `groups=`).
      dense_phase: which steps are dense by design, in words; None if every step is sparse.
      starts_dense: whether the run starts dense by default.
      gradients: which gradients of weights the rule reads: "kept" (a sparse backward product would
        do), "updates" (all of them, but only where masks change), "all" (at every step).
      exact_budget: whether exactly as many weights as asked for are kept once the target is reached;
        if not, there may be fewer, or more by design.
      needs_momentum: whether the rule reads the momentum of the inner optimizer, which must have one.
      fixed: the options that the name stands for, of a preset of another method.
      timing: the options whose defaults depend on others (`end_step` on `total_steps`), as they are in
        a run with given options.
    """

    name: str
    fn: Callable[..., optax.GradientTransformationExtraArgs]
    reference: str
    controls_sparsity: bool = True
    keeps_raw: bool = False
    dynamics: Dynamics = "dynamic"
    structures: Structures = "any"
    dense_phase: str | None = None
    starts_dense: bool = False
    gradients: Gradients = "kept"
    exact_budget: bool = True
    needs_momentum: bool = False
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timing: Timing | None = None

    @property
    def options(self) -> frozenset[str]:
        """The names of the arguments of `fn` besides `inner`."""
        return frozenset(inspect.signature(self.fn).parameters) - {"inner"}

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return " ".join((inspect.getdoc(self.fn) or "").split("\n\n")[0].split())

    def resolved(self, **options: Any) -> dict[str, Any]:
        """The options that a run with `options` has: those given, the defaults of the others, and in
        place of defaults that depend on the run (`begin_step=None`) what they come to.

        Args:
          **options: as `make` takes them; those that the method does not have are left out, so that
            one call serves all methods.

        Returns:
          A value for every name in `self.options`.

        >>> found = METHODS["rigl"].resolved(sparsity=0.9, total_steps=1000)
        >>> found["update_every"], found["begin_step"], found["end_step"]
        (100, 100, 750)

        Raises:
          ValueError: an option that the method needs is missing, a step out of range.
        """
        signature = inspect.signature(self.fn).parameters
        defaults = {name: signature[name].default for name in sorted(self.options)}
        found = defaults | {k: v for k, v in options.items() if k in defaults}
        missing = [name for name, value in found.items() if value is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"{self.name!r} needs {', '.join(missing)}: give it to resolved")
        if self.timing is not None:
            found |= self.timing({**self.fixed, **found})
        return {name: found[name] for name in defaults}


_METHODS: dict[str, Method] = {}


def register(name: str, *, reference: str, **facts: Any):
    """Decorator: enters a method into `METHODS`; `facts` are fields of `Method`."""

    def enter(fn):
        _enter(Method(name, fn, reference, **facts))
        return fn

    return enter


def preset(
    name: str,
    of: Callable[..., optax.GradientTransformationExtraArgs],
    doc: str,
    *,
    reference: str,
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Enters into `METHODS` what is published under a name of its own and is another method with some
    options `fixed`, or with other `defaults`. `facts` are fields of `Method`."""
    fn: Any = functools.partial(of, **fixed, **(defaults or {}))
    fn.__name__ = fn.__qualname__ = name
    fn.__module__, fn.__doc__ = of.__module__, doc
    signature = inspect.signature(fn)
    open_ = [p for p in signature.parameters.values() if p.name not in fixed]
    fn.__signature__ = signature.replace(parameters=open_)
    _enter(Method(name, fn, reference, fixed=dict(fixed), **facts))
    return fn


def _enter(method: Method) -> None:
    if method.name in _METHODS:
        raise ValueError(f"method {method.name!r} is registered twice")
    _METHODS[method.name] = method


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
