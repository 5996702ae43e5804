"""What is said of arguments that cannot be meant: shapes of a layer and of its inputs, numbers, batches."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import _control


def check_layer(
    w: Array,
    *,
    gram: Array | None = None,
    gradients: Array | None = None,
    mask: Array | None = None,
    **moments: Array | None,
) -> None:
    """Raises `ValueError` if `w` is no matrix `[in, out]`, or what was seen of its inputs is of another layer:
    `gram` `[in, in]`, `gradients` `[samples, in, out]`, `mask` `[in, out]`, `moments` `[in]`."""
    if jnp.ndim(w) != 2:
        raise ValueError(f"w: has shape {jnp.shape(w)}; give one layer as a matrix [in, out]")
    inputs, outputs = jnp.shape(w)
    wanted: list[tuple[str, Any, str, tuple[int, ...]]] = [
        ("gram", gram, "[in, in]", (inputs, inputs)),
        ("mask", mask, "[in, out]", (inputs, outputs)),
        *((name, x, "[in]", (inputs,)) for name, x in moments.items()),
    ]
    if gradients is not None:
        samples = jnp.shape(gradients)[:1]
        shape = (*samples, inputs, outputs)
        wanted.append(("gradients", gradients, "[samples, in, out]", shape))
    for name, x, axes, shape in wanted:
        if x is not None and jnp.shape(x) != shape:
            raise ValueError(
                f"{name}: has shape {jnp.shape(x)}; for w [in, out] of shape {(inputs, outputs)} give {axes}, "
                f"here {shape}"
            )


def check_damping(damping: Any) -> None:
    """Raises `ValueError` if it is no finite number of at least 0."""
    if not _control.is_concrete(damping):
        return
    number = isinstance(damping, int | float | np.number | np.ndarray | Array)
    if not number or np.ndim(damping) or not 0.0 <= float(damping) < math.inf:
        raise ValueError(
            f"damping={damping!r}: give a fraction of the mean of the diagonal, 0 or a little more, such as 0.01"
        )


def check_pattern(argument: str, pattern: Any) -> None:
    """Raises `ValueError` if it is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{argument}={pattern!r}: give a regular expression ({error})") from None


def listed(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list.

    Raises:
      ValueError: none; one array or mapping in place of a list; a batch without a number, or with something
        that is no array.
    """
    if isinstance(batches, Mapping | str | np.ndarray | Array) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches: is one {type(batches).__name__}; give a list of batches, [batch] if there is one"
        )
    found = list(batches)
    if not found:
        raise ValueError("batches: there are none; give at least one batch of calibration data")
    for i, batch in enumerate(found):
        for leaf in jax.tree.leaves(batch):
            if isinstance(leaf, str | bytes) or np.asarray(jnp.shape(leaf)).prod() == 0:
                said = repr(leaf) if isinstance(leaf, str | bytes) else f"shape {jnp.shape(leaf)}"
                raise ValueError(
                    f"batches: number {i} holds {said}; give arrays with at least one token, as the "
                    "model is called with"
                )
    return found
