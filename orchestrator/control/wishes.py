"""What the scheduler needs to know of a job that waits. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.model import Node
from orchestrator.cluster.spec import NodeKind
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.job.spec import AnyJob, TrainingJob, dump_job
from orchestrator.memory.options import Factors, Ways, kinds_of, ways
from orchestrator.schedule.decide import Waiting
from orchestrator.store.rows import JobRow


def waiting(
    job_id: str,
    sequence: int,
    job: AnyJob,
    *,
    sizing: str | None = None,
    nodes: Sequence[Node] = (),
    factors: Factors = (),
) -> Waiting:
    """A job that is not stored: `sizing` is memory.sizing.Sizing as JSON, if its model is known."""
    found = _ways(job, dump_job(job), sizing, kinds_of(nodes), factors, None)
    return _wish(job_id, sequence, job, found)


def waiting_row(row: JobRow, kinds: tuple[NodeKind, ...] | None, factors: Factors) -> Waiting:
    """A stored job; a run that is to be repeated takes its plan along."""
    return _wish(row.id, row.sequence, row.job, ways_of(row, kinds, factors))


def ways_of(row: JobRow, kinds: tuple[NodeKind, ...] | None, factors: Factors) -> Ways | None:
    """How a stored job may run; None where nobody knows what it needs."""
    if row.origin is not None and row.origin.pinned is not None:
        return None
    relief = row.relief.model_dump_json() if row.relief is not None else None
    return _ways(row.job, row.spec, row.sizing, kinds, factors, relief)


def _ways(
    job: AnyJob,
    spec: str,
    sizing: str | None,
    kinds: tuple[NodeKind, ...] | None,
    factors: Factors,
    relief: str | None,
) -> Ways | None:
    if sizing is None or not kinds or not isinstance(job, TrainingJob):
        return None
    return ways(spec, sizing, kinds, factors, relief)


def _wish(job_id: str, sequence: int, job: AnyJob, found: Ways | None) -> Waiting:
    low, high = job.resources.bounds
    if job.strategy == "single":
        low = high = 1
    misfit = None
    if found is not None and found.misfit is not None:
        misfit = Reason(
            code=ReasonCode.DOES_NOT_FIT,
            sentence=found.misfit,
            remedy="`tuneyard plan` tells the nearest change that fits",
        )
    options = found.options if found is not None else None
    return Waiting(job_id, sequence, job.priority, low, high, job.resources.accelerator, options, misfit)
