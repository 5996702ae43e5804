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
from jax import Array, lax

from jaxsparse import selection
from jaxsparse._control import is_concrete, when
from jaxsparse.engines import Step, View
from jaxsparse.leaves import Leaf
from jaxsparse.structures import FanIn, Structure, Unstructured
from jaxsparse.targets import named_leaves
from pallas_kernels.block_sparse_matmul import places as block_places
from pallas_kernels.condensed_matmul import places as condensed_places

_PANEL = 1 << 19  # numbers of a matrix that a rule sees at a time

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

    `leaf` is what rules work on: a grid of blocks, each block a weight, or the matrix itself. It has the
    path of the kernel that a masked method would see, so that both draw the same random numbers.
    """

    path: str
    values: int
    places: int
    scores: int | None
    sketch: int | None
    due: int
    fixed: tuple[int, ...]  # other integers, which nothing changes
    capacity: int
    candidates: int
    leaf: Leaf

    @property
    def integers(self) -> tuple[int, ...]:
        """The numbers of its leaves that hold integers."""
        return self.places, self.due, *self.fixed

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that stack matrices."""
        return self.leaf.stack_shape

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns; inputs and outputs."""
        return self.leaf.layer_shape[0], self.leaf.layer_shape[1]

    def each(self, function, *arrays):
        """`function` of one matrix's arrays, for every matrix of the stack."""
        for _ in self.lead:
            function = jax.vmap(function)
        return function(*arrays)

    def drawn(self, told: Array, salt: Array) -> Array:
        """`due`, int32: 0 unless `told`, else 1 at as many rows of the grid as are candidates."""
        shape, rows = (*self.lead, self.grid[0]), self.grid[0]
        if self.scores is None or self.candidates == rows:
            return jnp.broadcast_to(told, shape).astype(jnp.int32)
        k, axis, seed = self.candidates, len(shape) - 1, salt
        zeros = jnp.zeros(shape, jnp.float32)
        draw = lambda _, s: selection.topk_mask(zeros, k, ties="hash", seed=s, axis=axis)
        return when(told, draw, jnp.zeros(shape, bool), seed).astype(jnp.int32)

    def is_due(self, due: Array) -> Array:
        """Whether it is flagged at as many rows as are candidates (bool scalar)."""
        return jnp.all(jnp.sum(due != 0, -1) == (self.candidates if self.scores is not None else 0))

    def on_grid(self, scores: Array, due: Array) -> Array:
        """Scores of the candidates on the grid, 0 elsewhere."""
        if self.candidates == self.grid[0]:
            return scores

        def one(scores, due):
            at = jnp.nonzero(due, size=self.candidates, fill_value=self.grid[0])[0]
            return jnp.zeros(self.grid, scores.dtype).at[at].set(scores, mode="drop")

        return self.each(one, scores, due)


@dataclasses.dataclass(frozen=True)
class Blocks(Matrix):
    """A matrix of which blocks are stored, `values [..., capacity, bh, bw]`."""

    block_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return (*self.lead, self.capacity, *self.block_shape)

    @property
    def axis(self) -> int:
        """The axis of the values along which they are numbered."""
        return len(self.lead)

    def mask(self, places: Array) -> Array:
        """bool, of the shape of `leaf`: the blocks that are stored."""
        return self.each(functools.partial(block_places.mask_of, grid=self.grid), places)

    def spread(self, numbers: Array, places: Array) -> Array:
        """Numbers of the stored blocks on the grid, 0 where none is stored."""

        def one(numbers, places):
            zeros = jnp.zeros(self.grid, numbers.dtype)
            return zeros.at[places[0], places[1]].set(numbers, mode="drop")

        return self.each(one, numbers, places)

    def used(self, places: Array) -> Array:
        """bool, as broadcasts to the values: which of them are part of the pattern."""
        return (places[..., 0, :] < self.grid[0])[..., None, None]

    def rewired(self, places: Array, mask: Array) -> tuple[Array, Array]:
        """The places of another pattern, and which values stay, as `used`."""
        places, kept = self.each(block_places.rewire, places, mask)
        return places, kept[..., None, None]


@dataclasses.dataclass(frozen=True)
class Columns(Matrix):
    """A matrix of which every output stores some weights, `values [..., outputs, capacity]`; its places
    are their rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return (*self.lead, self.grid[1], self.capacity)

    @property
    def axis(self) -> int:
        """The axis of the values along which those of an output are numbered."""
        return len(self.lead) + 1

    def mask(self, places: Array) -> Array:
        """bool, of the shape of `leaf`: the weights that are stored."""
        return self.each(lambda rows: condensed_places.mask_of(rows, self.grid[0]), places)

    def used(self, places: Array) -> Array:
        """bool, like the values: which of them are part of the pattern."""
        return places < self.grid[0]

    def rewired(self, rule, count: Array, values: Array, places: Array, worth, due: Array):
        """The places that a rule chooses, which values stay, and whether there is room for all.

        The rule sees a few outputs at a time, as a matrix `[inputs, few]` of which each output competes
        for itself: nothing of the size of the whole is made.
        """
        layer = jnp.arange(self.leaf.layers, dtype=jnp.uint32).reshape(self.lead)
        operands = [layer, values, places] if worth is None else [layer, values, places, worth, due]
        one = functools.partial(self._one_rewired, rule, count)
        places, kept, fits = self.each(one, *operands)
        return places, kept, jnp.all(fits)

    def _one_rewired(self, rule, count, layer, values, places, worth: Any = None, due: Any = None):
        inputs, outputs = self.grid
        width = max(1, min(outputs, _PANEL // inputs))
        panels = -(-outputs // width)
        whole = dataclasses.replace(self.leaf, shape=self.grid, lead=0)
        leaf = dataclasses.replace(whole, shape=(inputs, width))
        column = jnp.arange(width, dtype=jnp.int32)[:, None]
        row = lax.broadcasted_iota(jnp.uint32, leaf.shape, 0)
        start = layer * jnp.uint32(inputs * outputs % (1 << 32))
        at = () if due is None else jnp.nonzero(due, size=self.candidates, fill_value=inputs)

        def panel(operands):
            first, values, places, scored = operands
            zeros = jnp.zeros(leaf.shape, values.dtype)
            w = zeros.at[places, column].set(values, mode="drop")
            g = None
            if scored is not None:
                g = jnp.zeros(leaf.shape, scored.dtype).at[at].set(scored.T, mode="drop")
            position = row * jnp.uint32(outputs) + first + column.T.astype(jnp.uint32) + start
            view = View(leaf, w, g, condensed_places.mask_of(places, inputs), position)
            (mask,) = rule(Step(count, [view], aux=whole))
            fits = jnp.all(jnp.sum(mask, 0, dtype=jnp.int32) <= self.capacity)
            return *condensed_places.rewire(places, mask), fits

        def cut(x, fill):
            x = jnp.pad(x, ((0, panels * width - outputs), (0, 0)), constant_values=fill)
            return x.reshape(panels, width, -1)

        first = jnp.arange(panels, dtype=jnp.uint32) * jnp.uint32(width)
        scored = None if worth is None else cut(worth.T, 0)
        found = lax.map(panel, (first, cut(values, 0), cut(places, inputs), scored))
        places, kept = (x.reshape(-1, self.capacity)[:outputs] for x in found[:2])
        return places, kept, jnp.all(found[2])


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
    matrices: tuple[Blocks | Columns, ...]

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

    def gradients(self, updates, params: Sequence[Any], probes: Sequence[int]) -> list[Any]:
        """The gradients of all leaves by their paths, of `probes` too; None where there is none to speak of. At integers
        that is whatever stands there (`float0`, zeros, nothing), but for zeros of float32: there updates
        are wanted in that type, by what calculates with whole trees.

        Raises:
          ValueError: a gradient is missing, or has another shape than its parameter.
        """
        named = dict(named_leaves(updates))
        if unknown := sorted(set(named) - set(self.paths)):
            raise ValueError(f"updates: {unknown[0]!r} is no leaf of the parameters")
        integers = {i for m in self.matrices for i in m.integers}
        found = []
        for i, (path, p) in enumerate(zip(self.paths, params)):
            asked = self.trained[i] or i in probes
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
    """The stored matrices of a tree: siblings called `values`, `places`, `scores`, `due` and, where there is
    one, `sketch`; or `values`, `rows`, `outputs`, `due` and, where there are candidates, `scores`.

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
        of = lambda part, parent=parent: f"{parent}/{part}".lstrip("/")
        in_columns = of("rows") in at
        if name != "values" or not (in_columns or jnp.ndim(x) >= 3):
            continue
        needed = ("rows", "outputs", "due") if in_columns else ("places", "scores", "due")
        if missing := [of(part) for part in needed if of(part) not in at]:
            raise ValueError(f"params: {path!r} has no {missing[0]!r} beside it; {REMEDY}")
        parts = (*needed, "scores", "sketch")
        shape = {part: jnp.shape(leaf[at[of(part)]]) for part in parts if of(part) in at}
        shape["values"] = jnp.shape(x)
        make = _columns if in_columns else _blocks
        wanted, options = make(shape)
        for part, want in wanted.items():
            if shape[part] != want:
                raise ValueError(
                    f"params: {of(part)!r} has shape {shape[part]}, beside values {shape['values']} it "
                    f"must be {want}"
                )
        lead = len(shape["due"]) - 1
        structure = (
            FanIn() if in_columns else Unstructured() if groups == 1 else ColumnGroups(groups)
        )
        structure.check(path, options["grid"])
        grid = Leaf(
            at[path], of("kernel"), (*shape["due"][:-1], *options.pop("grid")), lead, structure
        )
        probes = at.get(of("scores")), at.get(of("sketch"))
        common = (path, at[path], at[of(needed[0])], *probes, at[of("due")])
        if in_columns:
            matrices.append(Columns(*common, (at[of("outputs")],), **options, leaf=grid))
        else:
            matrices.append(Blocks(*common, (), **options, leaf=grid))
    if not matrices:
        raise ValueError(
            f"params: no stored matrix (values, places, scores, due) among {', '.join(paths[:8])}; use "
            f"jaxsparse.nn.BlockSparseLinear, CondensedLinear or jaxsparse.compact, and {REMEDY}"
        )
    if groups > 1 and not any(isinstance(m, Blocks) for m in matrices):
        raise ValueError(
            f"groups={groups}: outputs that store their weights one by one keep their numbers anyway; "
            "leave it out"
        )
    probes = {i for m in matrices for i in (m.scores, m.sketch)}
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaf]
    trained = tuple(f and i not in probes for i, f in enumerate(floating))
    return StoredTree(jax.tree.structure(params), paths, trained, tuple(matrices))


def _blocks(shape: dict[str, tuple[int, ...]]) -> tuple[dict, dict[str, Any]]:
    """The shapes that the parts of a matrix of blocks must have, and its sizes."""
    *lead, n, bh, bw = shape["values"]
    gr, (candidates, gc) = shape["due"][-1:] or (1,), (1, 1, *shape["scores"])[-2:]
    wanted = {
        "places": (*lead, 4, n),
        "due": (*lead, *gr),
        "scores": (*lead, min(candidates, *gr), gc),
    }
    if "sketch" in shape:
        r, _, c = (1, 1, 1, *shape["sketch"])[-3:]
        wanted["sketch"] = (*lead, *gr, min(r, bh), gc, min(c, bw))
    sizes = dict(capacity=n, candidates=candidates, block_shape=(bh, bw), grid=(*gr, gc))
    return wanted, sizes


def _columns(shape: dict[str, tuple[int, ...]]) -> tuple[dict, dict[str, Any]]:
    """The same of a matrix of which every output stores some weights."""
    *lead, outputs, n = shape["values"]
    inputs = shape["due"][-1:] or (1,)
    wanted = {
        "rows": (*lead, outputs, n),
        "outputs": (*lead, outputs),
        "due": (*lead, *inputs),
    }
    candidates = 0
    if "scores" in shape:
        candidates = (1, 1, *shape["scores"])[-2]
        wanted["scores"] = (*lead, min(candidates, *inputs), outputs)
    return wanted, dict(capacity=n, candidates=candidates, grid=(*inputs, outputs))


def check_patterns(tree: StoredTree, leaves: Sequence[Any], groups: int) -> None:
    """Checks the patterns, as far as they are known.

    Raises:
      ValueError: nothing stored, a block or a weight that is stored twice or outside of the matrix, orders
        that are not those of the pattern, groups of columns with different numbers of blocks.
    """
    for m in tree.matrices:
        where = f"params: {tree.paths[m.places]!r}"
        if m.capacity < 1:
            raise ValueError(f"params: {m.path!r} stores nothing; give the layer a larger density")
        if not is_concrete(leaves[m.places]) or isinstance(leaves[m.places], jax.ShapeDtypeStruct):
            continue
        places = np.asarray(leaves[m.places])
        if isinstance(m, Columns):
            _check_rows(m, where, places.reshape(-1, m.capacity))
        else:
            _check_blocks(m, where, places.reshape(-1, 4, m.capacity), groups)


def _check_rows(m: Matrix, where: str, rows: np.ndarray) -> None:
    inputs, outputs = m.grid
    used = rows < inputs
    if not used.any():
        raise ValueError(f"{where} stores nothing; give the layer a larger density")
    if rows.min() < 0 or rows.max() > inputs:
        o, j = divmod(int(np.argmax((rows < 0) | (rows > inputs))), m.capacity)
        raise ValueError(
            f"{where} holds row {rows[o, j]} of output {o % outputs}, outside of the {inputs} inputs; "
            "places are integers that only Condensed and stored change"
        )
    ordered = np.sort(rows, 1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < inputs)
    if twice.any():
        o, j = divmod(int(twice.argmax()), max(1, m.capacity - 1))
        raise ValueError(
            f"{where} stores row {ordered[o, j]} of output {o % outputs} twice; store it once"
        )


def _check_blocks(m: Matrix, where: str, stack: np.ndarray, groups: int) -> None:
    gr, gc = m.grid
    for rows, cols, by_row, by_col in stack:
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
