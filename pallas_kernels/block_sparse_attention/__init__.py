"""Block-sparse attention with per-head lists of blocks that may depend on the data."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.decode import block_sparse_decode
from pallas_kernels.block_sparse_attention.grid import Grid
from pallas_kernels.block_sparse_attention.mask import BlockMask
from pallas_kernels.block_sparse_attention.merge import merge_attention
from pallas_kernels.block_sparse_attention.ring import ring_block_sparse_attention

__all__ = [
    "BlockMask",
    "Grid",
    "block_sparse_attention",
    "block_sparse_decode",
    "merge_attention",
    "ring_block_sparse_attention",
]
