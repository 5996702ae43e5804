"""`Condensed`: outputs store the same number of weights each (constant fan-in), anywhere."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.core
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._formats import Array, concrete, integer_places

_PANEL = 1 << 20  # numbers that are drawn at a time


@dataclasses.dataclass(frozen=True)
class Condensed:
    """A matrix `[in, out]` of which each column (output) stores `fan_in` elements, or nothing.

    Columns with fewer nonzeros are filled up, so that any unstructured matrix can be held; masks of
    constant fan-in waste nothing. What fills up has the row beyond the last: it counts as zero
    whatever its value, and gets no gradient. (The condensed representation of Lasby, Golubeva,
    Evci, Nica, Ioannou, Dynamic Sparse Training with Structured Sparsity, 2024.) Gradients are taken
    with respect to `values`: `jax.grad(lambda values: loss(w.with_values(values)))(w.values)`.
    The values of a column may stand in any order, so that a pattern can change without moving those
    that stay; what fills up costs nothing at the end of a column.

    Attributes:
      values: `[stored outputs, fan_in]`.
      rows: int32 `[stored outputs, fan_in]`, the row of each value, no row twice in a column; `in`
        where nothing is stored.
      outputs: int32 `[stored outputs]`, which outputs these are, ascending; the others are zero.
      shape: `(in, out)`.

    >>> w = Condensed.from_dense(jnp.array([[1.0, 0.0, 0.0], [2.0, 0.0, 3.0]]))
    >>> w.values.tolist(), w.rows.tolist(), w.outputs.tolist()
    ([[1.0, 2.0], [3.0, 0.0]], [[0, 1], [1, 2]], [0, 2])
    """

    values: Array
    rows: Array
    outputs: Array
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, dense: Array, *, fan_in: int | None = None) -> "Condensed":
        """Store what is not zero; `fan_in` defaults to the most of a column (needed under jit)."""
        return cls.from_mask(dense, jnp.asarray(dense) != 0, fan_in=fan_in)

    @classmethod
    def from_mask(cls, dense: Array, mask: Array, *, fan_in: int | None = None) -> "Condensed":
        """Store what `mask [in, out]` marks. Empty columns are left out where the mask is known.

        Raises:
          ValueError: if shapes differ, or a column is known to hold more than `fan_in`.
        """
        dense, mask = jnp.asarray(dense), jnp.asarray(mask).astype(bool)
        if dense.ndim != 2 or mask.shape != dense.shape:
            raise ValueError(
                f"mask.shape={mask.shape} must equal dense.shape={dense.shape}, two dimensions"
            )
        outputs = np.arange(dense.shape[1], dtype=np.int32)
        if concrete(mask):
            counts = np.asarray(mask).sum(0)
            outputs, most = outputs[counts > 0], int(counts.max(initial=0))
            fan_in = most if fan_in is None else fan_in
            if most > fan_in:
                raise ValueError(f"fan_in={fan_in} must be at least {most}, the most of a column")
        elif fan_in is None:
            raise ValueError("fan_in=None must be a number where the mask is not known (jit)")
        return _store(dense, mask, jnp.asarray(outputs), fan_in)

    @classmethod
    def random(
        cls, key: Array, shape: tuple[int, int], *, fan_in: int, dtype: Any = jnp.float32
    ) -> "Condensed":
        """`fan_in` elements of each column at random rows, normal values of variance `1 / fan_in`. A key
        that is traced draws other rows than one that is known.

        >>> Condensed.random(jax.random.key(0), (8, 4), fan_in=3).values.shape
        (4, 3)

        Raises:
          ValueError: `fan_in` is not an integer from 1 to the number of rows.
        """
        inputs, outputs = shape
        if isinstance(fan_in, bool) or not isinstance(fan_in, int) or not 1 <= fan_in <= inputs:
            raise ValueError(f"fan_in={fan_in!r} must be an integer from 1 to {inputs}, the rows")
        if concrete(key):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32))
            pick = lambda n: rng.random((n, inputs)).argpartition(fan_in - 1, 1)[:, :fan_in]
            panel = max(1, _PANEL // inputs)
            sizes = [min(panel, outputs - i) for i in range(0, outputs, panel)]
            rows = jnp.asarray(np.sort(np.concatenate([pick(n) for n in sizes]), 1), jnp.int32)
        else:
            one = lambda key: lax.top_k(jax.random.uniform(key, (inputs,)), fan_in)[1]
            keys = jax.random.split(jax.random.fold_in(key, 1), outputs)
            rows = jnp.sort(lax.map(one, keys, batch_size=64), 1)
        values = jax.random.normal(key, rows.shape, jnp.float32) / fan_in**0.5
        return cls(
            values.astype(dtype), rows, jnp.arange(outputs, dtype=jnp.int32), (inputs, outputs)
        )

    @property
    def fan_in(self) -> int:
        """Stored elements of a column."""
        return self.values.shape[1]

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def filled(self) -> Array:
        """bool, like the values: which of them fill up their output and count as zero."""
        return integer_places("rows", self.rows) >= self.shape[0]

    def to_dense(self) -> Array:
        """The matrix with its zeros, `[in, out]`."""
        at = integer_places("rows", self.rows), integer_places("outputs", self.outputs)[:, None]
        return jnp.zeros(self.shape, self.dtype).at[at].set(self.values, mode="drop")

    def with_values(self, values: Array) -> "Condensed":
        """The same pattern with other values `[stored outputs, fan_in]`."""
        if jnp.shape(values) != self.values.shape:
            raise ValueError(f"values.shape={jnp.shape(values)} must be {self.values.shape}")
        return dataclasses.replace(self, values=values)

    def astype(self, dtype: Any) -> "Condensed":
        """The same matrix in another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))


@functools.partial(jax.jit, static_argnums=3)
def _store(dense: Array, mask: Array, outputs: Array, fan_in: int) -> Condensed:
    shape = dense.shape
    dense, mask = dense[:, outputs], mask[:, outputs]
    slot = jnp.where(mask, jnp.cumsum(mask, 0) - 1, fan_in)  # fan_in: dropped
    out, row = (lax.broadcasted_iota(jnp.int32, dense.shape, a) for a in (1, 0))
    stored = outputs.shape[0], fan_in
    rows = jnp.full(stored, shape[0], jnp.int32).at[out, slot].set(row, mode="drop")
    values = jnp.zeros(stored, dense.dtype).at[out, slot].set(dense, mode="drop")
    return Condensed(values, rows, outputs, (shape[0], shape[1]))


def _flatten(w: Condensed):
    key = jax.tree_util.GetAttrKey
    leaves = (key("values"), w.values), (key("rows"), w.rows), (key("outputs"), w.outputs)
    return leaves, w.shape


jax.tree_util.register_pytree_with_keys(
    Condensed,
    _flatten,
    lambda shape, leaves: Condensed(*tuple(leaves), shape=shape),
    lambda w: ((w.values, w.rows, w.outputs), w.shape),
)

jax.export.register_pytree_node_serialization(
    Condensed,
    serialized_name="pallas_kernels.Condensed",
    serialize_auxdata=lambda shape: json.dumps(shape).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)
