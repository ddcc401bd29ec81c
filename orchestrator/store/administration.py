"""What administrators say of queues and of nodes."""

from __future__ import annotations

import math
from typing import TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from orchestrator.cluster.model import Placement
from orchestrator.errors import ConflictError, NotFoundError, SpecError
from orchestrator.job.lifecycle import JobState
from orchestrator.store import schema
from orchestrator.store.engine import Database
from orchestrator.store.jobs import LIVE
from orchestrator.store.rows import Mark, NodeFault, NodeMark, QueueRow, QueueUse

MAX_WEIGHT = 1e6
MAX_SHARE = 1_000_000  # processes


class QueueSettings(TypedDict, total=False):
    """What can be said of a queue: QueueRow tells what it means."""

    weight: float
    guaranteed: int | None
    ceiling: int | None
    lendable: bool


class Administration(Database):
    """Shares of queues and marks of nodes. Needs no lease: the acting controller reads them on every tick."""

    def queues(self) -> list[QueueRow]:
        """The queues of which something was said, by name; any other has the defaults of QueueRow."""
        query = sa.select(schema.queues).order_by(schema.queues.c.name)
        with self._errors(), self.engine.connect() as connection:
            return [QueueRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def queue_uses(self) -> dict[str, QueueUse]:
        """What the live jobs of each queue do; a queue without any is left out."""
        jobs, attempts = schema.jobs, schema.attempts
        counts = sa.select(jobs.c.queue, jobs.c.state, sa.func.count()).where(jobs.c.state.in_(LIVE))
        placements = (
            sa.select(jobs.c.queue, attempts.c.placement)
            .join(attempts, attempts.c.job_id == jobs.c.id)
            .where(attempts.c.state != "ended")
        )
        found: dict[str, dict[str, int]] = {}

        def add(queue: str, what: str, number: int) -> None:
            uses = found.setdefault(queue, {})
            uses[what] = uses.get(what, 0) + number

        with self._errors(), self.engine.connect() as connection:
            for queue, state, number in connection.execute(counts.group_by(jobs.c.queue, jobs.c.state)):
                if state != JobState.PAUSED:
                    add(queue, "waiting" if state == JobState.QUEUED else "running", number)
            for queue, placement in connection.execute(placements):
                add(queue, "held", Placement.model_validate_json(placement).world_size)
        return {queue: QueueUse(**uses) for queue, uses in sorted(found.items())}

    def set_queue(self, name: str, **settings: Unpack[QueueSettings]) -> QueueRow:
        """Change some settings of a queue, which need not have been named before; the others stay as they are.

        Raises:
            SpecError: a setting that cannot be, or that contradicts another.
        """
        table = schema.queues
        with self._errors(), self._writing.begin() as connection:
            old = self._queue(connection, name)
            row = QueueRow.model_validate({**(old or QueueRow(name=name)).model_dump(), **settings})
            check_queue(row)
            write = table.insert() if old is None else table.update().where(table.c.name == name)
            connection.execute(write.values(**row.model_dump()))
        return row

    def delete_queue(self, name: str) -> None:
        """Forget what was said of a queue, so that it has the defaults; its jobs stay. Raises NotFoundError."""
        table = schema.queues
        with self._errors(), self._writing.begin() as connection:
            if connection.execute(table.delete().where(table.c.name == name)).rowcount == 0:
                raise NotFoundError(f"nothing was said of a queue {name}", field="queue", hint="see `tuneyard queues`")

    def _queue(self, connection: Connection, name: str) -> QueueRow | None:
        query = sa.select(schema.queues).where(schema.queues.c.name == name).with_for_update()
        row = connection.execute(query).mappings().first()
        return None if row is None else QueueRow.model_validate(dict(row))

    def node_marks(self) -> list[NodeMark]:
        """The nodes that are to get no new attempts, by name, whether or not they are here now."""
        query = sa.select(schema.node_marks).order_by(schema.node_marks.c.name)
        with self._errors(), self.engine.connect() as connection:
            return [NodeMark.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def mark_node(self, name: str, mark: Mark, reason: str | None, now: float) -> NodeMark:
        """Mark a node, instead of the mark that it has; doing so twice is the same as once."""
        row = NodeMark(name=name, mark=mark, reason=reason, since=now)
        values = row.model_dump()
        table = schema.node_marks
        with self._errors(), self._writing.begin() as connection:
            if connection.execute(table.update().where(table.c.name == name).values(**values)).rowcount == 0:
                connection.execute(table.insert().values(**values))
        return row

    def node_faults(self, since: float) -> list[NodeFault]:
        """Failures that may lie in a node, from then on."""
        table = schema.node_faults
        columns = [column for column in table.c if column.name != "id"]
        query = sa.select(*columns).where(table.c.time >= since).order_by(table.c.time)
        with self._errors(), self.engine.connect() as connection:
            return [NodeFault.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def absolve_node(self, name: str) -> None:
        """Let a suspect have new attempts again, and forget what was held against it."""
        marks, faults = schema.node_marks, schema.node_faults
        with self._errors(), self._writing.begin() as connection:
            connection.execute(marks.delete().where((marks.c.name == name) & (marks.c.mark == Mark.SUSPECT.value)))
            connection.execute(faults.delete().where(faults.c.node == name))

    def unmark_node(self, name: str) -> None:
        """Let a node have new attempts again. Raises ConflictError if it has no mark."""
        table, faults = schema.node_marks, schema.node_faults
        with self._errors(), self._writing.begin() as connection:
            # What was held against it before counts no more: else it would be suspect again at once.
            connection.execute(faults.delete().where(faults.c.node == name))
            if connection.execute(table.delete().where(table.c.name == name)).rowcount == 0:
                raise ConflictError(
                    f"node {name} is neither cordoned nor drained",
                    code="not-marked",
                    field="node",
                    hint="see `tuneyard nodes`",
                )


def check_queue(row: QueueRow) -> None:
    """Raises SpecError for a share that no queue can have."""
    if not (math.isfinite(row.weight) and 0 < row.weight <= MAX_WEIGHT):
        raise SpecError(
            f"a weight of {row.weight:g} is no share of anything",
            code="out-of-range",
            field="weight",
            hint=f"write a number above 0, at most {MAX_WEIGHT:g}; of 2 a queue gets twice what it gets of 1",
        )
    for field in ("guaranteed", "ceiling"):
        number = getattr(row, field)
        if number is not None and not 0 <= number <= MAX_SHARE:
            raise SpecError(
                f"`{field}` is {number}; it is a number of processes",
                code="out-of-range",
                field=field,
                hint=f"write a whole number from 0 to {MAX_SHARE}, or null for none",
            )
    if row.guaranteed is not None and row.ceiling is not None and row.guaranteed > row.ceiling:
        raise SpecError(
            f"queue {row.name} would be guaranteed {row.guaranteed} processes, and may hold {row.ceiling}",
            code="inconsistent",
            field="guaranteed",
            hint="raise `ceiling` to it, or lower `guaranteed`",
        )
