"""What the acting controller writes, inside one transaction that its lease guards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from launch.contract import ProgressLine, RunContract, StopRequest, dumps
from orchestrator.cluster.model import Placement
from orchestrator.cluster.status import Energy, Slots, Spent
from orchestrator.errors import ConflictError
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
from orchestrator.store.rows import HistoryRow


class Transaction:
    """Writes guarded by job id and attempt number; states change only as the lifecycle's tables allow."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def set_job(self, job_id: str, state: JobState, reason: Reason, now: float, **columns: Any) -> None:
        """Move a job to `state` (or keep it there) with the reason for it.

        Raises:
            IllegalTransitionError: the lifecycle's table does not allow it.
        """
        table = schema.jobs
        old = JobState(
            self._connection.execute(
                sa.select(table.c.state).where(table.c.id == job_id).with_for_update()
            ).scalar_one()
        )
        if old != state and state == JobState.QUEUED:
            columns["queued_at"] = now
        elif old != state and old == JobState.QUEUED:
            began = sa.func.coalesce(table.c.queued_at, table.c.submitted_at)
            columns["waited_s"] = table.c.waited_s + (now - began)
        if old != state:
            check_job_transition(job_id, old, state, self._story(job_id))
            self.event(job_id, None, now, f"job-{state}", {"reason": reason.model_dump(mode="json")})
        if state.final:
            columns["finished_at"] = now
        self._connection.execute(
            table.update()
            .where(table.c.id == job_id)
            .values(state=state, reason=reason.model_dump(mode="json"), **columns)
        )

    def explain(self, job_id: str, reason: Reason) -> None:
        """Another reason for the state that a job is in."""
        self._connection.execute(
            schema.jobs.update().where(schema.jobs.c.id == job_id).values(reason=reason.model_dump(mode="json"))
        )

    def note_start(self, job_id: str, now: float) -> None:
        """The first start of a job is when its max_duration begins."""
        table = schema.jobs
        self._connection.execute(
            table.update().where(table.c.id == job_id, table.c.started_at.is_(None)).values(started_at=now)
        )

    def add_attempt(
        self, contract: RunContract, placement: Placement, now: float, predicted: Mapping[str, Any] | None = None
    ) -> None:
        """A new attempt, and the job's newest number; `predicted` is a memory.options.Forecast as JSON.

        Raises:
            ConflictError: the number is not the one that follows the job's newest: another controller was faster.
        """
        changed = self._connection.execute(
            schema.jobs.update()
            .where(schema.jobs.c.id == contract.job_id, schema.jobs.c.attempts == contract.attempt - 1)
            .values(attempts=contract.attempt, not_before=None)
        )
        if changed.rowcount != 1:
            raise ConflictError(f"attempt {contract.attempt} of job {contract.job_id} is not the next one")
        self._connection.execute(
            schema.attempts.insert().values(
                job_id=contract.job_id, number=contract.attempt, state=AttemptState.STARTING,
                contract=contract.model_dump_json(), placement=placement.model_dump_json(),
                created_at=now, last_contact=now, predicted=None if predicted is None else dict(predicted),
            )
        )  # fmt: skip
        shares = {share.node: share.processes for share in placement.shares}
        self.event(
            contract.job_id, contract.attempt, now, "attempt-placed", {"nodes": shares, "plan": dumps(contract.plan)}
        )

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
            check_attempt_transition(job_id, number, old, state, self._story(job_id))
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

    def count_attempt(self, job_id: str, number: int, now: float, *, failed: bool, processes: int) -> None:
        """Count an attempt of so many processes that ends: its time, and whether it uses up one of the restarts."""
        jobs, attempts = schema.jobs, schema.attempts
        mine = (attempts.c.job_id == job_id) & (attempts.c.number == number)
        created = self._connection.execute(sa.select(attempts.c.created_at).where(mine)).scalar_one()
        ran = now - created
        self._connection.execute(
            jobs.update()
            .where(jobs.c.id == job_id)
            .values(
                ran_s=jobs.c.ran_s + ran,
                served_s=jobs.c.served_s + ran * processes,
                failures=jobs.c.failures + int(failed),
            )
        )

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
        self._connection.execute(
            schema.events.insert().values(job_id=job_id, attempt=attempt, time=now, kind=kind, data=data)
        )

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
