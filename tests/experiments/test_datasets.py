"""Data sets are prepared offline, and the stream of batches is a function of its position."""

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import images


@pytest.mark.parametrize(
    ("name", "train", "test", "shape"),
    [("digits", 1497, 300, (8, 8, 1)), ("mnist1d", 4000, 1000, (40, 1))],
)
def test_offline_data_sets_have_the_documented_counts(data_dir, name, train, test, shape):
    data = datasets.load(name, data_dir=data_dir)
    assert (data.num_examples("train"), data.num_examples("test")) == (train, test)
    assert data.shape == shape and data.num_classes == 10
    batch = next(iter(datasets.batches(data, 16, stop=1)))
    assert batch["x"].shape == (16, *shape) and batch["x"].dtype == np.float32
    assert batch["y"].min() >= 0 and batch["y"].max() < 10


def test_mnist1d_is_standardised_and_balanced(data_dir):
    data = datasets.load("mnist1d", data_dir=data_dir)
    x = np.stack([data.splits["train"][i]["signal"] for i in range(4000)])
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    labels = np.bincount([data.splits["train"][i]["label"] for i in range(4000)])
    assert labels.min() > 350


@pytest.mark.slow
def test_stdlib_text_is_text_whose_targets_are_the_next_characters(data_dir):
    data = datasets.load("stdlib_text", data_dir=data_dir, length=64)
    batch = next(iter(datasets.batches(data, 4, stop=1)))
    assert batch["x"].shape == batch["y"].shape == (4, 64)
    np.testing.assert_array_equal(batch["x"][:, 1:], batch["y"][:, :-1])
    assert batch["x"].max() < data.num_classes == 128
    assert data.num_examples("train") > 8 * data.num_examples("test") > 0
    whole = "".join(chr(c) for i in range(40) for c in data.splits["train"][i]["tokens"])
    assert "def " in whole


def stream(data, **options):
    return [b["x"] for b in datasets.batches(data, 48, **options)]


def test_the_stream_depends_on_the_position_only(data_dir):
    data = datasets.load("digits", data_dir=data_dir)
    whole = stream(data, stop=70)  # more than two epochs
    np.testing.assert_array_equal(stream(data, start=40, stop=70, threads=1), whole[40:])


def test_an_epoch_holds_every_example_once_and_epochs_differ_in_order(data_dir):
    data = datasets.load("digits", data_dir=data_dir)
    labels = lambda start: np.concatenate(
        [b["y"] for b in datasets.batches(data, 499, start=start, stop=start + 3)]
    )
    first, second = labels(0), labels(3)
    assert sorted(first) == sorted(second) and list(first) != list(second)


def test_hosts_read_the_rows_of_one_global_batch(data_dir):
    data = datasets.load("digits", data_dir=data_dir)
    parts = [stream(data, stop=3, host=(i, 3)) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), stream(data, stop=3))


def test_evaluation_sees_each_example_once_whatever_the_batch(data_dir):
    data = datasets.load("digits", data_dir=data_dir)
    for size in (64, 300, 512):
        weights = [b["weight"].sum() for b in datasets.evaluation_batches(data, size)]
        assert sum(weights) == 300


def test_crops_keep_the_size_and_depend_on_the_generator_only():
    photo = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    assert images.center(photo, 32).shape == (32, 32, 3)
    crop = lambda seed: images.augment(photo, 32, np.random.default_rng(seed))
    assert crop(0).shape == (32, 32, 3)
    np.testing.assert_array_equal(crop(1), crop(1))
    assert (crop(1) != crop(2)).any()


def test_digits_with_one_channel_are_never_flipped():
    image = np.zeros((16, 16, 1), np.uint8)
    image[:, 12:] = 255
    for seed in range(20):
        assert images.augment(image, 16, np.random.default_rng(seed))[:, :8].sum() == 0


def test_a_batch_that_does_not_divide_over_the_hosts_is_refused(data_dir):
    data = datasets.load("digits", data_dir=data_dir)
    with pytest.raises(ValueError, match="batch_size=10 does not divide over 3 hosts"):
        datasets.batches(data, 10, stop=1, host=(0, 3))


def test_text_of_a_length_that_is_not_there_is_refused(data_dir):
    with pytest.raises(ValueError, match="length=300: must be between 1 and 256"):
        datasets.load("stdlib_text", data_dir=data_dir, length=300)
