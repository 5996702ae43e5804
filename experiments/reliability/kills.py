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

import argparse
import dataclasses
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

from absl import logging as absl_logging

from experiments.launch.local import environment
from experiments.reliability import runs

LONGEST = 3.0  # seconds between its first word and a kill, at most: compilation is part of it
TIMEOUT = 300.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the results: the method, the steps of a whole run and between checkpoints, and the
    seed of the moments of the kills."""

    method: str = "rigl"
    steps: int = 800
    every: int = 20
    seed: int = 0


class Run:
    """One start of the training command, and what it prints."""

    def __init__(self, workdir: pathlib.Path, settings: Settings):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        arguments = [
            *runs.SMALL,
            f"--workdir={workdir}",
            f"--config.method={settings.method}",
            f"--config.steps={settings.steps}",
            f"--config.checkpoint_every={settings.every}",
        ]
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
        "signal": signal.Signals(number).name,
        "resumed_at": run.resumed_at,
        "delay": round(delay, 3),
        "code": code,
        "complete_before": before,
        "complete_after": runs.complete_steps(run.workdir),
        "while_writing": bool(writing),
        "new_checkpoints": len(before) - first,
    }


def clean(record: dict, steps: int) -> bool:
    """Whether a kill left behind what it should: SIGTERM a run that stopped by itself with 0. Once all
    steps are saved nobody listens for it, and it ends the process at once."""
    done = steps in record["complete_before"]
    return record["code"] in (0, -signal.SIGKILL, -signal.SIGTERM if done else 0)


def one_run(
    workdir: pathlib.Path, settings: Settings, done: int, kills: int, reference: pathlib.Path
) -> dict[str, list]:
    """Starts a run again and again until it ends, and kills it while kills are due; what was counted.

    Args:
      workdir: of the run; removed if nothing went wrong.
      settings: of the run.
      done: how many kills there were before.
      kills: how many there shall be in all.
      reference: working directory of the run that was never stopped.
    """
    found: dict[str, list] = {"each": [], "failed": [], "lost": [], "unequal": []}
    newest, code = 0, None
    while code is None:
        run, record = Run(workdir, settings), None
        number = done + len(found["each"])
        if number < kills:
            moment = random.Random(f"{settings.seed} {number}")
            signal_ = (signal.SIGKILL, signal.SIGTERM)[number % 2]
            record = interrupt(run, signal_, number % 4 >= 2, moment)
        if record is None:
            code = run.process.wait(TIMEOUT)  # done, or failed
        started = run.resumed_at
        if started is None or code or (record and not clean(record, settings.steps)):
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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add, default = parser.add_argument, Settings()
    add("--kills", type=int, default=30, help="how many")
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/kills"), help="emptied first")
    add("--steps", type=int, default=default.steps, help="steps of a whole run")
    add("--every", type=int, default=default.every, help="steps between checkpoints")
    add("--method", default=default.method, help="the method")
    add("--seed", type=int, default=default.seed, help="seed of the moments")
    add("--out", type=pathlib.Path, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    args = parse(argv)
    root, out = args.workdir, args.out
    chosen = Settings(args.method, args.steps, args.every, args.seed)
    settings = dataclasses.asdict(chosen)
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

    reference = Run(root / "reference", chosen)
    if reference.process.wait(TIMEOUT):
        sys.exit(f"the uninterrupted run failed:\n{reference.text}")
    while len(found["each"]) < args.kills and not found["failed"]:
        more = one_run(
            root / f"run{found['runs']}", chosen, len(found["each"]), args.kills, reference.workdir
        )
        found = {**found, **{key: found[key] + more[key] for key in more}}
        found["runs"] += 1
        if out:
            out.write_text(json.dumps({"results": summary(found), **found}, indent=1) + "\n")
    results = summary(found)
    print(json.dumps(results, indent=2))
    sys.exit(1 if found["failed"] or found["lost"] or found["unequal"] else 0)


if __name__ == "__main__":
    main()
