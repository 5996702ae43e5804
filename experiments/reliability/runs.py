"""What the scripts of this folder share: reading what a run has left behind."""

import json
import pathlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import logs

SMALL = (  # a second or two of training on the digits
    "--config=experiments/configs/digits_mlp.py",
    "--config.batch_size=64",
    "--config.options.update_every=10",
    "--config.eval_every=100",
    "--config.log_every=25",
    "--config.warmup_steps=20",
)


def complete_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that have their final name."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def being_written(workdir: pathlib.Path) -> list[str]:
    """Directories of checkpoints that are not complete (yet)."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return [name for name in names if re.match(r"\d+\.orbax-checkpoint-tmp", name)]


def final_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint by path, in this host's memory."""
    path = workdir.absolute() / "checkpoints" / str(complete_steps(workdir)[-1]) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(path).item_metadata.tree
        # To NumPy: the devices that wrote it may not be here.
        to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return flat(reader.restore(path, restore_args=to_host))


def flat(tree, path: str = "") -> dict[str, np.ndarray]:
    """The leaves of nested dictionaries and lists, by path."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        parts = [flat(value, f"{path}/{key}" if path else str(key)) for key, value in items]
        return {key: value for part in parts for key, value in part.items()}
    return {} if tree is None else {path: np.asarray(tree)}


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, int]:
    """How many entries of each array have other bits; `{}` if the two are bitwise equal."""
    if a.keys() != b.keys():
        return {path: -1 for path in a.keys() ^ b.keys()}
    bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(x.size, -1)
    unequal = {path: int(np.any(bits(a[path]) != bits(b[path]), axis=1).sum()) for path in a}
    return {path: n for path, n in unequal.items() if n}


def metrics(workdir: pathlib.Path) -> list[str]:
    """The lines of metrics.jsonl, without the speed."""
    lines = logs.read(workdir / "metrics.jsonl")
    return [json.dumps({k: v for k, v in x.items() if k != "steps_per_second"}) for x in lines]


def evaluations(workdir: pathlib.Path) -> list[str]:
    """Those of evaluations. The mean of the loss between two lines is cut in two where a run was
    stopped by SIGTERM; these are not."""
    return [line for line in metrics(workdir) if "eval_loss" in line]
