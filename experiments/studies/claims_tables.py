"""What the small experiments on claims share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Rows = list[dict[str, Any]]


def percent(values: Any) -> str:
    """Mean and standard deviation in per cent."""
    x = 100 * np.asarray(values, np.float64)
    return f"{x.mean():.1f} ± {x.std(ddof=min(1, x.size - 1)):.1f}"


def stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
