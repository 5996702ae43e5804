"""Channels that must go together, found in any model from one trace."""

from jaxsparse.channels.collect import Fixed, Group, Member
from jaxsparse.channels.groups import Groups, find

__all__ = ["Fixed", "Group", "Groups", "Member", "find"]
