"""A training problem as pure functions: state, training step, evaluation step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxsparse
from experiments import datasets, models, storage
from experiments.microbatches import mean_over_microbatches
from experiments.optimizer import make_optimizer, targets_of
from jaxsparse.state import find_states


class State(NamedTuple):
    """All that a checkpoint holds. `stats` are the running statistics of batch normalisation."""

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


class Task(NamedTuple):
    """A training problem as pure functions; see `make_task`."""

    init: Callable[[], State]
    train_step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
    eval_step: Callable[[State, Any], dict[str, jax.Array]]
    apply: Callable[..., Any]
    tx: optax.GradientTransformationExtraArgs


def prediction_entropy(logits: jax.Array) -> jax.Array:
    r"""The entropy $-\sum_c p_c \log p_c$ of the predicted distribution, in nats; $\log C$ of a uniform
    one. Of a sparse network it goes on falling where that of a dense one has settled (Kuznedelev et al.,
    Accurate neural network pruning requires rethinking sparse optimization, 2024).

    Args:
      logits: `[..., classes]`.

    Returns:
      `[...]`, float32.

    >>> float(prediction_entropy(jnp.zeros(2)).round(3))
    0.693
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def make_task(
    config,
    data: datasets.Dataset,
    axis_name: str | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    seed: Any = None,
    sparsity: Any = None,
    tx: optax.GradientTransformationExtraArgs | None = None,
) -> Task:
    """The config's training problem.

    Args:
      config: of it are read `model`, `model_options`, `storage`, `seed`, `microbatches`, `label_smoothing`, and
        the fields of `make_optimizer`.
      data: the data set; only its shapes.
      axis_name: the device axis under `jax.pmap`; `None` where the batch that a step sees is whole.
      mesh: of sharded parameters: its axis `data` shares the batch.
      seed, sparsity: may be traced, for sweeps in one program; `None` for the config's.
      tx: stands in place of the config's optimizer and method.

    Returns:
      The pure functions of the problem.

    Raises:
      ValueError: a model or a method that cannot be made so.
    """
    # Batch normalisation over the devices' batches; over each microbatch where there are such.
    norm_axis = None if config.microbatches else axis_name
    # Sharded parameters are gathered layer by layer; the batch stays where it is.
    rows = None
    if mesh is not None and not config.microbatches:
        rows = NamedSharding(mesh, PartitionSpec("data"))

    wrt = storage.wrt(config)

    def create():
        rngs = nnx.Rngs(jax.random.key(config.seed if seed is None else seed))
        model = models.create(
            config.model,
            data.shape,
            data.num_classes,
            rngs=rngs,
            axis_name=norm_axis,
            rows=rows,
            **config.model_options,
        )
        return (
            model
            if config.storage == "masks"
            else storage.store_layers(
                model,
                config,
                rngs,
                rows,
                axis_name=norm_axis,
                targets=targets_of(config.options.get("targets"), models.stacked(model)),
            )
        )

    shapes = nnx.eval_shape(create)
    graphdef, _, _ = nnx.split(shapes, wrt, ...)
    if tx is None:
        stacked = models.stacked(shapes)
        tx = make_optimizer(config, stacked=stacked, seed=seed, sparsity=sparsity)

    def init() -> State:
        _, params, stats = nnx.split(create(), wrt, ...)
        params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
        opt_state = tx.init(params)
        if find_states(opt_state):  # none if the method is `dense`
            params = jaxsparse.apply_masks(params, opt_state)  # sparse from the first forward pass
        return State(jnp.zeros((), jnp.int32), params, stats, opt_state)

    def apply(params, stats, x, train: bool):
        model = nnx.merge(graphdef, params, stats)
        model.train() if train else model.eval()
        logits = model(x)
        new_stats: Any = nnx.split(model, wrt, ...)[2]
        return logits, nnx.to_pure_dict(new_stats)

    def losses(logits, labels):
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        targets = optax.smooth_labels(targets, config.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets), jnp.argmax(logits, -1) == labels

    def gradient(params, stats, batch, parts=1):
        """Loss, accuracy and gradient as means over the batch, divided by `parts`."""

        def loss_fn(params):
            logits, new_stats = apply(params, stats, batch["x"], train=True)
            loss, correct = losses(logits, batch["y"])
            return jnp.mean(loss) / parts, (new_stats, jnp.mean(correct) / parts)

        (loss, (new_stats, accuracy)), grads = storage.value_and_grad(loss_fn)(params)
        return (loss, accuracy, grads), new_stats

    def over_microbatches(fn):
        """`fn(params, stats, batch)`, averaged over the microbatches of the global batch."""
        axis = axis_name if mesh is None else "data"
        mean = mean_over_microbatches(fn, config.microbatches, axis)
        if mesh is None:
            return mean
        whole, parts = PartitionSpec(), PartitionSpec("data")
        return jax.shard_map(
            mean, mesh=mesh, in_specs=(whole, whole, parts), out_specs=whole, check_vma=False
        )

    def mean_gradient(params, stats, batch):
        if config.microbatches:
            return over_microbatches(gradient)(params, stats, batch)
        if axis_name is None:
            return gradient(params, stats, batch)
        # The sum of shares, not the mean of sums: that is one more pass over all gradients, which an
        # update of the masks makes XLA write to memory.
        shares, stats = gradient(params, stats, batch, lax.axis_size(axis_name))
        return lax.psum(shares, axis_name), stats

    def train_step(state: State, batch):
        (loss, accuracy, grads), stats = mean_gradient(state.params, state.stats, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        numbers = {"loss": loss, "accuracy": accuracy, "grad_norm": storage.gradient_norm(grads)}
        return State(state.step + 1, params, stats, opt_state), numbers

    def eval_sums(params, stats, batch):
        logits, _ = apply(params, stats, batch["x"], train=False)
        loss, correct = losses(logits, batch["y"])
        rows = batch["weight"].reshape(-1, *[1] * (loss.ndim - 1))
        return {
            "loss": jnp.sum(loss * rows),
            "accuracy": jnp.sum(correct * rows),
            "entropy": jnp.sum(prediction_entropy(logits) * rows),
            "count": jnp.sum(jnp.broadcast_to(rows, loss.shape)),
        }

    def eval_step(state: State, batch):
        if config.microbatches:  # means instead of sums: only their ratios to `count` are used
            return over_microbatches(eval_sums)(state.params, state.stats, batch)
        sums = eval_sums(state.params, state.stats, batch)
        return sums if axis_name is None else lax.psum(sums, axis_name)

    return Task(init, train_step, eval_step, apply, tx)
