"""The engines: each one wraps an inner optimizer; methods are recipes on them."""

from jaxsparse._control import is_concrete, when
from jaxsparse.engines._checks import check_inner, is_placeholder
from jaxsparse.engines.anchored import (
    Changes,
    anchored,
    changes,
    restore,
    restore_seeded,
    save_seeded,
)
from jaxsparse.engines.drop_and_grow import drop_and_grow, random_start, refill, swap
from jaxsparse.engines.hold_masks import hold_masks
from jaxsparse.engines.keep_best import all_kept, keep_best, keep_best_units, random_masks
from jaxsparse.engines.learn_scores import keep_scored, nan_moves, score_learner, unless_nan
from jaxsparse.engines.penalties import L1, GroupLasso, Penalty, Sum, add_penalty, penalized
from jaxsparse.engines.proximal import followed_by, project_after, proximal
from jaxsparse.engines.redistribute import apportion, by_layer, by_leaf
from jaxsparse.engines.rewind import rewind
from jaxsparse.engines.scale_by_age import scale_by_age
from jaxsparse.engines.selective_decay import selective_decay
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
from jaxsparse.engines.units import Units, group_setup

__all__ = [
    "Changes",
    "GroupLasso",
    "L1",
    "Learner",
    "Penalty",
    "Projection",
    "Setup",
    "Step",
    "Sum",
    "Units",
    "View",
    "add_penalty",
    "all_kept",
    "anchored",
    "apportion",
    "by_layer",
    "by_leaf",
    "changes",
    "check_inner",
    "drop_and_grow",
    "followed_by",
    "group_setup",
    "keep_best",
    "keep_best_units",
    "keep_scored",
    "hold_masks",
    "is_concrete",
    "is_placeholder",
    "momentum",
    "nan_moves",
    "penalized",
    "project_after",
    "proximal",
    "random_masks",
    "random_start",
    "refill",
    "refresh",
    "restore",
    "restore_seeded",
    "rewind",
    "save_seeded",
    "scale_by_age",
    "score_learner",
    "selective_decay",
    "soft_threshold_learner",
    "straight_through",
    "swap",
    "threshold_of",
    "unless_nan",
    "when",
]
