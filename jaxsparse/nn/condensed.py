"""Condensed layers: a kernel with constant fan-in as a small dense matrix of values and one of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condensed:
    """A kernel `[in, out]` of which every active output has the same number k of inputs.

    Attributes:
      values: `[active, k]`, the weights.
      indices: int32 `[active, k]`, the input of each, ascending.
      outputs: int32 `[active]`, the outputs that are not switched off.
      shape: `(in, out)`.
    """

    values: Array
    indices: Array
    outputs: Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def todense(self) -> Array:
        """The kernel `[in, out]`."""
        dense = jnp.zeros(self.shape, self.values.dtype)
        return dense.at[self.indices, self.outputs[:, None]].set(self.values)


def condense(kernel: Array, mask: Any = None) -> Condensed:
    """The condensed form of a kernel `[..., in, out]` as SRigL leaves it; leading axes of a
    convolution are merged with its inputs. (Lasby et al., Dynamic sparse training with structured
    sparsity, 2024.)

    Args:
      kernel: concrete weights.
      mask: its mask; where the weights are not 0 if None.

    >>> c = condense(jnp.array([[1.0, 0.0, 3.0], [0.0, 0.0, 4.0], [2.0, 0.0, 0.0]]))
    >>> c.values.tolist(), c.indices.tolist(), c.outputs.tolist()
    ([[1.0, 2.0], [3.0, 4.0]], [[0, 2], [0, 1]], [0, 2])

    Raises:
      ValueError: outputs with different numbers of inputs.
    """
    w = np.asarray(kernel).reshape(-1, kernel.shape[-1])
    m = np.asarray(mask).reshape(w.shape) if mask is not None else w != 0
    counts = m.sum(axis=0)
    outputs = np.flatnonzero(counts)
    if outputs.size and counts[outputs].min() != counts.max():
        raise ValueError(
            f"kernel: active outputs have from {counts[outputs].min()} to {counts.max()} inputs; "
            "give one with constant fan-in, as srigl or structure=FanIn() make it"
        )
    indices = (
        np.stack([np.flatnonzero(m[:, o]) for o in outputs]) if outputs.size else np.zeros((0, 0))
    )
    indices = indices.astype(np.int32)
    values = w[indices, outputs[:, None]]
    return Condensed(
        jnp.asarray(values), jnp.asarray(indices), jnp.asarray(outputs, jnp.int32), w.shape
    )


def condensed_matmul(x: Array, kernel: Condensed) -> Array:
    """`x @ kernel` for x `[..., in]`: gathers the k inputs of every active output; the others are 0.

    >>> w = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> condensed_matmul(jnp.array([[3.0, 4.0]]), condense(w)).tolist()
    [[3.0, 8.0]]
    """
    y = jnp.einsum("...ok,ok->...o", jnp.take(x, kernel.indices, axis=-1), kernel.values)
    out = jnp.zeros((*x.shape[:-1], kernel.shape[1]), y.dtype)
    return out.at[..., kernel.outputs].set(y)
