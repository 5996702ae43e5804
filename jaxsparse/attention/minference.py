r"""MInference and FlexPrefill: the pattern of a head from the attention of the last queries.

The last queries' attention A `[sample, kv_len]` gives vertical scores $v_j = \sum_i A_{ij}$ and slash scores
$s_o = \sum_i A_{i, i - o}$ by the distance o of query and key. The best n_v keys and n_s distances are kept, and blocks
that contain any of their pairs are read.

Here verticals and slashes come in `units`: `unit=1` ranks single keys and distances, as MInference does; a unit of a
block ranks means over blocks of keys and of distances, which costs the kernel no more than it uses (FlexPrefill's
block form, recalled from its code, not verified). Blocks are read whole either way: more recall than the published
kernel, which reads verticals as columns, at more density. `vertical_slash_attention` is to the key.

Sources: Jiang et al., MInference 1.0, 2024, and its code; Lai et al., FlexPrefill, 2025, as rewritten in Nawrot et al.,
The Sparse Frontier, 2025. The last queries only are looked at: keys that matter to the middle of a text alone are missed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsparse._control import is_concrete
from jaxsparse.attention import pool, select
from jaxsparse.attention.layout import DEFAULT, Layout, Sizes, check_heads, group
from jaxsparse.attention.mass import block_mass, sample_scores
from jaxsparse.attention.predictor import Predictor, State, blocks_of, pooled_cost
from pallas_kernels import BlockMask, Grid
from pallas_kernels.block_sparse_attention.lists import best


@dataclasses.dataclass(frozen=True)
class AShape:
    """The first keys and a window of the last ones, to the block."""

    sinks: int = 100
    window: int = 800

    def __post_init__(self) -> None:
        if min(self.sinks, self.window) < 0 or self.sinks + self.window == 0:
            raise ValueError(
                f"sinks={self.sinks}, window={self.window} must not be negative, one of them at least 1"
            )


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """Keys and distances of the most attention; numbers of keys and of distances."""

    vertical: int
    slash: int
    sample: int = 64
    unit: int = 1
    first: int = 30
    near: int = 100

    def __post_init__(self) -> None:
        for name in ("vertical", "slash", "sample", "unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class TopBlocks:
    """Blocks by pooled queries and keys, a share of the blocks of a row."""

    share: float = 1 / 8

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1]")


Pattern = AShape | VerticalSlash | TopBlocks
PUBLISHED: tuple[Pattern, ...] = (
    AShape(100, 800),
    VerticalSlash(30, 800),
    VerticalSlash(100, 750),
    VerticalSlash(500, 700),
    VerticalSlash(3500, 100),
    TopBlocks(1 / 8),
)
"""The candidates of the authors' offline search."""


def candidates(density: float, kv_len: int, unit: int) -> tuple[Pattern, ...]:
    """Patterns of about a density of the causal area at this length: verticals and slashes 1:3, 1:1 and 3:1, in whole
    units, an A-shape, and blocks.

    Where slashes and verticals of a row overlap, the density is less. There are as many, in the same order, at every
    length: what a search found at one length is used at another.

    Raises:
      ValueError: a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must lie in (0, 1]")
    width = (1 - math.sqrt(1 - density)) * kv_len  # keys per late row
    number = max(2, round(width / unit))
    pairs = (max(1, round(number * share)) for share in (0.25, 0.5, 0.75))
    lines = [
        VerticalSlash(n * unit, max(1, number - n) * unit, unit=unit, first=unit, near=unit)
        for n in pairs
    ]
    shape = AShape(unit, max(1, number - 1) * unit)
    return (shape, *lines, TopBlocks(width / kv_len))


def minference(
    *,
    density: float | None = None,
    patterns: Sequence[Pattern] | None = None,
    heads: Array | np.ndarray | Sequence[int] | None = None,
    layout: Layout = DEFAULT,
) -> Predictor:
    """A pattern per head out of a few, filled in from the last queries; see the module.

    Args:
      density: patterns of about this density at the length at hand (`candidates`), in place of `patterns`.
      patterns: the patterns; `PUBLISHED` are the authors'.
      heads: int `[heads]`, traced or not: which pattern each query head has, from `search_patterns`. None: all have
        the first vertical-slash pattern (the one in the middle, with `density`).
      layout: blocks; forced blocks are kept besides.

    Returns:
      The predictor. Heads that share keys share the union of their blocks if the layout shares.

    Raises:
      ValueError: both or neither of density and patterns, or a number out of range.

    >>> import jax
    >>> q = k = jax.random.normal(jax.random.key(0), (1, 2, 64, 8))
    >>> mask = minference(density=0.5, layout=Layout(8, 8))(q, k)
    >>> bool((mask.density < 0.5).all()), mask.codes.shape
    (True, (1, 2, 8, 8))
    """
    _check_causal(layout)
    if (density is None) == (patterns is None):
        raise ValueError(f"density={density}, patterns={patterns}: give one of them")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density} must lie in (0, 1]")
    if patterns is not None and (not patterns or not all(isinstance(p, Pattern) for p in patterns)):
        raise ValueError(
            f"patterns={patterns} must be AShape, VerticalSlash or TopBlocks, at least one"
        )

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        grid = layout.grid(q.shape[2], k.shape[2])
        if patterns is None:
            assert density is not None
            found: Sequence[Pattern] = candidates(density, grid.kv_len, layout.block_kv)
        else:
            found = patterns
        if heads is None:
            lines = [p for p in found if isinstance(p, VerticalSlash)] or list(found)
            pattern = lines[len(lines) // 2 if patterns is None else 0]
            keep = pattern_blocks(q, k, pattern, layout, state.lengths)
        else:
            index = _checked_index(heads, q.shape[1], len(found)).reshape(1, -1, 1, 1, 1)
            each = [pattern_blocks(q, k, p, layout, state.lengths) for p in found]
            keep = jnp.take_along_axis(jnp.stack(each, 2), index, axis=2)[:, :, 0]
        return _finish(keep, k.shape[1], layout, grid)

    cost = lambda sizes: _sample_cost(sizes, layout, 64) + pooled_cost(sizes, layout)
    return Predictor("minference", run, layout, cost)


def _checked_index(heads: Array | np.ndarray | Sequence[int], number: int, patterns: int) -> Array:
    """The pattern of each head.

    Raises:
      ValueError: not one for each head, or one that is not there (where values can be looked at).
    """
    index = jnp.asarray(heads, jnp.int32)
    if index.shape != (number,):
        raise ValueError(
            f"heads has shape {index.shape}; give a pattern for each of the {number} query heads"
        )
    if is_concrete(heads):
        known = np.asarray(heads)
        if ((known < 0) | (known >= patterns)).any():
            raise ValueError(f"heads={known.tolist()} must lie in [0, {patterns}), the patterns")
    return index


def flexprefill(
    *,
    alpha: float = 0.65,
    minimum: int = 512,
    sample: int = 512,
    unit: int = 1,
    layout: Layout = DEFAULT,
) -> Predictor:
    """Vertical-slash patterns whose numbers are those that reach a mass, per head and without a search.

    The numbers of keys and distances are each the smallest that make the mass `alpha` of their mean distribution, at
    least `minimum`; the first 4 keys and the last 64 distances are kept in any case.

    Args:
      alpha: the mass, in (0, 1].
      minimum: keys and distances that are kept at least.
      sample: how many of the last queries are looked at.
      unit: keys and distances are ranked in units of so many; see the module.
      layout: blocks.

    Raises:
      ValueError: a number out of range.
    """
    _check_causal(layout)
    if not 0 < alpha <= 1 or min(minimum, sample, unit) < 1:
        raise ValueError(
            f"alpha={alpha}, minimum={minimum}, sample={sample}, unit={unit}: alpha must lie in (0, 1], "
            "the others be at least 1"
        )

    def run(q: Array, k: Array, v: Array | None, state: State) -> BlockMask:
        grid = layout.grid(q.shape[2], k.shape[2])
        vertical, slash = line_scores(q, k, sample, state.lengths)
        number = min(sample, q.shape[2])
        if state.lengths is not None:
            number = jnp.clip(state.lengths, 1, number)[:, None, None]
        counts = [
            jnp.maximum(select.mass_count(x / number, alpha, "reach"), minimum)
            for x in (vertical, slash)
        ]
        counts = [-(-n // unit) for n in counts]
        units = unit_means(vertical, unit), unit_means(slash, unit)
        keep = _lines(*units, counts[0], counts[1], 4, 64, unit, layout, grid)
        return _finish(keep, k.shape[1], layout, grid)

    cost = lambda sizes: _sample_cost(sizes, layout, sample)
    return Predictor("flexprefill", run, layout, cost)


def search_patterns(
    q: Array, k: Array, patterns: Sequence[Pattern], layout: Layout = DEFAULT, *, after: int = 2500
) -> tuple[Array, Array]:
    """The offline search: which pattern of each head keeps the most of its attention.

    Args:
      q, k: of one calibration prompt, `[1, heads, length, dim]`.
      patterns: candidates; `PUBLISHED`, or `candidates(density, length, unit)` for equal densities.
      layout: blocks.
      after: recall is the mean over blocks of rows from here on (early rows see little); at most half of the length
        is left out.

    Returns:
      int32 `[heads]`, for `minference(heads=...)`, and the recall of every pattern, float32 `[patterns, heads]`.
    """
    mass = block_mass(q, k, layout)
    grid = layout.grid(q.shape[2], k.shape[2])
    skip = min(after, q.shape[2] // 2) // layout.block_q
    force = layout.forced(grid)
    recall = jnp.stack([
        jnp.where(pattern_blocks(q, k, p, layout) | force, mass, 0).sum(-1)[:, :, skip:].mean((0, 2))
        for p in patterns
    ])  # fmt: skip
    return jnp.argmax(recall, 0).astype(jnp.int32), recall


def line_scores(
    q: Array, k: Array, sample: int, lengths: Array | None = None
) -> tuple[Array, Array]:
    r"""Vertical scores by key and slash scores by distance, float32 `[batch, heads, kv_len]` both.

    Sums over the sample's queries. No diagonal is cut off. Of sequences with `lengths`, the last queries that are there.
    """
    a = sample_scores(q, k, sample, causal=True, lengths=lengths)
    vertical = a.sum(2)
    if lengths is not None:  # all end where the longest could
        a = jax.vmap(lambda x, n: jnp.roll(x, n, axis=-1))(a, k.shape[2] - lengths)
    return vertical, diagonals(a)


def unit_scores(
    q: Array, k: Array, sample: int, unit: int, lengths: Array | None = None
) -> tuple[Array, Array]:
    r"""`unit_means` of both `line_scores`, float32 `[batch, heads, units]` both.

    With units as long as the sample, and longer, no row is shifted: the keys of unit b are at
    distances of two units from query i, $c_i - b$ up to the key at place $r_i$ of the unit and $c_i - b - 1$ after it, with
    $p_i = c_i u + r_i$ the query's position. So two sums over each unit of keys, with and without what comes after $r_i$, are all that
    is needed.
    """
    sizes = check_heads(q, k)
    number, length = min(sample, sizes.q_len), sizes.kv_len
    if lengths is not None or unit < number:
        vertical, slash = line_scores(q, k, sample, lengths)
        return unit_means(vertical, unit), unit_means(slash, unit)
    last = group(q[:, :, sizes.q_len - number :], sizes.kv_heads)
    units = -(-length // unit)
    k = jnp.pad(k, ((0, 0), (0, 0), (0, units * unit - length), (0, 0)))
    k = k.reshape(*k.shape[:2], units, unit, -1)
    position = np.arange(length - number, length)
    unit_of, place = position // unit, position % unit
    key = np.arange(units * unit).reshape(units, unit)

    def of_keys(head: Array) -> Array:
        """Both sums, for the queries that share a head of keys, `[2, batch, heads / kv_heads, number, units]`."""
        rows, keys = (lax.dynamic_index_in_dim(x, head, 1, keepdims=False) for x in (last, k))
        s = jnp.einsum("brid,butd->briut", rows, keys, preferred_element_type=jnp.float32)
        s = jnp.where(key <= position[:, None, None], s * sizes.dim**-0.5, -jnp.inf)
        top = s.max(-1, keepdims=True)
        weights = jnp.exp(s - jnp.where(jnp.isneginf(top), 0.0, top))
        before = jnp.where(np.arange(unit) <= place[:, None, None], weights, 0.0)
        sums = jnp.stack([weights.sum(-1), before.sum(-1)])
        sums = sums * jnp.exp(top - top.max(-2, keepdims=True))[..., 0]
        return sums / sums[0].sum(-1, keepdims=True)

    # One head of keys at a time, so that the probabilities of its queries stay in fast memory.
    sums = jnp.moveaxis(lax.map(of_keys, jnp.arange(sizes.kv_heads)), 0, 2)
    whole, near = sums.reshape(2, *q.shape[:2], number, units)

    def at_distance(x: Array, nearest: int) -> Array:
        """Sums of rows whose unit `nearest` is at distance 0, by distance."""
        backwards = jnp.flip(x.sum(2)[..., : nearest + 1], -1)
        return jnp.pad(backwards, ((0, 0), (0, 0), (0, units - 1 - nearest)))

    slash = jnp.zeros_like(whole[:, :, 0])
    for c in np.unique(unit_of):
        rows = slice(*np.searchsorted(unit_of, [c, c + 1]))
        slash = slash + at_distance(near[:, :, rows], c)
        slash = slash + at_distance((whole - near)[:, :, rows], c - 1)
    size = np.minimum(unit, length - np.arange(units) * unit)
    return whole.sum(2) / size, slash / size


def diagonals(a: Array) -> Array:
    """Sums of `[..., n, length]` over pairs of one distance, `[..., length]`: row i ends at length - n + i, distance 0.

    Rows are shifted by their place and added, eight times eight of them at a time and then the sums: slices at static
    places, where a skewed copy would be laid out anew.

    >>> diagonals(jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])).tolist()
    [7.0, 5.0, 3.0]
    """
    n, length = a.shape[-2:]
    width = min(64, n)
    rows = -(-n // width) * width
    pad = [(0, 0)] * (a.ndim - 2)
    wide = jnp.pad(a, [*pad, (rows - n, 0), (rows, rows)])  # rows in front see nothing
    wide = wide.reshape(*a.shape[:-2], rows // width, width, length + 2 * rows)
    size = length + 2 * rows - width
    some = functools.reduce(jnp.add, (wide[..., r, r : r + size] for r in range(width)))
    shifted = (some[..., c, c * width + 1 : c * width + 1 + length] for c in range(rows // width))
    return jnp.flip(functools.reduce(jnp.add, shifted), -1)


def pattern_blocks(
    q: Array, k: Array, pattern: Pattern, layout: Layout, lengths: Array | None = None
) -> Array:
    """The blocks that a pattern keeps, bool `[batch, heads, q_blocks, kv_blocks]`."""
    grid = layout.grid(q.shape[2], k.shape[2])
    if isinstance(pattern, AShape):
        q0, q1, k0, k1 = layout.bounds(grid)
        near = (k0 < pattern.sinks) | ((k0 <= q1) & (k1 > q0 - pattern.window))
        return jnp.broadcast_to(near & layout.visible(grid), (*q.shape[:2], *near.shape))
    if isinstance(pattern, TopBlocks):
        mean_q = pool.mean(q, layout.block_q, lengths)
        mean_k = pool.mean(k, layout.block_kv, lengths)
        mean_k = jnp.repeat(mean_k, q.shape[1] // k.shape[1], axis=1)
        logits = jnp.einsum("bhid,bhjd->bhij", mean_q, mean_k, precision="highest")
        rule = select.TopK(max(1, round(pattern.share * grid.kv_blocks)))
        visible = layout.visible(grid)
        return select.keep(logits, rule, visible, np.zeros_like(visible))
    vertical, slash = unit_scores(q, k, pattern.sample, pattern.unit, lengths)
    whole = lambda n: whole_units(n, grid.kv_len, pattern.unit)
    return _lines(
        vertical, slash, whole(pattern.vertical), whole(pattern.slash), pattern.first, pattern.near,
        pattern.unit, layout, grid,
    )  # fmt: skip


def _lines(
    vertical: Array, slash: Array, num_vertical: Array | int, num_slash: Array | int,
    first: int, near: int, unit: int, layout: Layout, grid: Grid,
) -> Array:  # fmt: skip
    """Blocks that contain a pair of a key or of a distance in the best units."""
    _, _, k0, k1 = layout.bounds(grid)
    chosen = _best_units(vertical, num_vertical, first, unit)
    columns = _any_between(chosen, k0, k1, unit, grid.kv_len)[:, :, None]
    diagonals = slash_blocks(slash, num_slash, near, unit, layout, grid)
    return (columns & layout.visible(grid)) | diagonals


def slash_blocks(
    slash: Array, number: Array | int, near: int, unit: int, layout: Layout, grid: Grid
) -> Array:
    """Blocks that contain a pair of a distance in the best units, bool `[batch, heads, q_blocks, kv_blocks]`."""
    q0, q1, k0, k1 = layout.bounds(grid)
    chosen = _best_units(slash, number, near, unit)
    return _any_between(chosen, q0 - k1, q1 - k0, unit, grid.kv_len) & layout.visible(grid)


def whole_units(number: int, length: int, unit: int) -> int:
    """How many units a number of keys or distances is, at least one."""
    return max(1, min(number, length) // unit)


def unit_means(scores: Array, unit: int) -> Array:
    """Means over units of the last axis, float32; the last unit may be short."""
    return pool.mean(scores[..., None], unit)[..., 0]


def _best_units(means: Array, number: Array | int, forced: int, unit: int) -> Array:
    """The units that are best or begin among the first `forced` keys or distances, bool `[..., units]`."""
    first = np.arange(means.shape[-1]) * unit < forced
    return best(jnp.where(first, jnp.inf, means), jnp.asarray(number))


def _any_between(chosen: Array, low: np.ndarray, high: np.ndarray, unit: int, length: int) -> Array:
    """Whether a key or distance of [low, high] is in a chosen unit; the range is cut to what exists, [0, length)."""
    total = jnp.cumsum(jnp.pad(chosen, ((0, 0), (0, 0), (1, 0))), -1, dtype=jnp.int32)
    low, high = np.clip(low, 0, length), np.clip(high + 1, 0, length)
    return (
        total[..., -(-high // unit)]
        > total[..., np.where(low < high, low // unit, -(-high // unit))]
    )


def _finish(keep: Array, kv_heads: int, layout: Layout, grid: Grid) -> BlockMask:
    keep = keep | layout.forced(grid)
    if layout.share:
        keep = group(keep, kv_heads).any(2)
    return layout.mask(keep, grid)


def _check_causal(layout: Layout) -> None:
    if not layout.causal:
        raise ValueError(
            "causal=False: patterns are read from the last queries of a causal model; give a causal Layout"
        )


def _sample_cost(sizes: Sizes, layout: Layout, sample: int) -> float:
    nq, nk = blocks_of(sizes, layout)
    rows = min(sample, sizes.q_len)
    look = sizes.heads * rows * sizes.kv_len * (2 * sizes.dim + 8)
    return look + sizes.heads * (64.0 * sizes.kv_len + 8.0 * nq * nk)
