"""`compact`: from a model trained under masks to one that stores and computes only what they keep."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse.nn.block_sparse_linear import BlockSparseLinear
from jaxsparse.nn.condensed import CondensedLinear
from jaxsparse.nn.nm_linear import NMLinear
from jaxsparse.state import get_masks

BLOCKS = ((512, 512), (256, 256), (128, 128), (64, 64), (32, 32), (16, 16))
BLOCKS_PAY_BELOW = 0.7  # density; above, the dense product is about as fast
SHARED_FROM = 32  # outputs with one N:M pattern from which 1:4 pays on CPU
CONDENSED_PAYS_BELOW = 0.15  # density of the fullest output, on CPU


@dataclasses.dataclass(frozen=True)
class Compacted:
    """What became of one layer.

    Attributes:
      path: of the layer in the model.
      layer: name of the layer's class now.
      replaced: whether it is another than before.
      why: the structure that was found, or why the layer was left.
      density: share of the kernel that the mask keeps.
    """

    path: str
    layer: str
    replaced: bool
    why: str
    density: float

    def __str__(self) -> str:
        verb = "replaced by" if self.replaced else "left as"
        return f"{self.path}: {verb} {self.layer} ({self.why}; density {self.density:.3f})"


def compact(
    model: nnx.Module,
    opt_state,
    *,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    platform: str | None = None,
) -> tuple[nnx.Module, list[Compacted]]:
    """A copy of the model in which masked linear layers are replaced where their structure pays.

    An `nnx.Linear` becomes a `BlockSparseLinear` if its mask is a union of whole blocks (the
    largest of `blocks` that fits) and keeps less than 0.7 of them; an `NMLinear` if its mask keeps
    at most 1 of 4 inputs and 32 or more neighbouring outputs share the choice, or for a TPU at most
    2 of 4 inputs; for a CPU a `CondensedLinear` if it keeps less than 0.15 of every output's inputs,
    wherever they are (faster in serving; training it on costs what the dense layer does). What is
    left is as it was, with its zeros, and the report says why.

    Args:
      model: a Flax NNX module, as trained.
      opt_state: the state of its optimizer, or the `nnx.Optimizer`: it holds the masks.
      blocks: block shapes to look for, best first.
      platform: where the model will serve, "cpu" or "tpu"; default: the backend in use.

    Returns:
      The new model and a report, one entry for every linear or masked layer; print its entries.

    Raises:
      ValueError: if `model` is not an NNX module, or `opt_state` holds no masks.

    >>> import jaxsparse, optax
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    >>> tx = jaxsparse.static(
    ...     optax.sgd(0.1), sparsity=0.75, structure=jaxsparse.structures.Block(16, 16)
    ... )
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> sparse, report = compact(model, optimizer)
    >>> print(report[0])
    layers.0: replaced by BlockSparseLinear (blocks of 16 x 16; density 0.250)
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model must be a flax.nnx.Module, not {type(model).__name__}")
    masks = {
        _names(path): mask
        for path, mask in jax.tree_util.tree_leaves_with_path(
            get_masks(getattr(opt_state, "opt_state", opt_state))
        )
    }
    platform = platform or jax.default_backend()
    new, report = nnx.clone(model), []
    for path, module in list(nnx.iter_modules(new)):
        names = tuple(map(str, path))
        kernels = [
            m for p, m in masks.items() if p[: len(names)] == names and len(p) == len(names) + 1
        ]
        if not kernels and not isinstance(module, nnx.Linear):
            continue
        label = ".".join(names)
        if not kernels:
            report.append(Compacted(label, type(module).__name__, False, "it has no mask", 1.0))
            continue
        mask = np.asarray(kernels[0])
        density = float(mask.mean())
        if type(module) is not nnx.Linear or mask.ndim != 2:
            what = type(module).__name__ if mask.ndim == 2 else f"a kernel of shape {mask.shape}"
            why = f"{what} has no sparse counterpart"
            report.append(Compacted(label, type(module).__name__, False, why, density))
            continue
        layer, why = _sparse_layer(module, mask, blocks, platform)
        if layer is not None:
            new = replace_module(new, path, layer)
        report.append(
            Compacted(label, type(layer or module).__name__, layer is not None, why, density)
        )
    return new, report


def _sparse_layer(linear: nnx.Linear, mask: np.ndarray, blocks, platform: str):
    """The layer that exploits the mask's structure (or None) and a word on why."""
    kept, why = jnp.asarray(mask), "its mask has no structure that pays"
    fitting = next((b for b in blocks if _is_union_of_blocks(mask, b)), None)
    if fitting is not None:
        name = f"blocks of {fitting[0]} x {fitting[1]}"
        if mask.mean() >= BLOCKS_PAY_BELOW:
            return None, f"{name}, but too many to be faster than dense"
        return BlockSparseLinear.from_dense(linear, kept, block_shape=fitting), name
    for n, m in ((1, 4), (2, 4)):
        if mask.shape[0] % m or _most_of_a_group(mask, m) > n:
            continue
        share = 1 if platform == "tpu" else _shared_outputs(mask)
        if platform == "tpu" or (share >= SHARED_FROM and 4 * n <= m):
            name = f"{n}:{m}" + (f" shared by {share} outputs" if share > 1 else "")
            return NMLinear.from_dense(linear, kept, n=n, m=m, share=share), name
        how = "element by element" if share < SHARED_FROM else f"{share} outputs alike"
        why = f"{n}:{m}, but {how}, which is not faster on {platform}"
        break
    fan_in = int(mask.sum(0).max(initial=0))
    if platform == "cpu" and fan_in < CONDENSED_PAYS_BELOW * mask.shape[0]:
        return CondensedLinear.from_dense(
            linear, kept, candidates=0
        ), f"at most {fan_in} inputs of an output"
    return None, why


def _is_union_of_blocks(mask: np.ndarray, block: tuple[int, int]) -> bool:
    (rows, cols), (bh, bw) = mask.shape, block
    if rows % bh or cols % bw:
        return False
    tiles = mask.reshape(rows // bh, bh, cols // bw, bw)
    return bool((tiles.all((1, 3)) == tiles.any((1, 3))).all())


def _most_of_a_group(mask: np.ndarray, m: int) -> int:
    return int(mask.reshape(-1, m, mask.shape[1]).sum(1).max())


def _shared_outputs(mask: np.ndarray) -> int:
    """The largest power of two up to 128 such that so many neighbouring outputs share a pattern."""
    share = 1
    while share < 128 and mask.shape[1] % (2 * share) == 0:
        sets = mask.reshape(mask.shape[0], -1, 2 * share)
        if not (sets == sets[:, :, :1]).all():
            break
        share *= 2
    return share


def _names(path) -> tuple[str, ...]:
    """The names in a tree path, without the `value` of a variable."""
    names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return tuple(names[:-1] if names and names[-1] in ("value", "raw_value") else names)


def replace_module(model: nnx.Module, path, layer: nnx.Module) -> nnx.Module:
    """The model with the module at `path` replaced, in place unless it is the model itself."""
    if not path:
        return layer
    parent: Any = model
    for name in path[:-1]:
        parent = _get(parent, name)
    if isinstance(path[-1], str):
        setattr(parent, path[-1], layer)
    else:
        parent[path[-1]] = layer  # nnx.List, nnx.Dict
    return model


def _get(parent, name):
    return getattr(parent, name) if isinstance(name, str) else parent[name]
