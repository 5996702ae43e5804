"""Trees of masks: apply, count, pack to bits.

A tree of masks has the structure of the parameters, a boolean array (True: the weight is kept) at
every sparse leaf and `None` at every dense one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jaxsparse.targets import named_leaves, select


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
            return owned(p)
        return jnp.where(unpack(m), p, jnp.zeros((), p.dtype))

    leaves, treedef = jax.tree.flatten(params)
    masks = at_leaves(plain(masks), plain(params))
    return treedef.unflatten([one(p, m) for p, m in zip(leaves, masks)])


def owned(x):
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
    if missing(tree):
        return [None] * len(jax.tree.leaves(params))
    branches, node = one_level(params)
    if jax.tree_util.treedef_is_leaf(node):
        return [tree]
    pairs = zip(node.flatten_up_to(tree), branches)
    return [x for below, branch in pairs for x in at_leaves(below, branch)]


def missing(x) -> bool:
    """True where a tree of masks has nothing for a leaf or a branch."""
    return x is None or isinstance(x, optax.MaskedNode)


def one_level(node):
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
    return {path: x for path, x in named_leaves(tree, is_leaf=is_mask) if not missing(x)}


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
