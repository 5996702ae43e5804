"""The types of arguments that many functions share, in the signatures of methods.

An array stands beside a number where a value may be traced: one compilation then serves a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jax import Array

from jaxsparse.allocations import AllocationLike
from jaxsparse.schedules import Schedule
from jaxsparse.structures import MakesCoupled, Structure
from jaxsparse.targets import Targets

Scalar = float | int | np.number | Array
"""A real number; may be traced."""

StepCount = int | np.integer | Array
"""A number of optimizer steps, counted from 0; may be traced."""


ScalarOrSchedule = Scalar | Schedule
"""A number, or a function of the step."""

Seed = int | np.integer | Array
"""Of random choices: an integer; may be traced."""

StructureLike = Structure | str | Mapping[str, Structure | str | None] | MakesCoupled | None
"""Which patterns of zeros are allowed: a structure, its text ("2:4"), None for any, a mapping from
path patterns to these, or the groups that `channels.find` returns."""

GroupsLike = MakesCoupled | Structure | None
"""What lives and dies together: the groups that `channels.find` returns, a structure, or None: every
output channel of a leaf by itself."""

__all__ = [
    "AllocationLike",
    "GroupsLike",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "Seed",
    "StepCount",
    "StructureLike",
    "Targets",
]
