"""How a sparsity budget is split over the layers.

Two kinds:

- a *rule of shapes* (`Uniform`, `UniformPlus`, `ErdosRenyi`, `Balanced`, `Pyramidal`, `Explicit`) gives each layer a sparsity of its own;
- a *ranking* (`Global`) ranks the weights of all layers together by score, perhaps rescaled per
  layer, so that the split follows from the scores.

`allocation=` takes one of these objects, or one of the names in `NAMED`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse._counts import scale_count
from jaxsparse.leaves import Leaf
from jaxsparse.targets import check_matched


class ByShape:
    """A rule that gives each layer its sparsity from the shapes alone."""

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        """The sparsity of a layer of each leaf; Python floats unless `sparsity` is traced."""
        raise NotImplementedError  # abstract


def _natural(path: str) -> list:
    """A sort key in which `layer_10` comes after `layer_9`."""
    return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", path)]


def last_leaf(leaves: Sequence[Leaf]) -> str | None:
    """The path of the last layer, by the natural order of the paths."""
    return max((leaf.path for leaf in leaves), key=_natural, default=None)


def _dense_leaves(leaves: Sequence[Leaf], first_dense: bool, dense: Sequence[str]) -> set[str]:
    paths = [leaf.path for leaf in leaves]
    check_matched("allocation(dense=...)", dense, paths)
    chosen = {path for path in paths if any(re.search(p, path) for p in dense)}
    return chosen | ({min(paths, key=_natural)} if first_dense and paths else set())


@dataclasses.dataclass(frozen=True)
class Uniform(ByShape):
    """The same sparsity everywhere; `first_dense` keeps the first layer (by the natural order of
    the paths) dense, `dense` those whose path matches one of the patterns. The others are not made
    up for: the total is then denser than asked."""

    first_dense: bool = False
    dense: tuple[str, ...] = ()

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        dense = _dense_leaves(leaves, self.first_dense, self.dense)
        return [0.0 if leaf.path in dense else sparsity for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class ErdosRenyi(ByShape):
    r"""Densities that follow the shape: $\epsilon\,(\sum_i s_i / \prod_i s_i)^{power}$.

    With `kernel=True` (ERK) the sum runs over all dimensions of a kernel, otherwise (ER) over
    inputs and outputs only. Layers whose density would exceed 1 become dense, and the rest is
    scaled anew until nothing exceeds it, so that the total is the one asked for. `dense` layers and
    `first_dense` are left out of both sums; with `last_dense` the last layer (by the natural order of
    the paths) is dense and counted, so that the others pay for it (ER+, ERK+). (Mocanu et al., SET, 2018; Evci et al., Rigging the
    lottery, 2020.)
    """

    kernel: bool = True
    power: float = 1.0
    first_dense: bool = False
    dense: tuple[str, ...] = ()
    last_dense: bool = False

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        dense = _dense_leaves(leaves, self.first_dense, self.dense)
        last = last_leaf(leaves) if self.last_dense else None
        free = [leaf for leaf in leaves if leaf.path not in dense]
        densities = dict.fromkeys(dense, 1.0)
        if free:
            raw = [self._raw(leaf.layer_shape) for leaf in free]
            sizes = [leaf.layer_size * leaf.layers for leaf in free]
            full = [leaf.path == last for leaf in free]
            zeros = lambda s: [leaf.layers * scale_count(leaf.layer_size, s) for leaf in free]
            found = _saturate(raw, sizes, zeros, sparsity, full)
            densities |= dict(zip([leaf.path for leaf in free], found))
        return [1.0 - densities[leaf.path] for leaf in leaves]

    def _raw(self, shape: tuple[int, ...]) -> float:
        shape = shape if self.kernel else shape[-2:]
        return (sum(shape) / math.prod(shape)) ** self.power


def _saturate(raw: list[float], sizes: list[int], zeros_at, sparsity, full=None) -> list:
    """Densities min(1, eps raw) with eps such that the budget is met; at ties all the largest
    saturate together. Layers that are `full` are dense from the start; `zeros_at(sparsity)` counts
    the zeros of a uniform split, whole weights in every layer."""
    start = np.asarray([False] * len(sizes) if full is None else full)
    if is_concrete(sparsity) and sum(sizes) * (1.0 - sparsity) < sum(
        n for n, f in zip(sizes, start) if f
    ):
        raise ValueError(
            f"sparsity={sparsity}: the layers that stay dense have more weights than that leaves; ask "
            "for less, or do without last_dense"
        )
    n, r = np.asarray(sizes, np.float64), np.asarray(raw, np.float64)
    if is_concrete(sparsity):
        zeros = np.asarray(zeros_at(float(sparsity)), np.float64)
        full = start
        while not full.all():
            budget = (n - zeros)[~full].sum() - zeros[full].sum()
            eps = budget / (r * n)[~full].sum()
            top = r[~full].max()
            if top * eps <= 1.0:
                break
            full = full | (r == top)
        return [1.0 if f else max(float(eps * x), 0.0) for f, x in zip(full, r)]
    # The same with a traced sparsity, in units of the whole network so that float32 does.
    share, r32 = jnp.asarray(n / n.sum(), jnp.float32), jnp.asarray(r / r.max(), jnp.float32)

    def eps_of(full):
        budget = jnp.sum(jnp.where(full, -sparsity, 1.0 - sparsity) * share)
        return budget / jnp.sum(jnp.where(full, 0.0, r32 * share))

    def over(full):
        return jnp.max(jnp.where(full, 0.0, r32)) * eps_of(full) > 1.0

    def grow(full):
        return full | (r32 >= jnp.max(jnp.where(full, 0.0, r32)))

    full = jax.lax.while_loop(over, grow, jnp.asarray(start))
    density = jnp.where(full, 1.0, eps_of(full) * r32)
    return [density[i] for i in range(len(sizes))]


@dataclasses.dataclass(frozen=True)
class UniformPlus(ByShape):
    """The first layer dense, the last at least 20 % dense, the others at one sparsity such that the
    total is the one asked for (Gale et al., The state of sparsity, 2019, as Lee et al., LAMP, 2021,
    use it)."""

    last_density: float = 0.2

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        paths = [leaf.path for leaf in leaves]
        first, last = min(paths, key=_natural, default=None), last_leaf(leaves)
        sizes = [leaf.size for leaf in leaves]
        floor = [
            1.0 if path == first else self.last_density if path == last else 0.0 for path in paths
        ]
        return [1.0 - d for d in _fill(floor, sizes, sparsity)]


def _fill(floor: list[float], sizes: list[int], sparsity) -> list:
    """Densities max(floor, x) with x such that the budget is met."""
    xp: Any = np if is_concrete(sparsity) else jnp
    dtype = np.float64 if is_concrete(sparsity) else np.float32
    share, low = xp.asarray(sizes, dtype) / sum(sizes), xp.asarray(floor, dtype)
    if is_concrete(sparsity) and float((share * low).sum()) > 1.0 - sparsity:
        raise ValueError(
            f"sparsity={sparsity}: the layers with a least density have more weights than that leaves"
        )
    return _solve(lambda x: xp.maximum(low, x), share, 1.0 - sparsity, xp)


def _solve(density, share, wanted, xp) -> list:
    """The densities at the x in [0, 1] with sum(share density(x)) = wanted, by bisection."""
    low, high = share[0] * 0.0, share[0] * 0.0 + 1.0
    for _ in range(60 if xp is np else 26):
        middle = (low + high) / 2
        enough = xp.sum(share * density(middle)) >= wanted
        low, high = xp.where(enough, low, middle), xp.where(enough, middle, high)
    found = density(high)
    return [float(d) if xp is np else d for d in found]


@dataclasses.dataclass(frozen=True)
class Balanced(ByShape):
    """The same number of kept weights in every layer: density min(1, d N / (L n)), n of N weights in
    one of L layers. What a small layer cannot hold goes to the others (`redistribute`), so that the
    total is the one asked for; without, as in the authors' code, the network is sparser than asked.
    (Gadhikar, Mukherjee & Burkholz, Why random pruning is all we need to start sparse, 2023.)"""

    redistribute: bool = True

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        if not leaves:
            return []
        concrete = is_concrete(sparsity)
        xp: Any = np if concrete else jnp
        sizes = [float(leaf.layer_size) for leaf in leaves]
        layers = [leaf.layers for leaf in leaves]
        n = xp.asarray(sizes, np.float64 if concrete else np.float32)
        total = float(sum(leaf.size for leaf in leaves))
        if not self.redistribute:
            equal = (1.0 - sparsity) * total / sum(layers)
            found = xp.minimum(1.0, equal / n)
            return [1.0 - (float(d) if concrete else d) for d in found]
        share = n * xp.asarray(layers, n.dtype) / total
        densities = _solve(lambda x: xp.minimum(1.0, x * max(sizes) / n), share, 1.0 - sparsity, xp)
        return [1.0 - d for d in densities]


@dataclasses.dataclass(frozen=True)
class Pyramidal(ByShape):
    r"""Density $r^l$ in the l-th layer from the input (natural order of the paths, from 1), with r
    such that the total is the one asked for. (Gadhikar, Mukherjee & Burkholz, Why random pruning is
    all we need to start sparse, 2023.)"""

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        if not leaves:
            return []
        concrete = is_concrete(sparsity)
        xp: Any = np if concrete else jnp
        order = sorted((leaf.path for leaf in leaves), key=_natural)
        depth = np.asarray([order.index(leaf.path) + 1 for leaf in leaves])
        sizes = np.asarray([leaf.size for leaf in leaves], np.float64)
        share = xp.asarray(sizes / sizes.sum(), np.float64 if concrete else np.float32)
        densities = _solve(lambda r: r ** xp.asarray(depth), share, 1.0 - sparsity, xp)
        return [1.0 - d for d in densities]


@dataclasses.dataclass(frozen=True)
class Explicit(ByShape):
    """Sparsities by path: `{pattern: sparsity}`, the first pattern that matches decides; leaves
    that no pattern matches take `default` (the method's `sparsity` if None)."""

    by_path: Mapping[str, float]
    default: float | None = None

    def __post_init__(self):
        for pattern, s in self.by_path.items():
            if is_concrete(s) and not 0.0 <= s < 1.0:
                raise ValueError(f"allocation: sparsity {s} for {pattern!r} is not in [0, 1)")

    def sparsities(self, leaves: Sequence[Leaf], sparsity) -> list:
        paths = [leaf.path for leaf in leaves]
        check_matched("allocation", self.by_path, paths)

        def of(path: str):
            for pattern, value in self.by_path.items():
                if re.search(pattern, path):
                    return value
            value = sparsity if self.default is None else self.default
            if value is None:
                raise ValueError(
                    f"allocation: no pattern matches {path!r}, and neither default= nor sparsity= "
                    "is given"
                )
            return value

        return [of(path) for path in paths]


@dataclasses.dataclass(frozen=True)
class Global:
    r"""One ranking over all layers.

    Layers whose scores are of another size than those of the others lose all or nothing of their
    weights, unless scores are put on one scale first:

    - `normalize="l2"`: the scores of a layer are divided by their Euclidean norm, as JaxPruner does by
      default;
    - `normalize="rms"`: by their root mean square. One threshold on |w| over all layers is then
      $\lambda\,std(W_l)$ in each, for weights of mean 0: the "class-distribution" rule (Han et al.,
      Learning both weights and connections for efficient neural networks, 2015; See, Luong & Manning,
      Compression of neural machine translation models via pruning, 2016, compare it with the
      "class-blind" `global` and the "class-uniform" `uniform`);
    - `normalize="mean"`: by the mean of their absolute values, which does not fall with the number of
      weights, so that small layers are not favoured;
    - `normalize="lamp"`: the score s of a weight becomes $s^2 / \sum s'^2$ over the weights of its layer
      that rank no lower (Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021),
      by which every layer keeps its largest weight. A neighbour of "l2", not its twin: ranks decide
      within a layer, not sizes alone.

    Args:
      normalize: None (scores as they are), "l2", "rms", "mean" or "lamp".
      minimum: the number of weights that every layer keeps whatever its scores: an integer, or a
        fraction (below 1) of all weights of the network. Layers that have no more stay dense
        (Gupta et al., Is complexity required for neural network pruning?, 2022, use 0.0005).

    >>> Global(normalize="l2")
    Global(normalize='l2', minimum=0)

    Raises:
      ValueError: another `normalize`, a negative `minimum`.
    """

    normalize: Literal["l2", "rms", "mean", "lamp"] | None = None
    minimum: int | float = 0

    def __post_init__(self):
        if self.normalize not in (None, "l2", "rms", "mean", "lamp"):
            raise ValueError(
                f"Global(normalize={self.normalize!r}): use None, 'l2', 'rms', 'mean' or 'lamp'"
            )
        if self.minimum < 0:
            raise ValueError(f"Global(minimum={self.minimum}): must not be negative")

    def floor(self, sizes: Sequence[int]) -> list[int]:
        """The least number of weights kept in each leaf of `sizes`."""
        least = self.minimum
        if isinstance(least, float) and least < 1:
            least = scale_count(sum(sizes), least)
        return [min(int(least), n) for n in sizes]

    def rank(self, leaf: Leaf, scores: Array) -> Array:
        """The scores of the units of a leaf on the scale that is compared across leaves."""
        if self.normalize is None:
            return scores
        lead = min(leaf.lead, 1)
        s = scores.astype(jnp.float32)
        if self.normalize == "lamp":
            return lamp_scores(s, lead=lead)
        axes, tiny = tuple(range(lead, s.ndim)), 1e-30
        if self.normalize == "mean":
            return s / jnp.maximum(jnp.mean(jnp.abs(s), axis=axes, keepdims=True), tiny)
        total = jnp.mean if self.normalize == "rms" else jnp.sum
        return s / jnp.maximum(jnp.sqrt(total(s * s, axis=axes, keepdims=True)), tiny)


def lamp_scores(scores: Array, *, lead: int = 0) -> Array:
    r"""Layer-adaptive magnitudes: $s_i^2 / \sum_{j: s_j \ge s_i} s_j^2$, equal scores in the order of
    their positions, float32.

    A global ranking by them prunes each layer by magnitude, and balances layers by the distortion
    that pruning does to each (Lee et al., Layer-adaptive sparsity for the magnitude-based pruning,
    2021). This is a sort, once for each layer: sharded layers are gathered for it.

    Args:
      scores: magnitudes, not negative.
      lead: so many leading axes stack independent layers.

    >>> lamp_scores(jnp.array([1.0, 2.0, 2.0])).tolist()
    [0.1111111119389534, 0.5, 1.0]
    """
    shape = scores.shape

    def one(s):
        order = jnp.argsort(s, stable=True)
        squares = jnp.square(s[order])
        at_least = jnp.cumsum(squares[::-1])[::-1]
        share = squares / jnp.maximum(at_least, jnp.finfo(jnp.float32).tiny)
        return jnp.zeros_like(s).at[order].set(share)

    flat = jax.lax.stop_gradient(scores).astype(jnp.float32)
    flat = flat.reshape(math.prod(shape[:lead]), math.prod(shape[lead:]))
    return jax.vmap(one)(flat).reshape(shape)


Allocation = ByShape | Global
AllocationLike = str | Mapping[str, float] | Allocation
"""How the budget is split over the layers: a name, a mapping from path patterns to sparsities, or an
object of this module."""

NAMED: dict[str, Allocation] = {
    "uniform": Uniform(),
    "er": ErdosRenyi(kernel=False),
    "erk": ErdosRenyi(),
    "global": Global(),
    "global_l2": Global(normalize="l2"),
    "global_rms": Global(normalize="rms"),
    "global_mean": Global(normalize="mean"),
    "lamp": Global(normalize="lamp"),
}


def resolve(allocation: AllocationLike) -> Allocation:
    """An allocation by name, as a mapping from path patterns to sparsities, or the object itself.

    Raises:
      ValueError: anything else.
    """
    if isinstance(allocation, ByShape | Global):
        return allocation
    if isinstance(allocation, Mapping):
        return Explicit(allocation)
    if isinstance(allocation, str) and allocation in NAMED:
        return NAMED[allocation]
    raise ValueError(
        f"allocation={allocation!r}: give one of {sorted(NAMED)}, a mapping from path patterns to "
        "sparsities, or an object of jaxsparse.allocations"
    )
