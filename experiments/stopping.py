"""How a run ends before its last step: a signal, or numbers that are not sound."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Diverged(RuntimeError):
    """The loss or a gradient is not finite, or the loss is larger than `config.max_loss`."""


class StopSignal:
    """SIGTERM or Ctrl-C asks for a stop at the end of a step; a second Ctrl-C interrupts at once.

    Several processes must stop at the same step, whichever of them got the signal: JAX's preemption
    service, which catches SIGTERM on each, agrees on the next step that none has passed.
    """

    def __enter__(self):
        self._received = False
        self._several = jax.process_count() > 1
        caught = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            caught = ()  # Python lets only the main thread handle signals
        self._previous = {s: signal.signal(s, self._on) for s in caught}
        return self

    def _on(self, number, frame):
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # to the preemption service

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; on several processes, to be asked at every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
