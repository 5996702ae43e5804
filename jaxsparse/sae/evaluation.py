r"""Measures of an autoencoder: of its code, of its reconstruction, and of the network that reads it.

All are over all tokens together: sums are added up over batches and divided once. The explained
variance is centred by the mean of the whole, which alone is invariant to scale and shift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsparse.sae import hooks
from jaxsparse.sae.scaffold import SAE


@dataclasses.dataclass(frozen=True)
class Evaluation:
    r"""What `evaluate` found.

    Attributes:
      tokens: how many.
      l0: mean number of active latents.
      mse: mean of $\|y - \hat y\|^2$.
      explained_variance: $1 - \sum\|y - \hat y\|^2 / \sum\|y - \bar y\|^2$.
      cosine: mean cosine of y and its reconstruction.
      norm_ratio: mean of $\|\hat y\| / \|y\|$.
      bias: $\gamma = \mathrm{mean}\|\hat y\|^2 / \mathrm{mean}\langle y, \hat y\rangle$; below 1 is
        shrunk.
      dead: fraction of latents that were active for no token.
      frequent: fraction of latents active for more than 10 % of tokens.
      max_cosine: mean over atoms of the largest cosine with another atom.
      encoder_cosine: mean cosine of an encoder column and its atom; NaN for transcoders.
      density: of each latent, the fraction of tokens it is active for, NumPy `[F]`.
    """

    tokens: int
    l0: float
    mse: float
    explained_variance: float
    cosine: float
    norm_ratio: float
    bias: float
    dead: float
    frequent: float
    max_cosine: float
    encoder_cosine: float
    density: np.ndarray

    def scalars(self) -> dict[str, float]:
        """All but the densities."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "density"}


@nnx.jit
def _sums(model: SAE, x: Array, y: Array) -> dict[str, Array]:
    f = model.encode(x)
    guess = model.decode(f, x)
    sizes, ours = jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(guess, axis=-1)
    inner = jnp.sum(y * guess, axis=-1)
    safe = lambda v: jnp.maximum(v, 1e-30)
    return {
        "active": jnp.sum(f != 0, axis=0),
        "error": jnp.sum((y - guess) ** 2),
        "mean": jnp.mean(y, axis=0),
        "spread": jnp.sum((y - jnp.mean(y, axis=0)) ** 2),
        "cosine": jnp.sum(inner / safe(sizes * ours)),
        "ratio": jnp.sum(ours / safe(sizes)),
        "square": jnp.sum(ours**2),
        "inner": jnp.sum(inner),
    }


def evaluate(model: SAE, batches: Iterable[Array | tuple[Array, Array]]) -> Evaluation:
    """Measures an autoencoder on batches `[tokens, d_model]`, or on pairs of input and target.

    Args:
      model: any autoencoder or transcoder; its inference rule is used.
      batches: at least one.

    Returns:
      An `Evaluation`.

    Raises:
      ValueError: no batch, or one that is no `[tokens, d_model]` or not finite.

    >>> from jaxsparse import sae
    >>> model = sae.ReLU(2, 4, rngs=nnx.Rngs(0))
    >>> evaluate(model, [jnp.ones((3, 2))]).tokens
    3
    """
    tokens, totals, mean, spread = 0, {}, np.zeros(()), 0.0
    for batch in batches:
        x, y = batch if isinstance(batch, tuple) else (batch, batch)
        if x.ndim != 2 or not len(x):
            raise ValueError(
                f"batches: one has shape {x.shape}; give a list of batches [tokens, {model.d_model}]"
            )
        if not (np.isfinite(np.asarray(x)).all() and np.isfinite(np.asarray(y)).all()):
            raise ValueError("batches: one has NaN or infinite entries; leave these tokens out")
        found = {k: np.asarray(v, np.float64) for k, v in _sums(model, x, y).items()}
        # The spread about the mean of all, from that about each batch's own (Chan et al. 1979).
        n, shift = len(x), found.pop("mean") - mean
        spread += float(found.pop("spread") + (shift**2).sum() * tokens * n / (tokens + n))
        mean = mean + shift * n / (tokens + n)
        tokens += n
        totals = {k: totals.get(k, 0.0) + v for k, v in found.items()}
    if not tokens:
        raise ValueError("batches: are empty; give at least one")
    density = totals["active"] / tokens
    return Evaluation(
        tokens=tokens,
        l0=float(density.sum()),
        mse=float(totals["error"] / tokens),
        explained_variance=1.0 - float(totals["error"]) / max(spread, 1e-300),
        cosine=float(totals["cosine"] / tokens),
        norm_ratio=float(totals["ratio"] / tokens),
        bias=float(totals["square"] / totals["inner"]) if totals["inner"] else float("nan"),
        dead=float(np.mean(density == 0)),
        frequent=float(np.mean(density > 0.1)),
        max_cosine=float(max_cosines(model.W_dec[...]).mean()),
        encoder_cosine=_encoder_cosine(model),
        density=density,
    )


def _encoder_cosine(model: SAE) -> float:
    if model.transcodes:
        return float("nan")
    columns, atoms = _unit(model.encoder().T), _unit(model.W_dec[...])
    return float(jnp.mean(jnp.sum(columns * atoms, axis=-1)))


def _unit(rows: Array) -> Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


def max_cosines(atoms: Array, others: Array | None = None, *, chunk: int = 1024) -> np.ndarray:
    r"""For each row of `atoms` the largest $|\cos|$ with a row of `others`, or, by default, with another
    row of `atoms`. With the true atoms first and the learned ones second it measures recovery.

    >>> max_cosines(jnp.eye(2), jnp.array([[2.0, 0.0], [1.0, 1.0]])).tolist()
    [1.0, 0.7071...]

    Raises:
      ValueError: rows of different lengths.
    """
    if others is not None and atoms.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"others: shape {others.shape}; rows must be as long as those of atoms, {atoms.shape}"
        )
    own = others is None
    left, right = _unit(atoms), _unit(atoms if others is None else others)
    found = []
    for start in range(0, len(left), chunk):
        cosine = jnp.abs(left[start : start + chunk] @ right.T)
        if own:
            rows = jnp.arange(cosine.shape[0])
            cosine = cosine.at[rows, start + rows].set(0.0)
        found.append(np.asarray(jnp.max(cosine, axis=1)))
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What the network loses when a layer's output is the reconstruction: losses are means per batch.

    Attributes:
      original: the network's own loss.
      patched: with reconstructions in place.
      ablated: with zeros in place, the baseline.
      fraction: (ablated - patched) / (ablated - original): 1 for the identity, 0 for zeros.
    """

    original: float
    patched: float
    ablated: float

    @property
    def fraction(self) -> float:
        """NaN if zeros do not change the loss."""
        lost = self.ablated - self.original
        return (self.ablated - self.patched) / lost if lost else float("nan")


class Recovery:
    """Measures many models of one layer by `loss_recovered`: what does not depend on the model is done once.

    The activations of the layer are kept on the host. The network is compiled once, from activations to the loss,
    so that the blocks before the layer cost nothing.

    Args, Raises: as of `loss_recovered`; calls refuse a model whose output has another shape than its input.

    >>> network = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.sin)
    >>> loss = lambda y, x: jnp.mean((y - 1.0) ** 2)
    >>> measure = Recovery(network, "layers/0", [jnp.ones((4, 2))], loss)
    >>> measure(lambda y: y).fraction == 1, measure(jnp.zeros_like).fraction == 0
    (True, True)
    """

    def __init__(
        self,
        network: hooks.Network,
        site: str,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Array],
        *,
        part: hooks.Part = "output",
        skip_first: int = 0,
    ):
        if isinstance(network, tuple):
            module, weights = network
            bind = lambda weights: (module, weights)
        else:
            graph, weights = nnx.split(network)
            bind = lambda weights: nnx.merge(graph, weights)
        read = jax.jit(lambda w, batch: hooks.capture(bind(w), site, batch, part=part))
        patched = jax.jit(
            lambda w, batch, new: loss(
                hooks.run(bind(w), site, lambda _: new, batch, part=part), batch
            )
        )
        self.skip_first = skip_first
        self._batches = [(batch, np.asarray(read(weights, batch))) for batch in batches]
        if not self._batches:
            raise ValueError("batches: are empty; give at least one")
        self._loss = lambda batch, new: patched(weights, batch, new)
        self._original = self._mean(lambda value: value)
        self._ablated = self._mean(jnp.zeros_like)

    def __call__(self, model: Callable[[Array], Array]) -> Recovered:
        """The losses with what `model` makes of the activations, `[..., D]` to the same shape: an autoencoder of
        activations as they are (fold the input scale first), or any function."""
        rebuild = (lambda v: _call(model, v)) if isinstance(model, nnx.Module) else model
        return Recovered(self._original, self._mean(rebuild), self._ablated)

    def _mean(self, change: Callable[[Array], Array]) -> float:
        losses = []
        for batch, kept in self._batches:
            value = jnp.asarray(kept)
            new = change(value)
            if new.shape != value.shape:
                raise ValueError(
                    f"model: makes {new.shape} of activations {value.shape}; both must have one shape"
                )
            if self.skip_first:
                first = jnp.arange(value.shape[1])[:, None] < self.skip_first
                new = jnp.where(first, value, new)
            found = self._loss(batch, new)
            if jnp.shape(found):
                raise ValueError(
                    f"loss: gives shape {jnp.shape(found)}; give a function to a scalar"
                )
            losses.append(float(found))
        return float(np.mean(losses))


@nnx.jit
def _call(model, value):
    return model(value)


def loss_recovered(
    network: hooks.Network,
    site: str,
    model: Callable[[Array], Array],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Array],
    *,
    part: hooks.Part = "output",
    skip_first: int = 0,
) -> Recovered:
    """The network's loss with reconstructions of one layer in place of its activations. For several models of one
    layer `Recovery` is faster.

    Args:
      network, site, part: as of `Activations`.
      model: an autoencoder of activations as they are (fold the input scale first), or any function of
        `[..., D]` to the same shape.
      batches: what the network is called with.
      loss: of the network's output and the batch, a scalar.
      skip_first: positions of each sequence that stay as they are in all three runs.

    Raises:
      ValueError: no batch; a site that does not exist; a loss that is no scalar.

    >>> network = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.sin)
    >>> loss = lambda y, x: jnp.mean((y - 1.0) ** 2)
    >>> loss_recovered(network, "layers/0", lambda y: y, [jnp.ones((4, 2))], loss).fraction
    1.0
    """
    return Recovery(network, site, batches, loss, part=part, skip_first=skip_first)(model)
