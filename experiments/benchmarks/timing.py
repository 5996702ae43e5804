"""Timing on a shared machine: candidates take turns, and medians are compared."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def medians(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median seconds of each candidate over interleaved rounds, by the wall clock unless another
    `clock` is given (`time.process_time`: seconds of all cores, which a loaded machine disturbs less).

    Candidates that together take more than `seconds` are run in fewer rounds, three at least.
    """
    for run in candidates.values():  # compile, and warm up
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for i in range(rounds):
        for name, run in candidates.items():
            t = clock()
            jax.block_until_ready(run())
            times[name].append(clock() - t)
        if i >= 2 and time.perf_counter() - start > seconds:
            break
    return {name: float(np.median(t)) for name, t in times.items()}


def machine() -> str:
    """One line on what was measured on."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {cores} cores{load}"
