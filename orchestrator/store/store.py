"""The database: user commands, reads, and what the acting controller writes under its lease."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.errors import ConflictError, LeaseLostError
from orchestrator.memory.alike import Peak
from orchestrator.store import schema
from orchestrator.store.accounts import Accounts
from orchestrator.store.administration import Administration
from orchestrator.store.jobs import LIVE, Jobs
from orchestrator.store.rows import AttemptRow, EventRow, HistoryRow, Lease
from orchestrator.store.transaction import Transaction
from orchestrator.store.watching import Watching

CONTROLLER = "controller"


class Store(Jobs, Administration, Accounts, Watching):
    """One database, SQLite (WAL) or PostgreSQL. Safe to use from several threads and processes."""

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

    def history(self, limit: int = 5000) -> list[HistoryRow]:
        """How long the last jobs ran that have ended, the newest last."""
        table = schema.history
        query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
        with self._errors(), self.engine.connect() as connection:
            return [HistoryRow.model_validate(dict(row)) for row in connection.execute(query).mappings()][::-1]

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

    def skip_numbers(self, gap: int, now: float) -> int:
        """Let the next attempts of all live jobs have numbers that are `gap` higher. Returns how many jobs there are.

        Raises:
            ConflictError: a controller acts on the database.
        """
        jobs, leases = schema.jobs, schema.leases
        with self._errors(), self._writing.begin() as connection:
            held = sa.select(leases.c.holder).where(leases.c.name == CONTROLLER, leases.c.expires_at > now)
            holder = connection.execute(held.with_for_update()).scalar()
            if holder is not None:
                raise ConflictError(
                    f"the controller {holder} acts on this database",
                    code="controller-acts",
                    hint="end all controllers; a lease in an older copy is over after some seconds",
                )
            live = jobs.c.state.in_(LIVE)
            ids = list(connection.execute(sa.select(jobs.c.id).where(live)).scalars())
            connection.execute(jobs.update().where(live).values(attempts=jobs.c.attempts + gap))
            told = {"numbers_skipped": gap}
            events = [{"job_id": one, "attempt": None, "time": now, "kind": "restored", "data": told} for one in ids]
            if events:
                connection.execute(schema.events.insert(), events)
        return len(ids)

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

    def _attempts(self, condition: sa.ColumnElement[bool]) -> list[AttemptRow]:
        table = schema.attempts
        query = sa.select(table).where(condition).order_by(table.c.job_id, table.c.number)
        with self._errors(), self.engine.connect() as connection:
            return [AttemptRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]
