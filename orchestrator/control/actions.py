"""What reconcile may ask for. Values; `apply` carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.contract import ExecutionPlan, ProgressLine, StopRequest
from orchestrator.cluster.model import Placement
from orchestrator.cluster.status import Energy, Spent
from orchestrator.job.lifecycle import JobState, Reason
from orchestrator.memory.alike import Peak
from orchestrator.memory.ladder import Relief
from orchestrator.recover.classify import Outcome


@dataclass(frozen=True)
class Note:
    """An event to store."""

    kind: str
    data: dict[str, Any]


@dataclass(frozen=True)
class StartAttempt:
    """Store a new attempt, then start its gang."""

    job_id: str
    number: int
    placement: Placement
    plan: ExecutionPlan
    relief: Relief | None = None
    """To store with it, if it is the first of a job that starts on a rung."""
    notes: tuple[Note, ...] = ()
    predicted: Mapping[str, Any] | None = None
    """What its memory was predicted to be: memory.options.Forecast as JSON."""


@dataclass(frozen=True)
class StartAgain:
    """The attempt was stored, but no agent has taken it on: the controller died in between, or a node was slow."""

    job_id: str
    number: int


@dataclass(frozen=True)
class MarkRunning:
    """A rank has shown itself."""

    job_id: str
    number: int


@dataclass(frozen=True)
class MarkLost:
    """A node of the attempt does not answer."""

    job_id: str
    number: int
    reason: Reason


@dataclass(frozen=True)
class NoteProgress:
    """The attempt was heard of."""

    job_id: str
    number: int
    progress: ProgressLine | None
    offset: int
    """Bytes of rank 0's progress in which there is no checkpoint that is not noted."""
    spent: Spent | None = None
    """Where its time went, if more is known of that."""
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class NoteCheckpoints:
    """Rank 0 has told of checkpoints."""

    job_id: str
    number: int
    lines: tuple[ProgressLine, ...]
    offset: int
    """Bytes of its progress that are read with them."""


@dataclass(frozen=True)
class SendStop:
    """Store the stop message, then pass it on."""

    job_id: str
    number: int
    request: StopRequest
    reason: Reason
    preempted_by: str | None = None
    """The job for whose sake it is."""
    target: int | None = None
    """With how many processes the job is to go on at once."""
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class SendStopAgain:
    """The message is stored, but it may never have arrived."""

    job_id: str
    number: int
    request: StopRequest


@dataclass(frozen=True)
class EndAttempt:
    """No process of the attempt is left. The job moves on with it, in one transaction."""

    job_id: str
    number: int
    outcome: Outcome
    job_state: JobState
    reason: Reason
    failed: bool = False
    """Whether it uses up one of the job's restarts."""
    progressed: bool = False
    """Whether it has saved something new, so that the restarts before it count no more."""
    not_before: float | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    relief: Relief | None = None
    """To store with it, so that the next attempt is planned within it."""
    target: int | None = None
    """With how many processes at most the next attempt is to start, at once."""
    avoid: tuple[str, ...] = ()
    """Nodes, by id, that the next attempt is to keep away from."""
    suspects: tuple[str, ...] = ()
    """Those of them that the fault may lie in."""
    peak: Peak | None = None
    spent: Spent | None = None
    """Where its time went, to its end."""
    energy: tuple[Energy | None, ...] | None = None
    """What each node's counters told."""
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class MoveJob:
    """Another state for a job that has no attempt."""

    job_id: str
    state: JobState
    reason: Reason


@dataclass(frozen=True)
class Explain:
    """The state stays; the reason for it is another."""

    job_id: str
    reason: Reason


Action = (
    StartAttempt
    | StartAgain
    | MarkRunning
    | MarkLost
    | NoteProgress
    | NoteCheckpoints
    | SendStop
    | SendStopAgain
    | EndAttempt
    | MoveJob
    | Explain
)
