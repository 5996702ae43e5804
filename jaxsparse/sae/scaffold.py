r"""What all sparse autoencoders share: encoder, decoder, counters, and the scale of their inputs.

    z = (x - b_dec) W_enc + b_enc        [tokens, F]
    f = S(z) >= 0                        the code; families differ in the rule S and its loss
    x_hat = f W_dec + b_dec              rows of W_dec are the atoms

With `d_out` the module is a transcoder: it predicts another target than its input, b_dec is not
subtracted from the input, and `skip=True` adds x W_skip, which starts at 0. Every family takes both.

Counters and running thresholds are `Statistic` variables, which no optimizer sees.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsparse._checks import check_count


class Statistic(nnx.Variable):
    """A counter or a running threshold: saved with the module, not trained."""


def check_weight(name: str, value: float) -> None:
    """Raises: ValueError: the weight of a penalty is negative or NaN."""
    if not value >= 0:
        raise ValueError(f"{name}={value}: give a number that is not negative")


class SAE(nnx.Module):
    """The scaffold; a family overrides `activate` and, if it needs to, `infer` and `penalty`.

    Attributes:
      W_enc: `[d_model, d_sae]`.
      b_enc: `[d_sae]`.
      W_dec: `[d_sae, d_out]`, one atom a row.
      b_dec: `[d_out]`.
      W_skip: `[d_model, d_out]` of a skip transcoder, or None.
      since_fired: int32 `[d_sae]`, tokens since each latent was last active in training.
      batches: int32 scalar, how many `loss` has seen.
      dead_after: tokens of silence after which a latent is dead.
    """

    atom_norm = 1.0  # of the initial atoms
    thresholds: tuple[str, ...] = ("b_enc", "b_dec")  # what an input scale is folded into

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        d_out: int | None = None,
        skip: bool = False,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        check_count("d_model", d_model)
        check_count("d_sae", d_sae)
        if skip and d_out is None:
            raise ValueError("skip=True: is for transcoders; give d_out, the width of the target")
        if d_out is not None:
            check_count("d_out", d_out)
        self.d_model, self.d_sae, self.dead_after = d_model, d_sae, dead_after
        self.transcodes = d_out is not None
        self.d_out = d_model if d_out is None else d_out
        atoms = jax.random.normal(rngs.params(), (d_sae, self.d_out))
        atoms = atoms / jnp.linalg.norm(atoms, axis=1, keepdims=True)
        encoder = atoms
        if self.transcodes:
            encoder = jax.random.normal(rngs.params(), (d_sae, d_model))
            encoder = encoder / jnp.linalg.norm(encoder, axis=1, keepdims=True)
        self.W_enc = nnx.Param(self.atom_norm * encoder.T)
        self.W_dec = nnx.Param(self.atom_norm * atoms)
        self.b_enc = nnx.Param(jnp.zeros(d_sae))
        self.b_dec = nnx.Param(jnp.zeros(self.d_out))
        self.W_skip = nnx.Param(jnp.zeros((d_model, self.d_out))) if skip else None
        self.since_fired = Statistic(jnp.zeros(d_sae, jnp.int32))
        self.batches = Statistic(jnp.zeros((), jnp.int32))

    # The rule of a family.

    def activate(self, z: Array) -> Array:
        """The code of pre-activations `[tokens, F]` in training."""
        raise NotImplementedError

    def infer(self, z: Array) -> Array:
        """The code at inference, where no token may depend on another."""
        return self.activate(z)

    def penalty(self, z: Array, f: Array) -> Array:
        """What the sparsity of a family costs, a scalar; `loss` multiplies it by `warmup`."""
        return jnp.zeros((), f.dtype)

    def auxiliary(self, z: Array, error: Array, target: Array) -> Array:
        """What else a family adds, such as the revival of dead latents."""
        return jnp.zeros((), z.dtype)

    def track(self, f: Array) -> None:
        """What a family keeps of the codes of a batch besides the counters."""

    def encoder(self) -> Array:
        """The encoder's weights `[d_model, F]`."""
        return self.W_enc[...]

    # The scaffold.

    def pre_activations(self, x: Array) -> Array:
        """`z [..., F]` of inputs `[..., d_model]`."""
        self._check_width(x)
        centred = x if self.transcodes else x - self.b_dec[...]
        return centred @ self.encoder() + self.b_enc[...]

    def encode(self, x: Array) -> Array:
        """The code `[..., F]` of inputs `[..., d_model]`, as at inference."""
        z = self.pre_activations(x)
        return self.infer(z.reshape(-1, self.d_sae)).reshape(z.shape)

    def decode(self, f: Array, x: Array | None = None) -> Array:
        """The reconstruction `[..., d_out]` of codes; a skip transcoder also needs its input x."""
        if f.shape[-1:] != (self.d_sae,):
            raise ValueError(f"f: shape {f.shape}; give [..., {self.d_sae}], which is d_sae")
        y = f @ self.W_dec[...] + self.b_dec[...]
        if self.W_skip is None:
            return y
        if x is None:
            raise ValueError("x=None: a skip transcoder decodes with its input; give x")
        return y + x @ self.W_skip[...]

    def __call__(self, x: Array) -> Array:
        """The reconstruction of `x [..., d_model]`, or the target that a transcoder predicts."""
        return self.decode(self.encode(x), x)

    def loss(
        self, x: Array, target: Array | None = None, *, warmup: Array | float = 1.0
    ) -> tuple[Array, dict[str, Array]]:
        r"""The training loss of a batch; counts which latents fired.

        Args:
          x: `[tokens, d_model]`.
          target: `[tokens, d_out]` of a transcoder; None: x.
          warmup: what the sparsity penalty is multiplied by, as `sae.warm_up(steps)(step)`.

        Returns:
          The loss $\frac1B\sum_b \|y_b - \hat y_b\|^2$ + warmup * penalty + auxiliary, and a dictionary
          of scalars: `mse`, `penalty`, `auxiliary`, `l0`, `dead` (the fraction of dead latents).

        Raises:
          ValueError: x is not `[tokens, d_model]`, or the target is missing or of another shape.
        """
        target = self._check_batch(x, target)
        z = self.pre_activations(x)
        f = self.activate(z)
        self.track(f)
        error = target - self.decode(f, x)
        return self._total(z, f, error, target, warmup)

    def _total(self, z, f, error, target, warmup):
        self.count(jnp.any(f != 0, axis=0), f.shape[0])
        mse = jnp.mean(jnp.sum(error**2, axis=-1))
        penalty, auxiliary = self.penalty(z, f), self.auxiliary(z, error, target)
        metrics = {
            "mse": mse,
            "penalty": penalty,
            "auxiliary": auxiliary,
            "l0": jnp.mean(jnp.sum(f != 0, axis=-1)),
            "dead": jnp.mean(self.dead),
        }
        return mse + warmup * penalty + auxiliary, metrics

    def count(self, fired: Array, tokens: int) -> None:
        """Adds a batch to the counters: 0 for latents that fired, `tokens` more for others."""
        quiet = jnp.minimum(self.since_fired[...], 2**31 - 1 - tokens) + tokens
        self.since_fired[...] = jnp.where(fired, 0, quiet)
        self.batches[...] = self.batches[...] + 1

    @property
    def dead(self) -> Array:
        """Latents that have not fired for `dead_after` tokens, bool `[F]`."""
        return self.since_fired[...] >= self.dead_after

    def fold_scale(self, scale: float, out: float | None = None) -> Self:
        r"""The module for unscaled data, of one that was trained on `scale * x`.

        Biases and thresholds are divided by the scale; weights stay, since $f(sx) = s f'(x)$.

        Args:
          scale: that of the inputs, as `sae.input_scale` gives it.
          out: that of a transcoder's targets; None: `scale`.

        Returns:
          A new module.

        Raises:
          ValueError: a scale that is not positive.
        """
        out = scale if out is None else out
        if not (scale > 0 and out > 0):
            raise ValueError(f"scale={scale}, out={out}: give positive numbers")
        folded = nnx.clone(self)
        for name in self.thresholds:
            variable = getattr(folded, name)
            variable[...] = variable[...] / (out if name == "b_dec" else scale)
        ratio = scale / out
        folded.W_dec[...] = folded.W_dec[...] * ratio
        if folded.W_skip is not None:
            folded.W_skip[...] = folded.W_skip[...] * ratio
        return folded

    def _check_width(self, x: Array) -> None:
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: shape {x.shape}; give [..., {self.d_model}], which is d_model")

    def _check_batch(self, x: Array, target: Array | None) -> Array:
        if x.ndim != 2 or not len(x) or x.shape[-1] != self.d_model:
            raise ValueError(f"x: shape {x.shape}; give [tokens, {self.d_model}], one at least")
        if target is None:
            if self.transcodes:
                raise ValueError("target=None: a transcoder learns to predict one; give target")
            return x
        if target.shape != (x.shape[0], self.d_out):
            raise ValueError(f"target: shape {target.shape}; give {(x.shape[0], self.d_out)}")
        return target


def input_scale(x: Array) -> float:
    r"""The factor $\sqrt D / \operatorname{mean}_b\|x_b\|$ that gives inputs unit mean square.

    Raises:
      ValueError: values that are not finite, or all of them 0.

    >>> input_scale(jnp.array([[3.0, 4.0], [0.0, 5.0]]))
    0.28284...
    """
    norm = float(jnp.mean(jnp.linalg.norm(x, axis=-1)))
    if not 0 < norm < float("inf"):
        raise ValueError(f"x: the mean norm of its rows is {norm}; give finite rows, not all 0")
    return x.shape[-1] ** 0.5 / norm


def geometric_median(x: Array, *, steps: int = 100, tolerance: float = 1e-5) -> Array:
    r"""The point with the least sum of distances to the rows of x `[n, D]`, by Weiszfeld's iteration.

    $m \leftarrow \sum_n w_n x_n / \sum_n w_n$ with $w_n = 1 / \|x_n - m\|$, until m moves by less than
    `tolerance` times its norm. It is what b_dec starts from in TopK autoencoders.

    Raises:
      ValueError: not two axes, or no rows.

    >>> geometric_median(jnp.array([[0.0], [1.0], [50.0]])).round(2).tolist()
    [1.0]
    """

    if x.ndim != 2 or not len(x):
        raise ValueError(f"x: shape {x.shape}; give [n, D] with at least one row")

    def moved(state):
        i, old, new = state
        return (i < steps) & (jnp.linalg.norm(new - old) > tolerance * jnp.linalg.norm(new))

    def step(state):
        i, _, m = state
        w = 1.0 / jnp.maximum(jnp.linalg.norm(x - m, axis=-1), 1e-12)
        return i + 1, m, w @ x / jnp.sum(w)

    mean = jnp.mean(x, axis=0)
    _, _, median = jax.lax.while_loop(moved, step, (0, jnp.full_like(mean, jnp.inf), mean))
    return median


def warm_up(steps: int):
    """A schedule from 0 to 1 over `steps`, for `loss(..., warmup=)`.

    >>> [float(warm_up(4)(s)) for s in (0, 2, 9)]
    [0.0, 0.5, 1.0]
    """
    if steps < 0:
        raise ValueError(f"steps={steps}: give a number that is not negative")
    return lambda step: jnp.clip(step / max(steps, 1), 0.0, 1.0) if steps else jnp.ones(())
