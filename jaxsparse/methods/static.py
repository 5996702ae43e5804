"""Fixed masks: drawn at random, given, or taken from the zeros of a sparse model."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import masking
from jaxsparse import targets as targets_
from jaxsparse._control import is_concrete
from jaxsparse.engines import Step, hold_masks
from jaxsparse.leaves import find
from jaxsparse.methods import _recipe as recipe
from jaxsparse.methods._registry import register


@register(
    "static",
    reference="Liu et al., The unreasonable effectiveness of random pruning, 2022",
    dynamics="fixed",
)
def static(
    inner: optax.GradientTransformation,
    sparsity: Any = None,
    *,
    masks: Any = "random",
    structure: Any = None,
    allocation: Any = "erk",
    targets: Any = None,
    seed: Any = 0,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Masks that never change.

    - `masks="random"`: drawn at `init`, exactly as many weights in each layer as `allocation` gives
      it at `sparsity`.
    - `masks="from_params"`: where the parameters given to `init` are not zero. This fine-tunes a
      model that was pruned before; `sparsity` is then what it is. A leaf that is zero everywhere (an
      adapter or a head at its start) is kept whole.
    - a tree of boolean masks like the parameters, `None` at dense leaves.

    Args:
      inner: the optimizer of the weights.
      sparsity: the fraction of zeros in [0, 1), for random masks.
      masks, structure, allocation, targets, seed, pack_masks: see above and the guide of options.

    >>> import jaxsparse
    >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
    >>> tx = jaxsparse.static(optax.sgd(0.1), masks="from_params")
    >>> jaxsparse.get_masks(tx.init(params))["kernel"].tolist()
    [[True, False], [False, True]]

    Raises:
      ValueError: a sparsity together with masks that fix it, masks that do not match the parameters.
    """
    given = not isinstance(masks, str)
    if not given and masks not in ("random", "from_params"):
        raise ValueError(f"masks={masks!r}: use 'random', 'from_params' or a tree of masks")
    if (given or masks == "from_params") and sparsity is not None:
        raise ValueError(
            f"sparsity={sparsity}: these masks fix the sparsity themselves; leave it out"
        )
    if given:
        return hold_masks(
            inner,
            lambda params: _plan_of(params, masks),
            init=lambda step: [_given(masks, v) for v in step.views],
            pack_masks=pack_masks,
        )
    plan_for = recipe.plan_for(targets, structure)
    if masks == "from_params":
        return hold_masks(inner, plan_for, init=_nonzeros, pack_masks=pack_masks)
    sparsity = recipe.sparsity_of(sparsity, structure)
    return hold_masks(
        inner, plan_for, init=recipe.random_masks(allocation, sparsity, seed), pack_masks=pack_masks
    )


def _nonzeros(step: Step) -> list:
    """Where a weight is not zero; all of a leaf that is zero everywhere, and a word about it."""
    found = [masking.nonzeros(v.w) for v in step.views]
    rows = [(v, m) for v, m in zip(step.views, found) if is_concrete(v.w)]
    zero = [v.leaf.path for v, m in rows if not bool(jnp.any(v.w != 0))]
    if zero:
        warnings.warn(
            f"masks='from_params': {', '.join(map(repr, zero))} is zero everywhere and is kept whole, "
            f"so that it trains; targets=[({zero[0]!r}, False)] leaves it out",
            stacklevel=4,
        )
    return found


def _plan_of(params, masks):
    """The plan whose sparse leaves are those that have a mask."""

    wanted = masking.by_path(masks)
    result = find(params, lambda path, _: path in wanted)
    missing = sorted(set(wanted) - {leaf.path for leaf in result.leaves})
    if missing and result.treedef.num_leaves:
        paths = [s.path for s in targets_.select(params)]
        raise ValueError(targets_.unmatched_message("masks", missing, paths))
    return result


def _given(masks, view) -> jax.Array:
    mask = jnp.asarray(masking.unpack(masking.by_path(masks)[view.leaf.path]))
    if mask.shape != view.w.shape or mask.dtype != bool:
        raise ValueError(
            f"masks: the mask of {view.leaf.path!r} is {mask.dtype}{list(mask.shape)}; it must be "
            f"bool{list(view.w.shape)}"
        )
    return mask
