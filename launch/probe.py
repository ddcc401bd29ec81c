"""`python -m launch.probe`: whether this node computes, remembers, stores and sends what it should.

Each check compares with what is known beforehand, so a wrong bit is found; speeds are told, and nothing fails for
them. Stdout ends with one line of JSON: {"checks": [{"name", "ok", "told", "value", "unit"}]}. Exit status 1 if one
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SIZE = 1024
"""Rows of the matrices that are multiplied."""
LARGEST = 8
"""Their whole numbers are at most that: sums of SIZE products are exact in fp32, and in what makes them up in TF32."""
MATMUL_S = 1.5
MEMORY_SHARE = 0.5
"""Of what is free."""
MEMORY_BYTES = 1 << 30
"""At most so much of the host's."""
DISK_BYTES = 64 << 20
SENT_BYTES = 16 << 20
ROUNDS = 4
PATIENCE_S = 120.0
"""For a neighbour."""
PATTERNS = (0x5555555555555555, -0x5555555555555556, 0, -1)


@dataclass(frozen=True)
class Check:
    """What came of one."""

    name: str
    ok: bool
    told: str
    value: float | None = None
    unit: str | None = None


class Wrong(Exception):
    """Something came out otherwise than it must."""


def devices() -> list[torch.device]:
    """The CPU, and every GPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def matmul(device: torch.device) -> tuple[str, float, str]:
    """Products of whole numbers, again and again, against what a product with a vector gives without them (Freivalds).

    Raises:
        Wrong: one differs.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-LARGEST, LARGEST + 1, (SIZE, SIZE), generator=generator) for _ in range(2))
    vector = torch.randint(-LARGEST, LARGEST + 1, (SIZE,), generator=generator)
    known = left @ (right @ vector)
    a, b = (whole.to(device, torch.float32) for whole in (left, right))
    first, count, began = a @ b, 0, time.monotonic()
    if not torch.equal(first.to("cpu", torch.int64) @ vector, known):
        raise Wrong("a product of two matrices is wrong")
    while (took := time.monotonic() - began) < MATMUL_S or not count:
        if not torch.equal(a @ b, first):  # waits for the GPU, too
            raise Wrong("the same product is another one than before")
        count += 1
    return f"{count} products of {SIZE} x {SIZE}, all right", 2 * SIZE**3 * count / took / 1e9, "GFLOP/s"


def memory(device: torch.device) -> tuple[str, float, str]:
    """Write patterns into much of what is free, and read them back.

    Raises:
        Wrong: something else is read.
    """
    count = _free_bytes(device) // 8
    words = torch.empty(count, dtype=torch.int64, device=device)
    began = time.monotonic()
    for pattern in PATTERNS:
        words.fill_(pattern)
        if not bool((words == pattern).all()):
            raise Wrong(f"memory does not keep what is written: {int((words != pattern).sum())} words differ")
    took = time.monotonic() - began
    return f"{8 * count >> 20} MiB keep what is written", 8 * count * len(PATTERNS) / took / 1e9, "GB/s"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    import psutil

    return min(MEMORY_BYTES, int(psutil.virtual_memory().available * MEMORY_SHARE))


def disk(directory: Path) -> tuple[str, float, str]:
    """Write a file to the disk, and read it back from there.

    Raises:
        Wrong: something else is read.
        OSError: it cannot be written.
    """
    data = torch.randint(0, 256, (DISK_BYTES,), dtype=torch.uint8).numpy().tobytes()
    with tempfile.TemporaryFile(dir=directory) as stream:
        began = time.monotonic()
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        took = time.monotonic() - began
        with contextlib.suppress(OSError):  # not everywhere
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        stream.seek(0)
        if hashlib.sha256(stream.read()).digest() != hashlib.sha256(data).digest():
            raise Wrong(f"what was written in {directory} is read back as something else")
    return f"{DISK_BYTES >> 20} MiB written and read back in {directory}", DISK_BYTES / took / 1e6, "MB/s"


def all_reduce(rank: int, size: int, address: str, port: int) -> tuple[str, float, str]:
    """Sum vectors with neighbours, of which everybody knows the sum.

    Raises:
        Wrong: it is another one.
        RuntimeError: a neighbour does not answer.
    """
    device = devices()[-1]
    backend = "nccl" if device.type == "cuda" else "gloo"
    where = f"tcp://{address}:{port}"
    dist.init_process_group(
        backend, init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S)
    )
    try:
        count = SENT_BYTES // 4
        own = torch.arange(count, dtype=torch.float32, device=device).remainder_(1 << 12)
        took = 0.0
        for turn in range(ROUNDS):
            sent = own * (rank + 1) + turn
            dist.barrier()
            began = time.monotonic()
            dist.all_reduce(sent)
            right = torch.equal(sent, own * (size * (size + 1) // 2) + size * turn)  # waits for the GPU, too
            took += time.monotonic() - began
            if not right:
                raise Wrong("the sum over the neighbours is wrong")
    finally:
        dist.destroy_process_group()
    return f"{ROUNDS} sums of {SENT_BYTES >> 20} MiB, all right", SENT_BYTES * ROUNDS / took / 1e9, "GB/s"


def ecc(device: torch.device) -> str | None:
    """What a GPU counts of errors that it could not correct since its driver was loaded; None without such a count."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        kind, since = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        count = pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, since)
    except Exception:  # no NVML, or a GPU without ECC: each has its own error, and none says that the GPU is bad
        return None
    if count:
        raise Wrong(f"{count} errors of its memory could not be corrected")
    return "no error of its memory was uncorrectable"


def alone(directory: Path) -> Iterator[Check]:
    """The checks of this node by itself."""
    for device in devices():
        where = f" on GPU {device.index}" if device.type == "cuda" else ""
        yield check(f"matmul{where}", lambda device=device: matmul(device))  # type: ignore[misc]
        yield check(f"memory{where}", lambda device=device: memory(device))  # type: ignore[misc]
        if device.type == "cuda":
            yield check(f"ecc{where}", lambda device=device: (ecc(device) or "it has no count", None, None))  # type: ignore[misc]
    yield check("disk", lambda: disk(directory))


def check(name: str, run: Callable[[], tuple[str, float | None, str | None]]) -> Check:
    """Run one; whatever goes wrong in it is its result."""
    try:
        return Check(name, True, *run())
    except Wrong as problem:
        return Check(name, False, str(problem))
    except Exception as problem:  # a driver's, a disk's, a neighbour's: the node does not do what it should
        return Check(name, False, f"{type(problem).__name__}: {problem}".splitlines()[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.probe", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="a directory on the disk that jobs use")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--size", type=int, default=1, help="with 2 or more: only sum with neighbours")
    parser.add_argument("--address", default="127.0.0.1", help="of rank 0")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--neighbour", default="", help="its name")
    asked = parser.parse_args()
    if asked.size > 1:
        name = f"all-reduce with {asked.neighbour}"
        checks = [check(name, lambda: all_reduce(asked.rank, asked.size, asked.address, asked.port))]
    else:
        checks = list(alone(asked.directory))
    print(json.dumps({"checks": [asdict(one) for one in checks]}))
    sys.stdout.flush()
    os._exit(0 if all(one.ok for one in checks) else 1)  # a communicator whose peer is gone may not let go


if __name__ == "__main__":
    main()
