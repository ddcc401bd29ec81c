"""GPU types: what their vendor's data sheets say of memory and speed. Pure.

Sources, all by NVIDIA: H100 and H200 Tensor Core GPU data sheets, DGX B200 data sheet, A100 Tensor Core GPU data sheet,
L40S, L4, A10 and RTX A6000 data sheets, V100 and T4 data sheets, Ada GPU architecture white paper (RTX 4090). A rate
with sparsity is halved. `memory_gib` is what is left of the board's memory to processes: less the driver's part, and
with GDDR a sixteenth for error correction.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
PCIE_GB_S = {3: 16.0, 4: 32.0, 5: 64.0}
"""Of sixteen lanes in one direction, in 10^9 bytes a second (PCI-SIG)."""


@dataclass(frozen=True)
class GpuType:
    """Rates in 10^12 operations and 10^9 bytes a second."""

    name: str
    memory_gib: float
    tflops: float
    """Dense products in bf16; in fp16 where there is no bf16."""
    tflops_fp32: float
    """Products in fp32: as TF32 is off, outside of the tensor cores."""
    memory_gb_s: float
    nvlink_gb_s: float
    """To all other GPUs together, both directions; 0 where there is none."""
    pcie: int
    bf16: bool = True
    """Whether it multiplies bf16: since Ampere (CUDA C++ programming guide, compute capability 8.0)."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)


KNOWN = {
    one.name.lower(): one
    for one in (
        GpuType("B200", 178.3, 2250, 80, 8000, 1800, 5),
        GpuType("H200", 139.8, 989, 67, 4800, 900, 5),
        GpuType("H100", 79.1, 989, 67, 3350, 900, 5),
        GpuType("A100", 79.1, 312, 19.5, 2039, 600, 4),
        GpuType("A100-80GB", 79.1, 312, 19.5, 2039, 600, 4),
        GpuType("A100-40GB", 39.4, 312, 19.5, 1555, 600, 4),
        GpuType("L40S", 44.4, 362, 91.6, 864, 0, 4),
        GpuType("A6000", 47.4, 155, 38.7, 768, 112, 4),
        GpuType("A10", 22.0, 125, 31.2, 600, 0, 4),
        GpuType("A10G", 22.0, 70, 31.5, 600, 0, 4),
        GpuType("L4", 22.0, 121, 30.3, 300, 0, 4),
        GpuType("V100", 31.7, 125, 15.7, 900, 300, 3, bf16=False),
        GpuType("T4", 14.6, 65, 8.1, 320, 0, 3, bf16=False),
        GpuType("4090", 23.5, 165, 82.6, 1008, 0, 4),
    )
}


def gpu_type(name: str) -> GpuType | None:
    """The type of that name, whatever its case; None for one that is not known."""
    return KNOWN.get(name.lower())


SLOWEST = KNOWN["t4"]
"""Stands in for a type that is not known, whose speed then only orders plans."""
