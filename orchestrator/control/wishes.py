"""What the scheduler needs to know of a job. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.model import Node, Option
from orchestrator.cluster.spec import NodeKind
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.job.spec import AnyJob, TrainingJob, dump_job
from orchestrator.memory.options import Factors, Ways, kinds_of, ways
from orchestrator.schedule.gang import Gang
from orchestrator.store.rows import JobRow


def gang_of_new(
    job_id: str,
    job: AnyJob,
    *,
    sizing: str | None = None,
    nodes: Sequence[Node] = (),
    factors: Factors = (),
) -> Gang:
    """A job that is not stored: `sizing` is memory.sizing.Sizing as JSON, if its model is known."""
    found = _ways(job, dump_job(job), sizing, kinds_of(nodes), factors, None)
    low, high = _bounds(job, found)
    return Gang(
        job_id, 0, job.priority, low, high, job.resources.accelerator, _options(found), _misfit(found), job.queue,
    )  # fmt: skip


def gang_of(row: JobRow, kinds: tuple[NodeKind, ...] | None, factors: Factors) -> Gang:
    """A stored job; a run that is to be repeated takes its plan along."""
    job = row.job
    found = ways_of(row, kinds, factors)
    low, high = _bounds(job, found)
    limit = job.max_duration
    return Gang(
        job_id=row.id,
        sequence=row.sequence,
        priority=row.priority,
        min_processes=low,
        max_processes=high,
        accelerator=job.resources.accelerator,
        options=_options(found),
        misfit=_misfit(found),
        queue=row.queue,
        name=label_of(job),
        queued_at=row.queued_at if row.queued_at is not None else row.submitted_at,
        waited_s=row.waited_s,
        ran_s=row.ran_s,
        left_s=None if limit is None else max(0.0, limit - row.ran_s),
        evictions=row.preemptions,
        # A command need not save when it is told to stop.
        preemptible=isinstance(job, TrainingJob),
        target=row.target,
        group=row.array_id,
        at_once=row.array_at_once,
        avoid=row.avoid or (),
    )


def label_of(job: AnyJob) -> str:
    """What runs of the same job have in common: its name, of an array's element without the number."""
    return job.name if job.array_of is None else job.name.removesuffix(f"-{job.array_of.index}")


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


def _bounds(job: AnyJob, found: Ways | None) -> tuple[int, int]:
    low, high = (1, 1) if job.strategy == "single" else job.resources.bounds
    if found is not None and found.options:
        low = max(low, min(option.processes for option in found.options))
    return low, high


def _options(found: Ways | None) -> tuple[Option, ...] | None:
    return found.options if found is not None else None


def _misfit(found: Ways | None) -> Reason | None:
    if found is None or found.misfit is None:
        return None
    return Reason(
        code=ReasonCode.DOES_NOT_FIT,
        sentence=found.misfit,
        remedy="`tuneyard plan` tells the nearest change that fits",
    )
