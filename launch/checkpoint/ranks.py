"""The ranks of one attempt, as its checkpoints know them: a process group apart from the training's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

from launch.checkpoint.manifest import CheckpointError

_PATIENCE = timedelta(hours=12)
"""How long ranks wait for the slowest one's storage; a rank that dies is noticed at once."""

T = TypeVar("T")


class Ranks:
    """All of them make one together. Its collectives are on the host, so they can run beside those of a GPU."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE) if world_size > 1 else None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def by_main(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises on rank 0, on every rank."""
        answer: list[Any] = [None, None]
        if self.main:
            try:
                answer[0] = act()
            except CheckpointError as problem:
                answer[1] = problem
        if self.group is not None:
            torch.distributed.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise answer[1]
        found: T = answer[0]
        return found

    def everyones(self, value: int) -> list[int]:
        """Each rank's `value`, by rank."""
        values = [value] * self.world_size
        if self.group is not None:
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def part(self) -> None:
        """Leave the group: peers that wait in it for this rank fail at once."""
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)
            self.group = None
