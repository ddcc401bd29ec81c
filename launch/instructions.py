"""What this host's CPU computes in hardware. Torch-free."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Linux's names of instructions that multiply bf16: x86's two, and Arm's."""


VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Of instructions that multiply bytes and add up in 32 bits. Without them bytes are added up in 16, too few."""


def multiplies_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether products in bf16 are faster than in fp32 here; True where nothing is known.

    Without such instructions each number is widened first: products take some five times as long as in fp32.
    """
    flags = flags_here(cpuinfo)
    return not flags or not BF16.isdisjoint(flags)


def multiplies_int8(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this is an x86-64 CPU that multiplies bytes (`train.precision: int8`); False where nothing is known."""
    return not VNNI.isdisjoint(flags_here(cpuinfo))


def flags_here(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """What the kernel calls the instructions of this host's CPU; empty where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    told = (line.partition(":") for line in lines)
    return next(
        (frozenset(flags.split()) for name, _, flags in told if name.strip() in ("flags", "Features")), frozenset()
    )


SLOW_BF16 = "this CPU has no instructions for bf16: products take several times as long as in fp32"
USE_FP32 = "take train.precision: auto or fp32 for what trains on such CPUs"
NO_INT8 = "this CPU has no instructions (VNNI) for products of bytes"
