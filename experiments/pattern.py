"""The zero pattern of a run, and what changes in it from look to look."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse
from experiments import storage
from experiments.task import State
from jaxsparse.state import find_states
from jaxsparse.targets import path_name

Pattern = dict[str, jax.Array]


def of(state: State) -> Pattern:
    """Which weights are kept, by path: the masks; which blocks, of layers that are stored; without
    either, the nonzeros of matrices."""
    if (blocks := storage.kept(state.params)) is not None:
        return blocks
    if find_states(state.opt_state):
        leaves = jax.tree_util.tree_flatten_with_path(jaxsparse.get_masks(state.opt_state))[0]
        return {path_name(path): mask for path, mask in leaves}
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    return {path_name(path): p != 0 for path, p in leaves if p.ndim > 1}


def look(state: State, previous: Pattern) -> tuple[Pattern, dict[str, Any]]:
    """The pattern now, and how it differs from the previous one: counts for `numbers`."""
    pattern = of(state)
    # Sums over one axis only: the rest is added on the host, where integers do not overflow.
    count = lambda m: jnp.sum(m, axis=-1, dtype=jnp.int32)
    return pattern, {
        "kept": {name: count(m) for name, m in pattern.items()},
        "born": {name: count(m & ~previous[name]) for name, m in pattern.items()},
        "size": {name: m.size for name, m in pattern.items()},
    }


def numbers(counts: dict[str, Any]) -> dict[str, Any]:
    """What a look gives for the logs, counted on the host in integers.

    Args:
      counts: `kept`, `born` (kept now, not at the look before) and `size`, each by sparse leaf.

    Returns:
      `sparsity` and `churn` of all leaves together; `density` and `layer_churn` by leaf. Churn is the
      part of the kept weights that is new.

    >>> counts = {"kept": {"a": np.array([1, 2])}, "born": {"a": np.array([1, 0])}, "size": {"a": 12}}
    >>> numbers(counts)["sparsity"], numbers(counts)["density"]
    (0.75, {'a': 0.25})
    """
    counts = jax.tree.map(lambda x: int(np.sum(x, dtype=np.int64)), jax.device_get(counts))
    kept, born, size = counts["kept"], counts["born"], counts["size"]
    return {
        "sparsity": 1 - sum(kept.values()) / max(1, sum(size.values())),
        "density": {name: kept[name] / size[name] for name in kept},
        "churn": sum(born.values()) / max(1, sum(kept.values())),
        "layer_churn": {name: born[name] / max(1, kept[name]) for name in kept},
    }
