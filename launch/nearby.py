"""Gradients of ranks on one host, averaged through memory that they share.

gloo sends them through sockets, copied into and out of the kernel by the cores that compute: with two ranks of a small
model on a CPU a tenth of the step. Here each rank adds up its part of every piece, and all read it. gloo still says
when everybody has come so far, so a rank that is lost is found as before.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from torch import distributed, nn

from launch.contract import ExecutionPlan
from launch.engine_config import NEARBY_BYTES as PIECE


def average_nearby(model: nn.parallel.DistributedDataParallel, plan: ExecutionPlan) -> None:
    """Have `model` average its gradients so, if all ranks are on this host's CPU. All ranks call this together."""
    if plan.device != "cpu" or os.environ.get("LOCAL_WORLD_SIZE") != str(plan.world_size):
        return
    nearby = Nearby.open()
    if nearby is not None:
        # A lambda, since torch takes no annotation that is a string.
        model.register_comm_hook(nearby, lambda nearby, bucket: nearby.bucket(bucket.buffer()))


class Nearby:
    """The slots of all ranks of the default process group, which are all on this host."""

    def __init__(self, rank: int, slots: list[torch.Tensor]) -> None:
        self._rank, self._slots = rank, slots
        self._turn = 0
        self._here = torch.zeros(1)

    @staticmethod
    def open() -> Nearby | None:
        """None on every rank, if on any there is no such memory. All ranks call this together."""
        rank = distributed.get_rank()
        file = _made()
        try:
            # The memory has no name, and is free when nobody maps it any more, however a rank ends.
            places = _everyones((os.getpid(), file) if file is not None else None)
            if None in places:
                return None
            found = [_mapped(f"/proc/{process}/fd/{there}") for process, there in places]
            slots = [slot for slot in found if slot is not None]
            if not all(_everyones(len(slots) == len(found))):
                return None
        finally:
            if file is not None:
                os.close(file)
        return Nearby(rank, slots)

    def bucket(self, gradients: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """What DistributedDataParallel expects of the average of its bucket of `gradients`."""
        self.average(gradients)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(gradients)
        return done

    def average(self, values: torch.Tensor) -> None:
        """Replace `values`, 1-D and of as many elements on every rank, by their mean over the ranks."""
        for start in range(0, len(values), PIECE // values.element_size()):
            self._average(values[start : start + PIECE // values.element_size()])

    def _average(self, piece: torch.Tensor) -> None:
        # A slot is written again after two pieces: by then all have come to the next one, and so have read this.
        size, ranks = len(piece), len(self._slots)
        side = slice(self._turn * PIECE, self._turn * PIECE + size * piece.element_size())
        self._turn = 1 - self._turn
        slots = [slot[side].view(piece.dtype) for slot in self._slots]
        parts = [slice(size * k // ranks, size * (k + 1) // ranks) for k in range(ranks)]
        own, mine = parts[self._rank], slots[self._rank]
        mine[: own.start].copy_(piece[: own.start])
        mine[own.stop :].copy_(piece[own.stop :])
        self._wait()
        total = piece[own]
        for other, slot in enumerate(slots):
            if other != self._rank:
                total.add_(slot[own])
        mine[own].copy_(total.div_(ranks))
        self._wait()
        for other, part in enumerate(parts):
            if other != self._rank:
                piece[part].copy_(slots[other][part])

    def _wait(self) -> None:
        distributed.all_reduce(self._here)


def _made() -> int | None:
    """A file of this rank's slots, which is memory alone."""
    try:
        file = os.memfd_create("tuneyard-gradients")
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, 2 * PIECE)  # a file with holes would end the process where there is no more memory
    except OSError:
        os.close(file)
        return None
    return file


def _mapped(path: str) -> torch.Tensor | None:
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return torch.frombuffer(mmap.mmap(file, 2 * PIECE), dtype=torch.uint8)
    except OSError:
        return None
    finally:
        os.close(file)


def _everyones(mine: Any) -> list[Any]:
    """What each rank says, by rank."""
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found
