"""What the ranks tell each other about a step: the sum of their losses, and whether one of them wishes to stop."""

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


class Heard(NamedTuple):
    """What all ranks together say of a step; the same on every rank."""

    step: Step
    loss: float
    stop: bool


class Tally:
    """One small all-reduce a step.

    With `late`, a step's result is read while the next one computes, so that the host never waits for the device. The
    ranks act a step later then, and still all at the same one.
    """

    def __init__(self, device: torch.device, *, late: bool) -> None:
        self.late = late
        self._device = device
        self._pending: tuple[Step, torch.Tensor, torch.cuda.Event | None] | None = None

    def tell(self, step: Step, loss_sum: torch.Tensor, *, stop: bool) -> Heard | None:
        """Tell of `step`, and hear of it; with `late`, of the one before, and None if there is none."""
        before = self.rest()
        values = torch.stack([loss_sum, torch.tensor(float(stop), dtype=torch.float64, device=self._device)])
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
        loss_sum, wishes = values.tolist()
        return Heard(step, loss_sum / step.terms, wishes > 0)
