"""jaxsparse: sparse neural networks in JAX by changing one line.

    tx = jaxsparse.rigl(optax.adamw(1e-3), sparsity=0.9, total_steps=10_000)

A method wraps any optax optimizer; after every `optax.apply_updates` the parameters are exactly
sparse. The method is the outermost transformation: what clips, scales or decays goes inside of it, as in
`rigl(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), ...)`; after it, it would change
the updates that make weights exactly 0 (`check` finds that out). `METHODS` lists the methods, `make` builds one by name. The axes that methods are made of are
modules of their own: `structures`, `scores`, `allocations`, `schedules`, `targets`, `selection`,
`masking`.
"""

from typing import TYPE_CHECKING

from jaxsparse import allocations, masking, schedules, scores, selection, state, structures, targets
from jaxsparse._version import __version__
from jaxsparse.analysis.summary import Summary, summarize
from jaxsparse.initial import minimum_threshold, preserve_flow, rescale_fan_in, score_ratios
from jaxsparse.methods import *  # noqa: F403 - METHODS, make, and every method
from jaxsparse.methods import __all__ as _methods
from jaxsparse.post_training.one_shot import prune
from jaxsparse.state import apply_masks, check, get_masks, get_raw_params
from jaxsparse.structures.transposable import transposable_nm_mask

if TYPE_CHECKING:  # what `__getattr__` imports, for editors
    from jaxsparse import analysis as analysis
    from jaxsparse import attention as attention
    from jaxsparse import channels as channels
    from jaxsparse import coding as coding
    from jaxsparse import nn as nn
    from jaxsparse import sae as sae
    from jaxsparse import testing as testing
    from jaxsparse import tickets as tickets
    from jaxsparse.nn import compact as compact
    from jaxsparse.nn import stored as stored

__all__ = [
    *_methods,
    "Summary",
    "__version__",
    "allocations",
    "apply_masks",
    "check",
    "get_masks",
    "get_raw_params",
    "masking",
    "minimum_threshold",
    "preserve_flow",
    "prune",
    "rescale_fan_in",
    "schedules",
    "score_ratios",
    "scores",
    "selection",
    "state",
    "structures",
    "summarize",
    "targets",
    "transposable_nm_mask",
]


def __getattr__(name: str):
    """Modules that are imported on first use, so that `import jaxsparse` stays light."""
    import importlib

    if name in ("analysis", "attention", "channels", "coding", "nn", "sae", "testing", "tickets"):
        return importlib.import_module(f"jaxsparse.{name}")
    if name in ("compact", "stored"):
        return getattr(importlib.import_module("jaxsparse.nn"), name)
    raise AttributeError(f"module 'jaxsparse' has no attribute {name!r}")
