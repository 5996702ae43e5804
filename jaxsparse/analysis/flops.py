"""Floating-point operations of a network, dense and sparse, and of training it.

The accounting is that of Evci et al., "Rigging the Lottery: Making All Tickets Winners" (2020),
appendix H: multiplications and additions of linear layers and convolutions count, everything else is
neglected; a layer of density d costs d times its dense operations; the backward pass is two more
products of that size, one for the gradient of the activations, one for that of the weights. With f_S
and f_D the operations of a forward pass of the sparse and of the dense network, a step costs

    3 f_D                                        dense
    3 f_S                                        fixed masks, SET, pruning (at the density of the step)
    (3 f_S T + 2 f_S + f_D) / (T + 1)            RigL, with a dense gradient every T steps
    2 f_S + f_D                                  a dense gradient at every step (straight-through)

These are operations that a sparse implementation would need. On hardware that multiplies by the
zeros, as most does, no time is saved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.extend import core

from jaxsparse.targets import path_name

# The operations through which a weight is still that weight.
_VIEWS = {
    "reshape", "transpose", "convert_element_type", "squeeze", "expand_dims", "broadcast_in_dim",
    "copy", "copy_p", "slice", "dynamic_slice", "rev", "reduce_precision", "optimization_barrier",
    "sharding_constraint",
}  # fmt: skip


def forward_flops(fn: Callable[..., Any], params: Any, *args: Any) -> dict[str, int]:
    """Operations of one evaluation of `fn(params, *args)`, by the leaf of `params` that they multiply.

    Nothing is computed: `fn` is traced, and its matrix products and convolutions are attributed to
    the leaf that one of their operands is a view of. Loops of known length (`scan`) count fully, a
    `while_loop` once, of the branches of a `cond` the most expensive.

    Args:
      fn: the forward pass.
      params: tree of arrays or `jax.ShapeDtypeStruct`s.
      *args: its other arguments, likewise. Use a batch of one for operations per example.

    Returns:
      Operations by path; under the empty path those without a leaf of `params`, such as the products
      of queries and keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> shape = jax.ShapeDtypeStruct
      >>> params = {"first": shape((40, 100), jnp.float32), "last": shape((100, 10), jnp.float32)}
      >>> net = lambda p, x: jax.nn.relu(x @ p["first"]) @ p["last"]
      >>> forward_flops(net, params, shape((1, 40), jnp.float32))
      {'first': 8000, 'last': 2000}
    """
    closed = jax.make_jaxpr(fn)(params, *args)
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    owners = [*names, *[None] * (len(closed.jaxpr.invars) - len(names))]
    total: Counter = Counter()
    _walk(closed.jaxpr, owners, 1, total)
    return {name: total[name] for name in [*names, ""] if total[name]}


def sparse_flops(dense: Mapping[str, int], density: Mapping[str, float]) -> float:
    """Operations of the forward pass with layers of these densities (1 where none is given).

    Example:
      >>> sparse_flops({"first": 8000, "last": 2000}, {"first": 0.1})
      2800.0
    """
    for name, d in density.items():
        if not 0 <= d <= 1:
            raise ValueError(f"density[{name!r}]={d}: must be between 0 and 1")
    return float(sum(flops * density.get(name, 1.0) for name, flops in dense.items()))


def training_flops(
    sparse: float,
    dense: float,
    weight_gradient: Literal["sparse", "dense"] | int = "sparse",
) -> float:
    """Operations of a training step, averaged over the steps.

    Args:
      sparse: operations of the forward pass of the sparse network, f_S.
      dense: those of the dense network, f_D.
      weight_gradient: `"sparse"` if the gradient is needed at the kept weights only; `"dense"` if at
        all weights in every step; a number T if at all weights once after T ordinary steps (RigL).

    Example:
      >>> training_flops(1.0, 10.0, "sparse"), training_flops(1.0, 10.0, "dense")
      (3.0, 12.0)
      >>> round(training_flops(1.0, 10.0, 100), 4)
      3.0891
    """
    if weight_gradient == "sparse":
        return 3.0 * sparse
    if weight_gradient == "dense":
        return 2.0 * sparse + dense
    if isinstance(weight_gradient, str) or weight_gradient < 1:
        raise ValueError(
            f"weight_gradient={weight_gradient!r}: must be 'sparse', 'dense' or a positive number of "
            "steps between dense gradients"
        )
    every = weight_gradient
    return (3.0 * sparse * every + 2.0 * sparse + dense) / (every + 1)


def _walk(jaxpr, owners, times, total) -> list[str | None]:
    """Adds the operations of `jaxpr` to `total`; returns the leaves that its outputs are views of."""
    owner = dict(zip(jaxpr.invars, owners))
    find = lambda v: None if isinstance(v, core.Literal) else owner.get(v)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [find(v) for v in eqn.invars]
        outputs: list[str | None] = [None] * len(eqn.outvars)
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            flops = 2 * math.prod(eqn.outvars[0].aval.shape) * inner
            total[inputs[0] or inputs[1] or ""] += times * flops
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            inner = math.prod(kernel) // features
            flops = 2 * math.prod(eqn.outvars[0].aval.shape) * inner
            total[inputs[1] or inputs[0] or ""] += times * flops
        elif name == "cond":
            counts = []
            for branch in eqn.params["branches"]:
                counts.append(Counter())
                outputs = _walk(branch.jaxpr, inputs[1:], times, counts[-1])
            total.update(max(counts, key=lambda c: c.total()))
        elif name == "while":
            skip = eqn.params["cond_nconsts"]
            _walk(eqn.params["body_jaxpr"].jaxpr, inputs[skip:], times, total)
        elif name in _VIEWS:
            outputs[0] = inputs[0]
        elif (inner := _inner_jaxpr(eqn)) is not None:
            length = eqn.params["length"] if name == "scan" else 1
            outputs = _walk(inner, inputs, times * length, total)
        owner.update(zip(eqn.outvars, outputs))
    return [find(v) for v in jaxpr.outvars]


def _inner_jaxpr(eqn):
    """The body of a call (`jit`, `scan`, `remat`, `custom_vjp`, ...), if its inputs are the call's."""
    for value in eqn.params.values():
        body = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if isinstance(body, core.Jaxpr) and len(body.invars) == len(eqn.invars):
            return body
    return None
