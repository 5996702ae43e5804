"""Trains a network with any method of jaxsparse, and writes a report.

  python -m experiments.train --workdir=runs/first
  python -m experiments.train --config=experiments/configs/digits_cnn.py \\
      --config.method=st3 --config.sparsity=0.95 --workdir=runs/st3

Without --config: RigL at 90 % on mnist1d, about a minute on two cores. Every field of the config can be
set from the command line; experiments/configs/base.py lists them with their meaning. Run the same
command again to go on where a run was stopped or killed; SIGTERM and Ctrl-C save first.

On several hosts each runs this command. Cloud TPU, SLURM and Open MPI say who the others are (Cloud TPU
with --distributed); elsewhere give --coordinator_address, --num_processes and --process_id. See
experiments/launch.
"""

import contextlib
import inspect
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from absl import logging as absl_logging
from flax import nnx
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

import jaxsparse
from experiments import datasets, models, parallel, report
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.logs import Logs
from jaxsparse.targets import path_name


@contextlib.contextmanager
def unknown_field_is_a_message():
    """ml_collections raises where a flag is defined or parsed; a user should not see a traceback."""
    try:
        yield
    except AttributeError as error:
        reason = error.args[0]
        text = " ".join(str(reason.args[0] if isinstance(reason, KeyError) else reason).split())
        sys.exit(f"error: --config has no field {text} (see configs/base.py)")


with unknown_field_is_a_message():
    CONFIG = config_flags.DEFINE_config_file(
        "config",
        os.path.join(os.path.dirname(__file__), "configs", "mnist1d_mlp.py"),
        "the experiment: a file with get_config(); set single fields with --config.field=value",
    )
WORKDIR = flags.DEFINE_string(
    "workdir",
    "runs/latest",
    "where checkpoints, metrics and the report go; on several hosts, a directory that all of them share",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "join the processes of several hosts, found by JAX where the flags below do not say; "
    "default: if one of them is given, or SLURM or Open MPI started several processes",
)
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of the first process")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "the number of this process, from 0")


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


def make_optimizer(
    config, *, seed: Any = None, sparsity: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer, and the method around it: the one line that makes a network sparse.

    `seed` and `sparsity` may be traced, for sweeps in one program; else they are the config's.
    """
    schedule = learning_rate_schedule(config)
    # Not vectors, which are biases and scales; but scalars: learned thresholds (STR) live of decay.
    matrices = lambda params: jax.tree.map(lambda p: p.ndim != 1, params)
    inner = {
        "adamw": lambda: optax.adamw(schedule, weight_decay=config.weight_decay, mask=matrices),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=matrices),
            optax.sgd(schedule, momentum=config.momentum, nesterov=True),
        ),
        "lion": lambda: optax.lion(schedule, weight_decay=config.weight_decay, mask=matrices),
        "muon": lambda: optax.contrib.muon(schedule, weight_decay=config.weight_decay),
    }
    if config.optimizer not in inner:
        raise ValueError(f"optimizer={config.optimizer!r}: choose from {', '.join(inner)}")
    method = jaxsparse.METHODS[config.method]
    options = {k: v for k, v in config.options.items() if v is not None}
    structure = config.structure
    if structure is not None:
        options["structure"] = structure
    elif "structure" in method.options:
        structure = inspect.signature(method.fn).parameters["structure"].default
    # N:M says how many zeros there are.
    fixed = jaxsparse.structures.resolve(structure).sparsity is not None
    for name, value in {
        "sparsity": None if fixed else config.sparsity if sparsity is None else sparsity,
        "total_steps": config.steps,
        "seed": config.seed if seed is None else seed,
        # Scanned layers are stacked: each has its own budget.
        "targets": [(r"^layers/.*kernel", jaxsparse.targets.stacked(1))]
        if config.model_options.get("scan_layers")
        else None,
    }.items():
        if name in method.options:
            options.setdefault(name, value)
    tx = jaxsparse.make(config.method, inner[config.optimizer](), **options)
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return optax.with_extra_args_support(tx)


def learning_rate_schedule(config) -> optax.Schedule:
    """Linear warm-up to the peak, then `config.decay` to zero at the last step; `config.cycles` times
    in equal parts of the run (rewinds, after which pruned networks recover)."""
    if config.decay not in ("cosine", "linear"):
        raise ValueError(f"decay={config.decay!r}: choose from cosine, linear")
    if not 1 <= config.cycles <= config.steps:
        raise ValueError(f"cycles={config.cycles}: must be from 1 to steps={config.steps}")
    ends = [config.steps * i // config.cycles for i in range(config.cycles + 1)]
    parts = [_cycle(config, b - a) for a, b in zip(ends, ends[1:])]
    return optax.join_schedules(parts, ends[1:-1])


def _cycle(config, steps: int) -> optax.Schedule:
    warmup = min(config.warmup_steps, steps - 1)
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)
    up = optax.linear_schedule(0.0, config.learning_rate, warmup)
    down = optax.linear_schedule(config.learning_rate, 0.0, steps - warmup)
    return optax.join_schedules([up, down], [warmup])


def prediction_entropy(logits: jax.Array) -> jax.Array:
    """The entropy of the predicted distribution in nats, `[...]` of `logits [..., classes]`: log C of a
    uniform one. Of a sparse network it goes on falling where that of a dense one has settled
    (Kuznedelev et al., Accurate neural network pruning requires rethinking sparse optimization, 2024).
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

    `axis_name` is the device axis under `jax.pmap`; otherwise the batch that a step sees is whole.
    `mesh` belongs to sharded parameters: its axis `data` shares the batch. `seed` and `sparsity` may be
    traced, for sweeps in one program. `tx` stands in place of the config's optimizer and method.
    """
    if tx is None:
        tx = make_optimizer(config, seed=seed, sparsity=sparsity)
    # Batch normalisation over the devices' batches; over each microbatch where there are such.
    norm_axis = None if config.microbatches else axis_name
    # Sharded parameters are gathered layer by layer; the batch stays where it is.
    rows = None
    if mesh is not None and not config.microbatches:
        rows = NamedSharding(mesh, PartitionSpec("data"))

    def create():
        return models.create(
            config.model,
            data.shape,
            data.num_classes,
            rngs=nnx.Rngs(jax.random.key(config.seed if seed is None else seed)),
            axis_name=norm_axis,
            rows=rows,
            **config.model_options,
        )

    graphdef, _, _ = nnx.split(nnx.eval_shape(create), nnx.Param, ...)

    def init() -> State:
        _, params, stats = nnx.split(create(), nnx.Param, ...)
        params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
        opt_state = tx.init(params)
        if jaxsparse.masking.find_states(opt_state):  # none if the method is `dense`
            params = jaxsparse.apply_masks(params, opt_state)  # sparse from the first forward pass
        return State(jnp.zeros((), jnp.int32), params, stats, opt_state)

    def apply(params, stats, x, train: bool):
        model = nnx.merge(graphdef, params, stats)
        model.train() if train else model.eval()
        logits = model(x)
        new_stats: Any = nnx.split(model, nnx.Param, ...)[2]
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

        (loss, (new_stats, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (loss, accuracy, grads), new_stats

    def over_microbatches(fn):
        """`fn(params, stats, batch)`, averaged over the microbatches of the global batch."""
        axis = axis_name if mesh is None else "data"
        mean = parallel.mean_over_microbatches(fn, config.microbatches, axis)
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
        numbers = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.global_norm(grads)}
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


def train(config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs the experiment to its end, from the last checkpoint in `workdir` if there is one.

    Returns the last evaluation.

    Raises:
      SystemExit: with code 0, after SIGTERM or Ctrl-C, when all is saved.
      ValueError: for a config that cannot be run, or a `workdir` of another run.
      Diverged: if the loss is not finite or above `config.max_loss`.
      CheckpointError: if checkpoints cannot be written or read.
    """
    with StopSignal() as stop:
        return _train(config, workdir, stop)


def _train(config, workdir, stop):
    if "://" in str(workdir):
        raise ValueError(
            f"workdir={str(workdir)!r}: must be a directory; mount the bucket (see docs/guides/pods.md)"
        )
    workdir = pathlib.Path(workdir).absolute()
    first_process = jax.process_index() == 0
    strategy = parallel.create(config)
    host = (jax.process_index(), jax.process_count())
    data = datasets.load(
        config.dataset, data_dir=config.data_dir, image_size=config.image_size, length=config.length
    )
    task = make_task(config, data, strategy.axis_name, mesh=strategy.mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", config.to_dict(), config.keep_checkpoints)

    state = strategy.init(task.init)
    restored = checkpoints.restore(strategy.saved_shape(state))
    if restored is not None:
        state = strategy.from_saved(restored[1])
    first = restored[0] if restored else 0
    train_step = strategy.compile(task.train_step, donate=True)
    eval_step = strategy.compile(task.eval_step)
    pattern_stats = jax.jit(_pattern_stats, out_shardings=(None, strategy.whole))

    def evaluate(state):
        sums = [
            eval_step(state, strategy.put(batch))
            for batch in datasets.evaluation_batches(data, config.batch_size, host=host)
        ]
        total = jax.tree.map(lambda *x: sum(float(v) for v in x), *jax.device_get(sums))
        return {k: total[k] / total["count"] for k in ("loss", "accuracy", "entropy")}

    logs = Logs(workdir, first_step=first, steps=config.steps, active=first_process)
    if first_process:
        _write_config(config, workdir)
    logs.say(
        f"{config.method} on {config.dataset} with {config.model}, {config.steps} steps; "
        + (f"resumed at step {first}" if restored else "a new run")
        + f"\n  writes to {workdir}\n  watch with: tensorboard --logdir {workdir / 'tensorboard'}"
    )

    pending, evaluation = [], None  # numbers of the steps since the last log, still on the device
    pattern = jax.jit(_pattern)(strategy.to_save(state))
    started, started_step = time.monotonic(), first

    def flush(step):
        """Logs what is pending; from here on the steps up to `step` are known to be sound."""
        nonlocal pattern, pending, started, started_step
        numbers = jax.device_get(pending)
        for i, number in enumerate(numbers):
            loss, norm = float(number["loss"]), float(number["grad_norm"])
            if not (loss <= config.max_loss and norm < float("inf")):
                at = step - len(numbers) + i + 1
                raise Diverged(
                    f"step {at} of {config.steps} (loss {loss:.4g}, |gradient| {norm:.4g})"
                )
        if numbers:
            mean = {k: sum(float(n[k]) for n in numbers) / len(numbers) for k in numbers[0]}
            pattern, counts = pattern_stats(strategy.to_save(state), pattern)
            speed = (step - started_step) / (time.monotonic() - started)
            logs.write(step, mean | report.pattern_numbers(counts) | {"steps_per_second": speed})
            logs.progress(step, f"loss {mean['loss']:.4f}")
        pending, started, started_step = [], time.monotonic(), step

    stream = datasets.batches(
        data,
        config.batch_size,
        start=first,
        stop=config.steps,
        seed=config.seed,
        host=host,
        threads=config.reader_threads,
        workers=config.reader_processes,
    )
    try:
        with jax.transfer_guard("disallow"):
            for step, batch in enumerate(stream, start=first + 1):
                state, numbers = train_step(state, strategy.put(batch))
                pending.append(numbers)
                last, stopping = step == config.steps, stop.requested(step)
                save = last or stopping or step % config.checkpoint_every == 0
                if save or step % config.log_every == 0:
                    flush(step)
                if last or step % config.eval_every == 0:
                    evaluation = evaluate(state)
                    logs.write(step, {f"eval_{k}": v for k, v in evaluation.items()})
                    logs.say(
                        f"step {step}: test accuracy {evaluation['accuracy']:.4f}, "
                        f"loss {evaluation['loss']:.4f}"
                    )
                if save:
                    checkpoints.save(step, strategy.to_save(state), wait=last or stopping)
                if stopping and not last:
                    logs.say(
                        f"stopped at step {step} and saved; the same command goes on from here"
                    )
                    logs.close()
                    checkpoints.close()
                    sys.exit(0)
    except (Diverged, FloatingPointError) as error:
        checkpoints.wait()
        good = checkpoints.latest()
        logs.close()
        raise Diverged(
            f"the run diverged: {error}. "
            + (f"The last good checkpoint is that of step {good}" if good else "No step was saved")
            + f" in {checkpoints.directory}. A lower --config.learning_rate or "
            "--config.clip_norm=1.0 may help (in another --workdir)."
        ) from error
    if evaluation is None:  # nothing was left to do
        evaluation = evaluate(state)
    logs.close()
    checkpoints.close()
    logical = parallel.to_host(strategy.to_save(state))
    if first_process:
        path = report.write(config, workdir, data, task, logical, evaluation)
        print(f"test accuracy {evaluation['accuracy']:.4f}; report: {path}")
    return evaluation


class Diverged(RuntimeError):
    """The loss or a gradient is not finite, or the loss is larger than `config.max_loss`."""


class StopSignal:
    """SIGTERM or Ctrl-C asks for a stop at the end of a step; a second Ctrl-C interrupts at once.

    Several processes must stop at the same step, whichever of them got the signal: JAX's preemption
    service, which catches SIGTERM on each, agrees on the next step that none has passed.
    """

    def __enter__(self):
        self._received = False
        self._several = jax.process_count() > 1
        caught = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            caught = ()  # Python lets only the main thread handle signals
        self._previous = {s: signal.signal(s, self._on) for s in caught}
        return self

    def _on(self, number, frame):
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # to the preemption service

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; on several processes, to be asked at every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _pattern_stats(state: State, previous):
    """The zero pattern of the sparse leaves, and counts by leaf for `report.pattern_numbers`."""
    pattern = _pattern(state)
    # Sums over one axis only: the rest is added on the host, where integers do not overflow.
    count = lambda m: jnp.sum(m, axis=-1, dtype=jnp.int32)
    return pattern, {
        "kept": {name: count(m) for name, m in pattern.items()},
        "born": {name: count(m & ~previous[name]) for name, m in pattern.items()},
        "size": {name: m.size for name, m in pattern.items()},
    }


def _pattern(state: State) -> dict[str, jax.Array]:
    """Which weights are kept, by path: the masks; without a mask anywhere, the nonzeros of matrices."""
    if jaxsparse.masking.find_states(state.opt_state):
        leaves = jax.tree_util.tree_flatten_with_path(jaxsparse.get_masks(state.opt_state))[0]
        return {path_name(path): mask for path, mask in leaves}
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    return {path_name(path): p != 0 for path, p in leaves if p.ndim > 1}


def _write_config(config, workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")


def initialize_from_flags() -> None:
    """Joins the other processes, if there are any; see `parallel.initialize`."""
    parallel.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, DISTRIBUTED.value)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not WORKDIR.value:
        raise app.UsageError("give --workdir: where checkpoints, metrics and the report go")
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        initialize_from_flags()
        train(CONFIG.value, WORKDIR.value)
    except (ValueError, Diverged, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # such as a full disk: metrics are written all the time
        sys.exit(f"error: {WORKDIR.value} cannot be written or read: {error}")


def parse_flags(argv):
    """For `app.run`."""
    with unknown_field_is_a_message():
        return app.parse_flags_with_usage(argv)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
