"""Trees of masks: apply, count, pack to bits, and find in the state of an optimizer.

A tree of masks has the structure of the parameters, a boolean array (True: the weight is kept) at
every sparse leaf and `None` at every dense one.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.core import Tracer

from jaxsparse.targets import named_leaves, select


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask as one bit per weight: `bits` is uint8, of the shape of the mask but for the packed
    axis, which has ceil(length / 8) bytes. The other axes stay, and with them their sharding.

    Attributes:
      bits: the bytes; the first of eight neighbours is the lowest bit.
      length: the length of the packed axis in the mask.
      axis: the packed axis, counted from the end.
    """

    bits: Array
    length: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mask."""
        shape = list(self.bits.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    def unpack(self) -> Array:
        """The boolean mask."""
        at = self.bits.ndim + self.axis
        apart = (jnp.expand_dims(self.bits, at + 1) >> _places(at, self.axis)) & 1
        whole = apart.reshape(*self.bits.shape[:at], -1, *self.bits.shape[at + 1 :])
        return lax.slice_in_dim(whole, 0, self.length, axis=at) != 0


def pack(mask: Array) -> PackedMask:
    """One bit per weight; `unpack` inverts it.

    Eight rows share their bytes, those of the last axis but one, wherever that wastes no more than
    another axis: TPUs hold eight rows in a register. Eight neighbours of the last axis would make
    XLA transpose the weights and the slots of the optimizer, at every step.

    >>> p = pack(jnp.array([[True, False], [False, True]]))
    >>> p.bits.tolist(), p.shape, p.unpack().tolist()
    ([[1, 2]], (2, 2), [[True, False], [False, True]])
    """
    _tell_flax()
    axes = [*range(-2, -mask.ndim - 1, -1), -1]
    axis = min(axes, key=lambda a: -(-mask.shape[a] // 8) * 8 / max(mask.shape[a], 1))
    at, length = mask.ndim + axis, mask.shape[axis]
    bytes_ = -(-length // 8)
    rows = jnp.pad(mask, [(0, 8 * bytes_ - n if a == at else 0) for a, n in enumerate(mask.shape)])
    apart = rows.reshape(*mask.shape[:at], bytes_, 8, *mask.shape[at + 1 :]).astype(jnp.uint8)
    bits = jnp.sum(apart << _places(at, axis), axis=at + 1, dtype=jnp.uint8)
    return PackedMask(bits, length, axis)


@functools.cache
def _tell_flax() -> None:
    """Lets `flax.serialization` store the bits; not at import, which would import all of Flax."""
    from flax import serialization

    serialization.register_serialization_state(
        PackedMask,
        lambda mask: {"bits": mask.bits},
        lambda mask, state: dataclasses.replace(mask, bits=state["bits"]),
    )


def _places(at: int, axis: int) -> Array:
    """0 to 7 along the axis after the packed one."""
    return jnp.arange(8, dtype=jnp.uint8).reshape(*[1] * (at + 1), 8, *[1] * (-axis - 1))


def unpack(mask):
    """The boolean mask of what a state holds: a bool array, a `PackedMask`, or None.

    Raises:
      ValueError: a `PackedMask` that `nnx.Optimizer` has taken apart.
    """
    if isinstance(mask, PackedMask):
        return mask.unpack()
    if taken_apart(mask):
        raise ValueError(
            "opt_state: masks packed by pack_masks=True lose their shapes inside nnx.Optimizer; give "
            "the method pack_masks=False to read them there"
        )
    return mask


def taken_apart(x) -> bool:
    """True at what `nnx.Optimizer` makes of a `PackedMask`: an `nnx.State` that holds its bits alone."""
    if not (isinstance(x, Mapping) and list(x) == ["bits"]):
        return False
    from flax import nnx

    return isinstance(x, nnx.State)


def is_mask(x) -> bool:
    """True at what stands at one leaf of a tree of masks."""
    return x is None or isinstance(x, PackedMask | optax.MaskedNode) or taken_apart(x)


def apply(params, masks):
    """`where(mask, p, 0)` at every masked leaf; NaN and infinities do not pass a mask.

    >>> apply({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})["w"].tolist()
    [1.0, 0.0]
    """

    def one(p, m):
        if m is None:
            return _own(p)
        return jnp.where(unpack(m), p, jnp.zeros((), p.dtype))

    leaves, treedef = jax.tree.flatten(params)
    masks = at_leaves(plain(masks), plain(params))
    return treedef.unflatten([one(p, m) for p, m in zip(leaves, masks)])


def _own(x):
    """A copy of an array, so that donating one deletes nothing else; under `jit` it costs nothing."""
    return jnp.copy(x) if isinstance(x, Array) else x


def at_leaves(tree, params) -> list:
    """What a tree of masks (or of values at sparse leaves) holds at each leaf of `params`, in their
    order; None where it has nothing. What is missing at a whole branch, such as one that
    `optax.partition` gives to another method, is missing at all its leaves.

    >>> params = {"a": {"b": jnp.ones(2), "w": jnp.ones(2)}, "c": jnp.ones(2)}
    >>> at_leaves({"a": optax.MaskedNode(), "c": jnp.ones(2)}, params)[:2]
    [None, None]
    """
    if _missing(tree):
        return [None] * len(jax.tree.leaves(params))
    branches, node = _one_level(params)
    if jax.tree_util.treedef_is_leaf(node):
        return [tree]
    pairs = zip(node.flatten_up_to(tree), branches)
    return [x for below, branch in pairs for x in at_leaves(below, branch)]


def _missing(x) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _one_level(node):
    """The children of a node, None among them, and its structure."""
    return jax.tree.flatten(node, is_leaf=lambda x: x is not node)


def count_kept(masks) -> int:
    """How many weights the (concrete) masks keep, over all sparse leaves.

    >>> count_kept({"w": jnp.array([True, False]), "b": None})
    1
    """
    found = [unpack(m) for m in jax.tree.leaves(masks, is_leaf=is_mask) if m is not None]
    return sum(int(np.count_nonzero(np.asarray(m))) for m in found)


def by_path(tree) -> dict[str, Any]:
    """What a tree of masks (or of values at sparse leaves) holds, by the path of the leaf."""
    return {path: x for path, x in named_leaves(tree, is_leaf=is_mask) if not _missing(x)}


def from_zeros(params, targets=None):
    """The masks of a model that is sparse already: True where a weight is not exactly 0. A leaf
    without any weight that is not (an adapter or a head at its start) is no pruned one: all of it
    is kept, so that it trains.

    >>> masks = from_zeros({"base": jnp.eye(2), "lora_b": jnp.zeros((2, 2))})
    >>> masks["base"].tolist(), masks["lora_b"].tolist()
    ([[True, False], [False, True]], [[True, True], [True, True]])
    """
    leaves, treedef = jax.tree.flatten(params)
    chosen = select(params, targets)
    return treedef.unflatten([nonzeros(p) if s.selected else None for p, s in zip(leaves, chosen)])


def nonzeros(w: Array) -> Array:
    """The mask of one leaf, see `from_zeros`."""
    kept = w != 0
    return kept | ~jnp.any(kept)


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


def plain(tree):
    """The tree of arrays behind what Flax users have at hand: an `nnx.Module` (its `nnx.Param`s), an
    `nnx.Optimizer` or a Linen `TrainState` (their optimizer state), any tree with NNX variables.

    >>> from flax import nnx
    >>> [x.shape for x in jax.tree.leaves(plain(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))]
    [(3,), (2, 3)]
    """
    from flax import nnx

    if not isinstance(tree, tuple):  # of optax's own states, which are tuples, the whole counts
        tree = getattr(tree, "opt_state", tree)
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    return nnx.as_pure(tree)


def _states(opt_state) -> list[SparseState]:
    found = find_states(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no state of a jaxsparse method; pass the state that "
            "jaxsparse.<method>(...).init(params) returned, alone or inside optax wrappers"
        )
    return found


def _merge(trees: list):
    """One tree from several that are None or MaskedNode where another has a leaf or a branch."""

    def merge(a, b):
        if _missing(a) or _missing(b) or isinstance(a, PackedMask):
            return (None if _missing(b) else b) if _missing(a) else a
        branches, node = _one_level(a)
        if jax.tree_util.treedef_is_leaf(node):
            return a
        return node.unflatten(map(merge, branches, node.flatten_up_to(b)))

    merged = functools.reduce(merge, trees, None)
    return jax.tree.map(lambda x: None if _missing(x) else x, merged, is_leaf=is_mask)


def get_masks(opt_state):
    """The tree of boolean masks of the methods inside `opt_state`; `None` at dense leaves (and at
    whole branches that `optax.partition` gives to no method with masks).

    Finds them in any nesting of optax wrappers, and merges the masks of several methods that share
    the leaves between them (`optax.partition`).

    Raises:
      ValueError: `opt_state` holds no state of a jaxsparse method, or packed masks that
        `nnx.Optimizer` has taken apart.
    """
    merged = _merge([s.masks for s in _states(opt_state)])
    return jax.tree.map(lambda m: _own(unpack(m)), merged, is_leaf=is_mask)


def get_raw_params(opt_state):
    """The tree of raw weights of methods that keep them, `None` at other leaves; `None` if no
    method inside `opt_state` keeps any.

    Raises:
      ValueError: `opt_state` holds no state of a jaxsparse method.
    """
    trees = [s.raw for s in _states(opt_state) if s.raw is not None]
    return jax.tree.map(_own, _merge(trees))


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
    return treedef.unflatten([_own(x) for x in leaves])


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
