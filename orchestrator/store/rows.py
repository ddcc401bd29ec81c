"""What the tables hold, as frozen values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict

from launch.contract import ExecutionPlan, Origin, ProgressLine, RunContract, StopRequest
from orchestrator.cluster.model import Placement
from orchestrator.cluster.status import Energy, Slots, Spent
from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import AttemptState, JobState, Reason
from orchestrator.job.spec import AnyJob, parse_job
from orchestrator.memory.ladder import Relief


class Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JobRow(Row):
    sequence: int
    id: str
    name: str
    queue: str
    priority: int
    spec: str
    origin: Origin | None = None
    state: JobState
    reason: Reason
    attempts: int
    failures: int = 0
    failed_by: dict[str, int] | None = None
    """The same by cause (recover.classify.Outcome); None where there are none."""
    ran_s: float = 0.0
    pause_requested: bool = False
    cancel_requested: bool
    not_before: float | None
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    checkpoint: LastCheckpoint | None = None
    sizing: str | None = None
    relief: Relief | None = None
    served_s: float = 0.0
    """Processes x seconds of the attempts that have ended."""
    preemptions: int = 0
    queued_at: float | None = None
    """When its present wait began."""
    waited_s: float = 0.0
    """Of the waits before that."""
    target: int | None = None
    """It was stopped to go on at once, with so many processes at most."""
    avoid: tuple[str, ...] | None = None
    """Nodes, by id, that its next attempt keeps away from, where others will do."""
    array_id: str | None = None
    array_at_once: int | None = None
    version: int = 0
    """Higher after every write to the row."""

    @cached_property
    def job(self) -> AnyJob:
        """The validated JobSpec. What a job may be given later (its priority) is told by the row alone."""
        return parse_job(self.spec)

    def renewed(self, columns: Mapping[str, Any]) -> JobRow:
        """The same job as its `columns` are now; those in FIXED are not among them, and are not parsed again."""
        row = JobRow.model_validate({**columns, **{name: getattr(self, name) for name in FIXED}})
        if "job" in self.__dict__:
            row.__dict__["job"] = self.job
        return row


FIXED = ("spec", "origin")
"""Columns of a job that nobody writes to after it was stored."""


class AttemptRow(Row):
    job_id: str
    number: int
    state: AttemptState
    contract: str
    placement: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    last_contact: float
    stop: StopRequest | None
    preempted_by: str | None = None
    """The job for whose sake it was stopped."""
    target: int | None = None
    """With how many processes the job is to go on at once after it."""
    outcome: str | None
    predicted: dict[str, Any] | None = None
    progress: ProgressLine | None
    progress_offset: int = 0
    spent: Spent | None = None
    """Where its time went; None where nobody told."""
    energy: tuple[Energy | None, ...] | None = None
    """What each of its nodes told of that, in their order."""

    @cached_property
    def run(self) -> RunContract:
        """The contract its ranks were given."""
        return RunContract.model_validate_json(self.contract)

    @property
    def plan(self) -> ExecutionPlan:
        return self.run.plan

    @cached_property
    def held(self) -> Placement:
        """The slots that it holds until it has ended."""
        return Placement.model_validate_json(self.placement)


class EventRow(Row):
    id: int
    job_id: str | None
    attempt: int | None
    time: float
    kind: str
    data: dict[str, Any]


class QueueRow(Row):
    """A queue's share; the defaults are those of a queue of which nothing was said."""

    name: str
    weight: float = 1.0
    guaranteed: int | None = None
    """Processes that are its own; None for none."""
    ceiling: int | None = None
    """Most processes that it may hold, with what it borrows; None for no limit."""
    lendable: bool = True
    """Whether others may have what it leaves idle of its guarantee."""


class QueueUse(Row):
    """What the live jobs of a queue do."""

    running: int = 0
    """Jobs with an attempt."""
    waiting: int = 0
    held: int = 0
    """Processes that have a place."""


class LiveCount(Row):
    """How many jobs of a queue are in a state that is not final."""

    queue: str
    state: JobState
    jobs: int
    waits_since: float | None = None
    """Of those that are queued: when the longest present wait began."""


class Mark(enum.StrEnum):
    """Why a node gets no new attempts."""

    CORDONED = "cordoned"  # an administrator said so, or it failed its probe
    DRAINED = "drained"  # and those on it go elsewhere
    SUSPECT = "suspect"  # jobs have failed on it; it is being probed


class NodeMark(Row):
    name: str
    mark: Mark
    reason: str | None = None
    since: float


class NodeFault(Row):
    """That an attempt failed on a node by which the fault may be."""

    node: str
    """Its name."""
    job_id: str
    attempt: int
    outcome: str
    time: float


class HistoryRow(Row):
    """How long a job ran that has ended."""

    queue: str
    name: str
    processes: int
    ran_s: float
    """All attempts together."""
    succeeded: bool
    time: float


class InventoryRow(Row):
    """Which slots there were from then on."""

    time: float
    nodes: dict[str, Slots]
    """By node id."""


class Lease(Row):
    """The right to act, while `token` is the newest."""

    name: str
    holder: str
    token: int
    expires_at: float
