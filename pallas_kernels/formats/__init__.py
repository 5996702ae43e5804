"""Storage formats: frozen dataclasses, registered as pytrees, that hold only what is not zero."""

from pallas_kernels.formats.block_sparse import BlockSparse

__all__ = ["BlockSparse"]
