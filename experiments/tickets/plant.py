r"""Plant 'n' Seek: sparse networks that solve a task, hidden in random ones, so that there is a truth to find.

A target network is built by hand (a ReLU, a circle of four classes, a helix). Layer by layer each of its neurons
takes the place of that neuron of a random network that is most like it: with the same signs and the least
$\sum |v - c\,t|$, v the random weights, t the target's (bias and inputs, each input divided by the scale of its
neuron), $c = \langle t, v \rangle / \|t\|^2$. Its entries become c t; ReLU networks are homogeneous, so that the
planted network computes the target up to one factor per output.

(Fischer & Burkholz, Plant 'n' seek: can you find the winning ticket?, 2022.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxsparse
from experiments.task import State
from experiments.tickets.problem import Masked, Trained

Task = Literal["relu", "circle", "helix"]
Layers = list[tuple[np.ndarray, np.ndarray]]  # weights [in, out], biases [out]
BOUNDS, SLOPES = (0.2, 0.5, 0.7), (5.0, 10.0, 20.0, 40.0)


class Planted(NamedTuple):
    """A random network with a ticket in it: parameters, masks of the ticket (biases too), and what the outputs are
    divided by."""

    params: dict[str, dict[str, np.ndarray]]
    masks: dict[str, dict[str, np.ndarray]]
    scale: np.ndarray


def univariate(function: Callable[[np.ndarray], np.ndarray], knots: np.ndarray) -> Layers:
    """Two layers that interpolate a function `[n] -> [n, outputs]` between knots, linearly: neurons
    relu(x - knot), and the differences of slopes."""
    values = function(knots)
    slopes = np.diff(values, axis=0) / np.diff(knots)[:, None]
    changes = np.concatenate([slopes[:1], np.diff(slopes, axis=0)])
    first = np.ones((1, len(knots) - 1)), -knots[:-1]
    return [first, (changes, values[0])]


def _circle() -> Layers:
    """r^2 of a point by two interpolated squares, then logits that are linear in it."""
    knots = np.linspace(0, 0.8, 5)
    one = np.concatenate([[0.2], np.full(4, 0.4)])  # slopes 0.2, 0.6, ... between the knots
    first = np.zeros((2, 20))
    for axis in range(2):
        first[axis, 10 * axis : 10 * axis + 5], first[axis, 10 * axis + 5 : 10 * axis + 10] = 1, -1
    offsets = [0.0]
    for bound, a, b in zip(BOUNDS, SLOPES, SLOPES[1:]):
        offsets.append(offsets[-1] + (a - b) * bound)
    square = np.tile(one, 4)[:, None], np.zeros(1)
    return [(first, -np.tile(knots, 4)), square, (np.array([SLOPES]), np.array(offsets))]


def _helix() -> Layers:
    def curve(x):
        y = 5 * np.pi + 3 * np.pi * x
        return np.stack([y * np.cos(y), y * np.sin(y), y], axis=1) / (8 * np.pi)

    return univariate(curve, np.linspace(-1, 1, 31))


def target(task: Task, depth: int) -> Layers:
    """The network that solves a task, with layers that pass everything on where it is shallower.

    Raises:
      ValueError: an unknown task, a depth below that of the task.
    """
    made = {"relu": lambda: [(np.eye(1), np.zeros(1))] * 2, "circle": _circle, "helix": _helix}
    if task not in made:
        raise ValueError(f"task={task!r}: use one of {sorted(made)}")
    layers = made[task]()
    if depth < len(layers):
        raise ValueError(f"depth={depth}: {task!r} needs {len(layers)} layers")
    width = layers[-1][0].shape[0]
    through = [(np.eye(width), np.zeros(width))] * (depth - len(layers))
    return [*layers[:-1], *through, layers[-1]]


def plant(layers: Layers, width: int, *, seed: int = 0) -> Planted:
    """Hides a network in a random one of this width.

    Args:
      layers: the target's weights `[in, out]` and biases.
      width: of every hidden layer; at least the target's.
      seed: of the random network: weights N(0, 2/n_in), biases with the product of such factors so far.

    Returns:
      The network, and the truth.

    This differs from the authors' code in: a neuron that none is like takes the length of the one that it
    replaces, where theirs divides one weight by another, which may be near 0; and among neurons that are equally
    like it (any, where a single weight is planted) the one of largest c is taken, or scales would shrink layer by
    layer.

    Raises:
      ValueError: a width below the target's.
    """
    rng = np.random.default_rng(seed)
    widest = max(w.shape[1] for w, _ in layers[:-1])
    if width < widest:
        raise ValueError(f"width={width}: the target has layers of {widest}")
    sizes = [layers[0][0].shape[0], *[width] * (len(layers) - 1), layers[-1][0].shape[1]]
    places, scales, spread = np.arange(sizes[0]), np.ones(sizes[0]), 1.0
    params, masks = {}, {}
    for n, (w, b) in enumerate(layers):
        deviation = np.sqrt(2 / sizes[n])
        spread *= deviation
        kernel = rng.normal(size=(sizes[n], sizes[n + 1])) * deviation
        bias = rng.normal(size=sizes[n + 1]) * spread
        kept = {"kernel": np.zeros(kernel.shape, bool), "bias": np.zeros(bias.shape, bool)}
        free = np.ones(sizes[n + 1], bool)
        new_places, new_scales = np.zeros(w.shape[1], int), np.ones(w.shape[1])
        for i in range(w.shape[1]):
            used = np.flatnonzero(w[:, i])
            t = np.concatenate([[b[i]], w[used, i] / scales[used]])
            v = np.concatenate([bias[None], kernel[places[used]]])
            held = np.abs(t) > 1e-9  # a bias of 0 is no part of the ticket
            t, v = t[held], v[held]
            last = n == len(layers) - 1
            choices = np.array([i]) if last else np.flatnonzero(free)
            at, c = _closest(t, v, choices)
            free[at] = False
            kernel[places[used], at] = c * w[used, i] / scales[used]
            kept["kernel"][places[used], at] = True
            if held[0]:
                bias[at], kept["bias"][at] = c * b[i], True
            new_places[i], new_scales[i] = at, c
        places, scales = new_places, new_scales
        params[f"layer_{n}"] = {"kernel": kernel.astype("f4"), "bias": bias.astype("f4")}
        masks[f"layer_{n}"] = kept
    return Planted(params, masks, scales)


def _closest(t: np.ndarray, v: np.ndarray, choices: np.ndarray) -> tuple[int, float]:
    """The neuron that is most like t, and its scale; where none has its signs, the first, at its own length."""
    among = v[:, choices]
    c = t @ among / (t @ t)
    distance = np.abs(among - c * t[:, None]).sum(axis=0)
    fits = (np.sign(among) == np.sign(t)[:, None]).all(axis=0) & (c > 0)
    if not fits.any():
        return int(choices[0]), float(np.linalg.norm(among[:, 0]) / np.linalg.norm(t))
    near = fits & (distance <= distance[fits].min() + 1e-9)
    best = int(np.argmax(np.where(near, c, -np.inf)))  # of equally good ones the longest
    return int(choices[best]), float(c[best])


def forward(params: Any, x: Array) -> Array:
    """The network: ReLU between the layers."""
    count = len(params)
    for n in range(count):
        x = x @ params[f"layer_{n}"]["kernel"] + params[f"layer_{n}"]["bias"]
        x = jax.nn.relu(x) if n < count - 1 else x
    return x


def sample(task: Task, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and labels (circle) or values."""
    rng = np.random.default_rng(seed)
    if task == "circle":
        x = rng.uniform(-1, 1, size=(n, 2))
        return x.astype("f4"), np.searchsorted(BOUNDS, (x**2).sum(axis=1)).astype("i4")
    x = rng.uniform(-1, 1, size=(n, 1))
    y = np.maximum(x, 0)
    if task == "helix":
        z = 5 * np.pi + 3 * np.pi * x
        y = np.concatenate([z * np.cos(z), z * np.sin(z), z], axis=1) / (8 * np.pi)
    return x.astype("f4"), y.astype("f4")


def recall(found: Any, truth: Any) -> Array:
    """The part of the planted weights that masks hold."""
    both = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    hits = sum(jnp.sum(jnp.asarray(f) & jnp.asarray(t)) for f, t in both)
    return jnp.asarray(hits / sum(jnp.sum(jnp.asarray(t)) for t in jax.tree.leaves(truth)))


@dataclasses.dataclass(frozen=True, eq=False)
class PlantedProblem(Masked):
    """A planted task in the form that `experiments.tickets.rounds` trains: biases are pruned like weights.

    Args:
      task_name: "relu", "circle", "helix".
      width, depth: of the random network.
      steps: of a run, Adam at 1e-3 on batches of 32 as the authors have it.
      plants: how many random networks with a ticket; seeds choose among them.
    """

    task_name: Task
    width: int = 50
    depth: int = 5
    steps: int = 2000
    plants: int = 3
    batch_size: int = 32

    @functools.cached_property
    def planted(self) -> Planted:
        """The random networks, stacked."""
        made = [
            plant(target(self.task_name, self.depth), self.width, seed=s)
            for s in range(self.plants)
        ]
        return jax.tree.map(lambda *xs: np.stack(xs), *made)

    @functools.cached_property
    def examples(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Training and test data."""
        sizes = {"train": 4000, "test": 2000}
        return {k: sample(self.task_name, n, i) for i, (k, n) in enumerate(sizes.items())}

    @functools.cached_property
    def ones(self) -> Any:
        """Masks that keep everything, biases too."""
        return jax.tree.map(lambda x: np.ones(x.shape[1:], bool), self.planted.params)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """Adam under masks."""
        return jaxsparse.static(optax.adam(1e-3), masks=self.ones)

    def init(self, seed: Any) -> State:
        """The random network of a seed; `stats` are the scales of its outputs."""
        pick = lambda x: jnp.asarray(x)[seed % self.plants]
        params, scale = jax.tree.map(pick, self.planted.params), pick(self.planted.scale)
        return State(jnp.zeros((), jnp.int32), params, scale, self.tx.init(params))

    def loss(self, params: Any, batch: tuple[Array, Array], scale: Array) -> Array:
        """Cross entropy, or the mean squared error, of outputs divided by their scale."""
        found = forward(params, batch[0]) / scale
        if self.task_name == "circle":
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, batch[1]))
        return jnp.mean((found - batch[1]) ** 2)

    def train(
        self, state: State, order: Any, start: int, stop: int, average_from: int | None = None
    ) -> Trained:
        """As `Problem.train`, without averages over time."""
        if average_from is not None:
            raise ValueError("average_from: planted problems keep no averages over time")
        x, y = map(jnp.asarray, self.examples["train"])
        key = jax.random.key(order)

        def step(state, i):
            rows = jax.random.randint(jax.random.fold_in(key, i), (self.batch_size,), 0, x.shape[0])
            loss, grads = jax.value_and_grad(self.loss)(
                state.params, (x[rows], y[rows]), state.stats
            )
            updates, opt = self.tx.update(grads, state.opt_state, state.params)
            return State(
                state.step + 1, optax.apply_updates(state.params, updates), state.stats, opt
            ), loss

        state, losses = jax.lax.scan(step, state, jnp.arange(start, stop))
        return Trained(state, None, jnp.mean(losses[-100:]))

    def recalibrate(self, params: Any, stats: Any, order: Any = 0, batches: int = 40) -> Any:
        """The scales of the outputs, which stay: there are no norms."""
        return stats

    def evaluate(self, params: Any, stats: Any, split: str = "test") -> dict[str, Array]:
        """Accuracy (of regressions: the part of the variance that is explained) and loss."""
        x, y = map(jnp.asarray, self.examples[split])
        loss = self.loss(params, (x, y), stats)
        if self.task_name == "circle":
            accuracy = jnp.mean(jnp.argmax(forward(params, x) / stats, axis=1) == y)
        else:
            accuracy = 1 - loss / jnp.mean(jnp.var(y, axis=0))
        return {"accuracy": accuracy, "loss": loss}
