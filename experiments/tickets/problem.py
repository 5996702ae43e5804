"""A small training problem as pure functions of a state that holds its masks: what drivers of rounds need.

All that a step depends on is in the state (weights, statistics of norms, slots and schedule of the optimizer,
the number of the step) or follows from it (the batch, from the number of the step and a seed of the order). A
state that is put back is therefore a run that is rewound, schedule and data included.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jaxsparse
from experiments import datasets
from experiments.optimizer import INNER, learning_rate_schedule
from experiments.studies.compare import make_config, on_device
from experiments.task import State, make_task
from jaxsparse import leaves, masking


class Trained(NamedTuple):
    """A state, the mean of the parameters over the last steps where asked for, and the mean loss."""

    state: State
    mean: Any
    loss: Array


class Trains(Protocol):
    """What drivers ask of a problem: `Problem`, or `experiments.tickets.plant.PlantedProblem`."""

    @property
    def steps(self) -> int: ...
    @property
    def ones(self) -> Any: ...
    def init(self, seed: Any) -> State: ...
    def with_masks(self, state: State, masks: Any) -> State: ...
    def train(
        self, state: State, order: Any, start: int, stop: int, average_from: int | None = None
    ) -> Trained: ...
    def evaluate(self, params: Any, stats: Any, split: str = "test") -> dict[str, Array]: ...
    def recalibrate(self, params: Any, stats: Any, order: Any = 0, batches: int = 40) -> Any: ...


class Masked:
    """A problem whose optimizer is `jaxsparse.static`: the state holds the masks."""

    def masks(self, state: State) -> Any:
        """The masks of a state, None at dense leaves."""
        return jaxsparse.get_masks(state.opt_state)

    def with_masks(self, state: State, masks: Any) -> State:
        """The state with other masks, and with zeros where they have them."""
        opt: Any = state.opt_state
        return state._replace(
            params=masking.apply(state.params, masks), opt_state=opt._replace(masks=masks)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Problem(Masked):
    """A data set in memory, a model, an optimizer under masks; made by `make_problem`.

    Functions take one run; `jax.vmap` makes many of them.

    Attributes:
      config: as of the training job.
      data: the data set; only its shapes.
      splits: "train" and "test", on the device.
      tx: the optimizer inside of `jaxsparse.static`, whose masks the state holds.
      ones: masks that keep everything.
    """

    config: Any
    data: datasets.Dataset
    splits: dict[str, dict[str, Array]]
    tx: optax.GradientTransformationExtraArgs
    ones: Any

    @functools.cached_property
    def task(self):
        """The pure functions of the training job."""
        return make_task(self.config, self.data, tx=self.tx)

    @property
    def steps(self) -> int:
        """The length of a run."""
        return self.config.steps

    def init(self, seed: Any) -> State:
        """A dense network at step 0, with initial weights of this seed."""
        return make_task(self.config, self.data, seed=seed, tx=self.tx).init()

    def train(
        self, state: State, order: Any, start: int, stop: int, average_from: int | None = None
    ) -> Trained:
        """Steps `start` to `stop` on batches in the order of the seed `order`.

        Args:
          state: at step `start`.
          order: a seed of the order of the data.
          start, stop: numbers of steps.
          average_from: the first step whose parameters enter the mean (stochastic weight averaging).
        """
        size, batch_size = self.splits["train"]["y"].shape[0], self.config.batch_size
        per_epoch, key = size // batch_size, jax.random.key(order)
        shuffled = lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), size)
        swa = average_from is not None

        def step(carry, i):
            state, rows, mean = carry
            position = i % per_epoch
            rows = lax.cond(position == 0, lambda: shuffled(i // per_epoch), lambda: rows)
            chosen = lax.dynamic_slice_in_dim(rows, position * batch_size, batch_size)
            batch = jax.tree.map(lambda x: x[chosen], self.splits["train"])
            state, numbers = self.task.train_step(state, batch)
            if swa:
                n = jnp.maximum(i - average_from + 1, 0).astype(jnp.float32)
                part = jnp.where(n > 0, 1 / jnp.maximum(n, 1), 0.0)
                mean = jax.tree.map(lambda a, p: a + part * (p - a), mean, state.params)
            return (state, rows, mean), numbers["loss"]

        first = state, shuffled(start // per_epoch), state.params if swa else None
        (state, _, mean), losses = lax.scan(step, first, jnp.arange(start, stop))
        return Trained(state, mean, jnp.mean(losses[-per_epoch:]))

    def evaluate(self, params: Any, stats: Any, split: str = "test") -> dict[str, Array]:
        """Accuracy, loss and predictions on a whole split."""
        x, y = self.splits[split]["x"], self.splits[split]["y"]
        logits, _ = self.task.apply(params, stats, x, train=False)
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        found = jnp.argmax(logits, -1)
        return {"accuracy": jnp.mean(found == y), "loss": jnp.mean(loss), "predictions": found}

    def recalibrate(self, params: Any, stats: Any, order: Any = 0, batches: int = 40) -> Any:
        """The statistics of norms that the parameters have on training batches; those of an average of models
        are not the average of theirs."""
        if not jax.tree.leaves(stats):
            return stats
        size, batch_size = self.splits["train"]["y"].shape[0], self.config.batch_size
        key = jax.random.key(order)

        def step(stats, i):
            rows = jax.random.choice(jax.random.fold_in(key, i), size, (batch_size,))
            return self.task.apply(params, stats, self.splits["train"]["x"][rows], train=True)[
                1
            ], None

        return lax.scan(step, stats, jnp.arange(batches))[0]

    def loss(
        self, params: Any, batch: tuple[Array, Array], stats: Any = None, temperature: float = 1.0
    ) -> Array:
        """The mean loss of a batch `(x, y)` in evaluation mode, as scores before training take it; logits are
        divided by `temperature`."""
        logits, _ = self.task.apply(
            params, stats if stats is not None else {}, batch[0], train=False
        )
        logits = logits.astype(jnp.float32) / temperature
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def make_problem(
    dataset: str = "mnist1d",
    model: str = "mlp",
    *,
    constant_from: int | None = None,
    constant_rate: float = 1e-3,
    **changes: Any,
) -> Problem:
    """A problem of `experiments.studies.compare`, dense, with fields of its config changed.

    Args:
      dataset, model: by name.
      constant_from: the step from which the learning rate is constant, for averages of weights.
      constant_rate: that rate.
      **changes: fields of the config: `steps=600`, `learning_rate=2e-3`, `model_options={"hidden": (64,)}`.
    """
    config: Any = make_config(dataset, model)
    with config.unlocked():
        config.update(changes)
        config.method = "dense"
    data = datasets.load(config.dataset, data_dir=config.data_dir)
    splits = {split: on_device(data, split) for split in ("train", "test")}
    rate = learning_rate_schedule(
        config.learning_rate, config.steps, warmup_steps=config.warmup_steps, decay=config.decay
    )
    if constant_from is not None:
        rate = optax.join_schedules([rate, optax.constant_schedule(constant_rate)], [constant_from])
    inner = INNER[config.optimizer](
        rate, weight_decay=config.weight_decay, momentum=config.momentum
    )
    params = jax.eval_shape(make_task(config, data).init).params
    sparse = leaves.find(params)
    ones = sparse.scatter([np.ones(leaf.shape, bool) for leaf in sparse])
    return Problem(config, data, splits, jaxsparse.static(inner, masks=ones), ones)
