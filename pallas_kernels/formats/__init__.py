"""Storage formats: frozen dataclasses, registered as pytrees, that hold only what is not zero."""

from pallas_kernels.formats.block_sparse import BlockSparse
from pallas_kernels.formats.condensed import Condensed
from pallas_kernels.formats.nm import NMSparse

__all__ = ["BlockSparse", "Condensed", "NMSparse"]
