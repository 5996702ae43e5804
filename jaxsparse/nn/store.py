"""`store`: a run under masks goes on as a run of what is stored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsparse.masking import by_path
from jaxsparse.nn._linear import Trained
from jaxsparse.nn._stored_rules import recipe_of
from jaxsparse.nn._stored_tree import find
from jaxsparse.nn.block_sparse_linear import BlockSparseLinear
from jaxsparse.nn.compact import replace_module
from jaxsparse.nn.condensed import CondensedLinear
from jaxsparse.nn.stored import StoredState, stored
from jaxsparse.state import find_states, get_masks
from jaxsparse.targets import named_leaves
from pallas_kernels import BlockSparse


def store(
    model: nnx.Module,
    opt_state,
    inner: optax.GradientTransformation,
    *,
    block_shape: tuple[int, int] | None = None,
    candidates: float | int = 1.0,
    sketch: tuple[int, int] | None = None,
    groups: int = 1,
    **options: Any,
) -> tuple[nnx.Module, optax.GradientTransformationExtraArgs, StoredState]:
    """Takes a run under masks to where it is trained as stored, at the step where it stands: its masked
    linear layers become `BlockSparseLinear` or `CondensedLinear`, and the slots of the inner optimizer
    those of what is stored. With the same rule, options and seed it goes on along the same trajectory,
    if all is a candidate for growth.

    Args:
      model: as trained; it stays as it is.
      opt_state: the state of its masked method, or the `nnx.Optimizer`.
      inner: the inner optimizer of the method, the same as before.
      block_shape: of masks of blocks; None: weights are stored one by one, for masks of constant fan-in, or of
        any kind: each output then keeps its number of weights.
      candidates: what growth by gradient chooses from, see the layers; 0 of single weights: no such growth.
      sketch: of blocks, for rule="momentum"; see `BlockSparseLinear`. The momentum starts at 0.
      groups, **options: of `stored`: rule, total_steps, and so on.

    Returns:
      The new model, the transformation `stored(inner, ...)`, and its state. For an `nnx.Optimizer`:
      `optimizer = nnx.Optimizer(model, tx, wrt=Trained)`, then
      `nnx.update(optimizer.opt_state, nnx.state(state))`.

    Raises:
      ValueError: a state without masks or with several methods; a mask that is no union of blocks, of
        nothing, or of a leaf that is not the kernel of an `nnx.Linear`; a sketch for another rule; the options of
        `stored`.

    >>> import jaxsparse
    >>> model = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    >>> options = dict(total_steps=100, update_every=10)
    >>> adam = optax.adam(1e-3)
    >>> tx = jaxsparse.rigl(adam, 0.75, structure="block:8x8", **options)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> sparse, tx, state = store(model, optimizer, adam, block_shape=(8, 8), rule="rigl", **options)
    >>> sparse.values.shape
    (4, 8, 8)
    """
    if sketch is not None and (rule := options.get("rule", "rigl")) != "momentum":
        raise ValueError(
            f"sketch={sketch!r}: rule={rule!r} does not read it, 'momentum' would; leave it out"
        )
    found = find_states(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds the states of {len(found)} methods; give that of one masked method"
        )
    (masked,) = found
    new, masks = nnx.clone(model), by_path(get_masks(opt_state))
    modules = {"/".join(map(str, path)): (path, m) for path, m in nnx.iter_modules(new)}
    for path, mask in masks.items():
        parent, _, name = path.rpartition("/")
        at, linear = modules.get(parent, ((), None))
        if name != "kernel" or type(linear) is not nnx.Linear:
            raise ValueError(
                f"model: {path!r} has a mask and is not the kernel of an nnx.Linear; keep it dense with "
                "targets="
            )
        layer = _layer(path, linear, np.asarray(mask), block_shape, candidates, sketch)
        new = replace_module(new, at, layer)
    params = nnx.as_pure(nnx.state(new, Trained))
    tx = stored(inner, groups=groups, **options)
    state: Any = tx.init(params)
    tree, recipe = find(params, groups), recipe_of(options.pop("rule", "rigl"), **options)
    matrices = {m.leaf.path: m for m in tree.matrices}
    for path in masks:
        _, layer = next(x for x in nnx.iter_modules(new) if _joined(x[0]) == _parent(path))
        assert isinstance(layer, BlockSparseLinear | CondensedLinear)
        layer.due[...] = recipe.flags(matrices[path], masked.count)
    inner_state = _slots(masked.inner, state.inner, params, masks)
    return new, tx, state._replace(count=jnp.copy(masked.count), inner=inner_state)


def _layer(
    path: str, linear: nnx.Linear, mask: np.ndarray, block_shape, candidates, sketch
) -> BlockSparseLinear | CondensedLinear:
    if not mask.any():
        raise ValueError(f"the mask of {path!r} keeps nothing, and a layer stores something")
    if block_shape is None:
        if sketch is not None:
            raise ValueError(f"sketch={sketch!r}: is one of blocks; give block_shape= as well")
        return CondensedLinear.from_dense(linear, jnp.asarray(mask), candidates=candidates)
    (rows, cols), (bh, bw) = mask.shape, block_shape
    if rows % bh or cols % bw:
        raise ValueError(f"block_shape={tuple(block_shape)} does not tile {path!r}, {mask.shape}")
    tiles = mask.reshape(rows // bh, bh, cols // bw, bw)
    if (tiles.all((1, 3)) != tiles.any((1, 3))).any():
        raise ValueError(
            f"block_shape={tuple(block_shape)}: the mask of {path!r} is no union of such blocks; give "
            "the blocks that the masked method had"
        )
    return BlockSparseLinear.from_dense(
        linear, jnp.asarray(mask), block_shape=(bh, bw), candidates=candidates, sketch=sketch
    )


def _slots(before, after, params, masks):
    """The inner state `after` of the stored run, filled with the values of that `before`, under masks."""
    kernels = {f"{_parent(path)}/values".lstrip("/"): path for path in masks}
    at = dict(named_leaves(params))
    old = dict(named_leaves(nnx.as_pure(before)))

    def value(path: str, leaf):
        own = next((p for p in kernels if path == p or path.endswith(f"/{p}")), None)
        if own is None:
            return jnp.copy(old[path])
        slot = old[path.removesuffix(own) + kernels[own]]
        if jnp.shape(slot) != jnp.shape(masks[kernels[own]]):
            return jnp.copy(slot) if jnp.shape(slot) == jnp.shape(leaf) else leaf
        parent = _parent(own)
        of = lambda part: at[f"{parent}/{part}".lstrip("/")]
        if leaf.ndim == 2:
            rows, outputs = of("rows"), of("outputs")[:, None]
            return slot.at[rows, outputs].get(mode="fill", fill_value=0).astype(leaf.dtype)
        rows, cols = of("places")[:2]
        every = jnp.ones((of("due").shape[0], of("scores").shape[1]), bool)
        blocks = BlockSparse.from_block_mask(slot, every, leaf.shape[1:])
        return blocks.values[cols * every.shape[0] + rows].astype(leaf.dtype)

    leaves, treedef = jax.tree.flatten(after)
    paths = [path for path, _ in named_leaves(after)]
    return treedef.unflatten([value(path, leaf) for path, leaf in zip(paths, leaves)])


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _joined(path) -> str:
    return "/".join(map(str, path))
