"""What the ranks tell each other about a step: the sum of their losses, and what one of them wishes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Step(NamedTuple):
    """A step whose gradient has been made."""

    number: int
    """1-based."""
    consumed: int
    rate: float
    terms: float
    """What its loss is a mean over."""


class Wishes(NamedTuple):
    """What a rank would have happen after a step; of all ranks together, what any of them wishes."""

    stop: bool = False
    """Somebody asked the attempt to stop."""
    save: bool = False
    """It is time to save, by rank 0's clock."""
    give_up: bool = False
    """A save has failed in a way that ends the training."""
    copy: bool = False
    """It is time for copies in memory, by rank 0's clock."""


class Heard(NamedTuple):
    """What all ranks together say of a step; the same on every rank."""

    step: Step
    loss: float
    wishes: Wishes
    own_s: tuple[float, ...] = ()
    """Seconds that each rank needed before it waited for others, by rank; of one rank alone nothing."""


class Tally:
    """One small all-reduce a step.

    With `late`, a step's result is read while the next one computes, so that the host never waits for the device. The
    ranks act a step later then, and still all at the same one.
    """

    def __init__(self, device: torch.device, *, late: bool) -> None:
        self.late = late
        self._device = device
        self._pending: tuple[Step, torch.Tensor, torch.cuda.Event | None] | None = None

    def tell(self, step: Step, loss_sum: torch.Tensor, wishes: Wishes, own_s: float = 0.0) -> Heard | None:
        """Tell of `step`, and hear of it; with `late`, of the one before, and None if there is none."""
        before = self.rest()
        times: list[float] = []
        if torch.distributed.is_initialized():
            times = [0.0] * torch.distributed.get_world_size()
            times[torch.distributed.get_rank()] = own_s
        told = torch.tensor([*wishes, *times], dtype=torch.float64, device=self._device)
        values = torch.cat([loss_sum.reshape(1), told])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        event = None
        if self._device.type == "cuda":
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, values, event)
        return before if self.late else self.rest()

    def rest(self) -> Heard | None:
        """What was told and has not been heard yet."""
        if self._pending is None:
            return None
        step, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        loss_sum, *told = values.tolist()
        wishes, own_s = told[: len(Wishes._fields)], told[len(Wishes._fields) :]
        return Heard(step, loss_sum / step.terms, Wishes(*(wish > 0 for wish in wishes)), tuple(own_s))


def either(first: Wishes, second: Wishes) -> Wishes:
    return Wishes(*(a or b for a, b in zip(first, second, strict=True)))


def part_from_peers() -> None:
    """Leave the process group, if there is one: peers that still use it fail at once instead of waiting."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
