r"""Autoencoders that keep the k largest pre-activations of each token.

TopK with AuxK (Gao et al. 2024), k-sparse autoencoders (Makhzani and Frey 2014), gradient SAEs
(Olmo et al. 2024) and k-nested Matryoshka (Zaigrajew et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.sae.decode import sparse_decode, topk_encode
from jaxsparse.sae.scaffold import SAE
from jaxsparse.selection import topk_indices, topk_mask


def scatter_code(values: Array, indices: Array, size: int) -> Array:
    """The dense code `[tokens, size]` of values at indices `[tokens, k]`, which differ within a row."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], size), values.dtype).at[rows, indices].set(values)


def code_at(z: Array, indices: Array) -> Array:
    """The code `[tokens, F]` of pre-activations, after a ReLU, at indices `[tokens, k]` and 0 elsewhere."""
    kept = jnp.take_along_axis(z, indices, axis=-1)
    return scatter_code(jax.nn.relu(kept), indices, z.shape[-1])


def aux_slots(aux_k: int | None, d_out: int, d_sae: int) -> int:
    """The slots of `aux_k`: half of d_out where none are given, at most F.

    Raises:
      ValueError: not an integer from 1 to d_sae.
    """
    slots = min(max(d_out // 2, 1), d_sae) if aux_k is None else aux_k
    return check_count("aux_k", slots, most=d_sae, limit="d_sae")


def aux_k(
    z: Array, candidates: Array, k: int, dictionary: Array, error: Array, target: Array
) -> Array:
    r"""How well latents that are no longer used model the error of the others.

    $\hat e$ decodes the k largest pre-activations of the candidates, after a ReLU and without a bias;
    the result is $\|\hat e - e\|^2 / \|e - \bar e\|^2 \cdot \|y - \bar y\|^2$, sums over a batch, divided
    by its size: relative to the error, in the unit of the loss. e and the last two factors are constants.
    Slots beyond the number of candidates add exactly 0, and so does a batch without candidates.

    Args:
      z: pre-activations `[tokens, F]`.
      candidates: bool `[F]`.
      k: slots a token.
      dictionary: `[F, D]`.
      error: `[tokens, D]`, target minus reconstruction.
      target: `[tokens, D]`.
    """
    error, target = jax.lax.stop_gradient((error, target))
    spread = lambda y: jnp.mean(jnp.sum((y - jnp.mean(y, axis=0)) ** 2, axis=-1))

    def compute(z: Array, dictionary: Array) -> Array:
        indices, chosen = topk_indices(z, k, where=jnp.broadcast_to(candidates, z.shape))
        kept = jnp.where(chosen, jnp.take_along_axis(z, indices, axis=-1), 0.0)
        guess = scatter_code(jax.nn.relu(kept), indices, z.shape[-1]) @ dictionary
        miss = jnp.mean(jnp.sum((guess - error) ** 2, axis=-1))
        scale = spread(error)
        return jnp.where(scale > 0, miss / jnp.where(scale > 0, scale, 1.0), 0.0) * spread(target)

    nothing = lambda z, dictionary: jnp.zeros((), z.dtype)
    return jax.lax.cond(jnp.any(candidates), compute, nothing, z, dictionary)


class TopK(SAE):
    r"""$f = \max(z, 0)$ at the k largest z of each token, 0 elsewhere; no penalty.

    Indices are constants: gradients flow through the k selected entries only. Latents that are dead
    are asked to model the error (`aux_k`).

    Args:
      k: entries a token; fewer are positive where z is not.
      aux_k: slots of dead latents; None: half of d_out, at most F.
      alpha: the weight of AuxK.
      by_norm: ranks $z_i\|d_i\|$ instead of z, which is invariant to the scale of atoms.
      sparse: whether training decodes k rows instead of a dense product; None: where F is at least
        64 k. Results agree to rounding.
      d_model, d_sae, d_out, skip, dead_after, rngs: as of `SAE`.

    Raises:
      ValueError: k or aux_k is not an integer from 1 to d_sae.

    >>> model = TopK(4, 16, k=2, rngs=nnx.Rngs(0))
    >>> (model.encode(jnp.ones((3, 4))) > 0).sum(-1).max() <= 2
    Array(True, dtype=bool)
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        k: int,
        aux_k: int | None = None,
        alpha: float = 1 / 32,
        by_norm: bool = False,
        sparse: bool | None = None,
        d_out: int | None = None,
        skip: bool = False,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, d_sae, d_out=d_out, skip=skip, dead_after=dead_after, rngs=rngs)
        k = check_count("k", k, most=d_sae, limit="d_sae")
        aux_k = aux_slots(aux_k, self.d_out, d_sae)
        if sparse and by_norm:
            raise ValueError("sparse=True: by_norm=True ranks with the atoms; leave one of the two")
        self.k, self.aux_k, self.alpha, self.by_norm = k, aux_k, alpha, by_norm
        self.sparse = (not by_norm and d_sae >= 64 * k) if sparse is None else sparse

    def scores(self, z: Array) -> Array:
        """What is ranked `[tokens, F]`."""
        return z * jnp.linalg.norm(self.W_dec[...], axis=-1) if self.by_norm else z

    def activate(self, z: Array) -> Array:
        indices, _ = topk_indices(self.scores(z), self.k)
        return code_at(z, indices)

    def auxiliary(self, z: Array, error: Array, target: Array) -> Array:
        return self.alpha * aux_k(z, self.dead, self.aux_k, self.W_dec[...], error, target)

    def loss(
        self, x: Array, target: Array | None = None, *, warmup: Array | float = 1.0
    ) -> tuple[Array, dict[str, Array]]:
        if not self.sparse:
            return super().loss(x, target, warmup=warmup)
        y = self._check_batch(x, target)
        centred = x if self.transcodes else x - self.b_dec[...]
        values, indices = topk_encode(centred, self.encoder(), self.b_enc[...], self.k)
        values = jax.nn.relu(values)
        guess = sparse_decode(values, indices, self.W_dec[...]) + self.b_dec[...]
        if self.W_skip is not None:
            guess = guess + x @ self.W_skip[...]
        error = y - guess
        fired = jnp.zeros(self.d_sae, bool).at[indices].max(values > 0)
        self.count(fired, x.shape[0])
        mse = jnp.mean(jnp.sum(error**2, axis=-1))
        parts = (self.encoder(), self.b_enc[...], self.W_dec[...], centred)

        def revive(parts):
            weight, bias, atoms, centred = parts
            return aux_k(centred @ weight + bias, self.dead, self.aux_k, atoms, error, y)

        nothing = lambda parts: jnp.zeros((), mse.dtype)
        auxiliary = self.alpha * jax.lax.cond(jnp.any(self.dead), revive, nothing, parts)
        metrics = {
            "mse": mse,
            "penalty": jnp.zeros((), mse.dtype),
            "auxiliary": auxiliary,
            "l0": jnp.mean(jnp.sum(values > 0, axis=-1)),
            "dead": jnp.mean(self.dead),
        }
        return mse + auxiliary, metrics


class KSparse(SAE):
    r"""The linear tied autoencoder that keeps the k largest z: no ReLU, $W_\mathrm{enc} = W_\mathrm{dec}^T$.

    Args:
      k: entries a token at the end of training; see `k_schedule` for the way there.
      alpha: at inference alpha * k entries are kept, rounded down, at most F.
      d_model, d_sae, dead_after, rngs: as of `SAE`.

    >>> model = KSparse(4, 16, k=2, rngs=nnx.Rngs(0))
    >>> (model.encode(jnp.ones((3, 4))) != 0).sum(-1).tolist()
    [2, 2, 2]
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        k: int,
        alpha: int = 1,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, d_sae, dead_after=dead_after, rngs=rngs)
        k = check_count("k", k, most=d_sae, limit="d_sae")
        alpha = check_count("alpha", alpha, most=d_sae, limit="d_sae")
        self.k, self.alpha = k, alpha
        del self.W_enc

    def encoder(self) -> Array:
        return self.W_dec[...].T

    def activate(self, z: Array) -> Array:
        return jnp.where(topk_mask(z, self.k, axis=-1), z, 0.0)

    def infer(self, z: Array) -> Array:
        k = min(self.alpha * self.k, self.d_sae)
        return jnp.where(topk_mask(z, k, axis=-1), z, 0.0)

    def loss(
        self,
        x: Array,
        target: Array | None = None,
        *,
        warmup: Array | float = 1.0,
        k: Array | int | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """As of `SAE`; `k` of this step may be traced, as `k_schedule(...)(step)` gives it."""
        y = self._check_batch(x, target)
        z = self.pre_activations(x)
        f = jnp.where(topk_mask(z, self.k if k is None else k, axis=-1), z, 0.0)
        return self._total(z, f, y - self.decode(f), y, warmup)


def k_schedule(start: int, end: int, steps: int):
    """k falls linearly from `start` to `end` in the first half of `steps`, then stays: small k from the
    first step on leaves units that are never chosen.

    >>> [int(k_schedule(10, 2, 8)(s)) for s in (0, 2, 4, 7)]
    [10, 6, 2, 2]
    """
    for name, value in (("start", start), ("end", end)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    half = max(steps // 2, 1)
    return lambda step: start - ((start - end) * jnp.minimum(step, half)) // half


class GradientTopK(TopK):
    r"""TopK that ranks latents by what they do to the network's loss, too.

    With $g = \partial \mathcal{L}/\partial x$ of the same forward pass, the rank of a latent is
    $z_i + \beta z_i\,|g \cdot d_i|$ (the additive form of the abstract; the paper's own scaling was not
    checked). Values stay z, and no gradient flows through the rank. At inference it is plain TopK.

    Args:
      beta: the weight of the gradient; 0 is TopK.
      others: as of `TopK`.

    >>> model = GradientTopK(4, 16, k=2, beta=1.0, rngs=nnx.Rngs(0))
    >>> model.select(jnp.eye(3, 16), jnp.zeros((3, 4))).shape
    (3, 16)
    """

    def __init__(self, d_model: int, d_sae: int, *, k: int, beta: float, rngs: nnx.Rngs, **options):
        super().__init__(d_model, d_sae, k=k, rngs=rngs, **options)
        self.beta = beta

    def loss(
        self,
        x: Array,
        target: Array | None = None,
        *,
        warmup: Array | float = 1.0,
        gradient: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """As of `SAE`; `gradient [tokens, d_out]` of the network's loss at x, divided by the input scale
        if x was multiplied by it.

        Raises:
          ValueError: no gradient, or one of another shape.
        """
        y = self._check_batch(x, target)
        if gradient is None or gradient.shape != y.shape:
            found = None if gradient is None else gradient.shape
            raise ValueError(f"gradient: shape {found}; give that of the target, {y.shape}")
        z = self.pre_activations(x)
        f = self.select(z, gradient)
        return self._total(z, f, y - self.decode(f, x), y, warmup)

    def select(self, z: Array, gradient: Array) -> Array:
        """The code `[tokens, F]` of pre-activations and gradients."""
        effect = jnp.abs(gradient @ self.W_dec[...].T)
        indices, _ = topk_indices(z + self.beta * z * effect, self.k)
        return code_at(z, indices)


class MatryoshkaTopK(SAE):
    r"""One dictionary trained at several k at once: $\sum_j w_j \|y - \hat y_j\|^2 / \sum_j w_j$.

    Codes are nested: that of a smaller k is a part of that of a larger one. F is always the last level.

    Args:
      ks: increasing numbers of entries a token; None: 64, 128, ... below F.
      weights: "uniform", or "reverse" (n, n-1, ..., 1), which weighs the sparsest level most.
      k: at inference; None: the first of `ks`.
      d_model, d_sae, d_out, skip, dead_after, rngs: as of `SAE`.

    >>> model = MatryoshkaTopK(4, 16, ks=(2, 4), rngs=nnx.Rngs(0))
    >>> model.ks
    (2, 4, 16)
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        ks: Sequence[int] | None = None,
        weights: Literal["uniform", "reverse"] = "uniform",
        k: int | None = None,
        d_out: int | None = None,
        skip: bool = False,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, d_sae, d_out=d_out, skip=skip, dead_after=dead_after, rngs=rngs)
        if ks is None:
            ks = [64 * 2**i for i in range(d_sae.bit_length()) if 64 * 2**i < d_sae]
        ks = tuple(ks) if ks and ks[-1] == d_sae else (*ks, d_sae)
        ks = tuple(check_count("ks", value, most=d_sae, limit="d_sae") for value in ks)
        if list(ks) != sorted(set(ks)):
            raise ValueError(f"ks={ks}: give increasing numbers")
        if weights not in ("uniform", "reverse"):
            raise ValueError(f'weights={weights!r}: give "uniform" or "reverse"')
        self.ks, self.k = ks, ks[0] if k is None else k
        self.k = check_count("k", self.k, most=d_sae, limit="d_sae")
        n = len(ks)
        self.weights = tuple(1.0 if weights == "uniform" else float(n - j) for j in range(n))

    def codes(self, z: Array) -> list[Array]:
        """The code `[tokens, F]` of each level."""
        return [*(code_at(z, i) for i in self._places(z)), jax.nn.relu(z)]

    def _places(self, z):
        if len(self.ks) == 1:
            return []
        indices, _ = topk_indices(z, self.ks[-2])  # sorted: smaller levels are its beginnings
        return [indices[:, :k] for k in self.ks[:-1]]

    def activate(self, z: Array) -> Array:
        indices, _ = topk_indices(z, self.k)
        return code_at(z, indices)

    def loss(
        self, x: Array, target: Array | None = None, *, warmup: Array | float = 1.0
    ) -> tuple[Array, dict[str, Array]]:
        y = self._check_batch(x, target)
        z = self.pre_activations(x)
        codes = self.codes(z)
        errors = [y - self.decode(f, x) for f in codes]
        losses = jnp.stack([jnp.mean(jnp.sum(e**2, axis=-1)) for e in errors])
        _, metrics = self._total(z, codes[0], errors[0], y, warmup)
        weights = jnp.asarray(self.weights)
        return jnp.sum(weights * losses) / jnp.sum(weights), metrics
