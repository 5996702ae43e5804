"""The folder of a run in rounds: numbers of every round, and the arrays that the next one needs."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def save_tree(path: pathlib.Path, tree: Any) -> None:
    """Writes the leaves of a tree of arrays; the file is there whole, or not at all."""
    arrays: dict[str, Any] = {
        f"{i:05d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))
    }
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    os.replace(part, path)


def load_tree(path: pathlib.Path, like: Any) -> Any:
    """The tree that was saved, in the structure of `like`.

    Raises:
      ValueError: other leaves than `like` has.
    """
    leaves, treedef = jax.tree.flatten(like)
    with np.load(path) as found:
        arrays = [found[name] for name in sorted(found.files)]
    shapes = [(np.shape(x), np.asarray(x).dtype) for x in leaves]
    if [(a.shape, a.dtype) for a in arrays] != shapes:
        raise ValueError(f"{path}: it holds the state of another model or optimizer")
    return treedef.unflatten([jnp.asarray(a) for a in arrays])


def save(
    folder: pathlib.Path | None, facts: Mapping[str, Any], rows: Sequence[Any], tree: Any
) -> None:
    """Writes the rounds so far (named tuples) and what the next one needs; without a folder nothing.

    Args:
      folder: made if it is not there.
      facts: what another run would differ in.
      rows: one for each round.
      tree: arrays.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    last = len(rows) - 1
    save_tree(folder / f"level_{last}.npz", tree)
    text = json.dumps({"facts": facts, "levels": [row._asdict() for row in rows]}, indent=1)
    part = folder / "rounds.part.json"
    part.write_text(text + "\n")
    os.replace(part, folder / "rounds.json")
    for old in range(last):  # the last state is enough to go on
        (folder / f"level_{old}.npz").unlink(missing_ok=True)


def load(folder: pathlib.Path | None, facts: Mapping[str, Any], row: type, like: Any):
    """The rounds so far and the arrays of the last; no rounds and None if there is nothing yet.

    Raises:
      ValueError: a folder of another run.
    """
    file = None if folder is None else folder / "rounds.json"
    if file is None or not file.exists():
        return [], None
    saved = json.loads(file.read_text())
    if saved["facts"] != facts:
        raise ValueError(
            f"{file} holds a run with {saved['facts']}, not {facts}; give another folder"
        )
    found = [row(**values) for values in saved["levels"]]
    return found, load_tree(file.parent / f"level_{len(found) - 1}.npz", like)
