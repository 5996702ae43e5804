"""A model as a function of its parameters: modules of NNX and Linen, and plain functions.

| model | called as | parameters |
|---|---|---|
| an `nnx.Module` | `model(*batch)` | its `nnx.Param` variables |
| `(module, params)` of Linen | `module.apply({"params": params}, *batch)` | `params` |
| `(module, variables)`, with a key "params" | `module.apply(variables, *batch)` | `variables` |
| `(function, params)` | `function(params, *batch)` | `params` |

A batch that is a tuple or a list is the positional arguments, a mapping the keyword arguments, anything
else the one argument. `forward=` replaces the call: `forward(model, batch)`, where for a pair `model` is a
function of the batch's arguments with the parameters bound.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxsparse import targets

Forward = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """`function(params, batch)`; `rebuild(params)` is a model like the one that was given."""

    function: Callable[[Any, Any], Any]
    params: Any
    rebuild: Callable[[Any], Any]

    def named(self) -> list[tuple[str, Any]]:
        """Paths and leaves of the parameters."""
        return targets.named_leaves(self.params)


def call(model: Callable, batch: Any) -> Any:
    """The model's outputs for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def of(model: Any, forward: Forward | None = None) -> Model:
    """The model as a function.

    Args:
      model: see the table above.
      forward: in place of the call.

    Returns:
      The function, its parameters, and the way back.

    Raises:
      ValueError: none of these; and, when the function is called, an NNX module that changes itself.
    """
    import flax.linen as nn
    from flax import nnx
    from flax.errors import TraceContextError

    forward = forward or call
    if isinstance(model, nnx.Module):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def function(params: Any, batch: Any) -> Any:
            try:
                return forward(nnx.merge(graph, params, rest), batch)
            except TraceContextError as error:
                raise ValueError(
                    "model: it changes its own variables when it is called, as dropout and batch norms do while "
                    "training; call model.eval() first"
                ) from error

        return Model(
            function,
            params,
            lambda params: nnx.merge(graph, params, rest),
        )
    if not (
        isinstance(model, tuple)
        and len(model) == 2
        and callable(getattr(model[0], "apply", model[0]))
    ):
        raise ValueError(
            f"model={type(model).__name__}: give an nnx.Module, (linen module, params) or "
            "(function, params)"
        )
    function, params = model
    if isinstance(function, nn.Module):
        whole = isinstance(params, Mapping) and "params" in params
        apply = function.apply
        bind = lambda p: functools.partial(apply, p if whole else {"params": p})
    else:
        bind = lambda p: functools.partial(function, p)
    return Model(
        lambda params, batch: forward(bind(params), batch),
        params,
        lambda params: (function, params),
    )
