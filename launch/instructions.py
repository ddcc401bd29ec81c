"""What this host's CPU computes in hardware. Torch-free."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Linux's names of instructions that multiply bf16: x86's two, and Arm's."""


def multiplies_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether products in bf16 are faster than in fp32 here; True where nothing is known.

    Without such instructions each number is widened first: products take some five times as long as in fp32.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    for line in lines:
        name, _, told = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not BF16.isdisjoint(told.split())
    return True


SLOW_BF16 = "this CPU has no instructions for bf16: products take several times as long as in fp32"
USE_FP32 = "take train.precision: auto or fp32 for what trains on such CPUs"
