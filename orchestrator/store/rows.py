"""What the tables hold, as frozen values."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict

from launch.contract import ExecutionPlan, Origin, ProgressLine, RunContract, StopRequest
from orchestrator.cluster.model import Placement
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

    @cached_property
    def job(self) -> AnyJob:
        """The validated JobSpec."""
        return parse_job(self.spec)


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
    outcome: str | None
    predicted: dict[str, Any] | None = None
    progress: ProgressLine | None
    progress_offset: int = 0

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


class Lease(Row):
    """The right to act, while `token` is the newest."""

    name: str
    holder: str
    token: int
    expires_at: float
