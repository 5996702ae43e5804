"""Fixed masks: drawn at random, given, or taken from the zeros of a sparse model."""

from __future__ import annotations

import warnings
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxsparse import masking
from jaxsparse import targets as targets_
from jaxsparse.engines import Step, hold_masks, is_placeholder, random_masks
from jaxsparse.engines.setup import setup
from jaxsparse.methods.registry import register
from jaxsparse.typing import AllocationLike, Scalar, Seed, StructureLike, Targets


@register(
    "static",
    reference="Liu et al., The unreasonable effectiveness of random pruning, 2022",
    dynamics="fixed",
)
def static(
    inner: optax.GradientTransformation,
    sparsity: Scalar | None = None,
    *,
    masks: Literal["random", "from_params"] | optax.Params = "random",
    structure: StructureLike = None,
    allocation: AllocationLike = "erk",
    targets: Targets = None,
    seed: Seed = 0,
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
      inner: the optimizer of the weights, any optax transformation.
      sparsity: the fraction of zeros in [0, 1), for random masks.
      masks: "random", "from_params" or a tree of masks, see above.
      structure: allowed patterns of zeros: a structure, its text ("2:4"), a mapping by path, None: any;
        of random masks.
      allocation: the budgets of layers: "uniform", "er", "erk", "global", "lamp", a mapping by path;
        of random masks.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of random masks and ties, an integer.
      pack_masks: store masks as one bit per weight.

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
        wanted = masking.by_path(masks)
        sparse = setup(
            asks_sparsity=False, targets=lambda path, _: path in wanted, pack_masks=pack_masks
        )
        tx = hold_masks(inner, sparse, init=lambda step: _given(wanted, step))

        def init(params):
            paths = [path for path, _ in targets_.named_leaves(params)]
            missing = sorted(set(wanted) - set(paths))
            if missing and not is_placeholder(params):
                raise ValueError(targets_.unmatched_message("masks", missing, paths))
            return tx.init(params)

        return optax.GradientTransformationExtraArgs(init, tx.update)
    drawn = masks == "random"
    sparse = setup(sparsity, structure, allocation, targets, seed, pack_masks, asks_sparsity=drawn)
    return hold_masks(inner, sparse, init=random_masks(sparse) if drawn else _nonzeros)


def _nonzeros(step: Step) -> list:
    """Where a weight is not zero; all of a leaf that is zero everywhere, and a word about it."""
    found = [masking.nonzeros(v.w) for v in step.views]
    if zero := step.all_zero():
        warnings.warn(
            f"masks='from_params': {', '.join(map(repr, zero))} is zero everywhere and is kept whole, "
            f"so that it trains; targets=[({zero[0]!r}, False)] leaves it out",
            stacklevel=4,
        )
    return found


def _given(wanted, step: Step) -> list[jax.Array]:
    """The masks that were given, by the path of their leaf."""
    found = [jnp.asarray(masking.unpack(wanted[leaf.path])) for leaf in step.leaves]
    for v, mask in zip(step.views, found):
        if mask.shape != v.w.shape or mask.dtype != bool:
            raise ValueError(
                f"masks: the mask of {v.leaf.path!r} is {mask.dtype}{list(mask.shape)}; it must be "
                f"bool{list(v.w.shape)}"
            )
    return found
