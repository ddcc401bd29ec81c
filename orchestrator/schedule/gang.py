"""What the scheduler knows of jobs and queues, the rules it follows, and what it may decide. Values."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.cluster.model import Option, Placement
from orchestrator.job.lifecycle import Reason

DAY_S = 86400.0
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Gang:
    """A job as the scheduler sees it: ranks that start together or not at all. Times in seconds."""

    job_id: str
    sequence: int
    """Order of submission."""
    priority: int
    min_processes: int
    max_processes: int
    accelerator: str
    options: tuple[Option, ...] | None = None
    """Best first; None where nobody knows what the job needs, so that any free slots will do."""
    misfit: Reason | None = None
    """Why there are no options."""
    queue: str = "default"
    name: str = ""
    """What runs of the same job have in common."""
    queued_at: float = 0.0
    """When its present wait began."""
    waited_s: float = 0.0
    """Of earlier waits."""
    ran_s: float = 0.0
    """Of attempts that have ended."""
    left_s: float | None = None
    """What is left of its max_duration."""
    evictions: int = 0
    """How often it was pre-empted."""
    preemptible: bool = True
    """Whether it saves when it is told to stop."""
    target: int | None = None
    """It was stopped to go on at once, with so many ranks at most."""
    group: str | None = None
    """Its array."""
    at_once: int | None = None
    """How many of the group may run."""
    avoid: tuple[str, ...] = ()
    """Nodes, by id, that it keeps away from: its last attempt failed on them."""
    oracle_s: float | None = None
    """Its true run time, where a simulation lets the scheduler know it."""

    @property
    def most(self) -> int:
        """Ranks that it may start with now."""
        return self.max_processes if self.target is None else max(self.min_processes, self.target)

    @property
    def elastic(self) -> bool:
        return self.max_processes > self.min_processes


@dataclass(frozen=True, slots=True)
class Held:
    """A gang that holds its slots."""

    gang: Gang
    placement: Placement
    since: float
    saved_at: float | None = None
    """When what it had done was last safe; None means at its start."""
    stopping: bool = False
    """It was told to stop, or its node is lost: nothing more can be asked of it."""
    target: int | None = None
    """It stops to go on at once, with so many ranks at most."""
    processes: int = field(init=False, compare=False)
    safe_at: float = field(init=False, compare=False)
    """Up to when what it has done is held by something."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "processes", self.placement.world_size)
        object.__setattr__(self, "safe_at", self.saved_at if self.saved_at is not None else self.since)

    @property
    def can_stop(self) -> bool:
        """Whether it saves and ends when it is told to, and was not told yet."""
        return not self.stopping and self.gang.preemptible

    def lost_s(self, now: float) -> float:
        """Rank-seconds of work that nothing holds yet."""
        return self.processes * max(0.0, now - self.safe_at)


@dataclass(frozen=True, slots=True)
class Queue:
    """A tenant's share. Ranks stand for GPUs, or for CPU slots."""

    name: str
    weight: float = 1.0
    guaranteed: int | None = None
    """What it gets back whenever it asks."""
    ceiling: int | None = None
    """What it may hold at most, with what it borrows."""
    lendable: bool = True
    """Whether others may use what it leaves unused of its guarantee."""


@dataclass(frozen=True)
class Rules:
    """The policy's numbers. Tuned on one week of one cluster's trace: see docs/scheduling.md."""

    consolidate: bool = False
    """A gang that one node could hold waits for one node, a larger one for whole nodes."""
    first_level_s: float = 600.0
    """Expected rank-seconds to a job's end up to which it is in the first level, the best."""
    level_factor: float = 4.0
    """Each level holds jobs that are expected to take so much longer than the one before."""
    levels: int = 6
    starving_s: float = DAY_S
    """A job goes up a level when all its waits together took so long, and then ever sooner: see order.lifts."""
    patience_s: float = 60.0
    """A job waits for so long before others are stopped because it is shorter."""
    min_run_s: float = 900.0
    """A job runs for so long before it is stopped because another is shorter."""
    min_run_for_class_s: float = 60.0
    """The same, for a job of a higher class or a queue that asks for what is its own."""
    max_evictions: int = 20
    """After so many, only a higher class or a queue's guarantee stops the job."""
    grow_after_s: float = 600.0
    """An elastic job runs for so long before it is stopped to go on with more."""
    preempt: bool = True
    resize: bool = True
    backfill_quantile: float = 0.9
    """Of a job's expected run time, what must end before a reservation begins."""


@dataclass(frozen=True, slots=True)
class Start:
    job_id: str
    placement: Placement
    option: Option | None = None
    """The one that was taken."""


class Why(enum.StrEnum):
    """Why a running job is told to stop; it goes back to its queue."""

    HIGHER_CLASS = "higher-class"
    QUOTA = "quota"  # another queue asks for what is guaranteed to it
    SHORTER = "shorter"  # another job is expected to be done far sooner
    SHRINK = "shrink"  # it goes on with fewer ranks
    GROW = "grow"  # it goes on with more ranks
    DRAINED = "drained"  # its node is to be empty


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask a running gang to save and end."""

    job_id: str
    why: Why
    for_job: str | None = None
    target: int | None = None
    """Ranks to go on with at once, at most; None: it waits its turn."""


class Wait(NamedTuple):
    job_id: str
    reason: Reason


Decision = Start | Stop | Wait


@dataclass(frozen=True)
class Decisions:
    """What follows from one look."""

    starts: tuple[Start, ...] = ()
    stops: tuple[Stop, ...] = ()
    waits: tuple[Wait, ...] = ()
    """In the order of the queue, as far as it was looked at."""
    next_at: float | None = None
    """When time alone may change the answer."""
    reservation: Reservation | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """What the first gang that cannot start will get, and when at the latest if estimates hold."""

    job_id: str
    at: float
    """math.inf where nobody knows how long jobs take."""
    slots: tuple[tuple[str, int], ...] = field(default=())
    """Node ids, each with how many slots."""
