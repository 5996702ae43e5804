r"""Which feature of each example to look at next: a policy, trained with a predictor that takes any subset.

    python -m experiments.studies.reveal_features [--budget=4] [--steps=1500]

At each of `budget` steps the policy sees the features that were revealed so far and which these are, and names the
next. Where it is trained as in Covert et al., "Learning to maximize mutual information for dynamic feature selection",
2023, it learns the greedy choice: the feature that tells most about the label, given what is known of this example.

The data are planted so that one fixed subset cannot do: $x_0$ is 1, 2 or 3, $x_1, x_2, x_3$ are fair bits, and the label
is $x_{x_0}$. Alone, $x_0$ tells nothing; the greedy order is some bit, then $x_0$, then the bit that it names. Printed
is the accuracy over the number of features next to the best fixed subset, found by trying all, and random ones.
"""

from __future__ import annotations

import argparse
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxsparse.selection import topk_mask

TAKEN = 1e6  # what is subtracted from the logits of features that are known


class Masked(nnx.Module):
    """A network of the revealed features and of which they are: 0 is a value, too."""

    def __init__(self, features: int, outputs: int, *, hidden: int = 128, rngs: nnx.Rngs):
        self.first = nnx.Linear(2 * features, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.last = nnx.Linear(hidden, outputs, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        h = jnp.concatenate([x * mask, mask], -1)
        return self.last(nnx.relu(self.second(nnx.relu(self.first(h)))))


def random_subsets(key: Array, shape: tuple[int, ...]) -> Array:
    """Masks `[examples, features]`, float32, whose number of ones is uniform from 0 to all."""
    few, order = jax.random.split(key)
    count = jax.random.randint(few, shape[:1], 0, shape[1] + 1)
    return topk_mask(jax.random.uniform(order, shape), count, axis=-1).astype(jnp.float32)


def predictor_loss(predictor: Masked, x: Array, y: Array, key: Array) -> Array:
    """Cross-entropy of predictions from random subsets."""
    logits = predictor(x, random_subsets(key, x.shape))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def policy_loss(
    policy: Masked,
    predictor: Masked,
    x: Array,
    y: Array,
    key: Array,
    *,
    budget: int,
    temperature: float,
    gamma: float = 0.2,
) -> Array:
    r"""The mean over steps of the cross-entropy after one more feature:
    $\frac1b \sum_s CE(f(x \odot \tilde m_s, \tilde m_s), y)$ with $\tilde m_s = \max(m_s, c_s)$, $c_s$ a Concrete sample of the
    policy's logits over gamma, which may name a known feature again. Then $m_{s+1}$ adds a categorical sample
    among the others; no gradient passes from step to step.

    Args:
      policy: names the next feature.
      predictor: predicts from what is revealed; trained with the policy.
      x: `[examples, features]`.
      y: labels, int `[examples]`.
      key: of the samples.
      budget: how many features are revealed.
      temperature: of the Concrete samples; falls over training.
      gamma: what logits are divided by.
    """
    mask, total = jnp.zeros_like(x), jnp.zeros(())
    for own in jax.random.split(key, budget):
        soft_key, hard_key = jax.random.split(own)
        logits = policy(x, mask) / gamma
        noisy = logits + jax.random.gumbel(soft_key, logits.shape)
        soft = jnp.maximum(mask, jax.nn.softmax(noisy / temperature))
        losses = optax.softmax_cross_entropy_with_integer_labels(predictor(x, soft), y)
        total += losses.mean() / budget
        chosen = jax.random.categorical(hard_key, jax.lax.stop_gradient(logits) - TAKEN * mask)
        mask = jnp.maximum(mask, jax.nn.one_hot(chosen, x.shape[1]))
    return total


def reveal(policy: Masked, x: Array, budget: int) -> tuple[Array, Array]:
    """The order in which the policy reveals features, int32 `[examples, budget]`, and the mask after each step,
    `[budget, examples, features]`. The best at each step; none twice.

    Raises:
      ValueError: a budget that is not from 1 to the number of features.
    """
    if not 1 <= budget <= x.shape[1]:
        raise ValueError(f"budget={budget}: must be from 1 to the {x.shape[1]} features")
    mask, order, masks = jnp.zeros_like(x), [], []
    for _ in range(budget):
        chosen = jnp.argmax(policy(x, mask) - TAKEN * mask, -1)
        mask = jnp.maximum(mask, jax.nn.one_hot(chosen, x.shape[1]))
        order.append(chosen)
        masks.append(mask)
    return jnp.stack(order, 1), jnp.stack(masks)


class Fitted(NamedTuple):
    """The two networks."""

    policy: Masked
    predictor: Masked


def fit(x: Array, y: Array, *, budget: int, classes: int, steps: int, seed: int = 0) -> Fitted:
    """The predictor on random subsets for `steps` steps, then both for as many, in five stages with
    temperatures from 1 to 0.1. Adam starts anew in each; batches of 256."""
    rngs = nnx.Rngs(seed)
    predictor = Masked(x.shape[1], classes, rngs=rngs)
    policy = Masked(x.shape[1], x.shape[1], rngs=rngs)

    def train(networks, loss, steps, key):
        optimizer = nnx.Optimizer(networks, optax.adam(1e-3), wrt=nnx.Param)

        @nnx.jit
        def step(networks, optimizer, key):
            rows, own = jax.random.split(key)
            rows = jax.random.randint(rows, (256,), 0, len(x))
            grads = nnx.grad(lambda n: loss(n, x[rows], y[rows], own))(networks)
            optimizer.update(networks, grads)

        for own in jax.random.split(key, steps):
            step(networks, optimizer, own)

    train(predictor, predictor_loss, steps, rngs())
    both = nnx.List([policy, predictor])
    for temperature in np.geomspace(1.0, 0.1, 5):
        options = dict(budget=budget, temperature=float(temperature))
        loss = lambda n, *a, options=options: policy_loss(*n, *a, **options)
        train(both, loss, steps // 5, rngs())
    return Fitted(policy, predictor)


def planted(n: int, seed: int) -> tuple[Array, Array]:
    """Features `[n, 4]` and labels: the label is the bit that the first feature names."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.integers(1, 4, (n, 1)), rng.integers(0, 2, (n, 3))], 1)
    y = np.take_along_axis(x, x[:, :1], 1)[:, 0]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def best_fixed(size: int) -> float:
    """The accuracy of the best classifier on the best fixed subset of the planted features."""
    rows = [(a, *bits) for a in (1, 2, 3) for bits in itertools.product((0, 1), repeat=3)]

    def accuracy(subset):
        seen: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            seen.setdefault(tuple(row[i] for i in subset), []).append(row[row[0]])
        return sum(max(v.count(0), v.count(1)) for v in seen.values()) / len(rows)

    return max(accuracy(subset) for subset in itertools.combinations(range(4), size))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    policy, predictor = fit(*planted(8192, 0), budget=args.budget, classes=2, steps=args.steps)
    x, y = planted(4096, 1)
    order, masks = reveal(policy, x, args.budget)
    at_random = jax.random.uniform(jax.random.key(2), x.shape)
    print("| features | the policy's | best fixed subset | random |\n|---|---|---|---|")
    for i, mask in enumerate(masks):
        hit = lambda m: float((predictor(x, m).argmax(-1) == y).mean())
        fixed, random = best_fixed(i + 1), hit(topk_mask(-at_random, i + 1, axis=-1) * 1.0)
        print(f"| {i + 1} | {hit(mask):.3f} | {fixed:.3f} | {random:.3f} |")
    for i, column in enumerate(np.asarray(order).T):
        counts = np.bincount(column, minlength=x.shape[1]) / len(column)
        print(f"step {i + 1}: " + ", ".join(f"x{j} {c:.2f}" for j, c in enumerate(counts)))


if __name__ == "__main__":
    main()
