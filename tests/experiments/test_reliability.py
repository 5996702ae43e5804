"""Kills, several processes, and other numbers of devices, with real processes."""

import json
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from flax import nnx

from experiments import hosts, models, parallel
from experiments.configs import base
from experiments.datasets import Dataset
from experiments.launch import local
from experiments.task import make_task


def script(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("dead", [0, 1])
def test_the_launcher_ends_all_when_any_process_is_killed(dead):
    code = "import os, signal, time; os.kill(os.getpid(), signal.SIGKILL) if {} else time.sleep(60)"
    processes = [subprocess.Popen([sys.executable, "-c", code.format(i == dead)]) for i in range(2)]
    assert local.wait(processes, timeout=30) == -signal.SIGKILL
    assert all(process.returncode for process in processes)


class Normalised(nnx.Module):
    """Batch normalisation and a linear layer."""

    def __init__(self, shape, classes, *, rngs, axis_name, rows):
        self.norm = nnx.BatchNorm(shape[0], momentum=0.9, axis_name=axis_name, rngs=rngs)
        self.head = nnx.Linear(shape[0], classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


@pytest.mark.parametrize("strategy", ["none", "pmap", "fsdp"])
def test_batch_normalisation_sees_a_microbatch_and_its_statistics_are_means(monkeypatch, strategy):
    monkeypatch.setattr(models, "create", lambda name, *args, **kwargs: Normalised(*args, **kwargs))
    c: Any = base.get_config()
    c.method, c.parallel, c.batch_size, c.microbatches = "dense", strategy, 16, 8
    data = Dataset("vectors", {}, lambda record, rng: dict(record), (8,), 10, False)
    x = np.random.default_rng(0).normal(np.arange(16)[:, None], size=(16, 8)).astype(np.float32)
    place = parallel.create(strategy, batch_size=16, microbatches=8)
    task = make_task(c, data, place.axis_name, mesh=place.mesh)
    state, batch = place.init(task.init), place.put({"x": x, "y": np.zeros(16, np.int32)})
    state, _ = place.compile(task.train_step, donate=True)(state, batch)
    found = hosts.to_host(place.to_save(state)).stats["norm"]
    pieces = x.reshape(8, 2, 8)
    np.testing.assert_allclose(found["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * pieces.var(1).mean(0), rtol=1e-5)


@pytest.mark.slow
def test_killed_runs_go_on_and_end_with_the_same_bits(tmp_path):
    out = tmp_path / "kills.json"
    script(
        "experiments.reliability.kills",
        "--kills=4",
        "--steps=200",
        f"--workdir={tmp_path / 'kills'}",
        f"--out={out}",
    )
    results = json.loads(out.read_text())["results"]
    assert results["kills"] == 4 and results["SIGKILL"] == 2
    assert results["while a checkpoint was being written"] > 0
    assert results["failed to resume"] == results["lost checkpoints"] == 0
    assert results["final state not bitwise equal"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy, run", [("pmap", "stopped"), ("fsdp", "killed")])
def test_two_processes_train_are_interrupted_and_go_on_to_the_same_bits(tmp_path, strategy, run):
    said = script(
        "experiments.reliability.rehearsal",
        "--steps=40",
        "--every=10",
        f"--parallel={strategy}",
        f"--runs={run}",
        f"--root={tmp_path / 'pod'}",
    )
    assert f"{run}: {'SIGTERM' if run == 'stopped' else 'SIGKILL'} to process 1" in said
    assert "arrays bitwise equal, metrics equal" in said


@pytest.mark.slow
def test_masks_do_not_depend_on_the_number_of_devices_and_processes(tmp_path):
    out = tmp_path / "devices.json"
    script(
        "experiments.reliability.devices",
        "--methods=st3",
        "--steps=40",
        f"--results={tmp_path / 'devices'}",
        f"--out={out}",
    )
    for method, settings in json.loads(out.read_text())["methods"].items():
        assert len(settings) == 3
        for setting, counts in settings.items():
            assert counts["mask entries"] > 1000
            assert counts["masks differ"] == 0, f"{method}, {setting}"
