"""Floating-point operations of a network, dense and sparse, and of training it; bytes that they move.

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
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
from jax.extend import core

from jaxsparse.analysis import memory
from jaxsparse.targets import named_leaves

# The operations through which a weight is still that weight.
_VIEWS = {
    "reshape",
    "transpose",
    "convert_element_type",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "copy",
    "copy_p",
    "slice",
    "dynamic_slice",
    "rev",
    "reduce_precision",
    "optimization_barrier",
    "sharding_constraint",
}


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
    found = _products(fn, params, args)
    return {leaf: sum(p.flops for p in ps) for leaf, ps in found.items()}


class Traffic(NamedTuple):
    """Bytes of the weights and of the activations (read and written) of a layer's products."""

    weights: int
    activations: int


def forward_bytes(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    density: Mapping[str, float] | None = None,
) -> dict[str, Traffic]:
    """Bytes that the products of `fn(params, *args)` move, by the leaf of `params` that they multiply:
    each product reads its two operands once and writes its result once, in their dtypes. What lies
    between products is taken to be fused into them. `forward_flops` divided by the sum is the
    arithmetic intensity, which says whether a layer waits for memory.

    Args:
      fn, params, *args: as for `forward_flops`, and traced in the same way.
      density: of the sparse leaves, by path (`dynamics.density(masks)`): their weights count as many
        bytes as the smallest of the formats of `memory.stored_bytes` takes.

    Returns:
      By path; under the empty path the products without a leaf of `params`, as activations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
      >>> net = lambda p, x: x @ p["w"]
      >>> forward_bytes(net, {"w": shape(100, 10)}, shape(1, 100))
      {'w': Traffic(weights=4000, activations=440)}
      >>> forward_bytes(net, {"w": shape(100, 10)}, shape(1, 100), density={"w": 0.1})
      {'w': Traffic(weights=525, activations=440)}

    Raises:
      ValueError: a density that is not in [0, 1].
    """
    density = _checked(density or {})

    def weights(leaf: str, p: _Product) -> int:
        kept = round(p.size * density.get(leaf, 1.0))
        return p.times * min(memory.stored_bytes(p.size, kept, p.itemsize).values())

    return {
        leaf: Traffic(sum(weights(leaf, p) for p in ps), sum(p.activations for p in ps))
        for leaf, ps in _products(fn, params, args).items()
    }


def sparse_flops(dense: Mapping[str, int], density: Mapping[str, float]) -> float:
    """Operations of the forward pass with layers of these densities (1 where none is given). Those of
    masks are `dynamics.density(masks)`.

    Example:
      >>> sparse_flops({"first": 8000, "last": 2000}, {"first": 0.1})
      2800.0

    Raises:
      ValueError: a density that is not in [0, 1].
    """
    _checked(density)
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


def _checked(density: Mapping[str, float]) -> Mapping[str, float]:
    for name, d in density.items():
        if not 0 <= d <= 1:
            raise ValueError(f"density[{name!r}]={d}: must be between 0 and 1")
    return density


class _Product(NamedTuple):
    """One product of the trace, evaluated `times` times; `flops` and `activations` are of all times.
    `size` and `itemsize` are of the operand that is a view of `leaf`, 0 if none is."""

    leaf: str
    times: int
    flops: int
    activations: int
    size: int
    itemsize: int


def _products(fn, params, args) -> dict[str, list[_Product]]:
    """By leaf, in the order of the leaves; products without a leaf last."""
    closed = jax.make_jaxpr(fn)(params, *args)
    names = [path for path, _ in named_leaves(params)]
    owners = [*names, *[None] * (len(closed.jaxpr.invars) - len(names))]
    found: list[_Product] = []
    _walk(closed.jaxpr, owners, 1, found)
    by_leaf = {name: [p for p in found if p.leaf == name] for name in [*names, ""]}
    return {leaf: products for leaf, products in by_leaf.items() if products}


def _product(eqn, inner: int, leaves, times: int) -> _Product:
    """`inner` is the length of the sums; `leaves` are the owners of the operands, the likelier one to
    be the weights first."""
    bytes_of = lambda v: math.prod(v.aval.shape) * v.aval.dtype.itemsize
    (out,) = eqn.outvars
    moved = sum(map(bytes_of, (*eqn.invars[:2], out)))
    weights = next((v for leaf, v in leaves if leaf is not None), None)
    return _Product(
        next((leaf for leaf, _ in leaves if leaf is not None), ""),
        times,
        times * 2 * math.prod(out.aval.shape) * inner,
        times * (moved - (bytes_of(weights) if weights is not None else 0)),
        math.prod(weights.aval.shape) if weights is not None else 0,
        weights.aval.dtype.itemsize if weights is not None else 0,
    )


def _walk(jaxpr, owners, times, found) -> list[str | None]:
    """Adds the products of `jaxpr` to `found`; returns the leaves that its outputs are views of."""
    owner = dict(zip(jaxpr.invars, owners))
    find = lambda v: None if isinstance(v, core.Literal) else owner.get(v)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [find(v) for v in eqn.invars]
        outputs: list[str | None] = [None] * len(eqn.outvars)
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            found.append(_product(eqn, inner, [*zip(inputs, eqn.invars)], times))
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            inner = math.prod(kernel) // features
            found.append(_product(eqn, inner, [*zip(inputs, eqn.invars)][::-1], times))
        elif name == "cond":
            branches: list[list[_Product]] = []
            for branch in eqn.params["branches"]:
                branches.append([])
                outputs = _walk(branch.jaxpr, inputs[1:], times, branches[-1])
            found += max(branches, key=lambda ps: sum(p.flops for p in ps))
        elif name == "while":
            skip = eqn.params["cond_nconsts"]
            _walk(eqn.params["body_jaxpr"].jaxpr, inputs[skip:], times, found)
        elif name in _VIEWS:
            outputs[0] = inputs[0]
        elif (inner := _inner_jaxpr(eqn)) is not None:
            length = eqn.params["length"] if name == "scan" else 1
            outputs = _walk(inner, inputs, times * length, found)
        owner.update(zip(eqn.outvars, outputs))
    return [find(v) for v in jaxpr.outvars]


def _inner_jaxpr(eqn):
    """The body of a call (`jit`, `scan`, `remat`, `custom_vjp`, ...), if its inputs are the call's."""
    for value in eqn.params.values():
        body = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if isinstance(body, core.Jaxpr) and len(body.invars) == len(eqn.invars):
            return body
    return None
