r"""CEAG: pruned networks whose accuracy falls for no group much more than for all, by constraints with dual variables.

With $A$ the accuracies and $L$ the losses of the pruned network, $A^0$, $L^0$ those of the dense one, each group g has
the excess gap $\psi_g = (A^0_g - A_g) - (A^0 - A)$ and the constraint $\psi_g \le \epsilon$:

    dual = constraints.start(groups, buffer=40)
    # each step, the dual one first:
    dual = constraints.ascend(dual, correct, group, reference, tolerance=0.02, rate=0.05)
    loss = constraints.penalized_loss(losses, group, dual, reference)     # its gradient trains the network

The penalty is made of losses, which have gradients; dual variables follow true accuracies. (Hashemizadeh et al.,
Balancing act: constraining disparate impact in sparse models, 2024.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsparse._control import is_concrete


class Reference(NamedTuple):
    """The dense network on the training set: accuracy and loss of each group `[groups]`, and of all."""

    group_accuracy: Array
    group_loss: Array
    accuracy: Array
    loss: Array


class Dual(NamedTuple):
    """The multipliers $\\lambda \\ge 0$, `[groups]`; the last `buffer` results (0 or 1) of each group and of all, and
    how many have been written."""

    multipliers: Array
    results: Array
    written: Array
    all_results: Array
    all_written: Array


def reference(losses: Array, correct: Array, group: Array, groups: int) -> Reference:
    """What the dense network does on a whole training set.

    Args:
      losses: of every example, `[n]`.
      correct: bool `[n]`.
      group: its group, integers `[n]`.
      groups: their number.

    >>> found = reference(jnp.array([1.0, 3.0]), jnp.array([True, False]), jnp.array([0, 1]), 2)
    >>> found.group_accuracy.tolist(), float(found.loss)
    ([1.0, 0.0], 2.0)

    Raises:
      ValueError: a group without an example.
    """
    counts = jnp.bincount(group, length=groups)
    if is_concrete(counts) and not bool(jnp.all(counts > 0)):
        raise ValueError(f"group: {int(jnp.argmin(counts))} has no example in the reference data")
    mean = lambda v: jnp.bincount(group, weights=v, length=groups) / counts
    right = correct.astype(jnp.float32)
    return Reference(mean(right), mean(losses), jnp.mean(right), jnp.mean(losses))


def start(groups: int, *, buffer: int = 40) -> Dual:
    """The dual state: multipliers of 0, empty buffers.

    Args:
      groups: their number.
      buffer: results of each group that are averaged; a group is judged once its buffer is full.

    Raises:
      ValueError: fewer than one of either.
    """
    if groups < 1 or buffer < 1:
        raise ValueError(f"groups={groups}, buffer={buffer}: must be at least 1")
    zero = jnp.zeros((), jnp.int32)
    return Dual(
        jnp.zeros(groups),
        jnp.zeros((groups, buffer)),
        jnp.zeros(groups, jnp.int32),
        jnp.zeros(groups * buffer),
        zero,
    )


def gaps(dual: Dual, reference: Reference) -> Array:
    r"""$\psi_g$ by the buffers, `[groups]`; NaN where a buffer is not full yet."""
    full = dual.written >= dual.results.shape[1]
    mine = jnp.mean(dual.results, axis=1)
    seen = jnp.minimum(dual.all_written, dual.all_results.shape[0])
    total = jnp.sum(dual.all_results) / jnp.maximum(seen, 1)
    found = (reference.group_accuracy - mine) - (reference.accuracy - total)
    return jnp.where(full, found, jnp.nan)


def ascend(
    dual: Dual,
    correct: Array,
    group: Array,
    reference: Reference,
    *,
    tolerance: float,
    rate: float = 0.01,
    active: Array | bool = True,
) -> Dual:
    r"""Writes the results of a batch into the buffers, and takes $\lambda_g \leftarrow \max(0, \lambda_g + \eta
    (\psi_g - \epsilon))$ for the groups that are in it and whose buffers are full.

    Args:
      dual: the state.
      correct: bool `[batch]`.
      group: integers `[batch]`.
      reference: of the dense network.
      tolerance: $\epsilon$.
      rate: $\eta$.
      active: whether multipliers move; False before the last cut (buffers are written in any case).

    >>> ref = reference(jnp.zeros(4), jnp.ones(4, bool), jnp.array([0, 0, 1, 1]), 2)
    >>> d = ascend(start(2, buffer=1), jnp.array([True, False]), jnp.array([0, 1]), ref, tolerance=0.1, rate=1.0)
    >>> [round(float(m), 4) for m in d.multipliers]  # gaps: -1/2 and 1/2
    [0.0, 0.4]
    """
    right = correct.astype(jnp.float32)
    size, length = dual.results.shape[1], dual.all_results.shape[0]

    def write(carry, row):
        results, written, all_results, all_written = carry
        value, g = row
        results = results.at[g, written[g] % size].set(value)
        all_results = all_results.at[all_written % length].set(value)
        return (results, written.at[g].add(1), all_results, all_written + 1), None

    first = dual.results, dual.written, dual.all_results, dual.all_written
    (results, written, all_results, all_written), _ = jax.lax.scan(write, first, (right, group))
    new = dual._replace(
        results=results, written=written, all_results=all_results, all_written=all_written
    )
    psi = gaps(new, reference)
    groups = dual.multipliers.shape[0]
    present = jnp.bincount(group, length=groups) > 0
    moved = jnp.maximum(0.0, dual.multipliers + rate * (psi - tolerance))
    due = present & ~jnp.isnan(psi) & active
    return new._replace(multipliers=jnp.where(due, moved, dual.multipliers))


def penalized_loss(losses: Array, group: Array, dual: Dual, reference: Reference) -> Array:
    r"""$L + \sum_g \lambda_g ((L_g - L_g^0) - (L - L^0))$ over the groups of a batch.

    Args:
      losses: of every example of the batch, `[batch]`.
      group: integers `[batch]`.
      dual: the state, whose multipliers are not differentiated.
      reference: of the dense network.

    >>> ref = Reference(jnp.ones(2), jnp.zeros(2), jnp.ones(()), jnp.zeros(()))
    >>> d = start(2)._replace(multipliers=jnp.array([0.0, 2.0]))
    >>> float(penalized_loss(jnp.array([1.0, 3.0]), jnp.array([0, 1]), d, ref))  # 2 + 2 * (3 - 2)
    4.0
    """
    groups = dual.multipliers.shape[0]
    counts = jnp.bincount(group, length=groups)
    sums = jnp.zeros(groups, losses.dtype).at[group].add(losses)
    mine = sums / jnp.maximum(counts, 1)
    mean = jnp.mean(losses)
    excess = (mine - reference.group_loss) - (mean - reference.loss)
    weight = jax.lax.stop_gradient(jnp.where(counts > 0, dual.multipliers, 0.0))
    return mean + jnp.sum(weight * excess)
