r"""DASS: an architecture is searched among sparse operations, so that it is good after pruning.

Each edge of a chain has a mixed operation $\sum_o softmax(\alpha)_o\, o(x)$, in which every operation multiplies with
$W \odot topk(|S|)$, scores S trained straight through (`sparse_weight`). Steps alternate: weights and scores on the
training half, $\alpha$ on the other half, through the masked network. What has the largest $\alpha$ stays; `hydra` prunes
it for good: pretrain dense, learn scores with frozen weights, fine-tune under the mask.

(Mousavi et al., DASS: differentiable architecture search for sparse neural networks, 2023; Sehwag et al., HYDRA:
pruning adversarially robust neural networks, 2020. The chain stands in place of the authors' cells.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxsparse
from jaxsparse import selection

Batch = tuple[Array, Array]
Loss = Callable[[Array, Array], Array]  # (outputs, targets) -> mean


class Operation(NamedTuple):
    """A candidate: `init(key) -> kernels` (a dict of arrays, {} for none) and `apply(kernels, x) -> outputs` of one
    shape for all candidates."""

    init: Callable[[Array], dict[str, Array]]
    apply: Callable[[dict[str, Array], Array], Array]


def sparse_weight(w: Array, s: Array, kept: float) -> Array:
    r"""$W \odot m$ with m the `kept` part of largest |S|: the gradient of W is masked, that of S is $g \odot W \odot
    sign(S)$, dense.

    >>> w, s = jnp.array([1.0, 2.0]), jnp.array([0.3, -0.9])
    >>> g = jax.grad(lambda w, s: sparse_weight(w, s, 0.5).sum(), argnums=(0, 1))(w, s)
    >>> sparse_weight(w, s, 0.5).tolist(), [x.tolist() for x in g]
    ([0.0, 2.0], [[0.0, 1.0], [1.0, -2.0]])
    """
    if kept >= 1:
        return w
    size = jnp.abs(s)
    mask = selection.topk_mask(jax.lax.stop_gradient(size), max(int(kept * w.size + 1e-9), 1))
    through = jax.lax.stop_gradient(w) * (size - jax.lax.stop_gradient(size))
    return jnp.where(mask, w, jnp.zeros((), w.dtype)) + through


def first_scores(w: Array) -> Array:
    r"""Scores in proportion to the weights, $w\,\sqrt{6 / n_{in}} / \max|w|$: the first mask is that of magnitudes."""
    fan_in = max(w.size // w.shape[-1], 1)
    return w * (6 / fan_in) ** 0.5 / jnp.maximum(jnp.max(jnp.abs(w)), jnp.finfo(w.dtype).tiny)


class Search(NamedTuple):
    """What is trained: per edge and operation kernels and their scores, and alpha `[edges, operations]`."""

    weights: list[dict[str, dict[str, Array]]]
    scores: list[dict[str, dict[str, Array]]]
    alpha: Array


class Cell(NamedTuple):
    """The names of the operations that were chosen, and the search at its end."""

    chosen: tuple[str, ...]
    state: Search


def start(key: Array, operations: Mapping[str, Operation], edges: int) -> Search:
    """Random kernels, scores in proportion to them, alpha of 0."""
    weights = []
    for i in range(edges):
        keys = jax.random.split(jax.random.fold_in(key, i), len(operations))
        weights.append({n: op.init(k) for (n, op), k in zip(operations.items(), keys)})
    return Search(weights, jax.tree.map(first_scores, weights), jnp.zeros((edges, len(operations))))


def mixed(state: Search, operations: Mapping[str, Operation], x: Array, kept: float) -> Array:
    """The chain of mixed operations."""
    for w, s, a in zip(state.weights, state.scores, state.alpha):
        share = jax.nn.softmax(a)
        outputs = []
        for name, op in operations.items():
            held = jax.tree.map(lambda w, s: sparse_weight(w, s, kept), w[name], s[name])
            outputs.append(op.apply(held, x))
        x = sum((p * y for p, y in zip(share, outputs)), jnp.zeros_like(outputs[0]))
    return x


def search(
    operations: Mapping[str, Operation],
    loss: Loss,
    train: Batch,
    validation: Batch,
    *,
    edges: int,
    kept: float,
    steps: int,
    key: Array,
    learning_rate: float = 0.05,
    alpha_rate: float = 0.02,
    batch_size: int = 64,
) -> Cell:
    """Alternates steps of weights and scores with steps of alpha.

    Args:
      operations: by name.
      loss: of outputs and targets.
      train, validation: whole, in memory; alpha sees the second only.
      edges: of the chain.
      kept: the fraction of each kernel that is kept; 1: dense, DARTS.
      steps: of either kind.
      key: of weights and batches.
      learning_rate: of SGD with momentum for weights and scores.
      alpha_rate: of Adam for alpha.
      batch_size: of both.

    Returns:
      The operation of largest alpha of each edge.

    Raises:
      ValueError: fewer than two operations, a fraction not in (0, 1].
    """
    if len(operations) < 2 or not 0 < kept <= 1:
        raise ValueError(
            f"{len(operations)} operations, kept={kept}: need two, and a fraction in (0, 1]"
        )
    state = start(key, operations, edges)
    labels = Search(
        jax.tree.map(lambda _: "w", state.weights), jax.tree.map(lambda _: "w", state.scores), "alpha"  # type: ignore[arg-type]
    )  # fmt: skip
    of = lambda own, tx: optax.multi_transform(
        {own: tx, "alpha" if own == "w" else "w": optax.set_to_zero()}, labels
    )
    inner = of("w", optax.sgd(learning_rate, momentum=0.9))
    outer = of("alpha", optax.adam(alpha_rate))

    def total(state, batch):
        return loss(mixed(state, operations, batch[0], kept), batch[1])

    def draw(data, i, salt):
        at = jax.random.randint(
            jax.random.fold_in(jax.random.fold_in(key, salt), i), (batch_size,), 0, data[0].shape[0]
        )
        return data[0][at], data[1][at]

    def step(carry, i):
        state, slots, alpha_slots = carry
        updates, slots = inner.update(jax.grad(total)(state, draw(train, i, 1)), slots, state)
        state = optax.apply_updates(state, updates)
        grads = jax.grad(total)(state, draw(validation, i, 2))
        updates, alpha_slots = outer.update(grads, alpha_slots, state)
        return (optax.apply_updates(state, updates), slots, alpha_slots), None

    first = state, inner.init(state), outer.init(state)
    (state, _, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(first)
    names = list(operations)
    return Cell(tuple(names[int(i)] for i in state.alpha.argmax(axis=1)), state)


def hydra(
    loss: Callable[[Any, Batch], Array],
    params: Any,
    batches: Callable[[int], Batch],
    sparsity: float,
    *,
    steps: Sequence[int],
    learning_rate: float = 0.05,
) -> Any:
    """Prunes a network in three parts: dense training, scores with frozen weights, fine-tuning under the mask.

    Args:
      loss: from parameters and a batch to a number.
      params: initial weights.
      batches: from the number of a step to its batch; traced.
      sparsity: of the kernels.
      steps: of the three parts.
      learning_rate: of SGD with momentum.

    Returns:
      The parameters at the end.
    """
    sgd = optax.sgd(learning_rate, momentum=0.9)

    def run(tx, params, length, salt):
        def step(carry, i):
            params, state = carry
            grads = jax.grad(loss)(params, batches(i + salt))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def whole(params):
            state = tx.init(params)
            if tx is not sgd:
                params = jaxsparse.apply_masks(params, state)
            return jax.lax.scan(step, (params, state), jnp.arange(length))[0]

        return jax.jit(whole)(params)

    params, _ = run(sgd, params, steps[0], 0)
    scored = jaxsparse.edge_popup(optax.set_to_zero(), sparsity, scores=sgd, first_scores="weights")
    params, state = run(scored, params, steps[1], steps[0])
    masks = jaxsparse.get_masks(state)
    return run(jaxsparse.static(sgd, masks=masks), params, steps[2], steps[0] + steps[1])[0]
