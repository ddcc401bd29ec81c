"""Sums that a monitoring system asks for again and again: none reads a row as long as a job's spec."""

from __future__ import annotations

import sqlalchemy as sa

from orchestrator.cluster.model import Placement
from orchestrator.job.lifecycle import JobState
from orchestrator.store import schema
from orchestrator.store.engine import Database
from orchestrator.store.jobs import LIVE
from orchestrator.store.rows import LiveCount


class Watching(Database):
    """Reads alone."""

    def live_counts(self) -> list[LiveCount]:
        """Jobs that have not ended, by queue and state."""
        table = schema.jobs
        since = sa.func.min(sa.func.coalesce(table.c.queued_at, table.c.submitted_at))
        query = (
            sa.select(table.c.queue, table.c.state, sa.func.count(), since)
            .where(table.c.state.in_(LIVE))
            .group_by(table.c.queue, table.c.state)
            .order_by(table.c.queue, table.c.state)
        )
        with self._errors(), self.engine.connect() as connection:
            return [
                LiveCount(queue=queue, state=state, jobs=jobs, waits_since=at if state == JobState.QUEUED else None)
                for queue, state, jobs, at in connection.execute(query)
            ]

    def ended_counts(self) -> dict[str, int]:
        """Jobs that have ended, by state: from an index."""
        table = schema.jobs
        query = sa.select(table.c.state, sa.func.count()).where(table.c.state.not_in(LIVE)).group_by(table.c.state)
        with self._errors(), self.engine.connect() as connection:
            found = {str(state): int(count) for state, count in connection.execute(query)}
        return {state.value: found.get(state.value, 0) for state in JobState if state.final}

    def placements(self) -> list[Placement]:
        """What attempts that have not ended hold."""
        table = schema.attempts
        query = sa.select(table.c.placement).where(table.c.state != "ended")
        with self._errors(), self.engine.connect() as connection:
            return [Placement.model_validate_json(text) for (text,) in connection.execute(query)]
