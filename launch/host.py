"""A rank's share of its host: cores, threads, and memory that is kept once it has been had."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.attempt import TORCH_ALLOCATOR, expands_segments
from launch.contract import Allocator, Device
from launch.errors import ContractError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # <malloc.h>


@dataclass(frozen=True)
class Share:
    """What a rank has of its host."""

    cores: tuple[int, ...]
    threads: tuple[int, ...]
    """Kernel ids of torch's threads, this one first."""
    allocator: Allocator = "fast"

    def pin(self) -> None:
        """One core for each of torch's threads, if there are as many. Threads that begin after this inherit the first.

        Two of them on one core wait for each other by turns of the scheduler, which has been seen to leave them there
        for minutes and to cost a factor of ten.
        """
        if len(self.cores) == len(self.threads) > 1:
            for thread, core in zip(self.threads, self.cores, strict=True):
                os.sched_setaffinity(thread, [core])


def take_share(device: Device, allocator: Allocator = "fast") -> Share:
    """Threads, cores and allocator of this rank; before anything computes.

    As many threads as OMP_NUM_THREADS says, which a process with torch loaded beforehand has not read; and on a CPU,
    where the ranks of this node divide all of its cores, each rank on cores of its own.

    Raises:
        ContractError: torch's allocator on a GPU was told something else than `allocator` when this process began.
    """
    told = os.environ.get("OMP_NUM_THREADS")
    if told:  # as torch itself would have taken it
        torch.set_num_threads(min(int(told), os.cpu_count() or 1))
    if device != "cpu":
        return Share((), (), _torch_allocator(allocator))
    mine = cores_of_rank(
        sorted(os.sched_getaffinity(0)),
        torch.get_num_threads(),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if mine:
        os.sched_setaffinity(0, mine)
    if allocator == "fast":
        keep_memory()
    else:
        return_memory()
    before = _threads()
    torch.zeros(1 << 20).add_(1.0)  # large enough to be divided: torch's threads are there after it, and no others
    return Share(tuple(mine), (os.getpid(), *sorted(_threads() - before)), allocator)


def _torch_allocator(planned: Allocator) -> Allocator:
    """What torch's allocator really does, by what it has read. More than planned is the user's to ask for."""
    settings = torch._C._accelerator_getAllocatorSettings()
    if expands_segments(settings):
        return "tight"
    if planned == "tight":
        raise ContractError(
            f"torch's allocator has read {settings!r} and so has no expandable segments, which the plan counts on",
            field="plan.allocator",
            hint=f"take `expandable_segments` out of {' and '.join(TORCH_ALLOCATOR)}, in the job's env and on the node",
        )
    return "fast"


def cores_of_rank(cores: list[int], threads: int, local_rank: int, local_world_size: int) -> list[int]:
    """The cores of one of `local_world_size` ranks with `threads` each; empty where they are not all of `cores`: others
    may be on the rest, and the kernel knows better which are free."""
    if local_world_size * threads != len(cores):
        return []
    return cores[local_rank * threads : (local_rank + 1) * threads]


def keep_memory() -> None:
    """Have malloc keep what is freed: a step allocates what the one before did, and pages given back and had anew cost
    a small model on a CPU a tenth of its step. Nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # large blocks from the heap, too: what is mapped for one goes back with it
        mallopt(M_TRIM_THRESHOLD, -1)  # as an unsigned number the largest: never


def return_memory() -> None:
    """Have malloc give back every large block as it is freed, so that a process holds what it uses and no more."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 16)  # set by hand it stays; by itself it grows with what is freed


def resident_bytes(which: str = "VmRSS") -> int:
    """What this process holds of the host's memory now; `VmHWM`, held at most so far; `RssFile`, of files."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        for line in status:
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(f"the kernel reports no {which}")


def _threads() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
