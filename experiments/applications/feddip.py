r"""FedDIP: federated learning of a sparse network, clients simulated along one axis.

  python -m experiments.applications.feddip

Each round some clients train the raw weights w through the server's mask m (gradients are taken at m * w, and applied
to all of w), with a penalty $\lambda_t \sum_l \|m \odot w_l\|_2$ that grows in stairs. The server takes the mean of their
weights by their data, multiplies it by m, and every R rounds prunes it anew by magnitude over all layers, at
$s_t = s + (s_0 - s)(1 - t/T)^3$. Masks are nested: raw values outside of the mask live for one round.

(Long et al., FedDIP: federated learning with extreme dynamic pruning and incremental regularization, 2023.) This
differs from the authors' code in that the gradient of the norm of a leaf of zeros is 0, not NaN.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxsparse
from experiments.applications.continual import digits
from experiments.report.page import markdown_table
from jaxsparse import leaves, masking
from jaxsparse.allocations import Global
from jaxsparse.choose import choose

Loss = Callable[[Any, Any], Array]  # (params, batch) -> mean loss


@dataclasses.dataclass(frozen=True)
class FedDIP:
    """The settings of a run; names as in the formulas above.

    Attributes:
      rounds: T.
      every: R, rounds between two cuts.
      initial: s_0, the sparsity of the random masks that clients draw before there is a server's mask.
      final: s.
      penalty: the largest $\\lambda$; 0 in the first of 20 stairs.
      learning_rate: of plain gradient descent; multiplied by 0.998 every round.
      weight_decay: of w, outside of the mask too.
    """

    rounds: int
    every: int = 5
    initial: float = 0.5
    final: float = 0.9
    penalty: float = 1e-3
    learning_rate: float = 0.1
    weight_decay: float = 5e-4

    def __post_init__(self):
        if self.rounds < 20:
            raise ValueError(
                f"rounds={self.rounds}: the penalty has 20 stairs; give at least as many"
            )
        if not 0 <= self.initial <= self.final < 1:
            raise ValueError(
                f"initial={self.initial}, final={self.final}: need 0 <= initial <= final < 1"
            )

    def sparsity(self, t: int) -> float:
        """$s_t$."""
        return self.final + (self.initial - self.final) * (1 - t / self.rounds) ** 3

    def stair(self, t: int) -> float:
        r"""$\lambda_t$: 0 in the first of 20 equal segments, then from 5e-4 to the largest; what is left over joins the
        last.

        >>> run = FedDIP(rounds=100)
        >>> [round(run.stair(t), 6) for t in (0, 5, 99)]
        [0.0, 0.0005, 0.000974]
        """
        i = min(t // (self.rounds // 20), 19)
        return 0.0 if i == 0 else 5e-4 + (i - 1) * (self.penalty - 5e-4) / 19


def norm(x: Array) -> Array:
    """The l2 norm, whose gradient at 0 is 0."""
    square = jnp.sum(x * x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def client(loss: Loss, params: Any, masks: Any, batches: Any, rate, penalty, decay: float) -> Any:
    """A client's round: steps on batches `[steps, ...]` from the server's sparse weights; returns raw weights.

    Args:
      loss: of the model.
      params: the weights that the server has sent.
      masks: those in force, None at dense leaves.
      batches: a tree with a leading axis of steps.
      rate, penalty: of this round.
      decay: of all weights.
    """
    held = [i for i, m in enumerate(masking.at_leaves(masks, params)) if m is not None]

    def total(sparse, batch):
        flat = jax.tree.leaves(sparse)
        return loss(sparse, batch) + penalty * sum(norm(flat[i]) for i in held)

    def step(raw, batch):
        g = jax.grad(total)(masking.apply(raw, masks), batch)
        return jax.tree.map(lambda w, g: w - rate * (g + decay * w), raw, g), None

    return jax.lax.scan(step, params, batches)[0]


def prune_globally(params: Any, sparsity: float) -> Any:
    """The server's mask: the largest magnitudes over all kernels."""
    sparse = leaves.find(params)
    sizes = [jnp.abs(w) for w in sparse.take(params)]
    return sparse.scatter(choose(sparse.leaves, sizes, Global(), sparsity))


class Round(NamedTuple):
    """The server after a round: weights, masks, and the sparsity of its kernels."""

    params: Any
    masks: Any
    sparsity: float


def train(
    run: FedDIP,
    loss: Loss,
    params: Any,
    data: Callable[[int, int], Any],
    sizes: np.ndarray,
    *,
    chosen: int,
    seed: int = 0,
    on_round: Callable[[int, Round], Any] | None = None,
) -> Round:
    """Runs all rounds.

    Args:
      run: the settings.
      loss: of the model.
      params: initial weights.
      data: `(client, round) -> batches`, a tree with a leading axis of steps.
      sizes: examples of every client, the weights of the mean.
      chosen: clients of a round, drawn anew.
      seed: of the draws.
      on_round: called after each round.

    Returns:
      The server at the end.
    """
    ones = jax.tree.map(lambda m: jnp.ones_like(m), prune_globally(params, 0.0))
    masks, now = None, Round(params, ones, 0.0)
    one = lambda p, m, b, rate, lam: client(loss, p, m, b, rate, lam, run.weight_decay)
    together = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None, None)))
    mix = jax.jit(lambda raw, w: jax.tree.map(lambda x: jnp.tensordot(w, x, axes=1), raw))
    for t in range(run.rounds):
        rng = np.random.default_rng((seed, t))
        who = rng.choice(len(sizes), chosen, replace=False)
        if masks is None:
            own = [
                jaxsparse.prune(params, run.initial, score="random", allocation="erk", seed=int(c))[
                    1
                ]
                for c in who
            ]
        else:
            own = [masks] * chosen
        stacked = jax.tree.map(lambda *m: jnp.stack(m), *own)
        batches = jax.tree.map(lambda *x: jnp.stack(x), *[data(int(c), t) for c in who])
        rate = run.learning_rate * 0.998**t
        raw = together(now.params, stacked, batches, rate, run.stair(t))
        weight = jnp.asarray(sizes[who] / sizes[who].sum(), jnp.float32)
        mean = mix(raw, weight)
        if masks is not None:
            mean = masking.apply(mean, masks)
        if t % run.every == 0:
            masks = prune_globally(mean, run.sparsity(t))
            mean = masking.apply(mean, masks)
        kernels = leaves.find(mean).take(mean)
        zeros = sum(int(jnp.sum(w == 0)) for w in kernels) / sum(w.size for w in kernels)
        now = Round(mean, masks, zeros)
        if on_round is not None:
            on_round(t, now)
    return now


def mlp(key: Array, sizes: tuple[int, ...] = (64, 64, 10)) -> Any:
    """Weights of a small network."""
    init, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(sizes))
    return {
        f"layer_{i}": {"kernel": init(k, (a, b)), "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def logits(params: Any, x: Array) -> Array:
    """Of that network."""
    for i in range(len(params)):
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--chosen", type=int, default=5)
    args = parser.parse_args(argv)
    train_set, test = digits()
    # Clients with two or three classes each: the data are sorted, and dealt in blocks.
    order = np.argsort(train_set.y, kind="stable")
    parts = np.array_split(order, 2 * args.clients)
    rows = [np.concatenate([parts[c], parts[-1 - c]]) for c in range(args.clients)]

    def data(c: int, t: int):
        at = np.random.default_rng((c, t)).choice(rows[c], (10, 32))
        return jnp.asarray(train_set.x[at]), jnp.asarray(train_set.y[at])

    def loss(params, batch):
        found = logits(params, batch[0])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(found), batch[1][:, None], axis=1))

    sizes, table = np.array([len(r) for r in rows]), []
    for final in (0.0, 0.8, 0.9, 0.95):
        accuracies = []
        for seed in range(3):
            run = FedDIP(rounds=args.rounds, initial=min(0.5, final), final=final)
            end = train(
                run, loss, mlp(jax.random.key(seed)), data, sizes, chosen=args.chosen, seed=seed
            )
            accuracies.append(
                float(
                    np.mean(np.asarray(logits(end.params, jnp.asarray(test.x))).argmax(1) == test.y)
                )
            )
        x = 100 * np.array(accuracies)
        table.append(
            [f"{final:.0%}", f"{end.sparsity:.1%}", f"{x.mean():.1f} ± {x.std(ddof=1):.1f}"]
        )
        print(table[-1], flush=True)
    print(markdown_table(["asked for", "sparsity", "accuracy"], table))


if __name__ == "__main__":
    main()
