"""The engines: each one wraps an inner optimizer; methods are recipes on them."""

from jaxsparse.engines.drop_and_grow import drop_and_grow, refill, swap
from jaxsparse.engines.hold_masks import hold_masks
from jaxsparse.engines.keep_best import all_kept, keep_best, random_masks
from jaxsparse.engines.redistribute import apportion, by_layer, by_leaf
from jaxsparse.engines.setup import Setup
from jaxsparse.engines.step import Step, View, momentum
from jaxsparse.engines.straight_through import (
    Learner,
    Projection,
    refresh,
    soft_threshold_learner,
    straight_through,
    threshold_of,
)

__all__ = [
    "Learner",
    "Projection",
    "Setup",
    "Step",
    "View",
    "all_kept",
    "apportion",
    "by_layer",
    "by_leaf",
    "drop_and_grow",
    "keep_best",
    "hold_masks",
    "momentum",
    "random_masks",
    "refill",
    "refresh",
    "soft_threshold_learner",
    "straight_through",
    "swap",
    "threshold_of",
]
