"""Channels that must go together, found in any model from one trace, and models without them."""

from jaxsparse.channels.collect import Fixed, Group, Member
from jaxsparse.channels.groups import Groups, find
from jaxsparse.channels.importance import importance
from jaxsparse.channels.prune import prune
from jaxsparse.channels.shrink import Report, Shrunk, shrink, zero, zero_invariance

__all__ = [
    "Fixed",
    "Group",
    "Groups",
    "Member",
    "Report",
    "Shrunk",
    "find",
    "importance",
    "prune",
    "shrink",
    "zero",
    "zero_invariance",
]
