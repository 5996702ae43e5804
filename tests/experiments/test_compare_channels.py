"""The study of methods on channels: equal operations for all of them, and the narrow network is what is tested."""

import jax
import pytest

from experiments.studies.compare_channels import METHODS, TASKS, Study
from jaxsparse import channels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["group_slimming", "hesso"])
def test_a_method_ends_with_the_operations_of_the_dense_network_of_the_small_size(name):
    it = Study(TASKS["mnist1d"], 0.75, steps=8)
    x, _ = it.splits["test"]
    groups = channels.find(it.wide(0), x[:1])
    tx = it.method(name, METHODS[name][1][0], groups)
    (score,), (kept,) = it.shrunk(tx, groups, [0], "validation")
    narrow = it.wide(0, share=0.25)
    assert kept == channels.find(narrow, x[:1]).flops() / groups.flops() < 0.2
    assert 0 <= score <= 100
    assert jax.eval_shape(narrow, x[:1]).shape == (1, 10)


def test_strengths_are_chosen_on_examples_that_no_run_trains_or_is_tested_on():
    splits = Study(TASKS["mnist1d"], 0.5, steps=8).splits
    rows = {
        name: {row.tobytes() for row in map(jax.device_get, x)} for name, (x, _) in splits.items()
    }
    assert [len(splits[name][1]) for name in ("train", "validation", "test")] == [3334, 666, 1000]
    assert not rows["validation"] & (rows["train"] | rows["test"])
