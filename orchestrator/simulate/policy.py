"""What a policy is to the simulator; the production scheduler is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from orchestrator.cluster.capacity import Fit
from orchestrator.cluster.model import UNKNOWN_NEED
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Decisions, Gang, Held, Start
from orchestrator.schedule.place import fit
from orchestrator.schedule.yard import Yard


class Policy:
    """Decides like `orchestrator.schedule.decide`. What happens is told as it happens, for those that keep books."""

    name = "policy"
    oracle = False
    """Whether it must know how long jobs run."""
    elastic = False
    """Whether it resizes gangs; for others all have num_gpus ranks."""
    looks_again = False
    """Whether it is asked again at once after starts: there may be more to do when they hold their slots. After stops,
    all policies are."""

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        raise NotImplementedError

    def waits(self, gang: Gang, /) -> None:
        """It wants to start: submitted, stopped, or its node failed."""

    def starts(self, held: Held, /) -> None:
        """It holds slots."""

    def stops(self, held: Held, now: float, done: bool, /) -> None:
        """It has left its slots."""


class Production(Policy):
    """The yard's own scheduler, the very function that the controller calls."""

    name = "yard"
    elastic = True
    looks_again = True

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        return decide(yard, now)


class Packing:
    """What is free while a decision is made, and the starts so far."""

    def __init__(self, yard: Yard) -> None:
        self.consolidate = yard.rules.consolidate
        self.capacity = yard.capacity.copy()
        self.free = sum(self.capacity.free_at)
        """Slots, on whatever nodes."""
        self.starts: list[Start] = []

    def find(self, gang: Gang) -> Fit:
        """Where it would go; empty if there is no room."""
        if gang.min_processes > self.free:
            return ()
        return fit(self.capacity, gang.min_processes, gang.accelerator, consolidate=self.consolidate)

    def start(self, gang: Gang, where: Fit) -> None:
        placement = self.capacity.placement(where, gang.accelerator, UNKNOWN_NEED)
        self.capacity.take(placement)
        self.free -= gang.min_processes
        self.starts.append(Start(gang.job_id, placement))


class Expected(Protocol):
    """When a job is expected to start."""

    @property
    def low(self) -> float: ...
    @property
    def expected(self) -> float: ...
    @property
    def high(self) -> float: ...


class Forecast(Protocol):
    """Expected starts of waiting jobs, by id; those of which nothing can be said are missing."""

    def __call__(self, yard: Yard, now: float, job_ids: Sequence[str], /) -> Mapping[str, Expected]: ...
