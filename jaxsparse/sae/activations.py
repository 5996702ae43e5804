"""Activations of a layer as batches of tokens: made on the fly and shuffled, or kept in an array.

activations = sae.Activations(network, "layers/3/mlp", batches)   # a stream through a buffer
stored = sae.Stored.collect(network, "layers/3/mlp", batches)     # all of them, batch(step) at random
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.sae import hooks


def _reader(network: hooks.Network, site: str, part: hooks.Part) -> Callable[[Any], Array]:
    """A compiled function from a batch to the activations of a site."""
    if isinstance(network, tuple):
        module, variables = network
        found = jax.jit(lambda v, batch: hooks.capture((module, v), site, batch, part=part))
        return lambda batch: found(variables, batch)
    graph, state = nnx.split(network)
    read = jax.jit(lambda s, batch: hooks.capture(nnx.merge(graph, s), site, batch, part=part))
    return lambda batch: read(state, batch)


def _tokens(values: Array, skip_first: int, keep: Any, site: str) -> np.ndarray:
    """`[B, T, D]` as rows, without the first positions of each sequence and those not kept."""
    found = np.asarray(values)
    if found.ndim == 3:
        found = found[:, skip_first:]
        keep = None if keep is None else np.asarray(keep)[:, skip_first:]
    elif skip_first:
        raise ValueError(
            f"skip_first={skip_first}: site {site!r} gives {found.shape}, no sequences"
        )
    rows = found.reshape(-1, found.shape[-1])
    rows = rows if keep is None else rows[np.asarray(keep, bool).reshape(-1)]
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows)).any(axis=1).sum())
        raise ValueError(
            f"site={site!r}: {bad} of {len(rows)} tokens have activations that are not finite; "
            "check the network and its precision, or leave these tokens out with keep="
        )
    return rows


class Activations:
    """Iterates over batches `[batch_size, D]` of a layer's activations, shuffled in a buffer.

    The buffer is filled from the network; half of it is handed out in random order before it is filled
    again, so that neighbouring tokens of a text part. Every iteration starts from the first batch, in
    the same order. The last tokens are handed out too; those that fill no batch are dropped.

    Args:
      network: an NNX module, or a Linen module with its variables `(module, variables)`.
      site: the path of a submodule, such as `"layers/3/mlp"`; `hooks.sites` lists them.
      batches: what the network is called with, an iterable that can be iterated again.
      batch_size: tokens of a batch.
      buffer: batches that the buffer holds, at least 2.
      skip_first: positions of each sequence that are left out. The first token of a text has activations
        that are much larger than all others, and spoils training and measures.
      keep: function of a batch to booleans `[B, T]`, False for padding; None: all.
      part: "output" or "input" of the submodule.
      seed: of the shuffling.

    Raises:
      ValueError: sizes that are not positive; when iterated: a site that does not exist (close ones are
        named), activations that are not finite, or fewer tokens than one batch.

    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
    >>> batches = [jnp.ones((4, 5, 2))] * 3
    >>> [x.shape for x in Activations(model, "layers/0", batches, batch_size=20)]
    [(20, 3), (20, 3), (20, 3)]
    """

    def __init__(
        self,
        network: hooks.Network,
        site: str,
        batches: Iterable[Any],
        *,
        batch_size: int = 4096,
        buffer: int = 16,
        skip_first: int = 0,
        keep: Callable[[Any], Any] | None = None,
        part: hooks.Part = "output",
        seed: int = 0,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("buffer", buffer, 2)):
            check_count(name, value, least)
        if skip_first < 0:
            raise ValueError(f"skip_first={skip_first}: give a number that is not negative")
        self.site, self.batches, self.batch_size = site, batches, batch_size
        self.size, self.skip_first, self.keep, self.seed = (
            buffer * batch_size, skip_first, keep, seed,
        )  # fmt: skip
        self._read = _reader(network, site, part)

    def chunks(self) -> Iterator[np.ndarray]:
        """Rows `[tokens, D]` of each batch of the network, in order."""
        for batch in self.batches:
            keep = None if self.keep is None else self.keep(batch)
            yield _tokens(self._read(batch), self.skip_first, keep, self.site)

    def __iter__(self) -> Iterator[Array]:
        rng = np.random.default_rng(self.seed)
        held: list[np.ndarray] = []
        count, given = 0, False
        for chunk in self.chunks():
            held.append(chunk)
            count += len(chunk)
            if count >= self.size:
                rows = rng.permutation(np.concatenate(held))
                out = max(len(rows) // 2 // self.batch_size, 1) * self.batch_size
                given = True
                yield from self._cut(rows[:out])
                held, count = [rows[out:]], len(rows) - out
        rows = rng.permutation(np.concatenate(held)) if held else np.zeros((0, 1))
        given = given or len(rows) >= self.batch_size
        if not given:
            raise ValueError(
                f"batch_size={self.batch_size}: the batches have {len(rows)} tokens in all; give more, "
                "or a smaller batch_size"
            )
        yield from self._cut(rows)

    def _cut(self, rows: np.ndarray) -> Iterator[Array]:
        for start in range(0, len(rows) - self.batch_size + 1, self.batch_size):
            yield jnp.asarray(rows[start : start + self.batch_size])


class Stored:
    """Activations in an array `[tokens, D]`, in memory or on disk, read at random.

    `batch(step)` is a function of the seed and the step alone: a run that goes on from a checkpoint reads
    what it would have read.

    Args:
      rows: `[tokens, D]`, such as a `numpy.memmap`.
      batch_size: tokens of a batch.
      seed: of the order; each pass over the rows has its own.

    Raises:
      ValueError: not two axes, no floats, fewer rows than one batch; of `batch`: rows that are not finite.

    >>> stored = Stored(np.arange(6.0).reshape(6, 1), batch_size=3)
    >>> sorted(float(v) for step in (0, 1) for v in stored.batch(step)[:, 0])
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(self, rows: np.ndarray, *, batch_size: int = 4096, seed: int = 0):
        if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
            raise ValueError(
                f"rows: shape {rows.shape}, dtype {rows.dtype}; give [tokens, D] of floats"
            )
        if not 1 <= batch_size <= len(rows):
            raise ValueError(f"batch_size={batch_size}: give 1 to {len(rows)}, the number of rows")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._pass, self._order = -1, np.arange(0)

    @classmethod
    def collect(
        cls,
        network: hooks.Network,
        site: str,
        batches: Iterable[Any],
        *,
        path: str | pathlib.Path | None = None,
        batch_size: int = 4096,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Runs the network over all batches once.

        Args:
          network, site, batches: as of `Activations`, and so are the `options` skip_first, keep, part.
          path: of an `.npy` file that keeps them, written through a temporary one; None: in memory.
          batch_size, seed: as of `Stored`.

        Raises:
          ValueError: as of `Activations`; no batches.
        """
        source = Activations(network, site, batches, batch_size=1, **options)
        chunks = list(source.chunks())
        if not chunks:
            raise ValueError("batches: are empty; give at least one")
        rows = np.concatenate(chunks)
        if path is not None:
            path = pathlib.Path(path)
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, rows)
            temporary.replace(path)
            rows = np.load(path, mmap_mode="r")
        return cls(rows, batch_size=batch_size, seed=seed)

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self.rows) // self.batch_size

    def batch(self, step: int) -> Array:
        """The batch of a step, `[batch_size, D]`."""
        passed, within = divmod(step, len(self))
        if passed != self._pass:
            rng = np.random.default_rng([self.seed, passed])
            self._pass, self._order = passed, rng.permutation(len(self.rows))
        chosen = self._order[within * self.batch_size : (within + 1) * self.batch_size]
        found = np.asarray(self.rows[np.sort(chosen)])
        if not np.isfinite(found).all():
            bad = np.sort(chosen)[~np.isfinite(found).all(axis=1)]
            raise ValueError(
                f"rows: {len(bad)} of {len(found)} in a batch are not finite, such as row {bad[0]}; "
                "leave these out"
            )
        return jnp.asarray(found)
