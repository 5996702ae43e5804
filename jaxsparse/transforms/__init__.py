"""The engines: each one wraps an inner optimizer; methods are recipes on them."""

from jaxsparse.transforms._common import Step, View, momentum
from jaxsparse.transforms.drop_and_grow import drop_and_grow, refill, swap
from jaxsparse.transforms.masked import masked
from jaxsparse.transforms.prune import keep_best
from jaxsparse.transforms.redistribute import apportion, by_layer, by_leaf
from jaxsparse.transforms.straight_through import (
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
    "Step",
    "View",
    "apportion",
    "by_layer",
    "by_leaf",
    "drop_and_grow",
    "keep_best",
    "masked",
    "momentum",
    "refill",
    "refresh",
    "soft_threshold_learner",
    "straight_through",
    "swap",
    "threshold_of",
]
