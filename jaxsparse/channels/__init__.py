"""Channels that must go together, found in any model from one trace, and models without them."""

from jaxsparse.channels.collect import Fixed, Group, Member
from jaxsparse.channels.depth import (
    Plan,
    add_identity,
    compress,
    dense_kernel,
    fold_batch_norm,
    merge_convolutions,
)
from jaxsparse.channels.groups import Groups, find
from jaxsparse.channels.importance import importance
from jaxsparse.channels.layers import Shallower, drop_layers
from jaxsparse.channels.losses import attention_transfer, feature_flow
from jaxsparse.channels.prune import prune
from jaxsparse.channels.shrink import Report, Shrunk, shrink, zero, zero_invariance

__all__ = [
    "Fixed",
    "Group",
    "Groups",
    "Member",
    "Plan",
    "Report",
    "Shallower",
    "Shrunk",
    "add_identity",
    "attention_transfer",
    "compress",
    "dense_kernel",
    "drop_layers",
    "feature_flow",
    "find",
    "fold_batch_norm",
    "importance",
    "merge_convolutions",
    "prune",
    "shrink",
    "zero",
    "zero_invariance",
]
