"""Kernels that compute only with what is stored, and the formats they read: frozen dataclasses,
registered as pytrees, of floating-point values and integer places.

Independent of `jaxsparse`: use them with any JAX code.
"""

from pallas_kernels.block_scores.api import block_scores, score_blocks
from pallas_kernels.block_scores.sketch import sketch_blocks
from pallas_kernels.block_sparse_attention import (
    BlockMask,
    Grid,
    block_sparse_attention,
    block_sparse_decode,
    merge_attention,
    ring_block_sparse_attention,
)
from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.format import BlockSparse
from pallas_kernels.condensed_matmul.api import condensed_matmul, score_inputs
from pallas_kernels.condensed_matmul.format import Condensed
from pallas_kernels.nm_matmul.api import nm_matmul
from pallas_kernels.nm_matmul.format import NMSparse

__all__ = [
    "BlockMask",
    "BlockSparse",
    "Condensed",
    "Grid",
    "NMSparse",
    "block_scores",
    "block_sparse_attention",
    "block_sparse_decode",
    "block_sparse_matmul",
    "condensed_matmul",
    "merge_attention",
    "nm_matmul",
    "ring_block_sparse_attention",
    "score_blocks",
    "score_inputs",
    "sketch_blocks",
]
