"""A folder with what became of each block, so that a run that was killed goes on where it was.

Every block is one file, written under another name first: a file that has its name is whole. Activations
are not kept: a run that goes on computes them anew with the weights of the files, by the same compiled
functions, so that everything after is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.post_training._layer import Pruned
from jaxsparse.post_training.report import LayerReport

Layers = list[tuple[list[Pruned], LayerReport]]


def digest(trees: Iterable[Any]) -> str:
    """A hash of all arrays and texts of some trees: types, shapes and values."""
    found = hashlib.sha256()
    for tree in trees:
        for leaf in jax.tree.leaves(tree):
            x = np.asarray(jax.device_get(leaf))
            found.update(f"{x.dtype}{x.shape}".encode())
            found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()


class Folder:
    """The files of one run.

    Args:
      path: of the folder, which is made where there is none.
      facts: what the run is; all must be the same when it goes on.

    Raises:
      ValueError: the folder holds another run.
    """

    def __init__(self, path: str | os.PathLike, facts: Mapping[str, str]):
        self.path = pathlib.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / "run.json"
        if about.exists():
            there = json.loads(about.read_text())
            wrong = [k for k in facts if there.get(k) != facts[k]]
            if wrong:
                raise ValueError(
                    f"checkpoint={str(path)!r} holds a run with another {wrong[0]}: {there.get(wrong[0])}, not "
                    f"{facts[wrong[0]]}; give another folder"
                )
        else:
            _write(about, json.dumps(dict(facts), indent=1).encode())

    def load(self, at: int) -> Layers | None:
        """What became of block `at`; None where it was not done (or its file is broken)."""
        try:
            with np.load(self._file(at)) as file:
                about = json.loads(str(file["about"]))
                arrays: dict[str, Any] = {
                    n: jnp.asarray(file[n]) for n in file.files if n != "about"
                }
        except (FileNotFoundError, zipfile.BadZipFile, EOFError, KeyError, ValueError):
            return None
        found: Layers = []
        for i, (report, layers) in enumerate(about):
            given: list[dict[str, Any]] = [
                {f: arrays.get(f"{i}/{j}/{f}") for f in Pruned._fields} for j in range(layers)
            ]
            report["shape"] = tuple(report["shape"])
            found.append(([Pruned(**fields) for fields in given], LayerReport(**report)))
        return found

    def save(self, at: int, layers: Layers) -> None:
        """Keeps what became of block `at`."""
        arrays: dict[str, Any] = {
            f"{i}/{j}/{name}": np.asarray(value)
            for i, (found, _) in enumerate(layers)
            for j, pruned in enumerate(found)
            for name, value in pruned._asdict().items()
            if value is not None
        }
        about = [(dataclasses.asdict(report), len(found)) for found, report in layers]
        arrays["about"] = np.array(json.dumps(about))
        part = self._file(at).with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._file(at))

    def _file(self, at: int) -> pathlib.Path:
        return self.path / f"block_{at:05d}.npz"


def _write(path: pathlib.Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
