"""Kernels that compute only with what is stored, and the formats they read.

Independent of `jaxsparse`: use them with any JAX code.
"""

from pallas_kernels.block_sparse_attention import (
    BlockMask,
    block_sparse_attention,
    merge_attention,
)
from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul
from pallas_kernels.formats import BlockSparse

__all__ = [
    "BlockMask",
    "BlockSparse",
    "block_sparse_attention",
    "block_sparse_matmul",
    "merge_attention",
]
