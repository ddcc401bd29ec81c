"""Keeps the scheduler's picture of the yard in step with what is stored and seen, by small changes.

A cache: a board that was just made answers the same as one that has been kept up to date for a year.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from orchestrator.cluster.model import Node
from orchestrator.cluster.spec import NodeKind
from orchestrator.control.wishes import gang_of
from orchestrator.job.lifecycle import AttemptState
from orchestrator.memory.options import Factors, kinds_of
from orchestrator.schedule.gang import Gang, Held, Queue, Rules
from orchestrator.schedule.history import Ran
from orchestrator.schedule.place import least_room
from orchestrator.schedule.yard import Yard
from orchestrator.store.rows import AttemptRow, JobRow, Mark

AVOIDED_S = 10.0
"""For how long a job waits for other nodes than the one on which it failed: a node that is bad becomes suspect."""


class Board:
    """The yard as the controller last saw it."""

    def __init__(self, rules: Rules | None = None, history: Iterable[Ran] = ()) -> None:
        self.yard = Yard(rules=rules)
        for ran in history:
            self.yard.history.add(ran)
        self._now = 0.0
        self._nodes: tuple[object, ...] = ()
        self._queues: tuple[Queue, ...] = ()
        self._kinds: tuple[NodeKind, ...] | None = ()
        self._factors: Factors = ()
        self._gangs: dict[str, tuple[JobRow, Gang]] = {}
        self._attempts: dict[str, tuple[AttemptRow, JobRow]] = {}

    def learn(self, ran: Ran) -> None:
        """A job has ended."""
        self.yard.history.add(ran)

    def sync(
        self,
        waiting: Sequence[JobRow],
        holding: Sequence[tuple[JobRow, AttemptRow]],
        nodes: Sequence[Node],
        *,
        marks: Mapping[str, Mark],
        queues: Sequence[Queue],
        factors: Factors,
        now: float,
    ) -> Yard:
        """The yard in which `waiting` jobs wait and `holding` attempts hold their slots; `marks` by name of node."""
        yard, self._now = self.yard, now
        seen = (tuple(nodes), tuple(sorted(marks.items())))
        if seen != self._nodes:
            self._nodes = seen
            self._kinds = kinds_of(nodes)
            self._gangs, self._attempts = {}, {}
            marked = {mark: [node.id for node in nodes if marks.get(node.name) == mark] for mark in Mark}
            yard.set_nodes(nodes, closed=[*marked[Mark.CORDONED], *marked[Mark.SUSPECT]], drained=marked[Mark.DRAINED])
        if tuple(queues) != self._queues:
            self._queues = tuple(queues)
            yard.set_queues(queues)
        if factors != self._factors:
            self._factors = factors
            self._gangs, self._attempts = {}, {}
        self._hold(holding)
        self._wait(waiting)
        return yard

    def _hold(self, holding: Sequence[tuple[JobRow, AttemptRow]]) -> None:
        yard = self.yard
        here = {job.id for job, _ in holding}
        for job_id in [job_id for job_id in yard.running if job_id not in here]:
            yard.release(job_id)
        known, self._attempts = self._attempts, {}
        for job, attempt in holding:
            before = known.get(job.id)
            self._attempts[job.id] = (attempt, job)
            if before is not None and before[0] == attempt and before[1] is job and job.id in yard.running:
                continue
            yard.hold(held_of(attempt, job, self._gang(job)))

    def _wait(self, waiting: Sequence[JobRow]) -> None:
        yard = self.yard
        here = {job.id for job in waiting}
        for job_id in [job_id for job_id in yard.waiting if job_id not in here]:
            yard.leave(job_id)
        for job in waiting:
            gang = self._gang(job)
            if yard.waiting.get(job.id) is not gang:
                yard.wait(gang)
        if len(self._gangs) > 2 * (len(yard.waiting) + len(yard.running)) + 100:
            live = {**yard.waiting, **yard.running}
            self._gangs = {job_id: pair for job_id, pair in self._gangs.items() if job_id in live}

    def _gang(self, job: JobRow) -> Gang:
        known = self._gangs.get(job.id)
        if known is None or known[0] is not job:
            gang = self._where_possible(job, gang_of(job, self._kinds, self._factors))
            if known is not None and known[1] == gang:
                gang = known[1]
            known = self._gangs[job.id] = (job, gang)
        elif known[1].avoid:
            gang = self._where_possible(job, known[1])
            if gang is not known[1]:
                known = self._gangs[job.id] = (job, gang)
        return known[1]

    def _where_possible(self, job: JobRow, gang: Gang) -> Gang:
        """A gang that keeps away from nodes only as long as the others could hold it, and not for long."""
        if not gang.avoid:
            return gang
        if self._now > max(gang.queued_at, job.not_before or 0.0) + AVOIDED_S:
            return replace(gang, avoid=())
        away = least_room(self.yard.idle, gang, gang.most, consolidate=self.yard.rules.consolidate)
        return gang if away is not None else replace(gang, avoid=())


def held_of(attempt: AttemptRow, job: JobRow, gang: Gang) -> Held:
    """An attempt as the scheduler sees it."""
    saved = job.checkpoint.time if job.checkpoint is not None else None
    asked = job.cancel_requested or job.pause_requested
    stopping = asked or attempt.stop is not None or attempt.state in (AttemptState.STOPPING, AttemptState.LOST)
    return Held(
        replace(gang, target=None, avoid=()) if gang.target is not None or gang.avoid else gang,
        attempt.held,
        since=attempt.created_at,
        saved_at=saved if saved is not None and saved > attempt.created_at else None,
        stopping=stopping,
        target=attempt.target if attempt.stop is not None and not asked else None,
    )
