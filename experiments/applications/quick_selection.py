"""QuickSelection: the strength of input neurons in a sparse denoising autoencoder selects features.

  python -m experiments.applications.quick_selection

A one-hidden-layer autoencoder with Erdos-Renyi-sparse kernels is trained by SET to undo noise on its
input; features are ranked by the sum of |weights| that leave them. Planted noise features, which nothing
predicts, should end last. (Atashgahi et al., Quick and robust feature selection, 2022.)

This differs from the authors' code in: 1. removal and growth are those of `jaxsparse.set_` (smallest |w|
of either sign; grown weights start at 0), not sign-wise with N(0, 0.1) values. 2. no dropout. 3. weights start ten times
smaller than usual, and training is short: features that others predict are learned first, and their
strength stands out; an autoencoder trained to the end also copies the noise, and each noise feature, which
shares its direction with no other, then takes *more* weight than the informative ones.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse
from jaxsparse.analysis.page import markdown_table


class Problem(NamedTuple):
    """Data `x [examples, features]`, standardised, and which features are no noise."""

    name: str
    x: np.ndarray
    informative: np.ndarray


def synthetic(
    informative: int = 10, noise: int = 90, examples: int = 500, seed: int = 0
) -> Problem:
    """Correlated features (mixtures of three factors) among independent noise, in random order."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(examples, 3))
    mixed = factors @ rng.normal(size=(3, informative))
    mixed += 0.3 * rng.normal(size=mixed.shape)
    x = np.concatenate([mixed, rng.normal(size=(examples, noise))], axis=1)
    order = rng.permutation(informative + noise)
    return Problem("3 factors", _standardised(x[:, order]), order < informative)


def planted(name: str, noise: int = 90, seed: int = 0) -> Problem:
    """A data set of scikit-learn ("breast_cancer" or "wine") with planted noise features."""
    from sklearn import datasets

    loaders: dict[str, Any] = {
        "breast_cancer": datasets.load_breast_cancer,
        "wine": datasets.load_wine,
    }
    if name not in loaders:
        raise ValueError(f"name={name!r}: choose from {', '.join(loaders)}")
    data = loaders[name]().data
    rng = np.random.default_rng(seed)
    x = np.concatenate([data, rng.normal(size=(len(data), noise))], axis=1)
    order = rng.permutation(x.shape[1])
    return Problem(name, _standardised(x[:, order]), order < data.shape[1])


def _standardised(x: np.ndarray) -> np.ndarray:
    # Unscaled features would dominate the strength.
    return ((x - x.mean(0)) / (x.std(0) + 1e-9)).astype(np.float32)


def strength(kernel: jax.Array) -> jax.Array:
    """The sum of |w| over the links that leave each input, `[in]`."""
    return jnp.sum(jnp.abs(kernel), axis=1)


def train(
    x: np.ndarray, *, hidden: int = 100, epsilon: float = 13.0, epochs: int = 40, batch: int = 50,
    learning_rate: float = 1e-3, noise: float = 0.2, decay: float = 1e-5, seed: int = 0,
) -> dict[str, jax.Array]:  # fmt: skip
    """The kernels of the autoencoder, `encode [in, hidden]` and `decode [hidden, in]`."""
    examples, features = x.shape
    per_epoch = examples // batch
    # The links of an Erdos-Renyi graph: epsilon (n_in + n_out).
    sparsity = max(0.0, 1 - epsilon * (features + hidden) / (features * hidden))
    tx = jaxsparse.set_(
        optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate, momentum=0.9)),
        sparsity,
        total_steps=epochs * per_epoch,
        end_step=epochs * per_epoch - 1,
        update_every=per_epoch,
        drop_fraction=lambda step: jnp.float32(0.2),
        allocation="uniform",
        targets="kernel",
        seed=seed,
    )
    # Small: the strength is to tell what training built, not how the weights were drawn.
    init = jax.nn.initializers.variance_scaling(0.01, "fan_avg", "normal")
    key = jax.random.key(seed)
    params = {
        "encode": {"kernel": init(jax.random.fold_in(key, 0), (features, hidden))},
        "decode": {"kernel": init(jax.random.fold_in(key, 1), (hidden, features))},
        "hidden_bias": jnp.zeros(hidden),
        "output_bias": jnp.zeros(features),
    }
    state = tx.init(params)
    params = jaxsparse.apply_masks(params, state)
    data = jnp.asarray(x)

    def loss_fn(params, rows, key):
        noisy = rows + noise * jax.random.normal(key, rows.shape)
        h = jax.nn.sigmoid(noisy @ params["encode"]["kernel"] + params["hidden_bias"])
        y = h @ params["decode"]["kernel"] + params["output_bias"]
        return jnp.mean(jnp.sum((y - rows) ** 2, axis=1))

    def step(carry, i):
        params, state = carry
        draw, corrupt = jax.random.split(jax.random.fold_in(key, i + 2))
        rows = data[jax.random.randint(draw, (batch,), 0, examples)]
        grads = jax.grad(loss_fn)(params, rows, corrupt)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(epochs * per_epoch))[0])
    params, _ = run((params, state))
    return {"encode": params["encode"]["kernel"], "decode": params["decode"]["kernel"]}


def recovered(scores: jax.Array, informative: np.ndarray) -> int:
    """How many of the informative features are among the top ones, as many as there are."""
    k = int(informative.sum())
    top = jaxsparse.selection.topk_mask(scores, k)
    return int(np.count_nonzero(np.asarray(top) & informative))


def main(argv: list[str] | None = None) -> list[list[Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--noise", type=int, default=90, help="planted noise features")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    problems = [
        synthetic(noise=args.noise, seed=args.seed),
        planted("wine", args.noise, args.seed),
        planted("breast_cancer", args.noise, args.seed),
    ]
    rows = []
    for problem in problems:
        kernels = train(problem.x, hidden=args.hidden, epochs=args.epochs, seed=args.seed)
        untrained = train(
            problem.x, hidden=args.hidden, epochs=2, learning_rate=0.0, seed=args.seed
        )
        k, n = int(problem.informative.sum()), len(problem.informative)
        rows.append([
            problem.name, f"{k} of {n}",
            f"{recovered(strength(kernels['encode']), problem.informative)}",
            f"{recovered(strength(untrained['encode']), problem.informative)}",
            f"{k * k / n:.1f}",
        ])  # fmt: skip
    print(
        "Informative features among the top ones by strength, after training, before it, and by "
        "chance:\n"
    )
    print(markdown_table(["data", "informative", "trained", "untrained", "chance"], rows))
    return rows


if __name__ == "__main__":
    main()
