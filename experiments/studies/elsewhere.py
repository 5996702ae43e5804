r"""Sparsity in other fields: the one primitive that each paper offers, small, on made data.

    python -m experiments.studies.elsewhere

Each function is named after what it does and says which paper it is of; what the papers do besides (rendering,
detection, compression of images, privacy) is not here. The table that is printed has the closed form or bound that
each is held to. docs/reviewed.md lists the papers that offer nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.selection import topk_mask

# ---- gates ----------------------------------------------------------------------------------------


def gate_logits(score: Array, *, b: float = 0.3, low: float = -0.5, high: float = 1.01) -> Array:
    r"""Logits of hard-concrete gates that are open with probability $p = d / (d + median\ d)$:
    $\log\frac{p}{1 - p} + b \log(-\gamma / \eta)$, within logs of 1e-3 and 1e3.

    Source: Girish et al., "QUEEN: quantized efficient encoding of dynamic Gaussians", 2024.

    >>> [round(float(x), 2) for x in open_probability(gate_logits(jnp.array([1.0, 3.0, 9.0])))]
    [0.25, 0.5, 0.75]
    """
    p = score / (score + jnp.median(score))
    logits = jnp.log(p) - jnp.log1p(-p) + b * jnp.log(-low / high)
    return jnp.clip(logits, jnp.log(1e-3), jnp.log(1e3))


def open_probability(
    logits: Array, *, b: float = 0.3, low: float = -0.5, high: float = 1.01
) -> Array:
    r"""$P(g \ne 0) = \sigma(a - b \log(-\gamma / \eta))$.

    >>> round(float(open_probability(0.3 * jnp.log(0.5 / 1.01))), 3)
    0.5
    """
    return jax.nn.sigmoid(logits - b * jnp.log(-low / high))


class Budgeted(NamedTuple):
    """Gates in (0, 1), and the multiplier of their budget."""

    gates: Array
    multiplier: Array


def budgeted_gates(
    loss: Callable[[Array], Array],
    start: Array,
    budget: float,
    *,
    steps: int = 20_000,
    rate: float = 2.0,
    dual_rate: float = 0.02,
    rho: float = 10.0,
) -> Budgeted:
    r"""$\min L(p)$ with a mean of gates $p = \sigma(G)$ of at most C, by descent on
    $L + \frac{\rho}{2} [N - C]_+^2 + \gamma (N - C)$ and ascent on $\gamma \ge 0$: the strength of the penalty is
    found, not tuned.

    Source: Xie et al., "HollowNeRF: pruning hashgrid-based NeRFs with trainable collision mitigation", 2023; rho and
    the step of the multiplier are ours: a larger step of
    the multiplier oscillates.

    >>> found = budgeted_gates(lambda p: ((1 - p) ** 2).sum(), jnp.zeros(4), 1.0, steps=200)
    >>> float(found.multiplier)
    0.0
    """

    def total(logits, gamma):
        p = jax.nn.sigmoid(logits)
        over = p.mean() - budget
        return loss(p) + rho / 2 * jnp.maximum(over, 0) ** 2 + gamma * over

    def step(_, carry):
        logits, gamma = carry
        logits = logits - rate * jax.grad(total)(logits, gamma)
        over = jax.nn.sigmoid(logits).mean() - budget
        return logits, jnp.maximum(gamma + dual_rate * over, 0)

    logits, gamma = jax.lax.fori_loop(0, steps, step, (start, jnp.zeros(())))
    return Budgeted(jax.nn.sigmoid(logits), gamma)


# ---- points in space and time ---------------------------------------------------------------------


def steadiness(times: Array, center: Array, variance: Array) -> Array:
    r"""$\sum_t 1 / (\frac12 \tanh|p''(t)| + \frac12)$ for $p(t) = e^{-(t - \mu)^2 / 2 \Sigma}$: how little a bump
    changes. It is not monotone in its width, so it needs the volume beside it.

    Source: Yuan et al., "4DGS-1K: 1000+ FPS 4D Gaussian splatting for dynamic scene rendering", 2025; the absolute
    value is needed, and lost in the text.

    >>> float(steadiness(jnp.array([100.0]), 0.0, 1.0))  # a tail does not change
    2.0
    """
    gap = times - center
    p = jnp.exp(-(gap**2) / (2 * variance))
    curvature = (gap**2 / variance**2 - 1 / variance) * p
    return (1 / (0.5 * jnp.tanh(jnp.abs(curvature)) + 0.5)).sum(-1)


def move_with_anchors(
    points: Array, anchors: Array, motion: Array, gate: Array, width: float
) -> Array:
    r"""Each point moves by the mean of the anchors' motion, weighted by $e^{-\|x - a\|^2 / 2 h^2}$; anchors whose
    gate is 0 stand still and still count.

    Source: "EDGS: efficient Gaussian splatting via sparse time-variant attribute modeling", 2025; its bandwidth and
    normalisation are not verified.

    >>> anchors = jnp.array([[0.0], [1.0]])
    >>> move_with_anchors(anchors, anchors, jnp.ones((2, 3)), jnp.ones(2), 0.1).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    distance = ((points[:, None] - anchors) ** 2).sum(-1)
    weights = jax.nn.softmax(-distance / (2 * width**2), axis=-1)
    return weights @ (gate[:, None] * motion)


def local_noise(noise: Array, slope: Array, share: float, bound: float, rate: float) -> Array:
    r"""$\delta \leftarrow clip(\delta - a\, sign(g), \pm\epsilon)$ where $|g|$ is among the largest of its sample, 0 elsewhere.

    Source: Sun et al., "Medical unlearnable examples: securing medical data from unauthorized training via
    sparsity-aware local masking", 2024; only the abstract was read.

    >>> local_noise(jnp.zeros((1, 4)), jnp.array([[3.0, -1.0, 0.0, 0.1]]), 0.5, 0.5, 1.0).tolist()
    [[-0.5, 0.5, 0.0, 0.0]]
    """
    flat = jnp.abs(slope).reshape(len(slope), -1)
    kept = jax.vmap(lambda g: topk_mask(g, round(share * flat.shape[1])))(flat)
    moved = jnp.clip(noise - rate * jnp.sign(slope), -bound, bound)
    return jnp.where(kept.reshape(noise.shape), moved, 0)


# ---- choosing actions -----------------------------------------------------------------------------


def eliminate(
    ask: Callable[[np.ndarray], float], arms: int, sparsity: int, error: float, levels: int = 3
) -> tuple[np.ndarray, int]:
    r"""A misspecified linear bandit whose weights have few nonzeros: all supports with a grid of values each are
    candidates, an action that two of them disagree on is asked, what is off by more than `error` goes. Queries grow
    with the sparsity, not with the number of arms to that power.

    Source: Dong, Yang, "Does sparsity help in learning misspecified linear bandits?", 2023, the idea of the upper
    bound by enumeration.

    >>> truth = np.array([0.0, 1.0, 0.0, 0.0])
    >>> found, queries = eliminate(lambda x: float(truth @ x) + 0.05, 4, 1, 0.1)
    >>> found.tolist(), queries < 8
    ([0.0, 1.0, 0.0, 0.0], True)
    """
    values = np.linspace(-1, 1, levels)
    candidates = [np.zeros(arms)]
    for support in itertools.combinations(range(arms), sparsity):
        for v in itertools.product(values, repeat=sparsity):
            w = np.zeros(arms)
            w[list(support)] = v
            candidates.append(w)
    left = np.unique(np.array(candidates), axis=0)
    queries = 0
    while len(left) > 1:
        # The coordinate on which they are most evenly split.
        spread = [max(np.mean(left[:, j] == v) for v in values) for j in range(arms)]
        j = int(np.argmin(spread))
        action = np.eye(arms)[j]
        said = ask(action)
        queries += 1
        near = np.abs(left @ action - said) <= error
        if near.all() or not near.any():
            break
        left = left[near]
    return left[0], queries


# ---- latent variables -----------------------------------------------------------------------------


class Activity(NamedTuple):
    """Of each latent: mean posterior variance, variance of the posterior mean, mean divergence from the prior."""

    variance: Array
    moves: Array
    divergence: Array

    @property
    def active(self) -> Array:
        """Whether the mean moves with the input."""
        return self.moves > 0.01


def latent_activity(means: Array, variances: Array) -> Activity:
    r"""Which latents of a variational autoencoder are used: the others are zeros of its structure, and can be cut.

    Args:
      means, variances: of the posteriors `[samples, latents]`.

    Source: Bonheme, Grzes, "Be more active! Understanding the differences between mean and sampled representations of
    variational autoencoders", 2023; the bound 0.01 is Burda's, 2016.

    >>> latent_activity(jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.array([[0.1, 1.0]] * 2)).active.tolist()
    [True, False]
    """
    kl = 0.5 * (variances + means**2 - 1 - jnp.log(variances))
    return Activity(variances.mean(0), means.var(0), kl.mean(0))


def linear_posterior(eigenvalues: Array, noise: float, beta: float = 1.0) -> tuple[Array, Array]:
    r"""Variance of the posterior and variance of its mean, of the best linear variational autoencoder: a latent of
    eigenvalue $l$ is active where $l > \beta s^2$, with $\beta s^2 / l$ and $1 - \beta s^2 / l$.

    >>> variance, moves = linear_posterior(jnp.array([4.0, 0.5]), 1.0)
    >>> variance.tolist(), moves.tolist()
    ([0.25, 1.0], [0.75, 0.0])
    """
    share = jnp.minimum(beta * noise / eigenvalues, 1)
    return share, 1 - share


# ---- few points for many --------------------------------------------------------------------------


def pivoted_cholesky(
    kernel: Callable[[Array, Array], Array], x: Array, m: int
) -> tuple[Array, Array]:
    r"""m inducing points, each where the residual diagonal of $K - K_{nm} K_{mm}^{-1} K_{mn}$ is largest.

    Returns:
      Their numbers, int32 `[m]`, and the residual diagonal after each, `[m, n]`, not negative and not growing.

    Source: Harbrecht, Peters, Schneider, "On the low-rank approximation by the pivoted Cholesky decomposition",
    2012; for "A theory of representation learning gives a deep generalisation of kernel methods", 2023.

    >>> linear = lambda a, b: a @ b.T
    >>> points, rest = pivoted_cholesky(linear, jnp.array([[1.0], [3.0], [2.0]]), 1)
    >>> points.tolist(), rest[-1].tolist()
    ([1], [0.0, 0.0, 0.0])
    """
    n = len(x)

    def step(carry, i):
        rest, factor = carry
        at = jnp.argmax(rest).astype(jnp.int32)
        pivot = jnp.maximum(rest[at], jnp.finfo(rest.dtype).tiny)
        row = (kernel(x[at][None], x)[0] - factor.T @ factor[:, at]) / jnp.sqrt(pivot)
        row = jnp.where(rest[at] > 0, row, 0)
        rest = jnp.maximum(rest - row**2, 0).at[at].set(0)
        return (rest, factor.at[i].set(row)), (at, rest)

    diagonal = jax.vmap(lambda p: kernel(p[None], p[None])[0, 0])(x)
    start = diagonal, jnp.zeros((m, n), diagonal.dtype)
    return jax.lax.scan(step, start, jnp.arange(m))[1]


def nystrom(kernel: Callable[[Array, Array], Array], x: Array, points: Array) -> Array:
    r"""$K_{nm} K_{mm}^{-1} K_{mn}$, `[n, n]`.

    >>> x = jnp.array([[1.0], [3.0]])
    >>> nystrom(lambda a, b: a @ b.T, x, jnp.array([1])).round(4).tolist()
    [[1.0, 3.0], [3.0, 9.0]]
    """
    across, inside = kernel(x, x[points]), kernel(x[points], x[points])
    return across @ jnp.linalg.pinv(inside, hermitian=True) @ across.T


# ---- one of K in each group -----------------------------------------------------------------------


def product_quantise(x: Array, codebooks: Array) -> tuple[Array, Array]:
    r"""The nearest code of each group, and the reconstruction, whose gradient goes straight to x. A code is one
    nonzero of K in each of G groups, $G \log_2 K$ bits.

    Args:
      x: `[samples, G * d]`.
      codebooks: `[G, K, d]`.

    Source: Zhu, Song, Gao, Zheng, Shen, "Unified multivariate Gaussian mixture for efficient neural image
    compression", 2022: its quantiser only.

    >>> codes, near = product_quantise(jnp.array([[0.9, -0.2]]), jnp.array([[[0.0], [1.0]], [[0.0], [1.0]]]))
    >>> codes.tolist(), near.tolist()
    ([[1, 0]], [[1.0, 0.0]])
    """
    groups, _, d = codebooks.shape
    cut = x.reshape(len(x), groups, 1, d)
    codes = ((cut - codebooks) ** 2).sum(-1).argmin(-1)
    near = jnp.take_along_axis(codebooks[None], codes[..., None, None], axis=2).reshape(x.shape)
    return codes, x + jax.lax.stop_gradient(near - x)


def lloyd(x: Array, codebooks: Array, seed: int) -> Array:
    """One iteration of each codebook: codes become the means of what is nearest to them, those that nothing is
    nearest to a sample at random.

    >>> lloyd(jnp.array([[0.0], [0.5], [4.0]]), jnp.array([[[1.0], [3.0]]]), 0).tolist()
    [[[0.25], [4.0]]]
    """
    groups, k, d = codebooks.shape
    codes, _ = product_quantise(x, codebooks)
    cut = x.reshape(len(x), groups, d)
    of = jax.nn.one_hot(codes, k)  # [samples, groups, K]
    count = of.sum(0)
    mean = jnp.einsum("ngk,ngd->gkd", of, cut) / jnp.maximum(count, 1)[..., None]
    anyone = cut[
        jax.random.randint(jax.random.key(seed), (groups, k), 0, len(x)),
        jnp.arange(groups)[:, None],
    ]
    return jnp.where(count[..., None] > 0, mean, anyone)


def match_queries(boxes: Array, found: Array) -> tuple[Array, Array]:
    """The best assignment of objects to few learned queries, by trying all: which query each object has, and the
    mean distance. Independent of the order of queries; with fewer queries than objects the first of them only.

    Args:
      boxes: `[objects, d]`.
      found: of the queries `[queries, d]`.

    Source: Sun et al., "Sparse R-CNN: end-to-end object detection with learnable proposals", 2021: the set of
    queries and its matching.

    >>> match_queries(jnp.array([[1.0]]), jnp.array([[5.0], [1.5]]))[0].tolist()
    [1]
    """
    objects = min(len(boxes), len(found))
    orders = jnp.array(list(itertools.permutations(range(len(found)), objects)), jnp.int32)
    distance = jnp.abs(boxes[:objects, None] - found).sum(-1)
    cost = distance[jnp.arange(objects), orders].mean(-1)
    best = jnp.argmin(cost)
    return orders[best], cost[best]


# ---- the table ------------------------------------------------------------------------------------


def table() -> list[tuple[str, str, str]]:
    """Primitive, what it is held to, what was found."""
    rng = np.random.default_rng(0)
    rows = []
    weights = jnp.where(jnp.arange(200) < 20, 1.0, 0.01)
    gates = budgeted_gates(lambda p: (weights * (1 - p) ** 2).sum(), jnp.zeros(200), 0.1)
    slack = float(gates.multiplier * (gates.gates.mean() - 0.1))
    found = f"{float(gates.gates.mean()):.4f}, {slack:.1e}"
    rows.append(("budgeted gates [065]", "mean 0.1, complementary slackness 0", found))
    eigen, noise = jnp.array([4.0, 2.0, 1.0, 0.5, 0.2]), 0.8
    variance, moves = linear_posterior(eigen, noise)
    means = jnp.asarray(rng.normal(size=(4000, 5))) * jnp.sqrt(moves)
    active = latent_activity(means, jnp.broadcast_to(variance, means.shape)).active
    rows.append(("latent activity [184]", "eigenvalues above the noise: 3", str(int(active.sum()))))
    x = jnp.asarray(rng.normal(size=(40, 3)))
    linear = lambda a, b: a @ b.T
    points, _ = pivoted_cholesky(linear, x, 3)
    gap = float(jnp.abs(nystrom(linear, x, points) - x @ x.T).max())
    rows.append(("inducing points [173]", "exact at the rank", f"{gap:.0e}"))
    truth = np.zeros(12)
    truth[[2, 7]] = 1, -1
    _, queries = eliminate(lambda a: float(truth @ a) + 0.05, 12, 2, 0.1)
    rows.append(("sparse bandit [189]", "at most one query for each arm: 12", str(queries)))
    return rows


if __name__ == "__main__":
    print("| primitive | held to | found |\n|---|---|---|")
    for row in table():
        print(f"| {' | '.join(row)} |")
