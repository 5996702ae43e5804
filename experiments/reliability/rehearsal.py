"""Rehearses a pod on this machine: `make pod-rehearsal`.

  python -m experiments.reliability.rehearsal --root=runs/rehearsal

1. Trains on 2 processes with 4 virtual devices each, to the end.
2. The same, but one process is killed (SIGKILL) on the way; the launcher ends the other; the same command
   goes on from the last complete checkpoint.
3. The same, but one process gets SIGTERM: both save at the same step and exit with 0; again it goes on.
4. The same on 1 process with 8 devices.

`--runs` chooses among 2 to 4. With the gradients added in one fixed order (`--config.microbatches=8`), all must
end with the same bits: parameters, optimizer state, masks and evaluations; the killed run and the one process
also with the same losses in metrics.jsonl. Exits with 1 if they do not.
"""

import argparse
import os
import pathlib
import shutil
import signal
import sys
import time

from absl import logging as absl_logging

from experiments.launch import local
from experiments.reliability import runs

NAMES = ("killed", "stopped", "one_process")
TIMEOUT = 600.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what follows `--` goes to the training job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--root", default="runs/rehearsal", type=pathlib.Path, help="of the runs; emptied first")
    add("--steps", type=int, default=300, help="steps of training, at least 40")
    add("--every", type=int, default=25, help="steps between checkpoints")
    add(
        "--runs",
        action="append",
        choices=NAMES,
        help="a run to compare with the uninterrupted one; may be repeated; default: all",
    )
    add("--parallel", default="pmap", choices=("pmap", "fsdp"), help="the strategy")
    add("arguments", nargs="*", help="after --, further arguments of experiments.train")
    args = parser.parse_args(argv)
    if args.steps < 40:
        parser.error(f"--steps={args.steps}: two checkpoints must fit in, so at least 40")
    args.runs = args.runs or list(NAMES)
    return args


def main(argv: list[str] | None = None) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    args = parse(argv)
    root = args.root
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    # Without fused multiply-add, whose use depends on what XLA fuses: see microbatches.py.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX".strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((root / "cache").absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    def launch(name, processes=2):
        log = (root / f"{name}.log").open("a")
        arguments = [
            *runs.SMALL,
            *args.arguments,
            f"--workdir={root / name}",
            f"--config.parallel={args.parallel}",
            f"--config.steps={args.steps}",
            f"--config.checkpoint_every={args.every}",
            "--config.microbatches=8",
        ]
        return local.start(
            "experiments.train",
            arguments,
            processes=processes,
            devices=8 // processes,
            output=log.fileno(),
        )

    def finish(name, **options):
        code = local.wait(launch(name, **options), timeout=TIMEOUT)
        if code:
            sys.exit(f"{name} failed with code {code}:\n{(root / f'{name}.log').read_text()}")

    def interrupt(name, number):
        """Sends a signal to process 1 when two checkpoints are complete; the code of the launch."""
        processes, until = launch(name), time.monotonic() + TIMEOUT
        while len(runs.complete_steps(root / name)) < 2 and time.monotonic() < until:
            if any(p.poll() is not None for p in processes):
                sys.exit(f"{name} ended early:\n{(root / f'{name}.log').read_text()}")
            time.sleep(0.02)
        processes[1].send_signal(number)
        code = local.wait(processes, timeout=TIMEOUT)
        print(f"{name}: {signal.Signals(number).name} to process 1, exit code {code}, ", end="")
        print(f"complete checkpoints {runs.complete_steps(root / name)}", flush=True)
        return code

    finish("uninterrupted")
    print("uninterrupted: done", flush=True)
    failures = []
    if "killed" in args.runs and not interrupt("killed", signal.SIGKILL):
        failures.append("a killed process was not noticed")
    if "stopped" in args.runs and interrupt("stopped", signal.SIGTERM):
        failures.append("SIGTERM to one process did not end both with 0")
    reference = runs.final_arrays(root / "uninterrupted")
    for name in args.runs:
        finish(name, processes=1 if name == "one_process" else 2)
        unequal = runs.differences(reference, runs.final_arrays(root / name))
        lines = runs.evaluations if name == "stopped" else runs.metrics
        same_lines = lines(root / "uninterrupted") == lines(root / name)
        print(
            f"{name}: {len(reference) - len(unequal)} of {len(reference)} arrays bitwise equal, "
            f"metrics {'equal' if same_lines else 'differ'}"
        )
        if unequal or not same_lines:
            failures.append(f"{name} differs from the uninterrupted run: {unequal or 'metrics'}")
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
