"""Every implementation of every operation against what the base of the operation demands."""

import pytest
from bases import AttentionBase, BlockSparseMatmulBase, CondensedMatmulBase, NMMatmulBase

from pallas_kernels.block_sparse_attention import tpu_walk


class TestBlockSparseMatmulReference(BlockSparseMatmulBase):
    implementation = "reference"


class TestBlockSparseMatmulXLA(BlockSparseMatmulBase):
    implementation = "xla"


@pytest.mark.slow
class TestBlockSparseMatmulTPU(BlockSparseMatmulBase):
    implementation = "tpu"


@pytest.mark.slow
class TestBlockSparseMatmulGPU(BlockSparseMatmulBase):
    implementation = "gpu"


class TestNMMatmulReference(NMMatmulBase):
    implementation = "reference"


class TestNMMatmulXLA(NMMatmulBase):
    implementation = "xla"


class TestNMMatmulTPU(NMMatmulBase):
    implementation = "tpu"


@pytest.mark.slow
class TestNMMatmulGPU(NMMatmulBase):
    implementation = "gpu"


class TestCondensedMatmulReference(CondensedMatmulBase):
    implementation = "reference"


class TestCondensedMatmulXLA(CondensedMatmulBase):
    implementation = "xla"


class TestAttentionReference(AttentionBase):
    implementation = "reference"


class TestAttentionXLA(AttentionBase):
    implementation = "xla"


@pytest.mark.slow
class TestAttentionGPU(AttentionBase):
    implementation, block = "gpu", 32


@pytest.mark.slow
class TestAttentionTPU(AttentionBase):
    implementation, block = "tpu", 128

    @pytest.fixture(autouse=True)
    def small_steps(self, monkeypatch):
        """Less unrolling, so that the interpreter's compilation is short; the code is the same."""
        for name in ("CHUNK", "BACKWARD_CHUNK"):
            monkeypatch.setattr(tpu_walk, name, 256)
        for name in ("STEP", "BACKWARD_STEP"):
            monkeypatch.setattr(tpu_walk, name, 128)
