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

The parts of a job: `fields` checks the config, `datasets` reads, `models` and `optimizer` make what `task`
trains, `parallel` places it on devices, `checkpoints` and `logs` keep what it does, `report` shows it.
"""

import contextlib
import pathlib
import sys
import time
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from experiments import datasets, fields, hosts, parallel, pattern, storage
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.logs import Logs
from experiments.report import result
from experiments.stopping import Diverged, StopSignal
from experiments.task import make_task


def train(config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs the experiment to its end, from the last checkpoint in `workdir` if there is one.

    Args:
      config: as `configs.base.get_config` makes it.
      workdir: where checkpoints, metrics and the report go; shared by all hosts.

    Returns:
      The last evaluation: `loss`, `accuracy` and `entropy` on the test split.

    Raises:
      SystemExit: with code 0, after SIGTERM or Ctrl-C, when all is saved.
      ValueError: for a config that cannot be run, or a `workdir` of another run.
      Diverged: if the loss is not finite or above `config.max_loss`.
      CheckpointError: if checkpoints cannot be written or read.
    """
    with StopSignal() as stop:
        return _train(config, workdir, stop)


def _train(config, workdir, stop):
    fields.check(config)
    if "://" in str(workdir):
        raise ValueError(
            f"workdir={str(workdir)!r}: must be a directory; mount the bucket (see docs/guides/pods.md)"
        )
    workdir = pathlib.Path(workdir).absolute()
    first_process = jax.process_index() == 0
    strategy = parallel.create(
        config.parallel,
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        tensor=config.tensor,
    )
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
    look = jax.jit(pattern.look, out_shardings=(None, strategy.whole))

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
    kept = jax.jit(pattern.of)(strategy.to_save(state))
    started, started_step = time.monotonic(), first

    def flush(step):
        """Logs what is pending; from here on the steps up to `step` are known to be sound."""
        nonlocal kept, pending, started, started_step
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
            kept, counts = look(strategy.to_save(state), kept)
            speed = (step - started_step) / (time.monotonic() - started)
            logs.write(step, mean | pattern.numbers(counts) | {"steps_per_second": speed})
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
    logical = hosts.to_host(strategy.to_save(state))
    if first_process:
        path = result.write(
            workdir,
            method=config.method,
            options=config.options,
            total_steps=config.steps,
            data=data,
            task=task,
            state=logical,
            evaluation=evaluation,
            dense=None if config.storage == "masks" else make_task(storage.dense(config), data),
        )
        print(f"test accuracy {evaluation['accuracy']:.4f}; report: {path}")
    return evaluation


def _write_config(config, workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")


def define_flags() -> None:
    """Defines the flags of the command; nothing is defined when this file is imported."""
    with unknown_field_is_a_message():
        config_flags.DEFINE_config_file(
            "config",
            str(pathlib.Path(__file__).parent / "configs" / "mnist1d_mlp.py"),
            "the experiment: a file with get_config(); set single fields with --config.field=value",
        )
    flags.DEFINE_string(
        "workdir",
        "runs/latest",
        "where checkpoints, metrics and the report go; on several hosts, a directory that all of them "
        "share",
    )
    flags.DEFINE_bool(
        "distributed",
        None,
        "join the processes of several hosts, found by JAX where the flags below do not say; "
        "default: if one of them is given, or SLURM or Open MPI started several processes",
    )
    flags.DEFINE_string("coordinator_address", None, "host:port of the first process")
    flags.DEFINE_integer("num_processes", None, "how many processes there are")
    flags.DEFINE_integer("process_id", None, "the number of this process, from 0")


@contextlib.contextmanager
def unknown_field_is_a_message():
    """ml_collections raises where a flag is defined or parsed; a user should not see a traceback."""
    try:
        yield
    except AttributeError as error:
        reason = error.args[0]
        text = " ".join(str(reason.args[0] if isinstance(reason, KeyError) else reason).split())
        sys.exit(f"error: --config has no field {text} (see configs/base.py)")


def parse_flags(argv):
    """For `app.run`."""
    with unknown_field_is_a_message():
        return app.parse_flags_with_usage(argv)


def main(argv):
    """The command, with its flags parsed."""
    given: Any = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not given.workdir:
        raise app.UsageError("give --workdir: where checkpoints, metrics and the report go")
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        hosts.initialize(
            given.coordinator_address, given.num_processes, given.process_id, given.distributed
        )
        train(given.config, given.workdir)
    except (ValueError, Diverged, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # such as a full disk: metrics are written all the time
        sys.exit(f"error: {given.workdir} cannot be written or read: {error}")


def run() -> None:
    """Runs the command; for a program that registers methods of its own first."""
    define_flags()
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
