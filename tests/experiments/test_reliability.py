"""Kills, several processes, and other numbers of devices, with real processes."""

import json
import signal
import subprocess
import sys

import pytest

from experiments.launch import local


def script(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("dead", [0, 1])
def test_the_launcher_ends_all_when_any_process_is_killed(dead):
    code = "import os, signal, time; os.kill(os.getpid(), signal.SIGKILL) if {} else time.sleep(60)"
    processes = [subprocess.Popen([sys.executable, "-c", code.format(i == dead)]) for i in range(2)]
    assert local.wait(processes, timeout=30) == -signal.SIGKILL
    assert all(process.returncode for process in processes)


@pytest.mark.slow
def test_killed_runs_go_on_and_end_with_the_same_bits(tmp_path):
    out = tmp_path / "kills.json"
    script(
        "experiments.reliability.kills", "--kills=6", "--steps=300", f"--workdir={tmp_path / 'kills'}",
        f"--out={out}",
    )  # fmt: skip
    results = json.loads(out.read_text())["results"]
    assert results["kills"] == 6 and results["SIGKILL"] == 3
    assert results["while a checkpoint was being written"] > 0
    assert results["failed to resume"] == results["lost checkpoints"] == 0
    assert results["final state not bitwise equal"] == 0


@pytest.mark.slow
def test_two_processes_train_stop_and_go_on_as_one(tmp_path):
    said = script(
        "experiments.launch.rehearsal", "--steps=100", f"--root={tmp_path / 'pod'}",
    )  # fmt: skip
    assert "stopped: SIGTERM to process 1, exit code 0" in said


@pytest.mark.slow
def test_masks_do_not_depend_on_the_number_of_devices_and_processes(tmp_path):
    out = tmp_path / "devices.json"
    script(
        "experiments.reliability.devices", "--methods=rigl,st3,global_magnitude", "--steps=60",
        f"--results={tmp_path / 'devices'}", f"--out={out}",
    )  # fmt: skip
    for method, settings in json.loads(out.read_text())["methods"].items():
        assert len(settings) == 3
        for setting, counts in settings.items():
            assert counts["mask entries"] > 1000
            assert counts["masks differ"] == 0, f"{method}, {setting}"
