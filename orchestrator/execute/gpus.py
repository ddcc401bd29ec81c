"""The GPUs of this machine, by NVML. Not run on a GPU here: covered by a fake NVML in tests."""

from __future__ import annotations

import functools

from orchestrator.cluster.model import Gpu


@functools.cache
def local_gpus() -> tuple[Gpu, ...]:
    """GPUs in NVML's order, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID; empty without driver or GPU."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            name = name.decode() if isinstance(name, bytes) else name
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            gpus.append(Gpu(index=index, type=short_type(name), memory_bytes=memory))
        return tuple(gpus)
    finally:
        pynvml.nvmlShutdown()


def short_type(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `H100`: the word that job files use."""
    words = [word for word in name.replace("-", " ").split() if word not in ("NVIDIA", "Tesla", "GeForce", "RTX")]
    return words[0] if words else name
