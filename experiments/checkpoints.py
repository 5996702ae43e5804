"""Checkpoints that are complete or absent, and never those of another run.

Orbax writes them (asynchronously, and atomically: a directory gets its final name when all is in it).
Next to the state, each holds the run's configuration and a fingerprint of every array. A checkpoint
that cannot be read or whose fingerprints differ is moved aside and the one before it is used; one that
belongs to another method, model or configuration is refused with the difference named.
"""

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.hosts import all_agree
from jaxsparse.targets import path_name

# What may differ between the run that wrote a checkpoint and the one that goes on from it: where it
# runs, how it reads, how often it writes.
FREE = {
    "parallel",
    "tensor",
    "data_dir",
    "reader_threads",
    "reader_processes",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_loss",
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read."""


class Checkpoints:
    """The checkpoints of one run, in `directory`."""

    def __init__(self, directory: str | pathlib.Path, config: dict[str, Any], keep: int):
        self.directory = pathlib.Path(directory).absolute()
        self.config = _plain(config)
        self.failed = False  # whether a save failed, and was told so
        self._probe_writable()
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                create=True,
                cleanup_tmp_directories=True,
            ),
        )

    def restore(self, shapes: Any) -> tuple[int, Any] | None:
        """The newest complete checkpoint as `(step, state)`, or `None` if there is none.

        Raises:
          ValueError: if it was written under another configuration; the message names each field.
          CheckpointError: if there are checkpoints, but none can be read.
        """
        unreadable = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            state, reason = self._read(step, shapes)
            if not all_agree(reason is None):  # each process reads its own parts
                unreadable.append((step, reason or "another process cannot read it"))
                continue
            for bad, why in unreadable:
                self._move_aside(bad, why, step)
            return step, state
        if unreadable:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in unreadable)
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read ({reasons}). Nothing was "
                "changed. Repair them, or give another --workdir to start afresh."
            )
        return None

    def _read(self, step, shapes):
        """`(state, None)`, or `(None, why not)`."""
        try:
            meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            meta = meta["meta"]
            self._refuse_other_run(step, meta["config"])
            restored = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            )
            _check_fingerprints(restored["state"], meta["fingerprints"])
        except OtherRunError:
            raise
        except Exception as error:  # Orbax raises many types for a damaged file
            return None, _first_line(error)
        return restored["state"], None

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Saves in the background; `wait` until it is complete.

        Raises:
          FloatingPointError: if the state has values that are not finite; it is not saved then.
          CheckpointError: if this or the last save failed.
        """
        if step in self.manager.all_steps():
            return self.wait() if wait else None
        fingerprints, finite = jax.device_get(_fingerprints(state))
        paths = [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        if not all(finite):
            bad = [path for path, ok in zip(paths, finite) if not ok]
            raise FloatingPointError(f"values that are not finite in {_some(bad)}")
        meta = {
            "step": step,
            "config": self.config,
            "fingerprints": {path: int(f) for path, f in zip(paths, fingerprints)},
        }
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error
        if wait:
            self.wait()

    def wait(self) -> None:
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error

    def latest(self) -> int | None:
        """The newest complete checkpoint."""
        return self.manager.latest_step()

    def close(self) -> None:
        """Waits for a save that is under way, and ends; a failure that was told is not told again."""
        try:
            self.manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            if not self.failed:
                raise self._failed(error) from error

    def _failed(self, error):
        self.failed = True
        self.manager.reload()
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory}: {_first_line(error)}. The last "
            f"complete one is that of step {self.latest()}. Make room; the same command goes on from it."
        )

    def _probe_writable(self):
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".probe-{jax.process_index()}"
            probe.write_text("can this be written?")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint directory {self.directory} cannot be written: {error}. Give "
                "another --workdir, or make room."
            ) from error

    def _refuse_other_run(self, step, saved):
        differences = [
            f"{key}: {old!r} in the checkpoint, {new!r} now"
            for key, old, new in _differences(saved, self.config)
            if key.split(".")[0] not in FREE
        ]
        if differences:
            raise OtherRunError(
                f"the checkpoint of step {step} in {self.directory} belongs to another run. "
                + "; ".join(differences)
                + ". Give another --workdir, or the configuration that it was started with."
            )

    def _move_aside(self, step, reason, used):
        target = self.directory.parent / "unreadable"
        if jax.process_index() == 0:
            target.mkdir(exist_ok=True)
            target /= f"{step}-{sum(1 for _ in target.iterdir())}"
            (self.directory / str(step)).rename(target)
            logging.warning(
                "the checkpoint of step %d cannot be read (%s): it was moved to %s, and that of step %d "
                "is used",
                step,
                reason,
                target,
                used,
            )
        self.manager.reload()


class OtherRunError(ValueError):
    """The checkpoint belongs to a run with another configuration."""


def _first_line(error: Exception) -> str:
    """What an error says, without the account of a reader's state that TensorStore adds to it."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0].partition(" See full TensorStore details")[0].rstrip(" .:")


def _check_fingerprints(state, saved):
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    now = jax.device_get(_fingerprints(state)[0])
    wrong = [path_name(p) for (p, _), f in zip(leaves, now) if saved.get(path_name(p)) != int(f)]
    if wrong or len(saved) != len(leaves):
        raise CheckpointError(f"contents differ from what was saved: {_some(wrong)}")


@jax.jit
def _fingerprints(state):
    """Per leaf: the sum of its bit patterns modulo 2^32, and whether all values are finite.

    The sum does not depend on the order of addition, so it is the same on any number of devices.
    """
    leaves = jax.tree.leaves(state)
    return [_bit_sum(x) for x in leaves], [jnp.all(jnp.isfinite(x)) for x in leaves]


def _bit_sum(x):
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
    if unsigned is None:  # 8-byte types split into pairs
        unsigned = jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def _differences(old, new, prefix=""):
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, a, b


def _plain(config):
    """As it comes back from JSON: tuples are lists."""
    if isinstance(config, dict):
        return {str(k): _plain(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [_plain(v) for v in config]
    return config.item() if isinstance(config, np.generic) else config


def _some(names, count=5):
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
