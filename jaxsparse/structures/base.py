"""Which patterns of zeros are allowed.

A structure says how the weights of a layer form *units* that live or die together, and within which
*slices* units compete. Everything that ranks weights (one-shot pruning, schedules, drop-and-grow,
straight-through projection) is written once, on units and slices:

| structure       | unit                      | slices that rank separately      |
|-----------------|---------------------------|----------------------------------|
| `Unstructured`  | one weight                | the whole layer                  |
| `Block(bh, bw)` | a tile of the matrix      | the whole layer                  |
| `Channel(axis)` | all weights of a channel  | the whole layer                  |
| `FanIn()`       | one weight                | the weights of one output        |
| `NM(n, m)`      | one weight                | a group of m weights             |

A kernel is `[..., in, out]` as everywhere in Flax. Structures know one layer: of stacked layers
`leaves.Leaf` gives them one after the other.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from jaxsparse import selection

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
    """The protocol of structures, and its simplest case: units are single weights that compete within
    the whole layer. `shape` is that of a layer, without stacked axes.

    A structure that is a ranking of units (`ranks`) says what they are: `pool`, `expand`, `axes`,
    `unit_size`, `slices`. One that is not chooses the mask of a layer itself: `assign`.
    """

    ranks: ClassVar[bool] = True

    def check(self, path: str, shape: Shape) -> None:
        """Raises `ValueError` if a layer of this shape cannot have this structure."""

    def pool(self, x: Array) -> Array:
        """Sums per-weight scores (or counts) to scores of units, in float32 at least: sums of
        bfloat16 rounded to bfloat16 would tie where the scores do not."""
        return x

    def expand(self, units: Array, shape: Shape) -> Array:
        """The mask of weights, of `shape`, that a mask of units stands for."""
        return units

    def axes(self, shape: Shape) -> tuple[int, ...]:
        """The axes of the units of a layer of `shape` within which units compete."""
        return tuple(range(len(shape)))

    def unit_size(self, shape: Shape) -> int:
        """Weights in a unit of a layer of `shape`."""
        return 1

    def slices(self, shape: Shape) -> int:
        """Slices in a layer of `shape`."""
        return 1

    def budget(self, shape: Shape, kept):
        """Units kept in each slice when `kept` weights of a layer are asked for; rounded so that
        no more weights stay than asked."""
        return kept // (self.unit_size(shape) * self.slices(shape))

    def assign(self, scores: Array, kept, *, where: Array | None, ties: str, seed) -> Array:
        """The mask of a layer, of structures that are no ranking of units: at most `kept` (see
        `budget`; may be traced) in each slice, within `where`."""
        raise NotImplementedError  # of structures that rank

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the structure fixes by itself, if any."""
        return None


@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
    """Any pattern."""


def sum_over(x: Array, axes: tuple[int, ...]) -> Array:
    """A sum in float32 at least."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.sum(axes, dtype=jnp.promote_types(x.dtype, jnp.float32) if floating else x.dtype)


@dataclasses.dataclass(frozen=True)
class Block(Structure):
    """Tiles of `height` x `width` of the kernel seen as a matrix `[in, out]` (the leading axes of a
    convolution are merged with its input channels)."""

    height: int
    width: int

    def __post_init__(self):
        if self.height < 1 or self.width < 1:
            raise ValueError(f"Block({self.height}, {self.width}): both sides must be at least 1")

    def check(self, path: str, shape: Shape) -> None:
        rows, cols = math.prod(shape[:-1]), shape[-1]
        for side, size, name in ((self.height, rows, "rows"), (self.width, cols, "columns")):
            if side > size or size % side:
                raise ValueError(
                    f"structure=Block({self.height}, {self.width}) does not tile {path!r} of shape "
                    f"{shape}: {side} must divide its {size} {name}"
                )

    def _tiles(self, shape: Shape) -> Shape:
        rows, cols = math.prod(shape[:-1]), shape[-1]
        return (rows // self.height, self.height, cols // self.width, self.width)

    def pool(self, x: Array) -> Array:
        return sum_over(x.reshape(self._tiles(x.shape)), (1, 3))

    def expand(self, units: Array, shape: Shape) -> Array:
        tiles = jnp.broadcast_to(jnp.expand_dims(units, (1, 3)), self._tiles(shape))
        return tiles.reshape(shape)

    def axes(self, shape: Shape) -> tuple[int, ...]:
        return (0, 1)

    def unit_size(self, shape: Shape) -> int:
        return self.height * self.width


@dataclasses.dataclass(frozen=True)
class Channel(Structure):
    """Whole channels: all weights with one index along `axis` (-1: outputs, -2: inputs)."""

    axis: int = -1

    def check(self, path: str, shape: Shape) -> None:
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"structure=Channel(axis={self.axis}): {path!r} has shape {shape}; give an axis "
                f"from {-len(shape)} to {len(shape) - 1}"
            )

    def _others(self, ndim: int) -> tuple[int, ...]:
        return tuple(a for a in range(ndim) if a != self.axis % ndim)

    def pool(self, x: Array) -> Array:
        return sum_over(x, self._others(x.ndim))

    def expand(self, units: Array, shape: Shape) -> Array:
        return jnp.broadcast_to(jnp.expand_dims(units, self._others(len(shape))), shape)

    def axes(self, shape: Shape) -> tuple[int, ...]:
        return (0,)

    def unit_size(self, shape: Shape) -> int:
        return math.prod(shape) // shape[self.axis]


@dataclasses.dataclass(frozen=True)
class FanIn(Structure):
    """The same number of weights for every output (the last axis): constant fan-in."""

    def axes(self, shape: Shape) -> tuple[int, ...]:
        return tuple(range(len(shape) - 1))

    def slices(self, shape: Shape) -> int:
        return shape[-1]


@dataclasses.dataclass(frozen=True)
class NM(Structure):
    """At most `n` nonzeros in each group of `m` weights along `axis` (-2: along the inputs, the
    contraction of a product). Groups are consecutive, or, with `strided=True`, the weights i,
    i + L/m, i + 2 L/m, ... of an axis of length L: then the same group positions lie in contiguous
    runs, which vector units and TPU lanes prefer.

    >>> NM(2, 4).sparsity
    0.5
    """

    n: int
    m: int
    axis: int = -2
    strided: bool = False

    def __post_init__(self):
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM({self.n}, {self.m}): need 1 <= n <= m")

    def check(self, path: str, shape: Shape) -> None:
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"structure={self}: {path!r} has shape {shape}; give an axis from {-len(shape)} to "
                f"{len(shape) - 1}"
            )
        if shape[self.axis] % self.m:
            raise ValueError(
                f"structure={self}: m={self.m} does not divide axis {self.axis} of {path!r} with "
                f"shape {shape}; choose another axis, or keep the leaf dense with "
                f"targets=[({path!r}, False)]"
            )

    def pool(self, x: Array) -> Array:
        a = self.axis % x.ndim
        groups = x.shape[a] // self.m
        split = (self.m, groups) if self.strided else (groups, self.m)
        return x.reshape(*x.shape[:a], *split, *x.shape[a + 1 :])

    def expand(self, units: Array, shape: Shape) -> Array:
        return units.reshape(shape)

    def axes(self, shape: Shape) -> tuple[int, ...]:
        a = self.axis % len(shape)
        return (a if self.strided else a + 1,)

    def slices(self, shape: Shape) -> int:
        return math.prod(shape) // self.m

    def budget(self, shape: Shape, kept):
        """Per group, rounded up: a ramp towards n:m tightens m, m-1, ..., n."""
        return self.m - (math.prod(shape) - kept) // self.slices(shape)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m


def parse(text: str) -> Structure:
    """The structure that a text names, for configs and command lines.

    | text | structure |
    |---|---|
    | `"unstructured"` | `Unstructured()` |
    | `"2:4"` | `NM(2, 4)` |
    | `"block:16x8"` | `Block(16, 8)` |
    | `"channel"`, `"channel:-2"` | `Channel()`, `Channel(-2)` |
    | `"fan_in"` | `FanIn()` |

    Wherever `structure=` is taken, so is its text.

    Args:
      text: as in the table.

    Returns:
      The structure.

    >>> parse("2:4")
    NM(n=2, m=4, axis=-2, strided=False)
    >>> parse("block:16x8")
    Block(height=16, width=8)

    Raises:
      ValueError: another text, or numbers that the structure does not allow.
    """
    kind, _, size = text.partition(":")
    if kind.isdigit() and size.isdigit():
        return NM(int(kind), int(size))
    if found := re.fullmatch(r"block:(\d+)x(\d+)", text):
        return Block(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"channel:(-?\d+)", text):
        return Channel(int(found[1]))
    if text in _BY_NAME:
        return _BY_NAME[text]
    raise ValueError(
        f"structure={text!r}: write 2:4 (n:m), block:16x16 (rows x columns), channel, channel:-2 "
        "(an axis), fan_in or unstructured"
    )


_BY_NAME: dict[str, Structure] = {
    "unstructured": Unstructured(),
    "channel": Channel(),
    "fan_in": FanIn(),
}


def resolve(structure: Structure | str | None) -> Structure:
    """The structure that `structure` stands for.

    Args:
      structure: a `Structure`, a text as for `parse`, or `None` for `Unstructured()`.

    Returns:
      The structure.

    >>> resolve(None), resolve("1:2").sparsity
    (Unstructured(), 0.5)

    Raises:
      ValueError: anything else.
    """
    if structure is None:
        return Unstructured()
    if isinstance(structure, str):
        return parse(structure)
    if not isinstance(structure, Structure):
        raise ValueError(
            f"structure={structure!r}: give None, Unstructured(), NM(n, m), Block(h, w), "
            "Channel(axis), FanIn(), or a text such as '2:4'"
        )
    return structure


def topk(
    structure: Structure,
    scores: Array,
    units,
    *,
    where: Array | None = None,
    ties: str = "position",
    seed: Any = None,
) -> Array:
    """The mask of one layer with the structure that keeps `units` units of highest pooled score in
    each slice; `leaves.Leaf.best` does it for stacked layers.

    `where` (bool, of the shape of `scores`) restricts the choice to units whose weights it holds.
    """
    kept = selection.topk_mask(
        structure.pool(scores),
        units,
        where=None if where is None else unit_mask(structure, where),
        ties=ties,
        seed=seed,
        axis=structure.axes(scores.shape),
    )
    return structure.expand(kept, scores.shape)


def unit_mask(structure: Structure, mask: Array) -> Array:
    """The units of one layer that a mask of weights holds (any weight of the unit)."""
    if structure.unit_size(mask.shape) == 1:
        return structure.pool(mask)
    return structure.pool(mask.astype(jnp.int32)) > 0
