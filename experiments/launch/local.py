"""Starts a training run as several processes on this machine, over CPU: a pod to rehearse on.

  python -m experiments.launch.local --processes=2 --devices=4 -- \\
      --config.parallel=pmap --workdir=runs/pod

What follows `--` are the arguments of experiments.train. Each process gets virtual devices, and they
exchange data through Gloo as hosts of a cluster would. SIGTERM and Ctrl-C are handed to all. When one
process fails the rest are ended, as SLURM does with --kill-on-bad-exit.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE = 5.0  # seconds between SIGTERM and SIGKILL for the rest, when a process has failed


def start(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    devices: int,
    output: int | None = None,
) -> list[subprocess.Popen]:
    """Starts `python -m module` so many times, each told of the others; does not wait.

    Args:
      module: its program calls `hosts.initialize` with the three flags that it is given.
      arguments: further arguments, the same for all.
      processes: their number. With 1, none of the flags is given.
      devices: virtual CPU devices of each.
      output: where standard output and error go, as in `subprocess`; `None`: where this program's go.
    """
    address = f"localhost:{_free_port()}"
    started = []
    for i in range(processes):
        join = [f"--coordinator_address={address}", f"--num_processes={processes}"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments]
                + ([*join, f"--process_id={i}"] if processes > 1 else []),
                env=environment(devices),
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                text=True,
            )
        )
    return started


def environment(devices: int) -> dict[str, str]:
    """That of this process, with so many virtual CPU devices and this source tree."""
    kept = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    flags_ = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    set_ = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_, "PYTHONPATH": path}
    # Threads of XLA's pool: on few cores, devices that wait for each other can hold all of them.
    return {"NPROC": str(4 * devices)} | os.environ | set_


def wait(processes: Sequence[subprocess.Popen], timeout: float | None = None) -> int:
    """Waits for all; ends the rest when one fails, or after `timeout` seconds. Returns the code of the
    first that failed, or 0."""
    until = None if timeout is None else time.monotonic() + timeout
    while None in (codes := [p.poll() for p in processes]):
        late = until is not None and time.monotonic() > until
        if late or any(codes):
            end(processes)
            return next((code for code in codes if code), signal.SIGALRM)
        time.sleep(0.05)
    return next((code for code in codes if code), 0)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM, and SIGKILL for what is still there after a grace period: a process that waits for a
    dead one inside a collective cannot stop by itself."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + GRACE
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _show(number: int, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--devices", type=int, default=4, help="virtual devices of each process")
    parser.add_argument("arguments", nargs="*", help="after --, those of experiments.train")
    args = parser.parse_args(argv)
    if min(args.processes, args.devices) < 1:
        parser.error("at least one process, and one device of each")
    processes = start(
        "experiments.train",
        args.arguments,
        processes=args.processes,
        devices=args.devices,
        output=subprocess.PIPE,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: [p.terminate() for p in processes if p.poll() is None])
    readers = [threading.Thread(target=_show, args=pair) for pair in enumerate(processes)]
    for reader in readers:
        reader.start()
    code = wait(processes)
    for reader in readers:
        reader.join()
    if code:
        print(
            f"a process failed with code {code}; the same command goes on from the last checkpoint"
        )
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
