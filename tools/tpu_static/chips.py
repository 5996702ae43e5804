"""Public figures of TPUs, per TensorCore (as in jax's TpuInfo)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore.

    Attributes:
      gen: the generation, as topologies name it.
      cores: of the chip.
      mxus: matrix units.
      mxu: their side.
      rows: of a product that a unit takes in a cycle.
      clock: in hertz; of v7x it is inferred from the peak.
      hbm: bytes per second that a core can have.
      vmem: bytes.
      granule: bytes of a DMA granule in the listings.
    """

    gen: str
    cores: int
    mxus: int
    mxu: int
    rows: int
    clock: float
    hbm: float
    vmem: int
    granule: int = 32

    @property
    def macs_per_cycle(self) -> int:
        """Products of bfloat16 that a core can add in a cycle.

        >>> CHIPS["TPU v5 lite"].macs_per_cycle
        65536
        """
        return self.rows * self.mxu**2 * self.mxus


# By the device kind that JAX reports.
CHIPS = {
    "TPU v4": Chip("v4", 2, 4, 128, 1, 1.05e9, 1.23e12 / 2, 16 << 20, granule=512),
    "TPU v5 lite": Chip("v5e", 1, 4, 128, 1, 1.5e9, 8.2e11, 128 << 20),
    "TPU v5": Chip("v5p", 2, 4, 128, 1, 1.75e9, 2.46e12 / 2, 64 << 20),
    "TPU v6 lite": Chip("v6e", 1, 2, 256, 2, 1.75e9, 1.64e12, 128 << 20),
    "TPU7x": Chip("v7x", 2, 2, 256, 2, 2.2e9, 7.4e12 / 2, 64 << 20),
}
DMA_LATENCY_S = 0.44e-6  # fitted, see the docstring of the package
