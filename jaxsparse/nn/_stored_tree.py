"""The trees that `stored` trains: which leaves the inner optimizer sees, and where the matrices are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse.leaves import Leaf
from jaxsparse.structures import Structure, Unstructured
from jaxsparse.targets import named_leaves
from pallas_kernels.block_sparse_matmul.places import mask_of, rewire

REMEDY = (
    "give the optimizer all of a layer: nnx.Optimizer(model, tx, wrt=jaxsparse.nn.Trained) and "
    "gradients of nnx.DiffState(0, jaxsparse.nn.Trained) with allow_int=True"
)


@dataclasses.dataclass(frozen=True)
class ColumnGroups(Structure):
    """Units that compete within groups of neighbouring columns of the grid of blocks."""

    groups: int

    def check(self, path: str, shape) -> None:
        if shape[1] % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the {shape[1]} block columns of {path!r}"
            )

    def pool(self, x: Array) -> Array:
        return x.reshape(x.shape[0], self.groups, -1)

    def expand(self, units: Array, shape) -> Array:
        return units.reshape(shape)

    def axes(self, shape) -> tuple[int, ...]:
        return (0, 2)

    def slices(self, shape) -> int:
        return self.groups


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A stored matrix in the tree, or a stack of them: the numbers of its leaves, and its sizes.

    `leaf` is its grid of blocks, each block a weight: what rules work on. It has the path of the kernel
    that a masked method would see, so that both draw the same random numbers.
    """

    path: str
    values: int
    places: int
    scores: int
    due: int
    capacity: int
    block_shape: tuple[int, int]
    leaf: Leaf

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that stack matrices."""
        return self.leaf.stack_shape

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return self.leaf.layer_shape[0], self.leaf.layer_shape[1]

    def each(self, function, *arrays):
        """`function` of one matrix's arrays, for every matrix of the stack."""
        for _ in self.lead:
            function = jax.vmap(function)
        return function(*arrays)

    def mask(self, places: Array) -> Array:
        """bool, of the shape of `leaf`: the blocks that are stored."""
        return self.each(functools.partial(mask_of, grid=self.grid), places)

    def spread(self, numbers: Array, places: Array) -> Array:
        """Numbers of the stored blocks on the grid, 0 where none is stored."""

        def one(numbers, places):
            zeros = jnp.zeros(self.grid, numbers.dtype)
            return zeros.at[places[0], places[1]].set(numbers, mode="drop")

        return self.each(one, numbers, places)

    def used(self, places: Array) -> Array:
        """bool `[..., capacity]`: which stored blocks are part of the pattern."""
        return places[..., 0, :] < self.grid[0]

    def rewired(self, places: Array, mask: Array) -> tuple[Array, Array]:
        """The places of another pattern, and which blocks stay."""
        return self.each(rewire, places, mask)


@dataclasses.dataclass(frozen=True)
class StoredTree:
    """A tree of parameters: trained leaves, and what belongs to stored matrices.

    Attributes:
      treedef: of the tree.
      paths: of all leaves.
      trained: for every leaf, whether the inner optimizer sees it: all but integers and scores.
      matrices: the stored matrices.
    """

    treedef: Any
    paths: tuple[str, ...]
    trained: tuple[bool, ...]
    matrices: tuple[Matrix, ...]

    def visible(self, leaves: Sequence[Any]):
        """The tree of what the inner optimizer sees of these leaves."""
        rows = zip(leaves, self.trained)
        return self.treedef.unflatten([x if t else optax.MaskedNode() for x, t in rows])

    def leaves_of(self, tree) -> list[Any]:
        """The leaves of a tree as `visible` makes it; None where the inner optimizer sees nothing."""
        found = iter(jax.tree.leaves(tree))
        return [next(found) if t else None for t in self.trained]

    def scatter(self, values: Sequence[Any], fill: Any = None):
        """A tree for the inner optimizer with `values` at the matrices' values, `fill` elsewhere."""
        flat = [fill] * len(self.paths)
        for matrix, value in zip(self.matrices, values):
            flat[matrix.values] = value
        return self.visible(flat)

    def gradients(self, updates, params: Sequence[Any], scored: bool) -> list[Any]:
        """The gradients of all leaves by their paths; None where there is none to speak of. At integers
        that is whatever stands there (`float0`, zeros, nothing), but for zeros of float32: there updates
        are wanted in that type, by what calculates with whole trees.

        Raises:
          ValueError: a gradient is missing, or has another shape than its parameter.
        """
        named = dict(named_leaves(updates))
        if unknown := sorted(set(named) - set(self.paths)):
            raise ValueError(f"updates: {unknown[0]!r} is no leaf of the parameters")
        scores = {m.scores for m in self.matrices}
        integers = {i for m in self.matrices for i in (m.places, m.due)}
        found = []
        for i, (path, p) in enumerate(zip(self.paths, params)):
            asked = self.trained[i] or (scored and i in scores)
            g: Any = named.get(path)
            if asked and g is None:
                raise ValueError(f"updates: the gradient of {path!r} is missing; {REMEDY}")
            if asked and jnp.shape(g) != jnp.shape(p):
                raise ValueError(
                    f"updates: {path!r} has shape {jnp.shape(g)}, its parameter {jnp.shape(p)}; give "
                    "the gradients of these parameters"
                )
            wide = i in integers and getattr(g, "dtype", None) == jnp.float32
            found.append(g if asked or wide else None)
        return found


def find(params, groups: int) -> StoredTree:
    """The stored matrices of a tree, which are siblings called `values`, `places`, `scores` and `due`.

    Raises:
      ValueError: there are none, one lacks a part, or a part has a shape that does not fit.
    """
    named = named_leaves(params)
    paths = tuple(path for path, _ in named)
    at = {path: i for i, path in enumerate(paths)}
    leaf = [x for _, x in named]
    matrices = []
    for path, x in named:
        parent, _, name = path.rpartition("/")
        if name != "values" or jnp.ndim(x) < 3:
            continue
        names = {n: f"{parent}/{n}".lstrip("/") for n in ("places", "scores", "due")}
        if missing := [p for p in names.values() if p not in at]:
            raise ValueError(f"params: {path!r} has no {missing[0]!r} beside it; {REMEDY}")
        places, scores, due = (leaf[at[p]] for p in names.values())
        *lead, n, bh, bw = jnp.shape(x)
        *_, gr, gc = jnp.shape(scores)
        shapes = (*lead, 4, n), (*lead, gr, gc), tuple(lead)
        for part, array, shape in zip(names.values(), (places, scores, due), shapes):
            if jnp.shape(array) != shape:
                raise ValueError(
                    f"params: {part!r} has shape {jnp.shape(array)}, beside values {jnp.shape(x)} it "
                    f"must be {shape} (places as `BlockSparse.in_any_order` makes them)"
                )
        structure = Unstructured() if groups == 1 else ColumnGroups(groups)
        grid = Leaf(at[path], f"{parent}/kernel".lstrip("/"), (*lead, gr, gc), len(lead), structure)
        structure.check(path, (gr, gc))
        numbers = {name: at[p] for name, p in names.items()}
        matrices.append(
            Matrix(path, at[path], **numbers, capacity=n, block_shape=(bh, bw), leaf=grid)
        )
    if not matrices:
        raise ValueError(
            f"params: no stored matrix (values, places, scores, due) among {', '.join(paths[:8])}; use "
            f"jaxsparse.nn.BlockSparseLinear or jaxsparse.compact, and {REMEDY}"
        )
    scores = {m.scores for m in matrices}
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaf]
    trained = tuple(f and i not in scores for i, f in enumerate(floating))
    return StoredTree(jax.tree.structure(params), paths, trained, tuple(matrices))


def check_patterns(tree: StoredTree, leaves: Sequence[Any], groups: int) -> None:
    """Checks the patterns, as far as they are known.

    Raises:
      ValueError: nothing stored, a block that is stored twice or outside of the matrix, orders that are
        not those of the pattern, groups of columns with different numbers of blocks.
    """
    for m in tree.matrices:
        where = f"params: {tree.paths[m.places]!r}"
        if m.capacity < 1:
            raise ValueError(f"params: {m.path!r} stores nothing; give the layer a larger density")
        if not is_concrete(leaves[m.places]) or isinstance(leaves[m.places], jax.ShapeDtypeStruct):
            continue
        gr, gc = m.grid
        for places in np.asarray(leaves[m.places]).reshape(-1, 4, m.capacity):
            rows, cols, by_row, by_col = places
            used = rows < gr
            inside = (rows >= 0) & (cols >= 0) & (cols < gc)
            if not used.any():
                raise ValueError(f"{where} stores nothing; give the layer a larger density")
            if not (inside | ~used).all():
                bad = int(np.argmin(inside | ~used))
                raise ValueError(
                    f"{where} holds block (row {rows[bad]}, column {cols[bad]}) outside of the grid "
                    f"{m.grid}; places are integers that only BlockSparse and stored change"
                )
            counts = np.bincount(rows[used] * gc + cols[used], minlength=gr * gc)
            if counts.max() > 1:
                r, c = divmod(int(counts.argmax()), gc)
                raise ValueError(f"{where} stores block (row {r}, column {c}) twice; store it once")
            for name, order, key in (
                ("row", by_row, rows * (gc + 1) + cols),
                ("column", by_col, cols * (gr + 1) + rows),
            ):
                whole = np.array_equal(np.sort(order), np.arange(m.capacity))
                if not whole or (np.diff(key[order]) < 0).any():
                    raise ValueError(
                        f"{where} does not list the blocks by {name}; make places with BlockSparse"
                    )
            if groups > 1:
                each = counts.reshape(gr, groups, -1).sum((0, 2))
                of = np.where(used, cols // (gc // groups), -1).reshape(groups, -1)
                if m.capacity % groups or (of != np.arange(groups)[:, None]).any():
                    raise ValueError(
                        f"groups={groups}: {where} stores {each.tolist()} blocks in the groups of "
                        "columns; they must be equally many, and stored group by group "
                        "(BlockSparse.random(..., balanced=True))"
                    )
