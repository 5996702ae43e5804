"""Where scores, structure, allocation and sparsity meet: budgets of layers, and masks that keep the
highest scores within them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import _control, _counts, allocations, selection
from jaxsparse.allocations import Allocation
from jaxsparse.leaves import Leaf, coupling, salt
from jaxsparse.structures import Structure


def check_sparsity(sparsity, structure: Any = None) -> Any:
    """The sparsity asked for, checked; that of the structure where it fixes one.

    Raises:
      ValueError: not in [0, 1), missing, or at odds with an N:M structure.
    """
    fixed = structure.sparsity if isinstance(structure, Structure) else None
    if sparsity is None:
        if fixed is None:
            raise ValueError("sparsity is missing: give the fraction of zeros, in [0, 1)")
        return fixed
    if not _control.is_concrete(sparsity):
        return sparsity
    number = isinstance(sparsity, int | float | np.number | np.ndarray | jax.Array)
    if isinstance(sparsity, bool) or not number or np.ndim(sparsity) != 0:
        raise ValueError(f"sparsity={sparsity!r}: give one number, the fraction of zeros in [0, 1)")
    if not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1); it is the fraction of zeros")
    if fixed is not None and abs(float(sparsity) - fixed) > 1e-6:
        raise ValueError(
            f"sparsity={sparsity} contradicts structure={structure}, whose sparsity is {fixed:.6g}; "
            "leave sparsity out, or give that value"
        )
    return float(sparsity) if not isinstance(sparsity, jax.Array) else sparsity


def unit_budgets(leaves: Sequence[Leaf], allocation, sparsity, fraction=1.0) -> list:
    """Units kept per slice of each leaf, when `fraction` of the way to `sparsity` is gone.

    Layer l has the sparsity `fraction * S_l`; counts are exact, and at fraction 1 those of the
    final sparsity.

    Raises:
      ValueError: a leaf would keep nothing.
    """
    found = []
    for leaf, s in zip(leaves, allocation.sparsities(leaves, sparsity)):
        fixed, n = leaf.structure.sparsity, leaf.layer_size
        dense = _control.is_concrete(s) and s == 0.0
        s = s if fixed is None or dense else fixed
        final = leaf.structure.budget(leaf.layer_shape, _counts.kept_count(n, s))
        if isinstance(final, int) and final < 1:
            raise ValueError(
                f"sparsity={s:.6g} leaves nothing of {leaf.path!r}, {leaf.layer_shape} with "
                f"{leaf.structure}; ask for less, or keep the leaf dense with targets="
            )
        if not isinstance(fraction, float) or fraction != 1.0:
            ramp = jnp.asarray(fraction, jnp.float32)
            now = leaf.structure.budget(leaf.layer_shape, _counts.kept_count(n, s * ramp))
            final = _counts.later(ramp >= 1.0, final, now)
        found.append(final if isinstance(final, int) else _counts.no_less(final, 1))
    return found


def choose(
    leaves: Sequence[Leaf],
    values: Sequence[Array],
    allocation: Allocation,
    sparsity,
    *,
    fraction: Any = 1.0,
    where: Sequence[Any] | None = None,
    ties: str = "position",
    seed: Any = 0,
    stream: Any = 0,
) -> list[Array]:
    """Masks that keep the highest scores within the budget.

    Args:
      leaves: the sparse leaves.
      values: scores, one array per leaf.
      allocation: how the budget is split.
      sparsity: the sparsity asked for; with `fraction` < 1 only that part of it. Of units that span
        leaves (`structures.Coupled`) it is the fraction of the units of each group.
      where: masks to choose within (a weight outside is never kept).
      ties, seed, stream: how equal scores are ranked, see `selection.topk_mask`.

    Returns:
      A boolean mask per leaf.

    Raises:
      ValueError: a budget that leaves nothing of a layer; a ranking of the whole network for
        structures that fix budgets within layers.
    """
    where = list(where or [None] * len(leaves))
    options = dict(fraction=fraction, ties=ties, seed=seed, stream=stream)
    if (together := coupling(leaves)) is not None:
        among = None
        if any(w is not None for w in where):
            among = together.units(
                [jnp.ones(x.shape, bool) if w is None else w for x, w in zip(leaves, where)]
            )
        pooled = together.pool(values)
        units = choose(together.leaves, pooled, allocation, sparsity, where=among, **options)
        return together.expand(units)
    if isinstance(allocation, allocations.Global):
        return _choose_global(leaves, values, allocation, sparsity, where=where, **options)
    units = unit_budgets(leaves, allocation, sparsity, fraction)
    salts = [leaf.salt(seed, stream) for leaf in leaves]
    masks: list[Any] = [
        None if leaf.structure.ranks else leaf.assign(v, k, where=w, ties=ties, seed=s)
        for leaf, v, k, w, s in zip(leaves, values, units, where, salts)
    ]
    at = [i for i, leaf in enumerate(leaves) if leaf.structure.ranks]
    kept = selection.topk_masks(
        [leaves[i].pool(values[i]) for i in at],
        [units[i] for i in at],
        where=[_units(leaves[i], where[i]) for i in at],
        ties=ties,
        seed=[salts[i] for i in at],
        axis=[leaves[i].axes for i in at],
    )
    for i, m in zip(at, kept):
        masks[i] = leaves[i].expand(m)
    return masks


def _units(leaf: Leaf, mask) -> Array | None:
    return None if mask is None else leaf.units(mask)


def _choose_global(leaves, values, allocation, sparsity, *, fraction, where, ties, seed, stream):
    if not leaves:
        return []
    unit = {leaf.unit_size for leaf in leaves}
    fixed = any(leaf.slices > 1 or not leaf.structure.ranks for leaf in leaves)
    if fixed or len(unit) > 1:
        raise ValueError(
            "allocation='global' ranks units of one size over the whole network; "
            f"structure={leaves[0].structure} fixes budgets within a layer: use a rule of shapes "
            "such as allocation='uniform'"
        )
    (size,) = unit
    total = sum(leaf.size for leaf in leaves)
    kept = _counts.kept_count(total, sparsity) // size
    if isinstance(kept, int) and kept < 1:
        raise ValueError(f"sparsity={sparsity} leaves nothing of {total} weights; ask for less")
    if not isinstance(fraction, float) or fraction != 1.0:
        ramp = jnp.asarray(fraction, jnp.float32)
        now = _counts.kept_count(total, sparsity * ramp) // size
        kept = _counts.later(ramp >= 1.0, kept, now)
    ranked = [allocation.rank(leaf, leaf.pool(v)) for leaf, v in zip(leaves, values)]
    eligible = [_units(leaf, w) for leaf, w in zip(leaves, where)]
    least = allocation.floor([leaf.size for leaf in leaves])
    masks = selection.topk_masks(
        ranked,
        kept,
        where=None if all(w is None for w in eligible) else eligible,
        ties=ties,
        seed=salt(seed, stream, ""),
        minimum=[x.layers * (n // (size * max(x.layers, 1))) for x, n in zip(leaves, least)]
        if allocation.minimum
        else None,
        together=True,
    )
    known = [(x.path, m) for x, m in zip(leaves, masks) if _control.is_concrete(m)]
    if empty := [path for path, m in known if not bool(jnp.any(m))]:
        warnings.warn(
            f"sparsity={sparsity}: one ranking of the whole network leaves nothing of "
            f"{', '.join(map(repr, empty))}; allocation=Global(minimum=1) keeps a weight of every leaf, "
            "targets= keeps a leaf dense",
            stacklevel=4,
        )
    return [leaf.expand(m) for leaf, m in zip(leaves, masks)]
