"""A model as a function of its arrays, whatever framework it was written in."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr

from jaxsparse.targets import named_leaves


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model taken apart.

    Attributes:
      params: the tree of all its arrays: parameters, statistics, what else there is.
      apply: `apply(params, *args)`, evaluated as in serving (no dropout, running averages).
      args: the example inputs.
      kind: "nnx", "linen", "module" (a callable tree, as Equinox makes them) or "function".
      model: the object that was given.
    """

    params: chex.ArrayTree
    apply: Callable[..., object]
    args: tuple[object, ...]
    kind: str
    model: object

    def named(self) -> list[tuple[str, jax.Array]]:
        """Path and leaf of all that is an array."""
        return [(path, leaf) for path, leaf in named_leaves(self.params) if is_array(leaf)]

    def trained(self) -> frozenset[str]:
        """The paths of floating-point parameters, without statistics that are kept beside them."""
        tree: Any = self.params
        if self.kind == "nnx":
            named = named_leaves(nnx.filter_state(tree, nnx.Param))
        elif self.kind == "linen" and "params" in tree:
            named = [(f"params/{path}", leaf) for path, leaf in named_leaves(tree["params"])]
        else:
            named = self.named()
        return frozenset(
            p for p, leaf in named if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        )

    def jaxpr(self) -> tuple[ClosedJaxpr, int]:
        """The trace of `apply`, its inputs the arrays of `params` in their order, then those of `args`; and the
        number of the former.

        Raises:
          ValueError: if the model does not run on its example inputs.
        """
        leaves, fill = _arrays((self.params, self.args))
        try:
            closed = jax.make_jaxpr(lambda leaves: self._run(fill, leaves))(leaves)
        except Exception as error:
            shapes = [str(getattr(leaf, "shape", leaf)) for leaf in jax.tree.leaves(self.args)]
            raise ValueError(
                f"model: it does not run on the example inputs of shape {', '.join(shapes) or '()'}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return closed, len(self.named())

    def output(self) -> list[jax.Array]:
        """The arrays that the model returns on its example inputs."""
        leaves, fill = _arrays((self.params, self.args))
        return jax.jit(lambda leaves: self._run(fill, leaves))(leaves)

    def _run(self, fill, leaves) -> list[jax.Array]:
        params, args = fill(leaves)
        return [x for x in jax.tree.leaves(self.apply(params, *args)) if is_array(x)]


def adapt(model: object, args: Sequence[object], params: chex.ArrayTree | None = None) -> Adapted:
    """Takes a model apart. `args` are its example inputs; for a function and for a Linen module the first of
    them is its parameters. With `params`, these take the place of the model's own.

    Raises:
      ValueError: if `model` is none of what is known.
    """
    if isinstance(model, type):
        raise ValueError(f"model: {model.__name__} is a class; give an instance of it")
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(serving(model))
        apply = lambda state, *args: nnx.merge(graph, state)(*args)
        return Adapted(state if params is None else params, apply, tuple(args), "nnx", model)
    linen = sys.modules.get("flax.linen")
    is_linen = linen is not None and isinstance(model, linen.Module)
    if not is_linen and any(map(is_array, jax.tree.leaves(model))):
        if not callable(model):
            raise ValueError(
                "model: a tree of parameters needs its function: give (apply_fn, params, *inputs)"
            )
        whole: Any = model if params is None else params
        return Adapted(whole, lambda m, *args: m(*args), tuple(args), "module", model)
    if not (is_linen or callable(model)):
        raise ValueError(
            f"model: {type(model).__name__} is no Flax module and no function; give a model, or "
            "(apply_fn, params, *inputs)"
        )
    if not args and params is None:
        raise ValueError(
            "params: a function needs its parameters: give (apply_fn, params, *inputs)"
        )
    own: Any
    if is_linen and not isinstance(args[0] if params is None else params, Mapping):
        raise ValueError(
            f"params: {type(model).__name__} is a Linen module and needs its variables, as init returns them: give "
            "(module, variables, *inputs), or params="
        )
    own, inputs = (args[0], args[1:]) if params is None else (params, args)
    apply: Any = getattr(model, "apply") if is_linen else model  # noqa: B009 - of no common type
    return Adapted(own, apply, tuple(inputs), "linen" if is_linen else "function", model)


def serving(model: nnx.Module) -> nnx.Module:
    """The model as it serves: no dropout, running averages of batch norms. Its variables are shared."""
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def is_array(x: object) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _arrays(tree) -> tuple[list, Callable[[Sequence], tuple]]:
    """The arrays of a tree, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def fill(arrays):
        filled = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(structure, filled)

    return [leaves[i] for i in places], fill
