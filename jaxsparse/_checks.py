"""Checks of arguments that rooms share: what is traced passes, for its value is not known."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxsparse._control import is_concrete


def check_count(
    name: str,
    value: Any,
    least: int = 1,
    most: int | None = None,
    *,
    limit: str = "",
    arrays: bool = False,
) -> Any:
    """The value of an argument that counts something, a Python integer if it is one of NumPy.

    Args:
      name: of the argument.
      value: what was given for it.
      least: the smallest that is right.
      most: the largest; None: any.
      limit: the name of what `most` is, where it has one.
      arrays: whether arrays of integers are right too.

    Raises:
      ValueError: a value that is known and is no integer, or out of range. `True` is none.

    >>> check_count("k", 9, most=8, limit="d_sae")
    Traceback (most recent call last):
    ValueError: k=9: give an integer from 1 to d_sae=8
    """
    if not is_concrete(value):
        return value
    known = np.asarray(value)  # not jnp: under `jit` its results would be traced
    alone = isinstance(value, int | np.integer)
    inside = known.dtype.kind in "iu" and (known >= least).all()
    if (alone or arrays) and inside and (most is None or (known <= most).all()):
        return int(value) if alone else value
    end = f"{limit}={most}" if limit else most
    span = f"of at least {least}" if most is None else f"from {least} to {end}"
    raise ValueError(f"{name}={value!r}: give an integer {span}")
