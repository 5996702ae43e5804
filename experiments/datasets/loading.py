"""From a data set's name to batches of NumPy arrays: TFDS stores, Grain reads ahead.

The stream of training examples is a pure function of (data set, seed, position): batch `i` holds the
examples `i * batch_size` to `(i + 1) * batch_size` of an endless sequence that is shuffled anew each
epoch. Each host reads its own contiguous rows of every batch. So the position of a run is one integer,
and it means the same on any number of hosts and reading threads.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import functools
import importlib
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

OFFLINE = ("digits", "mnist1d", "stdlib_text")
IN_MEMORY_BYTES = 1 << 28  # records of smaller splits are kept once they are read

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as the training job sees it.

    Attributes:
      name: name in TFDS.
      splits: `train` and `test`, random access to raw records.
      prepare: `(record, rng) -> {"x": ..., "y": ...}`, one example; `rng` is `None` in evaluation.
      shape: shape of one example's `x`.
      num_classes: number of classes (size of the vocabulary for text).
      is_text: whether `x` is tokens and `y` the next tokens.
      augments: whether `prepare` uses an `rng` in training.
    """

    name: str
    splits: Mapping[str, Sequence[Mapping[str, Any]]]
    prepare: Callable[[Mapping[str, Any], np.random.Generator | None], Batch]
    shape: tuple[int, ...]
    num_classes: int
    is_text: bool = False
    augments: bool = False

    def num_examples(self, split: str) -> int:
        return len(self.splits[split])

    def arrays(self, split: str) -> Batch:
        """A whole split as evaluation sees it, stacked: for data sets that fit in memory.

        Raises:
          ValueError: for a split that there is not.
        """
        if split not in self.splits:
            raise ValueError(f"split={split!r}: {self.name} has {', '.join(self.splits)}")
        source = self.splits[split]
        examples = [self.prepare(source[i], None) for i in range(len(source))]
        return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def load(
    name: str, *, data_dir: str | None = None, image_size: int | None = None, length: int = 256
) -> Dataset:
    """Opens a data set, preparing it first if it is not there.

    Args:
      name: `digits`, `mnist1d`, `stdlib_text`, or an image data set of TFDS.
      data_dir: where TFDS keeps its files; `None` is its default, `~/tensorflow_datasets`.
      image_size: images are brought to this size; needed if a data set has images of many sizes.
      length: characters per example of `stdlib_text`, at most 256.

    Raises:
      ValueError: for a name that neither this folder nor TFDS knows, or a bad `length`.
    """
    builder = _prepared_builder(name, data_dir)
    # imagenet2012's test split has no labels.
    test = next(s for s in ("validation", "test") if s in builder.info.splits)
    splits = {"train": _source(builder, "train"), "test": _source(builder, test)}
    if name == "stdlib_text":
        if not 1 <= length <= 256:
            raise ValueError(f"length={length}: must be between 1 and 256")

        def characters(record, rng):
            tokens = record["tokens"][: length + 1].astype(np.int32)
            return {"x": tokens[:-1], "y": tokens[1:]}

        return Dataset(name, splits, characters, (length,), 128, is_text=True)
    features: Any = builder.info.features
    x_key = next((k for k in ("image", "signal") if k in features), None)
    if x_key is None or "label" not in features:
        raise ValueError(
            f"dataset={name!r} has features {sorted(features)}: the training job reads "
            "data sets with 'image' and 'label'"
        )
    num_classes = features["label"].num_classes
    if name in OFFLINE:
        scale = 16.0 if name == "digits" else 1.0
        shape = features[x_key].shape

        def plain(record, rng):
            return {
                "x": np.asarray(record[x_key], np.float32) / scale,
                "y": np.int32(record["label"]),
            }

        return Dataset(name, splits, plain, shape, num_classes)
    *spatial, channels = features["image"].shape
    size = image_size or spatial[0]
    if size is None:
        raise ValueError(f"dataset={name!r} has images of many sizes: set image_size, such as 224")
    from experiments.datasets.images import augment, center

    def image(record, rng):
        pixels = record["image"]
        pixels = center(pixels, size) if rng is None else augment(pixels, size, rng)
        # Symmetric range; data sets' own means and deviations are within a few per cent of this.
        return {"x": (pixels.astype(np.float32) - 127.5) / 64.0, "y": np.int32(record["label"])}

    return Dataset(name, splits, image, (size, size, channels), num_classes, augments=True)


def batches(
    data: Dataset,
    batch_size: int,
    *,
    start: int = 0,
    stop: int,
    seed: int = 0,
    host: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
) -> Iterator[Batch]:
    """This host's rows of the training batches `start` to `stop`.

    Args:
      data: the data set.
      batch_size: rows of the global batch.
      start: the position in the data: the number of batches that the run has used already.
      stop: the number of batches of the whole run.
      seed: seed of order and augmentation.
      host: `(index, count)` of this host; each gets `batch_size / count` contiguous rows.
      threads: reading threads.
      workers: reading processes, for decoding that the threads cannot keep up with.

    Raises:
      ValueError: if the batch does not divide over the hosts, or is larger than the training split.
    """
    index, count = host
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} does not divide over {count} hosts")
    if not 0 < batch_size <= data.num_examples("train"):
        raise ValueError(
            f"batch_size={batch_size}: must be between 1 and the "
            f"{data.num_examples('train')} examples of {data.name}"
        )
    rows = batch_size // count
    source = data.splits["train"]

    def batch(i: int) -> Batch:
        positions = range(i * batch_size + index * rows, i * batch_size + (index + 1) * rows)
        records = _records(source, [_shuffled(seed, p, len(source)) for p in positions])
        rngs = [np.random.default_rng((seed, p)) if data.augments else None for p in positions]
        return _stack([data.prepare(record, rng) for record, rng in zip(records, rngs)])

    stream = grain.MapDataset.range(start, stop).map(batch)
    iterator = stream.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=2 * threads))
    if workers:
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(iterator)


def evaluation_batches(
    data: Dataset, batch_size: int, *, host: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The whole test split in order, in batches of one size: the last is padded, `weight` is 0 there."""
    index, count = host
    rows = batch_size // count
    source = data.splits["test"]
    for first in range(0, len(source), batch_size):
        positions = np.arange(first + index * rows, first + (index + 1) * rows)
        weight = (positions < len(source)).astype(np.float32)
        records = _records(source, [int(p) for p in np.minimum(positions, len(source) - 1)])
        yield _stack([data.prepare(r, None) for r in records]) | {"weight": weight}


class _Cached(Sequence):
    """Records of a small split, kept from the first time they are read."""

    def __init__(self, source):
        self._source = source
        self._records = {}

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        if i not in self._records:
            self._records[i] = self._source[i]
        return self._records[i]


def _source(builder, split):
    source = builder.as_data_source(split=split)
    small = builder.info.splits[split].num_bytes <= IN_MEMORY_BYTES
    return _Cached(source) if small else source


@functools.lru_cache(maxsize=2)  # a batch can span two epochs
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def _shuffled(seed: int, position: int, size: int) -> int:
    epoch, i = divmod(position, size)
    return int(_epoch_order(seed, epoch, size)[i])


def _records(source, indices):
    if hasattr(source, "__getitems__"):
        return source.__getitems__(indices)
    return [source[i] for i in indices]


def _stack(examples: Sequence[Batch]) -> Batch:
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _prepared_builder(name: str, data_dir: str | None):
    if name in OFFLINE:
        importlib.import_module(f"experiments.datasets.{name}")  # registers itself with TFDS
    elif name.split("/")[0] not in tfds.list_builders(with_community_datasets=False):
        known = [*OFFLINE, *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.5) or OFFLINE
        raise ValueError(
            f"dataset={name!r} is not known; close matches: {', '.join(close)} "
            f"(without a network: {', '.join(OFFLINE)})"
        )
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    directory = pathlib.Path(builder.data_dir)
    if not (directory / "dataset_info.json").exists():
        with _lock(directory.parent):
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            try:
                with _silence() if name in OFFLINE else contextlib.nullcontext():
                    builder.download_and_prepare()
            except (ImportError, RuntimeError) as error:
                if name in OFFLINE or "tensorflow" not in str(error).lower():
                    raise
                raise ValueError(
                    f"dataset={name!r}: TFDS needs TensorFlow to prepare this data set (once; not "
                    "to read it). In any environment with tensorflow and tensorflow-datasets run: "
                    f"tfds build {name} --file_format=array_record --data_dir={directory.parents[1]}"
                ) from error
    return builder


@contextlib.contextmanager
def _silence():
    """Without TFDS's account of a download, where there is nothing to download."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    tfds.enable_progress_bar()


@contextlib.contextmanager
def _lock(directory: pathlib.Path):
    """Lets one of several processes on a machine prepare, while the others wait for it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
