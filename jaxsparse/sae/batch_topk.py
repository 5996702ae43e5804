r"""Autoencoders whose budget of activations is that of a batch, not of a token.

The matrix of affinities $A = \max(z, 0)$ `[tokens, F]` is given $M = k\cdot$tokens activations: TopK
gives k to each token, mutual choice (= BatchTopK) M to the largest of all, feature choice $m_i$ to each
latent. At inference no token may depend on others: running thresholds take their place.

Sources: Bussmann et al. 2024 (BatchTopK), Ayonrinde 2024 (mutual and feature choice), Bussmann et al.
2025 (prefix-nested Matryoshka). On several devices the budget is that of the batch on each device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.sae.relu import JumpReLU
from jaxsparse.sae.scaffold import SAE, Statistic
from jaxsparse.sae.topk import aux_k, aux_slots
from jaxsparse.selection import topk_mask


class BatchTopK(SAE):
    r"""The k * tokens largest activations of a batch are kept, by whichever token.

    Inference keeps $f > \theta$, with one threshold: the running mean of the smallest value kept in
    training. It is -1 until `threshold_from` batches were seen, and the code a ReLU's until then.

    Args:
      k: mean entries a token.
      aux_k: slots of dead latents; None: half of d_out, at most F.
      alpha: the weight of AuxK.
      threshold_from: batches before the threshold is estimated.
      threshold_decay: of the running mean; the first observation starts it.
      d_model, d_sae, d_out, skip, dead_after, rngs: as of `SAE`.

    >>> model = BatchTopK(4, 16, k=2, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((5, 4))).shape
    (5, 4)
    """

    thresholds = ("b_enc", "b_dec", "threshold")

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        k: int,
        aux_k: int | None = None,
        alpha: float = 1 / 32,
        threshold_from: int = 1000,
        threshold_decay: float = 0.999,
        d_out: int | None = None,
        skip: bool = False,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, d_sae, d_out=d_out, skip=skip, dead_after=dead_after, rngs=rngs)
        k = check_count("k", k, most=d_sae, limit="d_sae")
        aux_k = aux_slots(aux_k, self.d_out, d_sae)
        if not 0 <= threshold_decay < 1:
            raise ValueError(f"threshold_decay={threshold_decay}: give a number in [0, 1)")
        self.k, self.aux_k, self.alpha = k, aux_k, alpha
        self.threshold_from, self.threshold_decay = threshold_from, threshold_decay
        self.threshold = Statistic(jnp.full((), -1.0))

    def activate(self, z: Array) -> Array:
        affinity = jax.nn.relu(z)
        kept = topk_mask(affinity, self.k * z.shape[0])
        return jnp.where(kept, affinity, 0.0)

    def infer(self, z: Array) -> Array:
        affinity = jax.nn.relu(z)
        return jnp.where(affinity > self.threshold[...], affinity, 0.0)

    def auxiliary(self, z: Array, error: Array, target: Array) -> Array:
        return self.alpha * aux_k(z, self.dead, self.aux_k, self.W_dec[...], error, target)

    def track(self, f: Array) -> None:
        """Moves the threshold towards the smallest positive entry of f."""
        f = jax.lax.stop_gradient(f)
        seen = jnp.min(jnp.where(f > 0, f, jnp.inf))
        self._move(seen, jnp.isfinite(seen) & (self.batches[...] >= self.threshold_from))

    def _move(self, seen: Array, use: Array) -> None:
        old, decay = self.threshold[...], self.threshold_decay
        seen = jnp.where(jnp.isfinite(seen), seen, 0.0)
        new = jnp.where(old < 0, seen, decay * old + (1 - decay) * seen)
        self.threshold[...] = jnp.where(use, new, old)

    def to_jump_relu(self) -> JumpReLU:
        """The JumpReLU autoencoder that computes what this one does at inference.

        Raises:
          ValueError: the threshold was not estimated yet.
        """
        if not bool(jnp.all(self.threshold[...] >= 0)):
            raise ValueError(
                f"threshold={self.threshold[...]}: is estimated after threshold_from="
                f"{self.threshold_from} batches; train on, or lower threshold_from"
            )
        jump = JumpReLU(
            self.d_model, self.d_sae, d_out=self.d_out if self.transcodes else None,
            skip=self.W_skip is not None, dead_after=self.dead_after, rngs=nnx.Rngs(0),
        )  # fmt: skip
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "since_fired", "batches"):
            getattr(jump, name)[...] = getattr(self, name)[...]
        if jump.W_skip is not None and self.W_skip is not None:
            jump.W_skip[...] = self.W_skip[...]
        jump.threshold[...] = jnp.broadcast_to(self.threshold[...], (self.d_sae,))
        return jump


MutualChoice = BatchTopK


class MatryoshkaBatchTopK(BatchTopK):
    r"""BatchTopK whose first $F_1, F_2, \dots$ latents each reconstruct on their own.

    $L = \sum_j w_j \|y - \hat y_j\|^2$, where $\hat y_j$ decodes the first j groups and $\sum_j w_j = 1$;
    AuxK models the error of all of them together.

    Args:
      groups: sizes of the groups, which sum to d_sae.
      weights: one each; None: equal ones. They are divided by their sum.
      others: as of `BatchTopK`.

    >>> model = MatryoshkaBatchTopK(4, 16, k=2, groups=(4, 12), rngs=nnx.Rngs(0))
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        k: int,
        groups: Sequence[int],
        weights: Sequence[float] | None = None,
        rngs: nnx.Rngs,
        **options,
    ):
        super().__init__(d_model, d_sae, k=k, rngs=rngs, **options)
        if sum(groups) != d_sae or min(groups, default=0) < 1:
            raise ValueError(f"groups={tuple(groups)}: give positive sizes that sum to {d_sae}")
        weights = [1.0] * len(groups) if weights is None else list(weights)
        if len(weights) != len(groups):
            raise ValueError(f"weights={weights}: give {len(groups)}, one for each group")
        self.groups = tuple(groups)
        self.weights = tuple(w / sum(weights) for w in weights)

    def loss(
        self, x: Array, target: Array | None = None, *, warmup: Array | float = 1.0
    ) -> tuple[Array, dict[str, Array]]:
        y = self._check_batch(x, target)
        z = self.pre_activations(x)
        f = self.activate(z)
        self.track(f)
        error, total, start = y - self.decode(jnp.zeros_like(f), x), jnp.zeros((), y.dtype), 0
        for size, weight in zip(self.groups, self.weights):
            part = slice(start, start + size)
            error = error - f[:, part] @ self.W_dec[part]
            total = total + weight * jnp.mean(jnp.sum(error**2, axis=-1))
            start += size
        _, metrics = self._total(z, f, error, y, warmup)
        return total + metrics["auxiliary"], metrics


def zipf_budgets(latents: int, total: int, *, exponent: float = 1.0, offset: float = 0.0):
    r"""Integers $m_r \propto 1/(r + b)^s$, r = 1, 2, ..., that sum to `total`.

    Rounded by largest remainders, ties to the lower rank; each is at least 1 where the total allows.

    Args:
      latents: how many budgets.
      total: their sum.
      exponent: s; 0 splits evenly.
      offset: b.

    Returns:
      NumPy int64 `[latents]`, not increasing.

    >>> zipf_budgets(4, 12).tolist()
    [5, 3, 2, 2]
    """
    if latents < 1 or total < 0:
        raise ValueError(f"latents={latents}, total={total}: give a positive number, and one >= 0")
    least = 1 if total >= latents else 0
    share = (np.arange(1, latents + 1) + offset) ** -float(exponent)
    share = share / share.sum() * (total - least * latents)
    budgets = np.floor(share).astype(np.int64)
    missing = total - least * latents - int(budgets.sum())
    order = np.argsort(-(share - budgets), kind="stable")
    budgets[order[:missing]] += 1
    return np.sort(budgets)[::-1] + least


class FeatureChoice(BatchTopK):
    r"""Each latent i keeps its $m_i$ largest tokens of a batch, $\sum_i m_i = k\cdot$tokens.

    Latent 0 is the most frequent one: the budgets follow a Zipf law in the order of latents (how the
    paper assigns ranks was not checked). A latent with $m_i \ge 1$ and a positive affinity is never dead;
    a token may get none. With `dying`, latents whose running rate is below this fraction of their budget
    model the error as dead ones do in AuxK. Inference has one running threshold per latent.

    Args:
      exponent: of the Zipf law; 0 gives every latent the same.
      offset: of its ranks.
      dying: 0 leaves AuxK to latents that are dead.
      others: as of `BatchTopK`.

    >>> model = FeatureChoice(4, 8, k=2, exponent=0.0, rngs=nnx.Rngs(0))
    >>> model.budgets(12).tolist()
    [3, 3, 3, 3, 3, 3, 3, 3]
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        k: int,
        exponent: float = 1.0,
        offset: float = 0.0,
        dying: float = 0.0,
        rngs: nnx.Rngs,
        **options,
    ):
        super().__init__(d_model, d_sae, k=k, rngs=rngs, **options)
        if not 0 <= dying < 1:
            raise ValueError(f"dying={dying}: give a fraction in [0, 1)")
        self.exponent, self.offset, self.dying = exponent, offset, dying
        self.threshold = Statistic(jnp.full((d_sae,), -1.0))
        self.rate = Statistic(jnp.zeros(d_sae))

    def budgets(self, tokens: int) -> np.ndarray:
        """How many of so many tokens each latent may keep `[F]`."""
        total = min(self.k, self.d_sae) * tokens
        found = zipf_budgets(self.d_sae, total, exponent=self.exponent, offset=self.offset)
        return np.minimum(found, tokens)

    def activate(self, z: Array) -> Array:
        affinity = jax.nn.relu(z)
        kept = topk_mask(affinity, jnp.asarray(self.budgets(z.shape[0]), jnp.int32), axis=0)
        return jnp.where(kept, affinity, 0.0)

    def auxiliary(self, z: Array, error: Array, target: Array) -> Array:
        expected = jnp.asarray(self.budgets(z.shape[0]) / z.shape[0], z.dtype)
        candidates = self.dead | (self.rate[...] < self.dying * expected)
        return self.alpha * aux_k(z, candidates, self.aux_k, self.W_dec[...], error, target)

    def track(self, f: Array) -> None:
        """Moves thresholds and rates of firing towards those of a batch."""
        f = jax.lax.stop_gradient(f)
        seen = jnp.min(jnp.where(f > 0, f, jnp.inf), axis=0)
        self._move(seen, jnp.isfinite(seen) & (self.batches[...] >= self.threshold_from))
        rate, decay = jnp.mean(f > 0, axis=0), self.threshold_decay
        first = self.batches[...] == 0
        self.rate[...] = jnp.where(first, rate, decay * self.rate[...] + (1 - decay) * rate)
