"""When methods update their masks: the defaults of `begin_step`, `end_step` and `update_every`, written
once for a method's body and for `Method.resolved`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxsparse import schedules
from jaxsparse.engines import is_concrete


@dataclasses.dataclass(frozen=True)
class Timing:
    """The defaults of a method's update steps.

    Attributes:
      begin: the first update, in percent of the run; None: after `update_every` steps.
      end: the last update, in percent of the run.
      every: the interval, as a fraction (numerator, denominator) of the run; None: the method's
        `update_every` is a number.
      at_end: whether masks are updated at `end_step` whatever the interval.
      skips_start: whether there is no update at step 0, even with `begin_step=0`: of methods that rewire
        what was trained.
    """

    begin: int | None = 0
    end: int = 75
    every: tuple[int, int] | None = None
    at_end: bool = True
    skips_start: bool = False

    def updates(
        self, total_steps, begin_step=None, end_step=None, update_every=None
    ) -> schedules.Updates:
        """The update steps, checked. Warns of a `begin_step` of 0 that is passed over.

        Raises:
          ValueError: as `schedules.window`.
        """
        schedules.check_length(total_steps)
        every = self._interval(total_steps) if update_every is None else update_every
        default = every if self.begin is None else total_steps * self.begin // 100
        found = schedules.window(
            total_steps,
            begin_step,
            end_step,
            every,
            default_begin=default,
            fraction=self.end / 100,
            at_end=self.at_end,
        )
        if (
            self.skips_start
            and begin_step is not None
            and is_concrete(begin_step)
            and begin_step == 0
        ):
            warnings.warn(
                "begin_step=0: step 0 has no update: its masks are those of init, and nothing has been "
                f"trained that could be ranked; the first update is at step {every}",
                stacklevel=3,
            )
        return found

    def __call__(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of these names that a run with `options` has."""
        names = ("total_steps", "begin_step", "end_step", "update_every")
        found = self.updates(*(options.get(name) for name in names))
        values = {"begin_step": found.begin, "end_step": found.end, "update_every": found.every}
        return {name: value for name, value in values.items() if name in options}

    def _interval(self, total_steps):
        if self.every is None:
            return 1
        steps = total_steps * self.every[0] // self.every[1]
        return max(steps, 1) if is_concrete(steps) else jnp.maximum(steps, 1)


# The first update after one interval, the last one before 75 % of the run.
AFTER_ONE_INTERVAL = Timing(begin=None, at_end=False)
# So do RigL and its kin, which rewire what was trained.
REWIRING = dataclasses.replace(AFTER_ONE_INTERVAL, skips_start=True)
