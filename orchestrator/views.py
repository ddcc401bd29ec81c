"""What the API answers and the client reads: one set of types on both sides. Lenient, since versions may differ."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from launch.contract import ExecutionPlan, NodeShare, ProgressLine
from orchestrator.cluster.model import Node, Placement
from orchestrator.cluster.status import StandbyReport
from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import AttemptState, JobState, Reason


class View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JobView(View):
    id: str
    name: str
    queue: str
    priority: int
    state: JobState
    reason: Reason
    attempts: int
    failures: int = 0
    """How many attempts failed, which retry.max_restarts bounds."""
    submitted_at: float
    started_at: float | None = None
    finished_at: float | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    progress: ProgressLine | None = None
    """The newest attempt's."""
    checkpoint: LastCheckpoint | None = None
    """The newest committed one that is known of."""
    plan: ExecutionPlan | None = None
    spec: dict[str, Any] | None = None


class AttemptView(View):
    number: int
    state: AttemptState
    plan: ExecutionPlan
    nodes: tuple[NodeShare, ...]
    run_dir: str
    checkpoint_dir: str | None = None
    """A directory, or a URL."""
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    outcome: str | None = None
    progress: ProgressLine | None = None
    launch: dict[str, str] = {}
    """File name → text of the generated launcher configuration of the first node."""


class EventView(View):
    id: int
    attempt: int | None
    time: float
    kind: str
    data: dict[str, Any]


class NodeView(Node):
    free: int
    """Ranks that it can take now."""
    standbys: StandbyReport = StandbyReport()


class DryRun(View):
    """What would happen to a job."""

    placement: Placement | None
    """Where it would start now; null if it would wait."""
    plan: ExecutionPlan
    waits: str | None
    """Why it would not start at once; null if it would."""
