r"""What a layer of a network says, and what the network says if the layer says something else.

A site is the path of a submodule of an NNX or Linen model, `"layers/3"` or `"layers_3/mlp"`. NNX modules
are copied within the trace, and the copy of the one layer is given a class whose call is intercepted;
Linen has `intercept_methods`. The model itself is never changed.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from flax import linen, nnx
from jax import Array

Network = nnx.Module | tuple[linen.Module, Any]  # a Linen module comes with its variables
Part = Literal["output", "input"]

_HOOK: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("hook", default=None)


def sites(network: Network, *arguments: Any) -> list[str]:
    """The paths of all submodules at which activations can be read.

    Args:
      network: an NNX module, or a Linen module with its variables.
      *arguments: what a Linen module is called with; not used for NNX.

    >>> sites(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))))
    ['layers/0', 'layers/1']
    """
    if isinstance(network, tuple):
        found: list[str] = []

        def note(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name == "__call__" and path and path not in found:
                found.append(path)
            return call(*args, **kwargs)

        module, variables = network
        with linen.intercept_methods(note):
            jax.eval_shape(functools.partial(module.apply, variables), *arguments)
        return found
    return [_name(path) for path, x in nnx.iter_modules(network) if path and callable(x)]


def _name(path):
    return "/".join(str(p) for p in path)


def call(network: Network, *arguments: Any) -> Any:
    """The output of a network."""
    if isinstance(network, tuple):
        module, variables = network
        return module.apply(variables, *arguments)
    return network(*arguments)


def capture(network: Network, site: str, *arguments: Any, part: Part = "output") -> Array:
    """What a submodule returns, or what it is given.

    Args:
      network: an NNX module, or a Linen module with its variables.
      site: the submodule's path.
      *arguments: of the network's call.
      part: "output", or "input" for the first argument.

    Returns:
      The array, `[..., D]`. Of a submodule that is called several times: the last one.

    Raises:
      ValueError: no such site; close ones are named. Or it is not called, or gives no array.

    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
    >>> capture(model, "layers/0", jax.numpy.ones((5, 2))).shape
    (5, 3)
    """
    found = []

    def note(value):
        found.append(value)
        return value

    run(network, site, note, *arguments, part=part)
    return found[-1]


def run(
    network: Network,
    site: str,
    change: Callable[[Array], Array],
    *arguments: Any,
    part: Part = "output",
) -> Any:
    """The network's output if `change(value)` takes the place of a submodule's output or input.

    Args, Raises: as of `capture`.

    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), lambda x: 2 * x)
    >>> run(model, "layers/0", jax.numpy.ones_like, jax.numpy.ones((1, 2))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    if part not in ("output", "input"):
        raise ValueError(f'part={part!r}: give "output" or "input"')
    called = []

    def intercept(function, args, kwargs):
        called.append(site)
        if part == "input":
            return function(_array(change, args[0], site), *args[1:], **kwargs)
        return _array(change, function(*args, **kwargs), site)

    if isinstance(network, tuple):
        result = _run_linen(network, site, intercept, arguments, called)
    else:
        copy = nnx.merge(*nnx.split(network))
        with _intercepted(copy, site, intercept):
            result = copy(*arguments)
    if not called:
        names = sites(network, *arguments)
        raise ValueError(f"site={site!r}: {_advice(site, names)}")
    return result


def _array(change, value, site):
    if not isinstance(value, jax.Array):
        raise ValueError(f"site={site!r}: gives {type(value).__name__}, not one array")
    new = change(value)
    return value if new is None else new


def _run_linen(network, site, intercept, arguments, called):
    module, variables = network

    def method(call, args, kwargs, context):
        if context.method_name == "__call__" and "/".join(context.module.path) == site:
            return intercept(call, args, kwargs)
        return call(*args, **kwargs)

    with linen.intercept_methods(method):
        return module.apply(variables, *arguments)


@contextlib.contextmanager
def _intercepted(model: nnx.Module, site: str, intercept: Callable) -> Iterator[None]:
    """Gives one submodule of a model, which is a copy, a class whose call goes through `intercept`."""
    modules = {_name(path): x for path, x in nnx.iter_modules(model) if path and callable(x)}
    if site not in modules:
        raise ValueError(f"site={site!r}: {_advice(site, modules)}")
    layer = modules[site]
    object.__setattr__(layer, "__class__", _subclass(type(layer)))
    token = _HOOK.set(intercept)
    try:
        yield
    finally:
        _HOOK.reset(token)


@functools.cache
def _subclass(kind: type) -> type:
    def __call__(self, *args, **kwargs):
        hook = _HOOK.get()
        function = functools.partial(kind.__call__, self)
        return function(*args, **kwargs) if hook is None else hook(function, args, kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__})


def _advice(site, names):
    close = difflib.get_close_matches(site, names, n=3, cutoff=0.4)
    if site in names:
        return "is not called when the network runs; name a submodule that is"
    return f"no such layer; close ones are {close or sorted(names)[:5]}"
