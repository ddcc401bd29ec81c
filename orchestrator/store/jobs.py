"""Jobs: what users ask for, and reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from launch.contract import Origin, dumps
from orchestrator.errors import ConflictError, NotFoundError
from orchestrator.job.lifecycle import JOB_TRANSITIONS, JobState, Reason, ReasonCode
from orchestrator.job.spec import AnyJob, dump_job
from orchestrator.store import schema
from orchestrator.store.engine import Database
from orchestrator.store.rows import FIXED, JobRow

LIVE = tuple(state.value for state in JobState if JOB_TRANSITIONS[state])
AT_ONCE = 500
"""Ids in one query: databases bound the number of parameters."""


@dataclass(frozen=True)
class NewJob:
    """A job that is to be stored."""

    id: str
    job: AnyJob
    origin: Origin | None = None
    sizing: str | None = None
    """memory.sizing.Sizing as JSON, if its model is known."""


class Jobs(Database):
    """Jobs as users and the controller see them. What is asked for needs no lease: it only adds a job or a wish."""

    def add_job(
        self, job_id: str, job: AnyJob, now: float, origin: Origin | None = None, sizing: str | None = None
    ) -> JobRow:
        """Store `job` as queued; otherwise as add_jobs."""
        (row,) = self.add_jobs([NewJob(job_id, job, origin, sizing)], now)
        return row

    def add_jobs(self, jobs: Sequence[NewJob], now: float) -> list[JobRow]:
        """Store all of `jobs` as queued, or none.

        Raises:
            ConflictError: an id is taken, or what a job comes after has failed or been cancelled.
            NotFoundError: there is no job that one of them comes after.
        """
        with self._errors(), self._writing.begin() as connection:
            self._check_after(connection, {job_id for new in jobs for job_id in new.job.after})
            for new in jobs:
                try:
                    connection.execute(schema.jobs.insert().values(**_columns(new), submitted_at=now, queued_at=now))
                except IntegrityError as problem:
                    raise ConflictError(
                        f"a job {new.id} exists already", field="id", hint="submit it again"
                    ) from problem
                told = {"queue": new.job.queue, "priority": new.job.priority}
                _add_event(connection, new.id, None, now, "submitted", told)
        with self._errors(), self.engine.connect() as connection:
            rows = {row.id: row for row in self._rows(connection, [new.id for new in jobs])}
        return [rows[new.id] for new in jobs]

    def check_after(self, job_ids: Iterable[str]) -> list[str]:
        """Those of these jobs that have not succeeded yet. Raises as add_jobs."""
        with self._errors(), self.engine.connect() as connection:
            return self._check_after(connection, set(job_ids))

    def _check_after(self, connection: Connection, job_ids: set[str]) -> list[str]:
        states = self._states(connection, job_ids)
        for job_id in sorted(job_ids):
            state = states.get(job_id)
            if state is None:
                raise NotFoundError(f"there is no job {job_id} to come after", field="after", hint="see `tuneyard ls`")
            if state in (JobState.FAILED, JobState.CANCELLED):
                what = "failed" if state == JobState.FAILED else "was cancelled"
                raise ConflictError(
                    f"job {job_id} {what}, so what comes after it would never start",
                    code="dependency-ended",
                    field="after",
                    hint=f"submit {job_id} again and name the new one, or leave it out",
                )
        return sorted(job_id for job_id, state in states.items() if state != JobState.SUCCEEDED)

    def set_priority(self, job_id: str, priority: int, now: float) -> JobRow:
        """Change what a job started with; its spec stays as it was submitted.

        Raises:
            NotFoundError: no such job.
            ConflictError: it has ended already.
        """
        with self._errors(), self._writing.begin() as connection:
            row = self._job(connection, job_id)
            if row.state.final:
                raise ConflictError(
                    f"job {job_id} has ended already: {row.state}", code="already-ended", hint="nothing waits for it"
                )
            if row.priority == priority:
                return row
            connection.execute(schema.jobs.update().where(schema.jobs.c.id == job_id).values(priority=priority))
            told = {"from": row.priority, "to": priority}
            _add_event(connection, job_id, None, now, "priority-changed", told)
        return self.job(job_id)

    def request_cancel(self, job_id: str, now: float) -> JobRow:
        """Ask for the job's end; doing so twice is the same as once.

        Raises:
            NotFoundError: no such job.
            ConflictError: it has ended already, otherwise than by being cancelled.
        """
        with self._errors(), self._writing.begin() as connection:
            row = self._job(connection, job_id)
            if row.state == JobState.CANCELLED or row.cancel_requested:
                return row
            if row.state.final:
                raise ConflictError(f"job {job_id} has {row.state} already", hint="nothing to cancel")
            connection.execute(schema.jobs.update().where(schema.jobs.c.id == job_id).values(cancel_requested=True))
            _add_event(connection, job_id, None, now, "cancel-requested", {})
        return self.job(job_id)

    def request_pause(self, job_id: str, now: float) -> JobRow:
        """Ask that the job ends what it runs, saving first, and gets no attempt until `request_resume`.

        Raises:
            NotFoundError: no such job.
            ConflictError: it has ended already, or is being cancelled.
        """
        return self._wish_pause(job_id, True, now)

    def request_resume(self, job_id: str, now: float) -> JobRow:
        """Take the wish that the job pauses back: it goes to the queue, once what still runs of it has ended.

        Raises:
            NotFoundError: no such job.
            ConflictError: it is neither paused nor being paused.
        """
        return self._wish_pause(job_id, False, now)

    def _wish_pause(self, job_id: str, paused: bool, now: float) -> JobRow:
        with self._errors(), self._writing.begin() as connection:
            row = self._job(connection, job_id)
            if row.state.final:
                raise ConflictError(
                    f"job {job_id} has ended already: {row.state}",
                    code="already-ended",
                    hint="nothing to pause" if paused else "submit it again: a job goes on only while it has not ended",
                )
            if row.cancel_requested:
                raise ConflictError(f"job {job_id} is being cancelled", code="being-cancelled", hint="submit it again")
            if row.pause_requested == paused:
                # A wish that was granted may be repeated; a resume that never followed a pause is a slip.
                if paused or row.state == JobState.PAUSED:
                    return row
                raise ConflictError(
                    f"job {job_id} is {row.state}, not paused", code="not-paused", hint="there is nothing to resume"
                )
            connection.execute(schema.jobs.update().where(schema.jobs.c.id == job_id).values(pause_requested=paused))
            _add_event(connection, job_id, None, now, "pause-requested" if paused else "resume-requested", {})
        return self.job(job_id)

    def job(self, job_id: str) -> JobRow:
        """Raises NotFoundError."""
        with self._errors(), self.engine.connect() as connection:
            return self._job(connection, job_id)

    def jobs(self, *, live: bool | None = None, array: str | None = None, limit: int = 1000) -> list[JobRow]:
        """Jobs in order of submission: the newest `limit`, or all live ones; of an array alone, if one is named."""
        query = sa.select(schema.jobs)
        if array is not None:
            query = query.where(schema.jobs.c.array_id == array)
        if live:
            query = query.where(schema.jobs.c.state.in_(LIVE)).order_by(schema.jobs.c.sequence)
        else:
            query = query.order_by(schema.jobs.c.sequence.desc()).limit(limit)
        with self._errors(), self.engine.connect() as connection:
            rows = [JobRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]
        return rows if live else rows[::-1]

    def live_jobs(self, known: Mapping[str, JobRow] | None = None) -> dict[str, JobRow]:
        """All live jobs by id, in order of submission. Of those in `known`, what was returned before, only the ones
        that were written to since are read again, without their specs."""
        known, table = known or {}, schema.jobs
        live = table.c.state.in_(LIVE)
        sums = sa.select(sa.func.count(), sa.func.sum(table.c.version), sa.func.sum(table.c.sequence)).where(live)
        with self._errors(), self.engine.connect() as connection:
            # A write makes a version higher, a new job's number is higher than all before, and what has ended stays so:
            # where these agree, nothing has changed. (PostgreSQL may show a lower number after a higher one. For the
            # sums to agree all the same, others have to end meanwhile with the same sums, and the next write tells.)
            if tuple(connection.execute(sums).one()) == _sums(known):
                return dict(known)
            versions: dict[str, int] = dict(
                connection.execute(sa.select(table.c.id, table.c.version).where(live)).all()
            )
            rows = {job_id: row for job_id, row in known.items() if job_id in versions}
            stale = [
                job_id
                for job_id, version in versions.items()
                if (row := rows.get(job_id)) is None or row.version != version
            ]
            for row in self._rows(connection, stale, known):
                rows[row.id] = row
        if all(job_id in known and not rows[job_id].state.final for job_id in stale):
            return rows  # in the order that they had
        still = (row for row in rows.values() if not row.state.final)  # one may have ended between the two reads
        return {row.id: row for row in sorted(still, key=lambda row: row.sequence)}

    def states_of(self, job_ids: Iterable[str]) -> dict[str, JobState]:
        """The states of those of these jobs that there are."""
        with self._errors(), self.engine.connect() as connection:
            return self._states(connection, job_ids)

    def _job(self, connection: Connection, job_id: str) -> JobRow:
        row = connection.execute(sa.select(schema.jobs).where(schema.jobs.c.id == job_id)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no job {job_id}", field="job", hint="see `tuneyard ls`")
        return JobRow.model_validate(dict(row))

    def _rows(
        self, connection: Connection, job_ids: Iterable[str], known: Mapping[str, JobRow] | None = None
    ) -> Iterator[JobRow]:
        """These jobs in any order; of `known` ones, what can have changed is read."""
        table, known = schema.jobs, known or {}
        light = [column for column in table.c if column.name not in FIXED]
        wanted = list(job_ids)
        for columns, ids in (
            (light, [job_id for job_id in wanted if job_id in known]),
            (list(table.c), [job_id for job_id in wanted if job_id not in known]),
        ):
            for some in batches(ids):
                for row in connection.execute(sa.select(*columns).where(table.c.id.in_(some))).mappings():
                    old = known.get(row["id"])
                    yield JobRow.model_validate(dict(row)) if old is None else old.renewed(dict(row))

    def _states(self, connection: Connection, job_ids: Iterable[str]) -> dict[str, JobState]:
        table = schema.jobs
        return {
            row.id: JobState(row.state)
            for some in batches(sorted(set(job_ids)))
            for row in connection.execute(sa.select(table.c.id, table.c.state).where(table.c.id.in_(some)))
        }


def _add_event(
    connection: Connection, job_id: str | None, attempt: int | None, now: float, kind: str, data: dict[str, Any]
) -> None:
    connection.execute(schema.events.insert().values(job_id=job_id, attempt=attempt, time=now, kind=kind, data=data))


def _columns(new: NewJob) -> dict[str, Any]:
    """The columns of a job that has just been submitted."""
    job = new.job
    reason = Reason(code=ReasonCode.SUBMITTED, sentence="submitted; the controller has not looked at it yet")
    array = job.array_of
    return {
        "id": new.id, "name": job.name, "queue": job.queue, "priority": job.priority, "spec": dump_job(job),
        "origin": None if new.origin is None else dumps(new.origin), "sizing": new.sizing,
        "state": JobState.QUEUED, "reason": reason.model_dump(mode="json"), "attempts": 0,
        "pause_requested": False, "cancel_requested": False,
        "array_id": None if array is None else array.id, "array_at_once": None if array is None else array.at_once,
    }  # fmt: skip


def _sums(rows: Mapping[str, JobRow]) -> tuple[int, int | None, int | None]:
    """What SQL's count and sums are of these rows."""
    if not rows:
        return 0, None, None
    return len(rows), sum(row.version for row in rows.values()), sum(row.sequence for row in rows.values())


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """`ids` in pieces that fit into a query."""
    for start in range(0, len(ids), AT_ONCE):
        yield ids[start : start + AT_ONCE]
