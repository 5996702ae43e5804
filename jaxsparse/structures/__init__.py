"""Which patterns of zeros are allowed: `base` has the protocol and the structures of one leaf."""

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
from jaxsparse.structures.transposable import transposable_nm_mask

__all__ = [
    "NM",
    "Block",
    "Channel",
    "FanIn",
    "Shape",
    "Structure",
    "Unstructured",
    "parse",
    "resolve",
    "topk",
    "transposable_nm_mask",
    "unit_mask",
]
