"""The units of the sparse leaves as vectors: norms over units, and what is decided of units at the weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import selection
from jaxsparse.allocations import Global
from jaxsparse.choose import choose, unit_budgets
from jaxsparse.engines.setup import Setup, setup
from jaxsparse.leaves import Leaf, coupling
from jaxsparse.structures import Block, Channel, Coupled, MakesCoupled, Structure, Unstructured
from jaxsparse.typing import AllocationLike, GroupsLike, Scalar, Seed, Targets


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of leaves: those of every leaf, or of every group of a `Coupled` structure.

    Values of units are lists of arrays, `[units]` or as the structure shapes them, one for each group or
    leaf; values of weights are lists of arrays, one for each leaf.

    >>> leaf = Leaf(0, "kernel", (2, 3), 0, Channel())
    >>> [n.tolist() for n in Units([leaf]).norms([jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])])]
    [[5.0, 0.0, 1.0]]
    """

    members: Sequence[Leaf]

    @property
    def leaves(self) -> list[Leaf]:
        """One leaf for every array of units, whose weights are the units."""
        together = coupling(self.members)
        if together is not None:
            return list(together.leaves)
        shapes = jax.eval_shape(lambda: [leaf.pool(jnp.zeros(leaf.shape)) for leaf in self.members])
        return [
            Leaf(leaf.index, leaf.path, x.shape, min(leaf.lead, 1), Unstructured())
            for leaf, x in zip(self.members, shapes)
        ]

    def pool(
        self, values: Sequence[Array], combine: Literal["sum", "mean", "max"] = "sum"
    ) -> list[Array]:
        """Sums over units, in float32 at least; of the leaves of a unit the sum, mean or maximum."""
        together = coupling(self.members)
        if together is not None:
            return together.pool(values, combine)
        return [leaf.pool(x) for leaf, x in zip(self.members, values)]

    def dots(self, xs: Sequence[Array], ys: Sequence[Array]) -> list[Array]:
        """The inner products of units."""
        return self.pool([_wide(x) * _wide(y) for x, y in zip(xs, ys)])

    def norms(self, xs: Sequence[Array]) -> list[Array]:
        """The Euclidean norms of units."""
        return [jnp.sqrt(n) for n in self.dots(xs, xs)]

    def sizes(self) -> list[Array]:
        """The numbers of weights in units, float32."""
        return self.pool([jnp.ones(leaf.shape, jnp.float32) for leaf in self.members])

    def at_weights(
        self, units: Sequence[Array], join: Literal["all", "sum"] = "all"
    ) -> list[Array]:
        """What is said of units, at their weights: masks, or numbers. Where a weight is in two units,
        masks meet and numbers are multiplied; with "sum" numbers are added, and are 0 at weights of no
        unit."""
        together = coupling(self.members)
        if together is not None:
            return together.expand(units, join)
        return [leaf.expand(u) for leaf, u in zip(self.members, units)]

    def held(self, masks: Sequence[Array]) -> list[Array]:
        """The units of which masks of weights keep any weight."""
        together = coupling(self.members)
        if together is not None:
            return together.units(masks)
        return [leaf.units(m) for leaf, m in zip(self.members, masks)]

    def alive(self, ws: Sequence[Array]) -> list[Array]:
        """The units of which any weight is not 0; all of them where there is none, at the start of a
        leaf of zeros."""
        held = self.held([w != 0 for w in ws])
        return [h | ~jnp.any(h) for h in held]

    def budgets(self, setup: Setup) -> list[Array]:
        """How many units of every array stay at the sparsity of the setup, int32 or Python integers."""
        return unit_budgets(self.leaves, setup.allocation, setup.sparsity)

    def best(
        self,
        scores: Sequence[Array],
        setup: Setup,
        where: Sequence[Array] | None = None,
        stream: Any = 0,
    ) -> list[Array]:
        """The units of highest score within the budgets of the setup, of those `where`. A global ranking
        leaves every array one unit at least."""
        rule = setup.allocation
        if isinstance(rule, Global) and not rule.minimum:
            rule = dataclasses.replace(rule, minimum=1)
        return choose(
            self.leaves, scores, rule, setup.sparsity, where=where, seed=setup.seed, stream=stream
        )

    def most(
        self,
        scores: Sequence[Array],
        counts: Sequence[Any],
        setup: Setup,
        where: Sequence[Array] | None = None,
        stream: Any = 0,
    ) -> list[Array]:
        """So many units of every array, of highest score, of those `where`; equal scores are ranked by a
        hash with the setup's seed."""
        leaves = self.leaves
        return selection.topk_masks(
            scores,
            list(counts),
            where=where,
            ties="hash",
            seed=[leaf.salt(setup.seed, stream) for leaf in leaves],
            axis=[leaf.axes for leaf in leaves],
        )

    def cut(self, masks: Sequence[Array], scores: Sequence[Array], setup: Setup) -> list[Array]:
        """Masks of weights that keep the best units, of those that `masks` hold."""
        kept = self.best(scores, setup, where=self.held(masks))
        return [m & k for m, k in zip(masks, self.at_weights(kept))]

    def scales(self, ws: Sequence[Array]) -> list[Array]:
        """The leaves that scale units (see `factors`), and zeros in place of the others."""
        return [w if yes else jnp.zeros_like(w) for w, yes in zip(ws, self.factors())]

    def scale_norms(self, ws: Sequence[Array]) -> list[Array]:
        """The norms of the scales of units (see `factors`)."""
        return self.norms(self.scales(ws))

    def pulled(self, ws: Sequence[Array], slopes: Sequence[Array]) -> list[Array]:
        """The gradient at the weights of a function of the norms of the units' scales, of which `slopes`
        are the derivatives; 0 at other leaves."""
        scales = self.scales(ws)
        per_unit = [safe_divide(s, n) for s, n in zip(slopes, self.norms(scales))]
        return [(f * w).astype(w.dtype) for f, w in zip(self.at_weights(per_unit, "sum"), scales)]

    def factors(self, pattern: str = r"(^|/)(scale|gamma)$") -> list[bool]:
        """Which leaves hold the scales of units, such as those of norms; all leaves of a unit where it
        has none."""
        named = [bool(re.search(pattern, leaf.path)) for leaf in self.members]
        together = coupling(self.members)
        if together is None:
            return [True] * len(named)
        scaled = {leaf.path for leaf, yes in zip(self.members, named) if yes}
        plain = {
            part.path
            for _, group in together.groups
            if not any(part.path in scaled for part in group.parts)
            for part in group.parts
        }
        return [yes or leaf.path in plain for leaf, yes in zip(self.members, named)]


def safe_divide(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def group_setup(
    sparsity: Scalar | None,
    groups: GroupsLike,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
    *,
    sides: Sequence[str] = ("out", "with"),
    asks_sparsity: bool = True,
    by_layer: bool = False,
) -> Setup:
    """The setup of a method that works on groups.

    Args:
      groups: what `channels.find` returns, a structure, or None: every output channel of a kernel.
      sides: what of the groups of `channels.find` belongs to a unit.
      sparsity, allocation, targets, seed, pack_masks, asks_sparsity, by_layer: as for `setup`. Targets
        are by default all leaves that the groups name, biases and scales among them.

    Returns:
      The setup.

    Raises:
      ValueError: groups that are none of these; what `setup` raises.
    """
    kind: Structure
    if groups is None:
        kind = Channel()
    elif isinstance(groups, MakesCoupled):
        kind = groups.structure(sides=sides)
    elif isinstance(groups, Channel | Block | Coupled):
        kind = groups
    else:
        raise ValueError(
            f"groups={groups!r}: give what channels.find(model, x) returns, a structure such as "
            "Channel(), or None for every output channel by itself"
        )
    if targets is None and isinstance(kind, Coupled):
        targets = tuple((f"^{re.escape(path)}$", True) for path in sorted(kind.paths))
    return setup(
        sparsity,
        kind,
        allocation,
        targets,
        seed,
        pack_masks,
        asks_sparsity=asks_sparsity,
        by_layer=by_layer,
    )


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
