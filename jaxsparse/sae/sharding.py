"""Latents over devices: how the state of an autoencoder is laid out on a mesh."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def shardings(tree: Tree, mesh: Mesh, d_sae: int, *, axis: str = "features") -> Tree:
    """The shardings of parameters, counters and optimizer slots that split the axis of latents.

    The encoder `[d_model, F]`, the decoder `[F, d_model]`, thresholds and counters `[F]` are cut alike, so that a
    device holds whole latents; all else is on every device. Give batches
    `NamedSharding(mesh, PartitionSpec("data"))`, and the same step computes the same numbers up to the order of sums.

    Args:
      tree: of arrays or shapes, such as `nnx.state(model)` and the optimizer's state.
      mesh: of devices.
      d_sae: F; axes of this length are those of latents.
      axis: of the mesh.

    Returns:
      The tree with a `NamedSharding` for each leaf, for `jax.device_put`.

    Raises:
      ValueError: an axis that the mesh does not have, or that does not divide F.

    >>> mesh = jax.make_mesh((1,), ("features",))
    >>> found = shardings({"W_dec": jax.ShapeDtypeStruct((64, 16), "float32")}, mesh, 64)
    >>> tuple(found["W_dec"].spec)
    ('features', None)
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r}: the mesh has {', '.join(map(repr, mesh.shape))}")
    if d_sae % mesh.shape[axis]:
        raise ValueError(
            f"d_sae={d_sae}: must be a multiple of the {mesh.shape[axis]} devices of {axis!r}"
        )

    def one(leaf) -> NamedSharding:
        cut = [axis if n == d_sae else None for n in jnp.shape(leaf)]
        first = cut.index(axis) if axis in cut else len(cut)
        return NamedSharding(
            mesh, PartitionSpec(*(a if i == first else None for i, a in enumerate(cut)))
        )

    return jax.tree.map(one, tree)
