"""Kernels solved anew on calibration data, which studies of narrower networks share."""

from __future__ import annotations

import numpy as np


def solve_towards(
    old: np.ndarray, gram: np.ndarray, cross: np.ndarray, damping: float
) -> np.ndarray:
    r"""$\arg\min_W \|X W - Y\|^2 + r \|W - W_{old}\|^2$, so that directions without data stay.

    Args:
      old: $W_{old}$ `[in, out]`.
      gram: $X^T X$ `[in, in]`, float64.
      cross: $X^T Y$ `[in, out]`, float64.
      damping: r as a fraction of the mean of the diagonal of `gram`.

    Returns:
      W in float32.
    """
    ridge = damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram + ridge, cross + ridge @ np.asarray(old, np.float64)).astype("f")
