"""The database: user commands, reads, and what the acting controller writes under its lease."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, SQLAlchemyError

from launch.contract import Origin, dumps
from orchestrator.errors import ConflictError, LeaseLostError, NotFoundError, StoreError
from orchestrator.job.lifecycle import JOB_TRANSITIONS, JobState, Reason, ReasonCode
from orchestrator.job.spec import AnyJob, dump_job
from orchestrator.memory.alike import Peak
from orchestrator.store import schema
from orchestrator.store.rows import AttemptRow, EventRow, JobRow, Lease
from orchestrator.store.transaction import Transaction

LIVE = tuple(state.value for state in JobState if JOB_TRANSITIONS[state])
CONTROLLER = "controller"


class Store:
    """One database, SQLite (WAL) or PostgreSQL. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.engine = _engine(url)
        # Writers take SQLite's lock at the start, so that no transaction fails half-way for want of it.
        self._writing = self.engine.execution_options(tuneyard_write=True)

    def prepare(self) -> None:
        """Bring the tables to this version's schema.

        Raises:
            StoreError: unreachable, or written by a newer version.
        """
        with self._errors():
            inspector = sa.inspect(self.engine)
            tables = set(inspector.get_table_names())
            if not tables and self.engine.dialect.name == "sqlite":
                # A fresh file needs no history; migrations and metadata are tested to agree. Spares `run` an import.
                with self._writing.begin() as connection:
                    schema.metadata.create_all(connection)
                    connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)"))
                    connection.execute(sa.text("INSERT INTO alembic_version VALUES (:v)"), {"v": schema.HEAD})
                return
            if "alembic_version" in tables:
                with self.engine.connect() as connection:
                    if connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == schema.HEAD:
                        return
            from orchestrator.store.migrate import upgrade

            upgrade(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    # What users ask for. Needs no lease: it only adds a job or a wish.

    def add_job(
        self, job_id: str, job: AnyJob, now: float, origin: Origin | None = None, sizing: str | None = None
    ) -> JobRow:
        """Store `job` as queued, with its memory.sizing.Sizing as JSON. Raises ConflictError if the id is taken."""
        reason = Reason(code=ReasonCode.SUBMITTED, sentence="submitted; the controller has not looked at it yet")
        with self._errors(), self._writing.begin() as connection:
            try:
                connection.execute(
                    schema.jobs.insert().values(
                        id=job_id, name=job.name, queue=job.queue, priority=job.priority, spec=dump_job(job),
                        origin=None if origin is None else dumps(origin), sizing=sizing,
                        state=JobState.QUEUED, reason=reason.model_dump(mode="json"), attempts=0,
                        pause_requested=False, cancel_requested=False, submitted_at=now,
                    )
                )  # fmt: skip
            except IntegrityError as problem:
                raise ConflictError(f"a job {job_id} exists already", field="id") from problem
            _add_event(connection, job_id, None, now, "submitted", {"queue": job.queue, "priority": job.priority})
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

    # Reads.

    def job(self, job_id: str) -> JobRow:
        """Raises NotFoundError."""
        with self._errors(), self.engine.connect() as connection:
            return self._job(connection, job_id)

    def jobs(self, *, live: bool | None = None, limit: int = 1000) -> list[JobRow]:
        """Jobs in order of submission: the newest `limit`, or all live ones."""
        query = sa.select(schema.jobs)
        if live:
            query = query.where(schema.jobs.c.state.in_(LIVE)).order_by(schema.jobs.c.sequence)
        else:
            query = query.order_by(schema.jobs.c.sequence.desc()).limit(limit)
        with self._errors(), self.engine.connect() as connection:
            rows = [JobRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]
        return rows if live else rows[::-1]

    def attempts(self, job_id: str) -> list[AttemptRow]:
        """Attempts of a job, oldest first."""
        return self._attempts(schema.attempts.c.job_id == job_id)

    def live_attempts(self) -> list[AttemptRow]:
        """Attempts of all jobs that have not ended."""
        return self._attempts(schema.attempts.c.state != "ended")

    def ended_attempts(self, since: float, limit: int = 2000) -> list[AttemptRow]:
        """The newest attempts that ran and ended after `since`, of all jobs."""
        table = schema.attempts
        query = (
            sa.select(table)
            .where(table.c.ended_at > since, table.c.started_at.is_not(None), table.c.outcome.is_not(None))
            .order_by(table.c.ended_at.desc())
            .limit(limit)
        )
        with self._errors(), self.engine.connect() as connection:
            return [AttemptRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def peaks(self, keys: Iterable[str], limit: int = 1000) -> list[Peak]:
        """The newest rows of jobs with these keys, newest first."""
        table = schema.peaks
        query = sa.select(table).where(table.c.key.in_(sorted(set(keys)))).order_by(table.c.id.desc()).limit(limit)
        with self._errors(), self.engine.connect() as connection:
            return [Peak.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def forecasts(self, limit: int = 1000) -> list[Peak]:
        """The newest rows of attempts of which something was predicted, of all jobs, newest first."""
        table = schema.peaks
        query = sa.select(table).where(table.c.predicted.is_not(None)).order_by(table.c.id.desc()).limit(limit)
        with self._errors(), self.engine.connect() as connection:
            return [Peak.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[EventRow]:
        """Events of a job with an id above `after`, oldest first."""
        query = (
            sa.select(schema.events)
            .where(schema.events.c.job_id == job_id, schema.events.c.id > after)
            .order_by(schema.events.c.id)
            .limit(limit)
        )
        with self._errors(), self.engine.connect() as connection:
            return [EventRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    # The acting controller.

    def acquire_lease(self, holder: str, now: float, ttl: float) -> Lease | None:
        """The lease if it is free, ours or expired, with a higher token whenever the holder changes; else None."""
        table = schema.leases
        with self._errors(), self._writing.begin() as connection:
            query = sa.select(table).where(table.c.name == CONTROLLER).with_for_update()
            row = connection.execute(query).mappings().first()
            expires = now + ttl
            if row is None:
                try:
                    connection.execute(
                        table.insert().values(name=CONTROLLER, holder=holder, token=1, expires_at=expires)
                    )
                except IntegrityError:  # another controller was first (PostgreSQL)
                    return None
                return Lease(name=CONTROLLER, holder=holder, token=1, expires_at=expires)
            held = Lease.model_validate(dict(row))
            if held.holder != holder and held.expires_at > now:
                return None
            token = held.token if held.holder == holder else held.token + 1
            connection.execute(
                table.update().where(table.c.name == CONTROLLER).values(holder=holder, token=token, expires_at=expires)
            )
            return Lease(name=CONTROLLER, holder=holder, token=token, expires_at=expires)

    def release_lease(self, lease: Lease) -> None:
        """Let another controller act at once."""
        table = schema.leases
        with self._errors(), self._writing.begin() as connection:
            connection.execute(
                table.update().where(table.c.name == lease.name, table.c.token == lease.token).values(expires_at=0.0)
            )

    @contextlib.contextmanager
    def acting(self, lease: Lease) -> Iterator[Transaction]:
        """A transaction that commits only while `lease` is the newest.

        Raises:
            LeaseLostError: another controller has taken over; nothing was written.
        """
        table = schema.leases
        with self._errors(), self._writing.begin() as connection:
            token = connection.execute(
                sa.select(table.c.token).where(table.c.name == lease.name).with_for_update()
            ).scalar()
            if token != lease.token:
                raise LeaseLostError(
                    f"the lease {lease.name} has token {token}; this controller holds {lease.token}",
                    hint="another controller acts on this database; this one steps back",
                )
            yield Transaction(connection)

    def _job(self, connection: Connection, job_id: str) -> JobRow:
        row = connection.execute(sa.select(schema.jobs).where(schema.jobs.c.id == job_id)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no job {job_id}", field="job", hint="see `tuneyard ls`")
        return JobRow.model_validate(dict(row))

    def _attempts(self, condition: sa.ColumnElement[bool]) -> list[AttemptRow]:
        table = schema.attempts
        query = sa.select(table).where(condition).order_by(table.c.job_id, table.c.number)
        with self._errors(), self.engine.connect() as connection:
            return [AttemptRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Database trouble as a StoreError that shows no password."""
        try:
            yield
        except OperationalError as problem:
            where = make_url(self._url).render_as_string(hide_password=True)
            raise StoreError(
                f"the database {where} cannot be used: {problem.orig}",
                hint="check TUNEYARD_DATABASE_URL, that the server runs, and that the disk is not full",
            ) from problem
        except SQLAlchemyError as problem:
            raise StoreError(f"the database refused: {problem.__class__.__name__}: {problem}") from problem


def _add_event(
    connection: Connection, job_id: str | None, attempt: int | None, now: float, kind: str, data: dict[str, Any]
) -> None:
    connection.execute(schema.events.insert().values(job_id=job_id, attempt=attempt, time=now, kind=kind, data=data))


def _json(value: Any) -> str:
    """`value` as JSON. A loss may be infinite or no number, which JSON cannot say; as text a float field reads it."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except ArgumentError as problem:  # its text may hold the URL, and the URL a password
        raise StoreError(
            "TUNEYARD_DATABASE_URL is not the URL of a known kind of database",
            code="bad-setting",
            field="TUNEYARD_DATABASE_URL",
            hint="write sqlite:////path/yard.db or postgresql://user:password@host/name",
        ) from problem
    except ModuleNotFoundError:
        pass  # told below, with what to install
    if parsed.get_backend_name() != "sqlite":
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        try:
            return sa.create_engine(parsed, pool_pre_ping=True, json_serializer=_json)
        except ModuleNotFoundError as problem:
            raise StoreError(
                f"no driver for {parsed.get_backend_name()}: {problem}", hint="pip install 'tuneyard[postgres]'"
            ) from problem
    if parsed.database and parsed.database != ":memory:":
        try:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise StoreError(
                f"cannot make the directory of {parsed.database}: {os.strerror(problem.errno or 0)}",
                hint="choose another TUNEYARD_HOME",
            ) from problem
    engine = sa.create_engine(parsed, connect_args={"timeout": 30, "check_same_thread": False}, json_serializer=_json)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver's guess
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # a committed attempt must survive a crash of the machine
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("tuneyard_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def describe_jobs(rows: Sequence[JobRow]) -> list[dict[str, Any]]:
    """Rows as JSON types, without the spec."""
    return [row.model_dump(mode="json", exclude={"spec"}) for row in rows]
