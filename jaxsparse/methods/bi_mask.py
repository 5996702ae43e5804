"""Bi-Mask: N:M weights for the forward product, and some of them for the input's gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from jaxsparse import selection
from jaxsparse.engines import is_concrete, when
from jaxsparse.engines.setup import setup
from jaxsparse.engines.two_view import two_view
from jaxsparse.leaves import Leaf
from jaxsparse.methods.backward_pattern import aligned, along_outputs, grouped, pattern
from jaxsparse.methods.registry import register
from jaxsparse.methods.sr_ste import sr_ste
from jaxsparse.structures import NM
from jaxsparse.typing import Scalar, Seed, StructureLike, Targets


def best_order(leaf: Leaf, kind: NM, w: Array, f: Array, candidates: int, salt: Any) -> Array:
    """The order of the outputs, `[*stacked, out]`, under which `along_outputs` keeps most weights:
    the best of the identity and `candidates - 1` random ones. More candidates never keep fewer."""
    identity = jnp.broadcast_to(
        jnp.arange(leaf.shape[-1], dtype=jnp.int32), (*leaf.stack_shape, leaf.shape[-1])
    )
    axes = leaf.layer_axes
    key, score = jax.random.key(salt), jnp.abs(w)

    def kept(order):
        index = jnp.broadcast_to(aligned(leaf, order), w.shape)
        return selection.count(grouped(leaf, kind, score, f, index), axis=axes)

    def attempt(i, best):
        order, most = best
        shuffled = jax.random.permutation(
            jax.random.fold_in(key, i), identity, axis=-1, independent=True
        )
        n = kept(shuffled)
        better = n > most
        return jnp.where(better[..., None], shuffled, order), jnp.where(better, n, most)

    return jax.lax.fori_loop(1, candidates, attempt, (identity, kept(identity)))[0]


@register(
    "bi_mask",
    reference="Zhang et al., Bi-directional masks for efficient N:M sparse training, 2023",
    controls_sparsity=False,
    keeps_raw=True,
    dynamics="projected",
    structures="n:m",
    gradients="all",
)
def bi_mask(
    inner: optax.GradientTransformation,
    *,
    decay: Scalar = 2e-4,
    structure: StructureLike = "2:4",
    update_every: int = 100,
    candidates: int = 100,
    targets: Targets = None,
    seed: Seed = 0,
    raw_dtype: DTypeLike | None = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SR-STE in the forward view, and a second mask $b \le f$ for the gradient of the input:

    $$Y = X (W \odot f),\quad \partial X = \partial Y (W \odot b)^T,\quad
      \partial W = X^T \partial Y + \lambda (1 - f) \odot W,$$

    f the n:m mask of |W| along the inputs, b = f and the n:m mask of $|W \odot f|$ along the outputs
    taken in an order $\pi$. Every `update_every` steps $\pi$ becomes the best of `candidates` orders
    (the one under which b keeps most).

    The parameters are $W \odot f$. b needs layers with two views and one more line in the training
    loop: see `jaxsparse.nn.two_view`. On ordinary layers this is `sr_ste`.

    Args:
      inner: the optimizer of W, any optax transformation.
      decay: $\lambda$; it is added to the gradient.
      structure: NM(n, m) or its text; m must divide the inputs and the outputs of every sparse
        leaf.
      update_every: steps between two searches of $\pi$.
      candidates: orders tried by a search; the identity is the first, so 1 never permutes.
      targets: which leaves are sparse, by path; None: all kernels. See `jaxsparse.targets`.
      seed: of the random orders, an integer.
      raw_dtype: the dtype of z; None: that of the parameters, too coarse for small steps if bfloat16.
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.methods.bi_mask(optax.sgd(0.1), structure=jaxsparse.structures.NM(2, 4))

    Raises:
      ValueError: another structure, groups that do not divide, no candidate.
    """
    if candidates < 1 or (is_concrete(update_every) and update_every < 1):
        raise ValueError(
            f"candidates={candidates}, update_every={update_every}: both must be at least 1"
        )
    forward, kind = pattern(structure)

    def rule(leaf, w, f, old, count):
        def search(_, w, f):
            return best_order(leaf, kind, w, f, candidates, leaf.salt(seed, count))

        if old is None:
            order = search(None, w, f)
        else:
            # The update that makes count + 1 the number of those done.
            order = when((count + 1) % update_every == 0, search, old[1], w, f)
        return along_outputs(leaf, kind, w, where=f, order=order), order

    tx = sr_ste(
        inner,
        decay=decay,
        structure=forward,
        targets=targets,
        raw_dtype=raw_dtype,
        pack_masks=pack_masks,
    )
    sparse = setup(structure=forward, targets=targets, pack_masks=pack_masks)
    return two_view(tx, sparse, kind, rule)
