r"""Adapters of low rank that merge into a sparse model: SparsePEFT and LoRS.

    w + (α / r) (A B) where the mask keeps, 0 elsewhere

A `[in, r]` is random, B `[r, out]` zero, so that training begins at the model that was given; A and B alone
are trained. The product is masked before it is added, by which merging changes no zero: SparsePEFT (Munoz,
Yuan & Jain, SQFT: low-cost model adaptation in low-precision sparse foundation models, EMNLP Findings 2024).
The sum is made anew in the backward pass instead of being kept for it (`jax.checkpoint`): LoRS (Hu et al.,
LoRS: efficient low-rank adaptation for sparse large language model, 2025). Gradients are the exact ones,

    dA = (α / r) (G masked) Bᵀ,   dB = (α / r) Aᵀ (G masked),   G = xᵀ dy.

Masks are carried, not read from zeros: a kept weight may be 0.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse import targets as targets_
from jaxsparse._checks import check_count
from jaxsparse.post_training import models
from jaxsparse.post_training._checks import check_pattern
from jaxsparse.post_training.report import Result


class Factors(NamedTuple):
    """A `[stack, in, rank]` and B `[stack, rank, out]` of one kernel."""

    a: Array
    b: Array


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a kernel is: its leaf, and the way from the leaf to `[stack, in, out]`."""

    path: str
    take: Callable[[Array], Array]

    def spread(self, matrix: Array, leaf: Array) -> Array:
        """A matrix as an array like the leaf, zero where the leaf has other things."""
        shape = jax.ShapeDtypeStruct(leaf.shape, matrix.dtype)
        return jax.linear_transpose(self.take, shape)(matrix)[0]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What `adapter` returns.

    Attributes:
      init: the factors by the name of the kernel: what is trained.
      scale: α / r.
    """

    init: dict[str, Factors]
    scale: float
    _model: models.Model = dataclasses.field(repr=False)
    _masks: Mapping[str, Array] = dataclasses.field(repr=False)
    _places: Mapping[str, _Place] = dataclasses.field(repr=False)

    def params(self, factors: Mapping[str, Factors]) -> Any:
        """The parameters of the model with the factors merged into its masks."""
        named = dict(self._model.named())
        for name, f in factors.items():
            place = self._places[name]
            mask = self._masks[place.path]
            named[place.path] = _merged(place, named[place.path], f, mask, self.scale)
        return jax.tree.structure(self._model.params).unflatten(list(named.values()))

    def __call__(self, factors: Mapping[str, Factors], batch: Any) -> Any:
        """The outputs of the adapted model for a batch: differentiate it by the factors."""
        return self._model.function(self.params(factors), batch)

    def merge(self, factors: Mapping[str, Factors]) -> Any:
        """A model like the one that was given, with the factors merged: same masks, same outputs."""
        return self._model.rebuild(self.params(factors))


def adapter(
    pruned: Any,
    masks: Any = None,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str = "",
    forward: models.Forward | None = None,
    seed: int = 0,
) -> Adapter:
    """Adapters of low rank for a sparse model, that keep it sparse.

    Args:
      pruned: a `Result` of `prune`; or a model whose sparse leaves are matrices, with `masks`.
      masks: a tree like the parameters, bool where pruned and None elsewhere.
      rank: r, of every kernel.
      alpha: α; by default r, for a scale of 1.
      targets: a regular expression for the names of kernels that get adapters, of those that have a mask.
      forward: `forward(model, batch)`, in place of the usual call.
      seed: of A.

    Returns:
      The adapter.

    >>> from jaxsparse import post_training as pt
    >>> model = (lambda p, x: x @ p["kernel"], {"kernel": jnp.array([[2.0], [1.0]])})
    >>> lora = pt.adapter(pt.prune(model, [jnp.ones((1, 2))], "wanda", sparsity=0.5), rank=1)
    >>> grads = jax.grad(lambda f: jnp.sum(lora(f, jnp.ones((1, 2)))))(lora.init)
    >>> after = jax.tree.map(lambda f, g: f - 0.1 * g, lora.init, grads)
    >>> lora.params(after)["kernel"].ravel() != lora.params(lora.init)["kernel"].ravel()
    Array([ True, False], dtype=bool)

    Raises:
      ValueError: a rank that is not positive, no masks, a mask of a leaf that is no matrix, targets that
        match nothing.
    """
    check_count("rank", rank)
    check_pattern("targets", targets)
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}: give a finite number")
    model = pruned.model if isinstance(pruned, Result) else pruned
    masks = pruned.masks if isinstance(pruned, Result) else masks
    if masks is None:
        raise ValueError("masks: a model has none of its own; give them, or a Result of prune")
    whole = models.of(model, forward)
    named, kept = dict(whole.named()), dict(targets_.named_leaves(masks))
    if isinstance(pruned, Result):
        places = {k.name: _Place(k.path, k.take) for k in pruned.kernels}
    else:
        places = {path: _Place(path, lambda x: x[None]) for path in kept}
        for path, mask in kept.items():
            if path not in named or jnp.shape(mask) != jnp.shape(named[path]):
                has = f"the leaf {named[path].shape}" if path in named else "no such leaf"
                raise ValueError(
                    f"masks: {path!r} has shape {jnp.shape(mask)}, and the model has {has}; give a tree like "
                    "the parameters, with None where nothing was pruned"
                )
        if deep := [p for p in kept if jnp.ndim(named[p]) != 2]:
            raise ValueError(
                f"masks: {deep[0]!r} has shape {named[deep[0]].shape}; of a leaf that is no matrix [in, out] "
                "the Result of prune knows the axes: give that"
            )
    places = {name: place for name, place in places.items() if re.search(targets, name)}
    if not places:
        raise ValueError(f"targets={targets!r}: matches no kernel that has a mask")
    init = {}
    for i, (name, place) in enumerate(places.items()):
        stack, inputs, outputs = jax.eval_shape(place.take, named[place.path]).shape
        key = jax.random.fold_in(jax.random.key(seed), i)
        a = jax.random.normal(key, (stack, inputs, rank)) * inputs**-0.5
        init[name] = Factors(a, jnp.zeros((stack, rank, outputs)))
    scale = (rank if alpha is None else alpha) / rank
    return Adapter(init, scale, whole, {p: jnp.asarray(m) for p, m in kept.items()}, places)


def _merged(place: _Place, w: Array, factors: Factors, mask: Array, scale: float) -> Array:
    @jax.checkpoint
    def merged(w: Array, factors: Factors) -> Array:
        product = jnp.einsum("sir,sro->sio", *factors)
        return w + jnp.where(mask, scale * place.spread(product, w), 0.0).astype(w.dtype)

    return merged(w, factors)
