"""The state of every method, and what is read from it wherever it is nested: masks, raw weights, the
sparse network, and whether a network still is what its masks say."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jaxsparse.masking import (
    PackedMask,
    at_leaves,
    is_mask,
    missing,
    one_level,
    owned,
    plain,
    unpack,
)
from jaxsparse.targets import named_leaves


class SparseState(NamedTuple):
    """The state of every method of the library.

    The parameters that the model sees are a function of it: `where(mask, p, 0)` for methods that
    hold masks, `where(mask, scale sign(z) (|z| - shift), 0)` for those that hold raw weights z.

    Attributes:
      count: int32 scalar, updates done.
      masks: tree of masks as they are stored: boolean arrays, or `PackedMask` with
        `pack_masks=True`.
      raw: tree of raw weights z at sparse leaves, or None.
      shift: tree of thresholds that are subtracted from |z|, or None (0).
      scale: tree of factors per leaf or per output, or None (1).
      inner: the state of the inner optimizer.
      aux: what a method keeps besides (counters, thresholds in training), or None.
    """

    count: Array
    masks: Any
    raw: Any
    shift: Any
    scale: Any
    inner: Any
    aux: Any


def find_states(opt_state) -> list[SparseState]:
    """Every `SparseState` inside an optimizer state, however deeply wrapped."""
    found = []

    def visit(node):
        for x in jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, SparseState)):
            if isinstance(x, SparseState):
                found.append(x)
                visit(x.inner)

    visit(plain(opt_state))
    return found


def _states(opt_state) -> list[SparseState]:
    found = find_states(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no state of a jaxsparse method; pass the state that "
            "jaxsparse.<method>(...).init(params) returned, alone or inside optax wrappers"
        )
    return found


def _merge(trees: list, join: Callable[[Any, Any], Any] = lambda a, _: a):
    """One tree from several that are None or MaskedNode where another has a leaf or a branch; `join`
    of the values where several have a leaf."""

    def merge(a, b):
        if missing(a) or missing(b):
            return (None if missing(b) else b) if missing(a) else a
        if isinstance(a, PackedMask):
            return join(a, b)
        branches, node = one_level(a)
        if jax.tree_util.treedef_is_leaf(node):
            return join(a, b)
        return node.unflatten(map(merge, branches, node.flatten_up_to(b)))

    merged = functools.reduce(merge, trees, None)
    return jax.tree.map(lambda x: None if missing(x) else x, merged, is_leaf=is_mask)


def get_masks(opt_state):
    """The tree of boolean masks of the methods inside `opt_state`; `None` at dense leaves (and at
    whole branches that `optax.partition` gives to no method with masks).

    Finds them in any nesting of optax wrappers, and merges the masks of several methods that share
    the leaves between them (`optax.partition`). Where one method wraps another, a weight is kept that
    both keep.

    Raises:
      ValueError: `opt_state` holds no state of a jaxsparse method, or packed masks that
        `nnx.Optimizer` has taken apart.
    """
    return jax.tree.map(lambda m: owned(unpack(m)), _in_force(_states(opt_state)), is_leaf=is_mask)


def _in_force(states: list[SparseState]):
    return _merge([s.masks for s in states], lambda a, b: unpack(a) & unpack(b))


def masks_of_inner(opt_state, params) -> list | None:
    """The masks of the methods inside an inner optimizer's state, at the leaves of `params` (None
    where there are none); None if it holds no such method."""
    states = find_states(opt_state)
    return at_leaves(_in_force(states), params) if states else None


def get_raw_params(opt_state):
    """The tree of raw weights of methods that keep them, `None` at other leaves; `None` if no
    method inside `opt_state` keeps any.

    Raises:
      ValueError: `opt_state` holds no state of a jaxsparse method.
    """
    trees = [s.raw for s in _states(opt_state) if s.raw is not None]
    return jax.tree.map(owned, _merge(trees))


def project(z: Array, mask: Array, shift=None, scale=None, dtype=None) -> Array:
    r"""$S(z) = scale \cdot sign(z)\,relu(|z| - shift)$ where `mask`, 0 elsewhere."""
    p = z if shift is None else jnp.sign(z) * jnp.maximum(jnp.abs(z) - shift, 0)
    p = p if scale is None else p * scale
    return jnp.where(mask, p, jnp.zeros((), p.dtype)).astype(dtype or z.dtype)


def apply_masks(params, opt_state):
    """The sparse network of this state: what `params` are after an update, for the forward pass
    before the first one.

    Masked methods: `where(mask, p, 0)`. Methods that keep raw weights z: S(z).

    >>> import jaxsparse, optax
    >>> params = {"kernel": jnp.ones((4, 4))}
    >>> tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.75)
    >>> int((jaxsparse.apply_masks(params, tx.init(params))["kernel"] != 0).sum())
    4

    Raises:
      ValueError: `opt_state` holds no state of a jaxsparse method.
    """
    leaves, treedef = jax.tree.flatten(params)
    arrays = plain(params)  # leaf by leaf the same, without NNX variables
    read = lambda tree: at_leaves(tree, arrays)
    _warn_of_leaks(params, opt_state)
    for state in _states(opt_state):
        rows = zip(leaves, read(state.masks), read(state.raw), read(state.shift), read(state.scale))
        leaves = [
            p if m is None else project(p if z is None else z, unpack(m), shift, scale, p.dtype)
            for p, m, z, shift, scale in rows
        ]
    # Dense leaves, too, are copies: a result may be donated while its argument is still used.
    return treedef.unflatten([owned(x) for x in leaves])


def leaks(params, opt_state) -> dict[str, Array]:
    """How many weights outside the masks are not 0 (int32), by the path of the leaf; {} for a state
    of no method with masks."""
    tree = plain(params)
    kept = at_leaves(get_masks(opt_state), tree) if find_states(opt_state) else []
    return {
        path: jnp.sum(~m & (p != 0), dtype=jnp.int32)
        for (path, p), m in zip(named_leaves(tree), kept)
        if m is not None
    }


def _warn_of_leaks(params, opt_state) -> None:
    """Warns of weights outside the masks that an update has left."""
    values = jax.tree.leaves((params, opt_state))
    if any(isinstance(x, Tracer) for x in values):
        return
    if not all(int(jnp.max(s.count)) > 0 for s in find_states(opt_state)):
        return  # before the first update a network may be dense
    found = {path: int(n) for path, n in leaks(params, opt_state).items() if int(n) > 0}
    if found:
        path, n = next(iter(found.items()))
        warnings.warn(
            f"params: {n} weights of {path!r} outside of its mask are not 0, after updates that made "
            f"them 0 ({len(found)} such leaves): {ORDER}",
            stacklevel=3,
        )


ORDER = (
    "a transformation after the method, or an average around it, changes its updates; put clipping, "
    "scaling and decay inside, method(optax.chain(clip, adam), ...), and average masked weights with "
    "apply_masks"
)


def check(params, opt_state) -> Array:
    """Whether `params` are exactly sparse: every weight outside the masks is 0.

    A transformation that stands after a method in `optax.chain`, or an average around it, changes
    the updates that would have made pruned weights exactly 0. Clipping, scaling, decay and averages
    belong inside: `jaxsparse.rigl(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), ...)`.

    Args:
      params: the parameters, after at least one update (or `apply_masks`).
      opt_state: the optimizer state that belongs to them.

    Returns:
      A bool scalar; usable under `jit`, in a training loop, as a metric.

    >>> import jaxsparse, optax
    >>> tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.75)
    >>> params = {"kernel": jnp.ones((4, 4))}
    >>> state = tx.init(params)
    >>> bool(check(params, state)), bool(check(jaxsparse.apply_masks(params, state), state))
    (False, True)

    Raises:
      ValueError: `opt_state` holds no state of a jaxsparse method.
    """
    _states(opt_state)  # raises where there is none
    found = list(leaks(params, opt_state).values())
    return jnp.sum(jnp.stack(found)) == 0 if found else jnp.ones((), bool)
