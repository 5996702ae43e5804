r"""OWL (Yin et al., Outlier weighed layerwise sparsity, ICML 2024): blocks with outliers stay denser.

D of a block is the share of its Wanda scores |w_ij| |x_i| that exceed `threshold` times their mean.
Densities are D on a scale from 0 to 2 `spread`, moved such that the mean over all weights is the one asked
for. (The authors take the mean over blocks, by which the budget is missed where blocks differ in size.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.post_training.wanda import wanda_scores

_LEAST_DENSITY = 0.01


@dataclasses.dataclass(frozen=True)
class OWL:
    """An allocation for `prune`.

    Args:
      threshold: what makes an outlier, in means of the block's scores.
      spread: the largest distance of a density from the middle; the authors use 0.08.
    """

    threshold: float = 3.0
    spread: float = 0.08

    def outliers(self, layers: Sequence[tuple[Array, Array]]) -> float:
        """The share of outliers of a block, from weights `[in, out]` and sums of squares `[in]`."""
        scores = [wanda_scores(w, squares) for w, squares in layers]
        size = sum(s.size for s in scores)
        mean = sum(float(jnp.sum(s)) for s in scores) / size
        above = sum(float(jnp.sum(s > self.threshold * mean, dtype=jnp.float32)) for s in scores)
        return above / size

    def sparsities(
        self, outliers: Sequence[float], sizes: Sequence[int], sparsity: float
    ) -> list[float]:
        """The sparsities of blocks.

        >>> [round(s, 3) for s in OWL().sparsities([1, 2, 3, 8], [5] * 4, 0.7)]
        [0.757, 0.734, 0.711, 0.597]
        """
        d, n = np.asarray(outliers, np.float64), np.asarray(sizes, np.float64)
        width = d.max() - d.min()
        scaled = (d - d.min()) / (width if width > 0 else 1.0) * 2 * self.spread
        density = scaled - np.sum(n * scaled) / n.sum() + (1 - sparsity)
        return [float(1 - max(x, _LEAST_DENSITY)) if x < 1 else 0.0 for x in density]
