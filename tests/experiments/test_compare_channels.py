"""The study of methods on channels: equal operations for all of them, and the narrow network is what is tested."""

import jax
import pytest

from experiments.studies import compare_channels
from experiments.studies.compare_channels import METHODS, TASKS, Study
from jaxsparse import channels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["group_slimming", "hesso"])
def test_a_method_ends_with_the_operations_of_the_dense_network_of_the_small_size(name):
    it = Study(TASKS["mnist1d"], 0.75, steps=8)
    x, _ = it.splits["test"]
    groups = channels.find(it.wide(0), x[:1])
    tx = it.method(name, METHODS[name][1][0], groups)
    ((score, kept),) = it.shrunk(tx, groups, [0], "validation")
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


def test_results_of_finished_runs_are_read_and_only_missing_seeds_run(tmp_path):
    finished = compare_channels.Finished(tmp_path / "new" / "rows.jsonl", {"steps": 8})
    ran = []

    def run(seeds):
        for seed in seeds:
            ran.append(seed)
            yield 90.0 + seed, 0.25

    assert finished.results(run, [0], method="hspg") == ([90.0], [0.25])
    assert finished.results(run, [1, 0], method="hspg") == ([91.0, 90.0], [0.25, 0.25])
    assert ran == [0, 1]
    finished.results(run, [0], method="ssl")
    compare_channels.Finished(finished.path, {"steps": 9}).results(run, [0], method="hspg")
    assert ran == [0, 1, 0, 0]


def test_a_run_that_is_stopped_has_written_the_seeds_before(tmp_path):
    finished = compare_channels.Finished(tmp_path / "rows.jsonl", {})

    def stopped(seeds):
        yield 90.0, 1.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finished.results(stopped, [0, 1], method="hspg")
    rest = finished.results(
        lambda seeds: iter([(50.0 + s, 1.0) for s in seeds]), [0, 1], method="hspg"
    )
    assert rest == ([90.0, 51.0], [1.0, 1.0])


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    common = ["--steps=2", "--methods=dense", f"--workdir={tmp_path}"]
    table = lambda: capsys.readouterr().out.split("| method")[1]
    compare_channels.main([*common, "--seeds=1"])
    first = table()
    assert first.count("\n| dense") == 3
    train, ran = Study.train, []

    def counted(self, tx, seeds, share=1.0):
        ran.append((share, list(seeds)))
        return train(self, tx, seeds, share)

    monkeypatch.setattr(Study, "train", counted)
    compare_channels.main([*common, "--seeds=1"])
    assert table() == first and not any(seeds for _, seeds in ran)
    ran.clear()
    compare_channels.main([*common, "--seeds=2"])
    assert ran == [(1.0, [1]), (0.25, [1]), (0.25, [1])]
