"""What is read to account for time: jobs, attempts, events and slots of a time that may be long ago."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from orchestrator.store import schema
from orchestrator.store.engine import Database
from orchestrator.store.jobs import batches
from orchestrator.store.rows import AttemptRow, EventRow, InventoryRow, JobRow


class Accounts(Database):
    """Reads alone."""

    def jobs_between(self, since: float, until: float, limit: int, *, begun: bool = False) -> list[JobRow]:
        """Jobs that had been submitted by `until` and had not ended before `since`, the newest `limit`, in order;
        `begun`: those that ever had an attempt."""
        table = schema.jobs
        query = (
            sa.select(table)
            .where(table.c.submitted_at < until, sa.or_(table.c.finished_at.is_(None), table.c.finished_at > since))
            .where(table.c.attempts > 0 if begun else sa.true())
            .order_by(table.c.sequence.desc())
            .limit(limit)
        )
        with self._errors(), self.engine.connect() as connection:
            return [JobRow.model_validate(dict(row)) for row in connection.execute(query).mappings()][::-1]

    def attempts_of(self, job_ids: Sequence[str]) -> list[AttemptRow]:
        """All attempts of these jobs, of each oldest first."""
        table = schema.attempts
        with self._errors(), self.engine.connect() as connection:
            return [
                AttemptRow.model_validate(dict(row))
                for some in batches(job_ids)
                for row in connection.execute(
                    sa.select(table).where(table.c.job_id.in_(some)).order_by(table.c.job_id, table.c.number)
                ).mappings()
            ]

    def events_of(self, job_ids: Sequence[str], kinds: Iterable[str]) -> list[EventRow]:
        """Events of these kinds of these jobs, of each oldest first."""
        table, wanted = schema.events, sorted(set(kinds))
        with self._errors(), self.engine.connect() as connection:
            return [
                EventRow.model_validate(dict(row))
                for some in batches(job_ids)
                for row in connection.execute(
                    sa.select(table).where(table.c.job_id.in_(some), table.c.kind.in_(wanted)).order_by(table.c.id)
                ).mappings()
            ]

    def inventories(self, since: float) -> list[InventoryRow]:
        """Which slots there were: what held at `since`, if that is known, and every change after it."""
        table = schema.inventories
        first = sa.select(sa.func.max(table.c.id)).where(table.c.time <= since).scalar_subquery()
        query = sa.select(table).where(table.c.id >= sa.func.coalesce(first, 0)).order_by(table.c.id)
        with self._errors(), self.engine.connect() as connection:
            return [InventoryRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]
