"""`NMSparse`: of every M consecutive weights along the contraction, N are stored.

Two forms, for two machines. The element-wise form, in which every output chooses its own N of M:
the values of a group lie in N planes, `values[n, group, output]`, so that a plane is as wide as the
matrix and no lane of a TPU is skipped. The vector-wise form, in which `share` neighbouring outputs
have one pattern: `values[set, output of the set, n and group]`, a small dense matrix for each set,
to be multiplied by the rows of x that the set uses, as a CPU likes it.

Which of the M places a value belongs to takes `bits` bits; codes are packed 32 / bits to an int32,
those of groups q, q + R, q + 2R, ... into row q of R: unpacking is a shift of the whole array and
never moves a value between lanes or rows.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.core
import jax.export
import jax.numpy as jnp

from pallas_kernels._formats import Array, integer_places


@dataclasses.dataclass(frozen=True)
class NMSparse:
    """A matrix `[in, out]` with at most N nonzeros in every M consecutive rows of a column.

    Build it with `from_dense` (keeps the largest) or `from_mask`. Gradients are taken with respect to
    `values`: `jax.grad(lambda values: loss(w.with_values(values)))(w.values)`.

    Attributes:
      values: `[N, in / M, out]` if `share` is 1, else `[out / share, share, N * in / M]`, by
        ascending place within the group.
      codes: int32, the packed places; read them as `places`.
      shape: `(in, out)`.
      n: N, stored values of a group.
      m: M, size of a group.
      share: outputs that have a pattern in common; 1 is the element-wise form.

    >>> w = NMSparse.from_dense(jnp.array([[1.0], [-4.0], [3.0], [2.0]]), 2, 4)
    >>> w.values.ravel().tolist(), w.places.ravel().tolist()
    ([-4.0, 3.0], [1, 2])
    """

    values: Array
    codes: Array
    shape: tuple[int, int]
    n: int
    m: int
    share: int

    @classmethod
    def from_dense(cls, dense: Array, n: int, m: int, *, share: int = 1) -> "NMSparse":
        """Keep the N largest magnitudes of every group (of their sums of squares, if shared)."""
        dense = jnp.asarray(dense)
        _check(dense.shape, n, m, share)
        blocks = dense.reshape(-1, m, dense.shape[1] // share, share).astype(jnp.float32)
        return _keep(dense, (blocks**2).sum(3), n, m, share)

    @classmethod
    def from_mask(cls, dense: Array, mask: Array, n: int, m: int, *, share: int = 1) -> "NMSparse":
        """Keep what `mask [in, out]` marks: at most N of every group, the same in shared outputs.

        Raises:
          ValueError: where the mask is known and keeps more than N of a group.
        """
        dense, mask = jnp.asarray(dense), jnp.asarray(mask).astype(bool)
        if mask.shape != dense.shape:
            raise ValueError(f"mask.shape={mask.shape} must equal dense.shape={dense.shape}")
        _check(dense.shape, n, m, share)
        kept = mask.reshape(-1, m, dense.shape[1] // share, share).any(3)
        if not isinstance(kept, jax.core.Tracer) and int(kept.sum(1).max(initial=0)) > n:
            raise ValueError(
                f"mask keeps {int(kept.sum(1).max())} of a group of m={m} rows; at most n={n} fit"
            )
        return _keep(jnp.where(mask, dense, 0), kept.astype(jnp.float32), n, m, share)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def places(self) -> Array:
        """int32 `[N, in / M, out / share]`: the place of each value in its group."""
        codes = integer_places("codes", self.codes)
        return unpack(codes, self.m)[:, : self.shape[0] // self.m]

    @property
    def planes(self) -> Array:
        """The values as `[N, in / M, out]`, in either form."""
        return to_planes(self.values, self.n, self.share)

    @property
    def rows(self) -> Array:
        """int32 `[N, in / M, out / share]`: the row of each value in the matrix."""
        groups = self.shape[0] // self.m
        return self.places + self.m * jnp.arange(groups, dtype=jnp.int32).reshape(1, -1, 1)

    def to_dense(self) -> Array:
        """The matrix with its zeros, `[in, out]`."""
        return _to_dense(self)

    def with_values(self, values: Array) -> "NMSparse":
        """The same pattern with other values, in the shape of the present ones."""
        if jnp.shape(values) != self.values.shape:
            raise ValueError(f"values.shape={jnp.shape(values)} must be {self.values.shape}")
        return dataclasses.replace(self, values=values)

    def astype(self, dtype: Any) -> "NMSparse":
        """The same matrix in another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def split(self, parts: int, axis: str = "columns") -> "NMSparse":
        """Cut the matrix into `parts` equal ones by columns or rows, stacked.

        The result holds arrays with a leading axis of size `parts`: shard that axis over a mesh and
        drop it inside `shard_map` (`jax.tree.map(lambda a: a[0], part)`), or `vmap` over it. With
        "columns" every part yields its columns of `x @ w`; with "rows" every part takes its columns
        of x and the products are to be summed.

        Raises:
          ValueError: unless whole groups of rows, or whole sets of outputs, go to each part.

        >>> w = NMSparse.from_dense(jnp.eye(8), 2, 4)
        >>> w.split(2, "rows").values.shape, w.split(2).shape
        ((2, 2, 1, 8), (8, 4))
        """
        if axis not in ("columns", "rows"):
            raise ValueError(f"axis={axis!r} must be 'columns' or 'rows'")
        dim, unit = (2, self.share) if axis == "columns" else (1, self.m)
        whole = self.shape[dim - 1]
        if whole % (parts * unit):
            raise ValueError(
                f"parts={parts} must divide the {whole // unit} groups of {unit} {axis}"
            )
        shape = list(self.shape)
        shape[dim - 1] //= parts
        values = [from_planes(p, self.share) for p in jnp.split(self.planes, parts, dim)]
        codes = [_pack(p, self.m) for p in jnp.split(self.places, parts, dim)]
        static = (shape[0], shape[1]), self.n, self.m, self.share
        return NMSparse(jnp.stack(values), jnp.stack(codes), *static)


def to_planes(values: Array, n: int, share: int) -> Array:
    """Values of either form to `[N, in / M, out]`."""
    if share == 1:
        return values
    sets, _, kept = values.shape
    cut = values.reshape(sets, share, n, kept // n)
    return cut.transpose(2, 3, 0, 1).reshape(n, kept // n, sets * share)


def from_planes(planes: Array, share: int) -> Array:
    """`[N, in / M, out]` to the values of the form."""
    if share == 1:
        return planes
    n, groups, outputs = planes.shape
    cut = planes.reshape(n * groups, outputs // share, share)
    return cut.transpose(1, 2, 0)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _keep(dense: Array, score: Array, n: int, m: int, share: int) -> NMSparse:
    """The n best-scored places of a group, found by counting what beats each; ties go first."""
    place = jnp.arange(m)
    mine, other = score[:, :, None], score[:, None]  # [groups, m, m, outputs / share]
    earlier = (place[None, :] < place[:, None])[None, :, :, None]
    chosen = ((other > mine) | ((other == mine) & earlier)).sum(2) < n
    slot = jnp.where(chosen, jnp.cumsum(chosen, 1) - 1, n)  # plane of each place
    places = jnp.stack([jnp.where(slot == p, place[:, None], 0).sum(1) for p in range(n)])
    groups = dense.reshape(-1, m, dense.shape[1])
    at = jnp.repeat(places, share, 2)
    values = jnp.stack([jnp.take_along_axis(groups, a[:, None], 1)[:, 0] for a in at])
    values = from_planes(values, share)
    return NMSparse(values, _pack(places, m), tuple(dense.shape), n, m, share)


@jax.jit
def _to_dense(w: NMSparse) -> Array:
    places, values = jnp.repeat(w.places, w.share, 2), w.planes
    planes = [jnp.where(places == r, values, 0).sum(0, dtype=w.dtype) for r in range(w.m)]
    return jnp.stack(planes, 1).reshape(w.shape)


def code_bits(m: int) -> int:
    """Bits of a code: enough for a place below m, and a divisor of 32."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def unpack(codes: Array, m: int) -> Array:
    """int32 `[n, R, outputs]` to `[n, R * 32 / bits, outputs]`."""
    bits = code_bits(m)
    parts = [(codes >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return jnp.concatenate(parts, 1)


def _pack(places: Array, m: int) -> Array:
    bits = code_bits(m)
    each = 32 // bits
    n, groups, outputs = places.shape
    rows = -(-groups // each)
    places = jnp.pad(places.astype(jnp.int32), ((0, 0), (0, rows * each - groups), (0, 0)))
    parts = places.reshape(n, each, rows, outputs)
    return sum(parts[:, s] << (s * bits) for s in range(each))


def _check(shape: tuple[int, ...], n: int, m: int, share: int) -> None:
    if len(shape) != 2:
        raise ValueError(f"dense.shape={shape} must have two dimensions")
    if not 1 <= n <= m <= 256:
        raise ValueError(f"n={n}, m={m} must satisfy 1 <= n <= m <= 256")
    if shape[0] % m:
        raise ValueError(f"m={m} must divide the {shape[0]} rows of the matrix")
    if share < 1 or shape[1] % share:
        raise ValueError(f"share={share} must divide the {shape[1]} columns of the matrix")


def _flatten(w: NMSparse):
    key = jax.tree_util.GetAttrKey
    static = (w.shape, w.n, w.m, w.share)
    return ((key("values"), w.values), (key("codes"), w.codes)), static


def _unflatten(static, leaves) -> NMSparse:
    return NMSparse(leaves[0], leaves[1], *static)


jax.tree_util.register_pytree_with_keys(
    NMSparse,
    _flatten,
    _unflatten,
    lambda w: ((w.values, w.codes), (w.shape, w.n, w.m, w.share)),
)

jax.export.register_pytree_node_serialization(
    NMSparse,
    serialized_name="pallas_kernels.NMSparse",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: (tuple((s := json.loads(data))[0]), *s[1:]),
)
