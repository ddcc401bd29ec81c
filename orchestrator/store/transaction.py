"""What the acting controller writes, inside one transaction that its lease guards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from launch.contract import ProgressLine, RunContract, StopRequest, dumps
from orchestrator.cluster.model import Placement
from orchestrator.cluster.status import Energy, Slots, Spent
from orchestrator.job.checkpoint import LastCheckpoint, newest
from orchestrator.job.lifecycle import (
    AttemptState,
    JobState,
    Reason,
    check_attempt_transition,
    check_job_transition,
)
from orchestrator.memory.alike import Peak
from orchestrator.store import schema
from orchestrator.store.rows import HistoryRow, NodeFault


@dataclass(frozen=True)
class NewAttempt:
    """The next attempt of a job, that is to be stored."""

    contract: RunContract
    placement: Placement
    predicted: Mapping[str, Any] | None = None
    """memory.options.Forecast as JSON."""


class Transaction:
    """Writes guarded by job id and attempt number; states change only as the lifecycle's tables allow."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def set_job(self, job_id: str, state: JobState, reason: Reason, now: float, **columns: Any) -> None:
        """Move a job to `state` (or keep it there) with the reason for it.

        Raises:
            IllegalTransitionError: the lifecycle's table does not allow it.
        """
        self.set_jobs({job_id: reason}, state, now, **columns)

    def set_jobs(self, reasons: Mapping[str, Reason], state: JobState, now: float, **columns: Any) -> None:
        """Move jobs to `state` (or keep them there), each with its reason.

        Raises:
            IllegalTransitionError: the lifecycle's table does not allow it for one of them.
        """
        table = schema.jobs
        if not reasons:
            return
        told = {job_id: reason.model_dump(mode="json") for job_id, reason in reasons.items()}
        query = sa.select(table.c.id, table.c.state).where(table.c.id.in_(told)).with_for_update()
        moved = [(job_id, JobState(old)) for job_id, old in self._connection.execute(query) if old != state]
        for job_id, old in moved:
            check_job_transition(job_id, old, state, partial(self._story, job_id))
        kind = f"job-{state}"
        self._add_events([_event(job_id, None, now, kind, {"reason": told[job_id]}) for job_id, _ in moved])
        if state == JobState.QUEUED:
            columns["queued_at"] = sa.case((table.c.state != state, now), else_=table.c.queued_at)
        else:
            waits = now - sa.func.coalesce(table.c.queued_at, table.c.submitted_at)
            waited = sa.case((table.c.state == JobState.QUEUED, table.c.waited_s + waits), else_=table.c.waited_s)
            columns["waited_s"] = waited
        if state.final:
            columns["finished_at"] = now
        self._connection.execute(
            table.update().where(table.c.id == sa.bindparam("job")).values(state=state, **columns),
            [{"job": job_id, "reason": reason} for job_id, reason in told.items()],
        )

    def explain(self, job_id: str, reason: Reason) -> None:
        """Another reason for the state that a job is in."""
        self._connection.execute(
            schema.jobs.update().where(schema.jobs.c.id == job_id).values(reason=reason.model_dump(mode="json"))
        )

    def add_attempts(self, attempts: Sequence[NewAttempt], now: float) -> set[str]:
        """Store new attempts, each of another job. With the first of a job its max_duration begins.

        Returns:
            The jobs whose attempt is stored. The number of any other is not the one that follows its job's newest:
            another controller was faster.
        """
        table = schema.jobs
        query = sa.select(table.c.id, table.c.attempts).where(table.c.id.in_([one.contract.job_id for one in attempts]))
        newest: dict[str, int] = dict(self._connection.execute(query.with_for_update()).all())
        next_ones = [one for one in attempts if newest.get(one.contract.job_id) == one.contract.attempt - 1]
        if not next_ones:
            return set()
        self._connection.execute(
            table.update()
            .where(table.c.id == sa.bindparam("job"))
            .values(not_before=None, started_at=sa.func.coalesce(table.c.started_at, now)),
            [{"job": one.contract.job_id, "attempts": one.contract.attempt} for one in next_ones],
        )
        self._connection.execute(schema.attempts.insert(), [_attempt(one, now) for one in next_ones])
        self._add_events([_placed(one, now) for one in next_ones])
        return {one.contract.job_id for one in next_ones}

    def set_attempt(self, job_id: str, number: int, state: AttemptState, now: float, **columns: Any) -> None:
        """Move an attempt to `state`, or keep it there.

        Raises:
            IllegalTransitionError: the lifecycle's table does not allow it.
        """
        table = schema.attempts
        mine = (table.c.job_id == job_id) & (table.c.number == number)
        old = AttemptState(
            self._connection.execute(sa.select(table.c.state).where(mine).with_for_update()).scalar_one()
        )
        if old != state:
            check_attempt_transition(job_id, number, old, state, partial(self._story, job_id))
            told = {key: columns[key] for key in ("outcome",) if columns.get(key)}
            self.event(job_id, number, now, f"attempt-{state}", told)
        if state.final:
            columns["ended_at"] = now
        self._connection.execute(table.update().where(mine).values(state=state, **columns))

    def end_attempt(
        self,
        job_id: str,
        number: int,
        now: float,
        outcome: str,
        spent: Spent | None = None,
        energy: Sequence[Energy | None] | None = None,
    ) -> None:
        """An attempt of which nothing lives, where its time went, and what each node's counters told of energy."""
        told: dict[str, Any] = {"outcome": outcome}
        if spent is not None:
            told["spent"] = spent.model_dump(mode="json")
        if energy is not None and any(energy):
            told["energy"] = [one and one.model_dump(mode="json") for one in energy]
        self.set_attempt(job_id, number, AttemptState.ENDED, now, **told)

    def count_attempt(
        self,
        job_id: str,
        number: int,
        now: float,
        *,
        processes: int,
        failed: str | None = None,
        progressed: bool = False,
    ) -> None:
        """Count an attempt of so many processes that ends: its time, and the cause if it uses up one of the restarts.
        If it `progressed`, failures before it count no more."""
        jobs, attempts = schema.jobs, schema.attempts
        known = self._connection.execute(sa.select(jobs.c.failed_by).where(jobs.c.id == job_id)).scalar_one()
        failed_by = Counter({} if progressed else known or {})
        failed_by.update([failed] if failed is not None else [])
        mine = (attempts.c.job_id == job_id) & (attempts.c.number == number)
        created = self._connection.execute(sa.select(attempts.c.created_at).where(mine)).scalar_one()
        ran = now - created
        self._connection.execute(
            jobs.update()
            .where(jobs.c.id == job_id)
            .values(
                ran_s=jobs.c.ran_s + ran,
                served_s=jobs.c.served_s + ran * processes,
                failures=int(failed is not None) + (0 if progressed else jobs.c.failures),
                failed_by=dict(failed_by) or None,
            )
        )

    def add_node_fault(self, fault: NodeFault) -> None:
        """Store that an attempt failed on a node by which the fault may be."""
        self._connection.execute(schema.node_faults.insert().values(**fault.model_dump()))

    def count_preemption(self, job_id: str) -> None:
        """Count that a job was stopped for the sake of another."""
        table = schema.jobs
        self._connection.execute(table.update().where(table.c.id == job_id).values(preemptions=table.c.preemptions + 1))

    def note_checkpoints(
        self, job_id: str, number: int, lines: Sequence[ProgressLine], offset: int, directory: str
    ) -> None:
        """Store what rank 0 told of checkpoints as events, and the job's newest one, once: when it is told again, with
        an `offset` that was reached before, nothing is written."""
        table = schema.attempts
        mine = (table.c.job_id == job_id) & (table.c.number == number)
        changed = self._connection.execute(
            table.update().where(mine, table.c.progress_offset < offset).values(progress_offset=offset)
        )
        if changed.rowcount != 1:
            return
        stored = self._connection.execute(
            sa.select(schema.jobs.c.checkpoint).where(schema.jobs.c.id == job_id).with_for_update()
        ).scalar_one()
        last = None if stored is None else LastCheckpoint.model_validate(stored)
        for line in lines:
            if line.checkpoint is not None:
                kind = f"checkpoint-{line.checkpoint.outcome}"
                self.event(job_id, number, line.time, kind, line.checkpoint.model_dump(mode="json", exclude_none=True))
                last = newest(last, line, directory)
        self._connection.execute(
            schema.jobs.update()
            .where(schema.jobs.c.id == job_id)
            .values(checkpoint=sa.null() if last is None else last.model_dump(mode="json"))
        )

    def set_progress(
        self,
        job_id: str,
        number: int,
        progress: ProgressLine | None,
        offset: int,
        now: float,
        spent: Spent | None = None,
    ) -> None:
        """The newest sign of life of an attempt's ranks, how much of rank 0's progress holds no more news, and where
        its time went; what is None stays as it is."""
        columns: dict[str, Any] = {"last_contact": now, "progress_offset": offset}
        if progress is not None:
            columns["progress"] = dumps(progress)
        if spent is not None:
            columns["spent"] = spent.model_dump(mode="json")
        table = schema.attempts
        self._connection.execute(
            table.update().where(table.c.job_id == job_id, table.c.number == number).values(**columns)
        )

    def set_stop(
        self,
        job_id: str,
        number: int,
        request: StopRequest,
        now: float,
        preempted_by: str | None = None,
        target: int | None = None,
    ) -> None:
        """Remember the stop message before it is sent, the job for whose sake it is, and with how many processes the
        stopped one is to go on at once."""
        told = {"preempted_by": preempted_by, "target": target}
        self.set_attempt(job_id, number, AttemptState.STOPPING, now, stop=dumps(request), **told)

    def set_sizing(self, job_id: str, sizing: str) -> None:
        """A memory.sizing.Sizing as JSON, that is better than the one before."""
        self._connection.execute(schema.jobs.update().where(schema.jobs.c.id == job_id).values(sizing=sizing))

    def set_relief(self, job_id: str, relief: Mapping[str, Any]) -> None:
        """Which rungs of the ladder a job has taken: a memory.ladder.Relief as JSON."""
        self._connection.execute(schema.jobs.update().where(schema.jobs.c.id == job_id).values(relief=dict(relief)))

    def add_peak(self, peak: Peak) -> None:
        """What an attempt needed of memory."""
        self._connection.execute(schema.peaks.insert().values(**dumps(peak)))

    def add_inventory(self, nodes: Mapping[str, Slots], now: float) -> None:
        """Which slots there are from now on, by node id."""
        told = {node: slots.model_dump(mode="json") for node, slots in nodes.items()}
        self._connection.execute(schema.inventories.insert().values(time=now, nodes=told))

    def add_history(self, row: HistoryRow) -> None:
        """How long a job ran that ends."""
        self._connection.execute(schema.history.insert().values(**row.model_dump()))

    def event(self, job_id: str | None, attempt: int | None, now: float, kind: str, data: dict[str, Any]) -> None:
        self._add_events([_event(job_id, attempt, now, kind, data)])

    def _add_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        if events:
            self._connection.execute(schema.events.insert(), events)

    def _story(self, job_id: str) -> list[str]:
        table = schema.events
        rows = self._connection.execute(
            sa.select(table.c.time, table.c.kind, table.c.attempt)
            .where(table.c.job_id == job_id)
            .order_by(table.c.id.desc())
            .limit(10)
        )
        return [f"{row.time:.1f} {row.kind}" + (f" (attempt {row.attempt})" if row.attempt else "") for row in rows][
            ::-1
        ]


def _event(job_id: str | None, attempt: int | None, now: float, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"job_id": job_id, "attempt": attempt, "time": now, "kind": kind, "data": data}


def _attempt(new: NewAttempt, now: float) -> dict[str, Any]:
    """The columns of an attempt that has just been decided on."""
    contract = new.contract
    return {
        "job_id": contract.job_id, "number": contract.attempt, "state": AttemptState.STARTING,
        "contract": contract.model_dump_json(), "placement": new.placement.model_dump_json(),
        "created_at": now, "last_contact": now, "predicted": None if new.predicted is None else dict(new.predicted),
    }  # fmt: skip


def _placed(new: NewAttempt, now: float) -> dict[str, Any]:
    contract = new.contract
    told = {"nodes": {share.node: share.processes for share in contract.nodes}, "plan": dumps(contract.plan)}
    return _event(contract.job_id, contract.attempt, now, "attempt-placed", told)
