r"""A generator of images with sparse maps: what a penalty on its activations does for denoising.

    python -m experiments.studies.sparse_image_prior [--steps=600]

A generator of ReLU layers is multi-layer convolutional sparse coding (Ganz, Elad, "Improved image generation via sparse
modeling", 2021): $\gamma_i = relu(D_{i+1} * \gamma_{i+1} + b_i)$, the image is $D_1 * \gamma_1$. As a deep image prior
it is fitted to one noisy image from a fixed random input,

    min_theta  mean (x_theta - y)^2 + mu sum_{i in layers} R(gamma_i),

where R is the mean of the entries. Filters have norm 1: otherwise D grows and gamma shrinks, and R says nothing. (The
paper's own R is a surrogate of local sparsity that was not verified: only its abstract was read. Adversarial training is
not here.) Images are planted: sparse codes through two layers of known filters. Printed are the error of the clean image and
the nonzeros of the maps over mu, at the end of the fit and at its best step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class Layer(NamedTuple):
    """Filters `[height, width, in, out]` and biases `[out]`."""

    filters: Array
    bias: Array


def init(key: Array, channels: Sequence[int], size: int = 5) -> list[Layer]:
    """Random layers from the input, of `channels[0]`, to the image, of `channels[-1]`."""
    rows = zip(jax.random.split(key, len(channels) - 1), channels, channels[1:])
    draw = lambda k, i, o: unit_filters(jax.random.normal(k, (size, size, i, o)))
    return [Layer(draw(k, i, o), jnp.zeros(o)) for k, i, o in rows]


def unit_filters(filters: Array) -> Array:
    """What each entry of a map paints has norm 1: filters over that norm, for each input channel."""
    norm = jnp.sqrt(jnp.sum(filters**2, axis=(0, 1, 3), keepdims=True))
    return filters / jnp.maximum(norm, 1e-12)


def generate(layers: Sequence[Layer], noise: Array) -> tuple[Array, list[Array]]:
    """The image `[height, width, channels]` and the maps before it, the one next to the input first.
    Images wrap around, so that a shifted input gives a shifted image."""
    maps, h = [], noise
    for i, layer in enumerate(layers):
        # The first layer mixes noise and paints nothing: it is free.
        d = unit_filters(layer.filters) if i else layer.filters
        pad = d.shape[0] // 2
        wrapped = jnp.pad(h, ((pad, pad), (pad, pad), (0, 0)), mode="wrap")
        h = jax.lax.conv_general_dilated(
            wrapped[None], d, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]
        if i < len(layers) - 1:
            h = jax.nn.relu(h + layer.bias)
            maps.append(h)
    return h, maps


def penalty(maps: Sequence[Array], chosen: Sequence[int]) -> Array:
    """The mean entry of the chosen maps, summed; maps are nonnegative."""
    return sum((jnp.mean(maps[i]) for i in chosen), jnp.zeros(()))


def local_count(gamma: Array, window: int) -> Array:
    r"""$\|\gamma\|_{0,\infty}$: the most nonzeros of a map `[height, width, channels]` in any window, int32. Windows
    wrap around, so that shifts do not change it.

    >>> int(local_count(jnp.zeros((8, 8, 2)).at[0, 0].set(1.0).at[7, 7, 0].set(1.0), 2))
    3
    """
    hot = jnp.sum(gamma != 0, axis=-1, dtype=jnp.int32)
    wrapped = jnp.pad(hot, ((0, window - 1), (0, window - 1)), mode="wrap")
    sums = jax.lax.reduce_window(
        wrapped, jnp.int32(0), jax.lax.add, (window, window), (1, 1), "VALID"
    )
    return sums.max()


class Fit(NamedTuple):
    """The image and maps at the end, and the clean image's mean squared error after each step."""

    image: Array
    maps: list[Array]
    errors: Array


def fit(
    layers: list[Layer],
    noise: Array,
    noisy: Array,
    clean: Array,
    mu: float,
    *,
    chosen: Sequence[int] = (0, 1),
    steps: int = 600,
    rate: float = 1e-2,
) -> Fit:
    """The deep image prior of `noisy`, by Adam; `clean` is looked at for the errors alone.

    Args:
      layers: of `init`.
      noise: the fixed input, `[height, width, channels]`.
      noisy: the image that is fitted.
      clean: the image before noise.
      mu: the strength of the penalty; 0: none.
      chosen: which maps are penalised, counted from the input.
      steps: how many.
      rate: Adam's.
    """
    tx = optax.adam(rate)

    def loss(layers):
        image, maps = generate(layers, noise)
        error = jnp.mean((image - clean) ** 2)
        return jnp.mean((image - noisy) ** 2) + mu * penalty(maps, chosen), error

    def step(carry: Any, _):
        layers, state = carry
        grads, error = jax.grad(loss, has_aux=True)(layers)
        updates, state = tx.update(grads, state, layers)
        moved: Any = optax.apply_updates(layers, updates)
        return (moved, state), error

    (layers, _), errors = jax.lax.scan(step, (layers, tx.init(layers)), length=steps)
    return Fit(*generate(layers, noise), errors)


def planted(key: Array, size: int = 32, share: float = 0.01) -> Array:
    """An image `[size, size, 1]` of nonnegative sparse codes, `share` of them nonzero, through two layers."""
    where, values, d1, d2 = jax.random.split(key, 4)
    shape = (size, size, 8)
    codes = jnp.abs(jax.random.normal(values, shape)) * jax.random.bernoulli(where, share, shape)
    identity = Layer(jnp.eye(8)[None, None], jnp.zeros(8))
    layers = [identity, init(d2, (8, 4))[0], init(d1, (4, 1))[0]]
    image = generate(layers, codes)[0]
    return image / jnp.std(image)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--noise", type=float, default=1.0, help="over the image's deviation")
    args = parser.parse_args(argv)
    print(f"the noisy image's error: {args.noise**2:.3f}\n")
    print("| mu | error at the end | at the best step | nonzeros of the maps | most in 5 x 5 |")
    print("|---|---|---|---|---|")
    for mu in (0.0, 0.03, 0.1, 0.3):
        rows = []
        for seed in range(3):
            keys = jax.random.split(jax.random.key(seed), 4)
            clean = planted(keys[0])
            noisy = clean + args.noise * jax.random.normal(keys[1], clean.shape)
            layers, noise = init(keys[2], (8, 16, 16, 1)), jax.random.normal(keys[3], (32, 32, 8))
            found = jax.jit(fit, static_argnames="steps")(
                layers, noise, noisy, clean, mu, steps=args.steps
            )
            share = jnp.mean(jnp.stack(found.maps) != 0)
            local = jnp.stack([local_count(m, 5) for m in found.maps]).max()
            rows.append([found.errors[-1], found.errors.min(), share, local])
        end, best, share, local = jnp.asarray(rows).mean(0).tolist()
        print(f"| {mu:g} | {end:.3f} | {best:.3f} | {share:.1%} | {local:.0f} |")


if __name__ == "__main__":
    main()
