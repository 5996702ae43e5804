r"""What a ticket is worth on another task, without a change of its weights: visual prompts with a map of labels, and
linear probes; with accuracy and calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxsparse.analysis.impact import calibration_error

Forward = Callable[
    [Array], Array
]  # inputs [n, height, width, channels] -> logits [n, source classes]


def greedy_label_map(counts: np.ndarray) -> np.ndarray:
    """The source class that stands for each target class: the largest count is fixed first, its row and column go, and
    so on; no source class stands for two.

    Args:
      counts: `[source, target]`, how often the frozen network says a source class for examples of a target class.

    Returns:
      Integers `[target]`.

    (Misra, Goyal, Runwal & Chen, Uncovering the hidden cost of model compression, 2024.)

    >>> greedy_label_map(np.array([[9, 8], [5, 1], [0, 2]])).tolist()
    [0, 2]

    Raises:
      ValueError: fewer source than target classes.
    """
    left = np.array(counts, np.float64)
    if left.ndim != 2 or left.shape[0] < left.shape[1]:
        raise ValueError(
            f"counts: {left.shape}; need [source, target] with at least as many source classes"
        )
    found = np.zeros(left.shape[1], int)
    for _ in range(left.shape[1]):
        source, target = np.unravel_index(np.argmax(left), left.shape)
        found[target] = source
        left[source], left[:, target] = -np.inf, -np.inf
    return found


def prompted(program: Array, x: Array) -> Array:
    r"""Small images in the middle of a trained border: x padded to the size of the program, plus $\sigma(program)$ where
    x is not.

    Args:
      program: `[height, width, channels]`, 0 at first.
      x: `[n, h, w, channels]`, no larger.

    >>> prompted(jnp.zeros((3, 3, 1)), jnp.ones((1, 1, 1, 1)))[0, :, :, 0].tolist()
    [[0.5, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 0.5]]

    Raises:
      ValueError: images larger than the program.
    """
    height, width = program.shape[:2]
    top, left = (height - x.shape[1]) // 2, (width - x.shape[2]) // 2
    if top < 0 or left < 0:
        raise ValueError(f"x: {x.shape[1:3]} is larger than the program, {program.shape[:2]}")
    rows = (top, height - x.shape[1] - top), (left, width - x.shape[2] - left)
    inside = jnp.pad(jnp.ones(x.shape[1:3], bool), rows)
    padded = jnp.pad(x, ((0, 0), *rows, (0, 0)))
    return jnp.where(inside[:, :, None], padded, jax.nn.sigmoid(program))


class Transferred(NamedTuple):
    """Test accuracy and expected calibration error, and what was trained."""

    accuracy: float
    calibration: float
    trained: Any


class Few(NamedTuple):
    """Examples and labels, in memory."""

    x: Array
    y: Array


def few_shot(data: Few, shots: int, classes: int, seed: int = 0) -> Few:
    """The first `shots` examples of each class in a random order.

    Raises:
      ValueError: a class with fewer.
    """
    rng, rows = np.random.default_rng(seed), []
    for c in range(classes):
        of = np.flatnonzero(np.asarray(data.y) == c)
        if of.size < shots:
            raise ValueError(f"shots={shots}: class {c} has {of.size} examples")
        rows.append(rng.permutation(of)[:shots])
    at = np.concatenate(rows)
    return Few(data.x[at], data.y[at])


def reprogram(
    forward: Forward,
    train: Few,
    test: Few,
    *,
    size: tuple[int, int, int],
    classes: int,
    epochs: int = 100,
    learning_rate: float = 0.01,
) -> Transferred:
    """Trains a border of the input of a frozen network; the labels are mapped anew at each epoch, by frequency.

    Args:
      forward: the frozen network in evaluation mode.
      train, test: of the target task.
      size: of the network's inputs.
      classes: of the target task.
      epochs: full-batch steps of Adam.
      learning_rate: of them.
    """
    program = jnp.zeros(size)
    tx = optax.adam(learning_rate)
    state = tx.init(program)

    @jax.jit
    def step(program, state, mapping):
        def loss(program):
            logits = forward(prompted(program, train.x))[:, mapping]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, train.y))

        updates, state = tx.update(jax.grad(loss)(program), state)
        return optax.apply_updates(program, updates), state

    said = jax.jit(lambda program, x: forward(prompted(program, x)))

    def mapped(program):
        found = said(program, train.x)
        counts = np.zeros((found.shape[1], classes))
        np.add.at(counts, (np.asarray(found.argmax(axis=1)), np.asarray(train.y)), 1)
        return greedy_label_map(counts)

    for _ in range(epochs):
        program, state = step(program, state, jnp.asarray(mapped(program)))
    mapping = mapped(program)
    logits = said(program, test.x)[:, mapping]
    return Transferred(*_judge(logits, test.y), (program, mapping))


def linear_probe(
    features: Callable[[Array], Array],
    train: Few,
    test: Few,
    *,
    classes: int,
    steps: int = 300,
    learning_rate: float = 0.01,
) -> Transferred:
    """Trains a new head on the features `[n, d]` of a frozen network.

    Args:
      features: the frozen network up to its head.
      train, test, classes: of the target task.
      steps: full-batch steps of Adam.
      learning_rate: of them.
    """
    inside, outside = features(train.x), features(test.x)
    head = {"kernel": jnp.zeros((inside.shape[1], classes)), "bias": jnp.zeros(classes)}
    tx = optax.adam(learning_rate)
    say = lambda h, f: f @ h["kernel"] + h["bias"]

    def loss(head):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(say(head, inside), train.y))

    def step(carry, _):
        head, state = carry
        updates, state = tx.update(jax.grad(loss)(head), state)
        return (optax.apply_updates(head, updates), state), None

    (head, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((head, tx.init(head)))
    return Transferred(*_judge(say(head, outside), test.y), head)


def _judge(logits: Array, labels: Array) -> tuple[float, float]:
    accuracy = float(jnp.mean(logits.argmax(axis=1) == labels))
    return accuracy, calibration_error(jax.nn.softmax(logits, axis=1), labels)
