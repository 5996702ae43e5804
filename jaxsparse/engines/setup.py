"""What a method was asked for, resolved and checked once: the setup that every engine takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse import allocations, leaves, structures
from jaxsparse.allocations import Allocation
from jaxsparse.choose import check_sparsity
from jaxsparse.leaves import SparseLeaves
from jaxsparse.structures import Structure
from jaxsparse.typing import AllocationLike, Scalar, Seed, StructureLike, Targets


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Which leaves are sparse, how, and how sparse; made by `setup`.

    Attributes:
      sparsity: the fraction of zeros; None of methods that cannot be asked for one.
      structure: of all leaves, or by path pattern.
      allocation: how the budget is split over the layers.
      targets: which leaves are sparsified.
      seed: of random masks and random ties.
      pack_masks: whether the state stores masks as bits.
      fits: structures that every sparse leaf must be able to have, besides its own.
    """

    sparsity: Any
    structure: Structure | Mapping[str, Structure]
    allocation: Allocation
    targets: Targets
    seed: Seed
    pack_masks: bool
    fits: tuple[Structure, ...] = ()

    @property
    def by_shape(self) -> allocations.ByShape:
        """The allocation, where `setup(by_layer=True)` has made sure that it is a rule of shapes."""
        assert isinstance(self.allocation, allocations.ByShape)
        return self.allocation

    def leaves_for(self, params) -> SparseLeaves:
        """The sparse leaves of `params`.

        Raises:
          ValueError: targets that match nothing, a structure that a leaf cannot have.
        """
        found = leaves.find(params, self.targets, self.structure)
        for leaf in found:
            for structure in self.fits:
                structure.check(leaf.path, leaf.layer_shape)
        return found

    def replace(self, **changes: Any) -> Setup:
        """The same setup with other values: `setup.replace(sparsity=0.5)`."""
        return dataclasses.replace(self, **changes)


def setup(
    sparsity: Scalar | None = None,
    structure: StructureLike = None,
    allocation: AllocationLike = "uniform",
    targets: Targets = None,
    seed: Seed = 0,
    pack_masks: bool = False,
    *,
    asks_sparsity: bool = True,
    by_layer: bool = False,
    fits: Sequence[Structure] = (),
) -> Setup:
    """Resolves and checks the arguments that methods share; the first line of a method.

    Args:
      sparsity: the fraction of zeros in [0, 1); None: that of the structure.
      structure: None, a structure, its text, a mapping from path patterns to these, or the groups that
        `channels.find` returns.
      allocation: a name, a mapping from path patterns to sparsities, or an allocation.
      targets: see `jaxsparse.targets`.
      seed: an integer; may be traced.
      pack_masks: store masks as one bit per weight.
      asks_sparsity: False of a method that cannot be asked for a sparsity.
      by_layer: whether the method needs budgets of layers, which a global ranking does not give.
      fits: structures that every sparse leaf must be able to have, besides `structure`.

    Returns:
      The setup.

    >>> sparse = setup(structure="2:4")
    >>> sparse.sparsity, sparse.structure
    (0.5, NM(n=2, m=4, axis=-2, strided=False))

    Raises:
      ValueError: a sparsity out of range, missing, or at odds with the structure; an argument that is
        none of the above.
    """
    kind: Any = structures.resolve_all(structure)
    if not isinstance(pack_masks, bool):
        raise ValueError(f"pack_masks={pack_masks!r}: give True (one bit per weight) or False")
    rule = allocations.resolve(allocation)
    if by_layer and isinstance(rule, allocations.Global):
        raise ValueError(
            f"allocation={allocation!r} ranks weights over all layers; this method needs budgets of "
            "layers: give 'uniform', 'er', 'erk' or a mapping from path patterns to sparsities"
        )
    return Setup(
        sparsity=check_sparsity(sparsity, kind) if asks_sparsity else None,
        structure=kind,
        allocation=rule,
        targets=targets,
        seed=seed,
        pack_masks=pack_masks,
        fits=tuple(fits),
    )
