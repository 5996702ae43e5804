"""Which patterns of zeros are allowed: `base` has the protocol and structures that rank units of a layer,
`transposable` N:M both ways, `coupled` units that span leaves."""

from jaxsparse.structures.base import (
    NM,
    Block,
    Channel,
    FanIn,
    Shape,
    Structure,
    Unstructured,
    parse,
    resolve,
    topk,
    unit_mask,
)
from jaxsparse.structures.coupled import Coupled, Group, MakesCoupled, Part, resolve_all
from jaxsparse.structures.transposable import TransposableNM, transposable_nm_mask

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Coupled",
    "FanIn",
    "Group",
    "MakesCoupled",
    "Part",
    "Shape",
    "Structure",
    "TransposableNM",
    "Unstructured",
    "parse",
    "resolve",
    "resolve_all",
    "topk",
    "transposable_nm_mask",
    "unit_mask",
]
