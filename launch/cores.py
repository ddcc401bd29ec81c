"""The CPU cores and threads of a rank. Before anything computes: torch's threads inherit the cores."""

from __future__ import annotations

import os

import torch

from launch.contract import Device


def take_cores(device: Device) -> None:
    """As many threads as OMP_NUM_THREADS says, which a process with torch loaded beforehand has not read; and on a
    CPU, where the ranks of this node divide all of its cores, each on cores of its own."""
    told = os.environ.get("OMP_NUM_THREADS")
    if told:  # as torch itself would have taken it
        torch.set_num_threads(min(int(told), os.cpu_count() or 1))
    mine = cores_of_rank(
        sorted(os.sched_getaffinity(0)),
        torch.get_num_threads(),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if mine and device == "cpu":
        os.sched_setaffinity(0, mine)


def cores_of_rank(cores: list[int], threads: int, local_rank: int, local_world_size: int) -> list[int]:
    """The cores of one of `local_world_size` ranks with `threads` each; empty where they are not all of `cores`: others
    may be on the rest, and the kernel knows better which are free."""
    if local_world_size * threads != len(cores):
        return []
    return cores[local_rank * threads : (local_rank + 1) * threads]
