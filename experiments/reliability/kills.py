"""Kills training runs at random moments and looks whether anything is lost.

  python -m experiments.reliability.kills --kills=30 --out=docs/results/kills.json

A run is started with the command of any user, killed at a random moment (SIGKILL and SIGTERM in turn,
every second pair while a checkpoint is being written), and started again, until it is done; then a new
one, until there were enough kills. Counted are
- runs that did not go on: the command failed, or started from nothing though a checkpoint was complete;
- lost checkpoints: one that was complete before the kill, but the run went on from an older one;
- runs whose final parameters, optimizer state or evaluations differ in a single bit from those of a run that
  was never stopped.
Exits with 1 if any of the three is not zero. --out is written after each run, and the same command goes on from
it: what is there is not done again.
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags
from absl import logging as absl_logging

from experiments.launch.local import environment
from experiments.reliability import runs

KILLS = flags.DEFINE_integer("kills", 30, "how many", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/kills", "emptied first")
STEPS = flags.DEFINE_integer("steps", 800, "steps of a whole run")
EVERY = flags.DEFINE_integer("every", 20, "steps between checkpoints")
METHOD = flags.DEFINE_string("method", "rigl", "the method")
SEED = flags.DEFINE_integer("seed", 0, "seed of the moments")
OUT = flags.DEFINE_string("out", "", "JSON file of the results")
LONGEST = 3.0  # seconds between its first word and a kill, at most: compilation is part of it
TIMEOUT = 300.0


class Run:
    """One start of the training command, and what it prints."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        arguments = [
            *runs.SMALL, f"--workdir={workdir}", f"--config.method={METHOD.value}",
            f"--config.steps={STEPS.value}", f"--config.checkpoint_every={EVERY.value}",
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *arguments],
                env=environment(1) | {"PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def resumed_at(self) -> int | None:
        """The step that it says it goes on from; 0 of a new run, `None` if it has not said."""
        found = re.search(r"resumed at step (\d+)|a new run", self.text)
        return int(found[1] or 0) if found else None

    def until(self, condition) -> bool:
        """Waits until `condition()`; `False` if the run ends first."""
        limit = time.monotonic() + TIMEOUT
        while not condition():
            if self.ended:
                return False
            if time.monotonic() > limit:
                self.process.kill()
                raise TimeoutError(f"{self.workdir} does not go on:\n{self.text}")
            time.sleep(0.002)
        return True


def interrupt(run: Run, number: int, during_save: bool, rng: random.Random) -> dict | None:
    """Kills the run; the record of it, or `None` if it was done before."""
    if not run.until(lambda: run.resumed_at is not None):
        return None
    first = len(runs.complete_steps(run.workdir))
    delay = rng.uniform(0, LONGEST)
    time.sleep(delay)
    # The first save of a process takes longest, and every later one must be as safe.
    if during_save and not run.until(lambda: runs.being_written(run.workdir)):
        return None
    time.sleep(rng.uniform(0, 0.01) if during_save else 0)
    before = runs.complete_steps(run.workdir)
    writing = runs.being_written(run.workdir)
    if run.ended:
        return None
    run.process.send_signal(number)
    code = run.process.wait(TIMEOUT)
    if number == signal.SIGKILL:
        writing = runs.being_written(run.workdir)  # what it left behind
    return {
        "signal": signal.Signals(number).name, "resumed_at": run.resumed_at, "delay": round(delay, 3),
        "code": code, "complete_before": before, "complete_after": runs.complete_steps(run.workdir),
        "while_writing": bool(writing), "new_checkpoints": len(before) - first,
    }  # fmt: skip


def clean(record: dict) -> bool:
    """Whether a kill left behind what it should: SIGTERM a run that stopped by itself with 0. Once all
    steps are saved nobody listens for it, and it ends the process at once."""
    done = STEPS.value in record["complete_before"]
    return record["code"] in (0, -signal.SIGKILL, -signal.SIGTERM if done else 0)


def one_run(workdir: pathlib.Path, done: int, reference: pathlib.Path) -> dict[str, list]:
    """Starts a run again and again until it ends, and kills it while kills are due; what was counted.

    Args:
      workdir: of the run; removed if nothing went wrong.
      done: how many kills there were before.
      reference: working directory of the run that was never stopped.
    """
    found: dict[str, list] = {"each": [], "failed": [], "lost": [], "unequal": []}
    newest, code = 0, None
    while code is None:
        run, record = Run(workdir), None
        number = done + len(found["each"])
        if number < KILLS.value:
            moment = random.Random(f"{SEED.value} {number}")
            signal_ = (signal.SIGKILL, signal.SIGTERM)[number % 2]
            record = interrupt(run, signal_, number % 4 >= 2, moment)
        if record is None:
            code = run.process.wait(TIMEOUT)  # done, or failed
        started = run.resumed_at
        if started is None or code or (record and not clean(record)):
            found["failed"].append({"workdir": str(workdir), "output": run.text[-2000:]})
            return found
        if started < newest:
            found["lost"].append({"workdir": str(workdir), "expected": newest, "started": started})
        if record is not None:
            found["each"].append(record)
            newest = max([*record["complete_after"], 0])
            if gone := set(record["complete_before"][-1:]) - set(record["complete_after"]):
                found["lost"].append({"workdir": str(workdir), "vanished": gone.pop()})
            print(f"{number + 1}: {json.dumps(record)}", flush=True)
    different = runs.differences(runs.final_arrays(reference), runs.final_arrays(workdir))
    if different or runs.evaluations(workdir) != runs.evaluations(reference):
        found["unequal"].append({"workdir": str(workdir), "arrays": different})
    else:
        shutil.rmtree(workdir)
    return found


def summary(found: dict) -> dict[str, int]:
    """The counts of everything so far."""
    count = lambda key, value: sum(kill[key] == value for kill in found["each"])
    return {
        "kills": len(found["each"]),
        "SIGKILL": count("signal", "SIGKILL"),
        "SIGTERM": count("signal", "SIGTERM"),
        "while a checkpoint was being written": count("while_writing", True),
        "runs": found["runs"],
        "failed to resume": len(found["failed"]),
        "lost checkpoints": len(found["lost"]),
        "final state not bitwise equal": len(found["unequal"]),
    }


def main(argv):
    absl_logging.set_verbosity(absl_logging.WARNING)
    root, out = pathlib.Path(WORKDIR.value), pathlib.Path(OUT.value) if OUT.value else None
    settings = {
        "method": METHOD.value,
        "steps": STEPS.value,
        "every": EVERY.value,
        "seed": SEED.value,
    }
    found = {"settings": settings, "runs": 0, "each": [], "failed": [], "lost": [], "unequal": []}
    if out and out.exists():
        found = json.loads(out.read_text())
        if found.get("settings") != settings:
            sys.exit(f"{out} is of {found.get('settings')}, not {settings}: give another --out")
        found.pop("results")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    # Programs are compiled once, not at every start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((root / "cache").absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    reference = Run(root / "reference")
    if reference.process.wait(TIMEOUT):
        sys.exit(f"the uninterrupted run failed:\n{reference.text}")
    while len(found["each"]) < KILLS.value and not found["failed"]:
        more = one_run(root / f"run{found['runs']}", len(found["each"]), reference.workdir)
        found = {**found, **{key: found[key] + more[key] for key in more}}
        found["runs"] += 1
        if out:
            out.write_text(json.dumps({"results": summary(found), **found}, indent=1) + "\n")
    results = summary(found)
    print(json.dumps(results, indent=2))
    sys.exit(1 if found["failed"] or found["lost"] or found["unequal"] else 0)


if __name__ == "__main__":
    app.run(main)
